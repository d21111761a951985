"""The closing line of the suite: in which ComfyUI it ran, and how many tests were skipped for want of what.

scripts/test.sh starts pytest several times, once in each host. NEXTSTEP_TALLY names a file of its own that hands the
numbers on, so that the last line speaks for all.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from scripts.comfy_server import find_comfyui, host_version

IN_HOST = ("tests/host/", "tests/browser/")


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """What a skipped test lacked."""
    return report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else "?"


def closing_line(hosts: list[str], skipped: dict[str, int]) -> str:
    """What is said of the whole suite."""
    ran = ", ".join(hosts) if hosts else "none"
    wanting = "; ".join(f"{count}: {reason}" for reason, count in Counter(skipped).most_common())
    return f"ComfyUI hosts: {ran}. Skipped tests: {sum(skipped.values())}{f' ({wanting})' if wanting else ''}"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter):
    yield
    stats = terminalreporter.stats
    kept = os.environ.get("NEXTSTEP_TALLY")
    before = json.loads(Path(kept).read_text() or "{}") if kept else {}
    skipped = Counter(before.get("skipped", {})) + Counter(map(reason_of, stats.get("skipped", [])))
    hosts = before.get("hosts", [])
    done = (report for kind in ("passed", "failed", "error") for report in stats.get(kind, []))
    if any(report.nodeid.startswith(IN_HOST) for report in done):
        hosts.append(host_version(find_comfyui()))
    if kept:
        Path(kept).write_text(json.dumps({"hosts": hosts, "skipped": skipped}))
    terminalreporter.write_line(closing_line(hosts, skipped))
