"""The command that measures everything on a GPU: tried out on a CPU, and with steps that fail."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from scripts import gpu_check

SCRIPT = gpu_check.ROOT / "scripts" / "gpu_check.py"


def test_a_dry_run_goes_through_every_step_and_the_report_shows_them(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("NEXTSTEP_TALLY", raising=False)  # tests that it runs are not counted among these
    results = tmp_path / "gpu.json"
    run = subprocess.run([sys.executable, SCRIPT, "--dry-run", "--json", results], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    done = json.loads(results.read_text())
    assert [step["name"] for step in done] == [step.name for step in gpu_check.steps("cuda", dry=False)]
    assert all(step["ended"] == "well" and (step["result"] or "tests" in step["name"]) for step in done)
    report = subprocess.run([sys.executable, SCRIPT, "--report", results], capture_output=True, text=True)
    assert report.returncode == 0, report.stderr
    rows = [line for line in report.stdout.splitlines() if line.startswith("| ")]
    assert len({row.count("|") for row in rows if row.startswith("| int4 ")}) == 1
    for formats in ("float32", "int4", "int8", "fp8"):
        assert sum(row.startswith(f"| {formats} ") for row in rows) == 2 + (formats == "float32")
    assert report.stdout.count("\n## ") == 2 + len(gpu_check.PROBES)


def test_no_step_keeps_the_others_from_running(tmp_path: Path) -> None:
    hangs = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    (tmp_path / "hangs.py").write_text(hangs + "time.sleep(60)")
    (tmp_path / "fails.py").write_text("print('why it failed'); raise SystemExit(3)")
    (tmp_path / "half.py").write_text("import sys; open(sys.argv[-1], 'w').write('{'); raise SystemExit(1)")
    (tmp_path / "works.py").write_text("import sys; open(sys.argv[-1], 'w').write('{\"number\": 1}')")
    wanted = [
        gpu_check.Step(name, (name,), limit=2 if name == "hangs" else 60, environment={"PYTHONPATH": str(tmp_path)})
        for name in ("hangs", "fails", "half", "works")
    ]
    started = time.monotonic()
    for _ in range(2):
        assert not gpu_check.check(wanted, tmp_path / "gpu.json")
    assert time.monotonic() - started < 30
    done = json.loads((tmp_path / "gpu.json").read_text())
    assert [step["ended"] for step in done] == 2 * ["not within 2 s", "with 3", "with 1", "well"]
    assert [step["result"] for step in done] == 2 * [None, None, None, {"number": 1}]
    assert "why it failed" in done[1]["output"]
