"""`scripts/demo.sh --comfyui DIR` from nothing to the first picture, without a network."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.comfy_server import ROOT, find_comfyui, free_port
from scripts.workflows import FIRST_RUN, read_workflow

RUN = """() => new Promise(async done => {
    for (const end of ['execution_success', 'execution_error']) app.api.addEventListener(end, () => done(end));
    await app.queuePrompt(0, 1);
})"""


@pytest.fixture
def source(tmp_path: Path) -> str:
    """The code of the ComfyUI under test as a git repository to clone from."""
    comfyui = find_comfyui()
    unneeded = shutil.ignore_patterns(".git", "custom_nodes", "models", "input", "output", "temp", "user", "*venv*")

    def at_the_top(folder: str, names: list[str]) -> set[str]:
        return unneeded(folder, names) if Path(folder) == comfyui else set()

    folder = shutil.copytree(comfyui, tmp_path / "source", ignore=at_the_top)
    author = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    for command in (["init", "-q"], ["add", "-A", "-f"], [*author, "commit", "-qm", "ComfyUI"]):
        subprocess.run(["git", "-C", str(folder), *command], check=True)
    return folder.as_uri()


def test_the_demo_clones_comfyui_and_opens_the_first_workflow_which_runs(source: str, browser, tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "scripts" / "demo.sh"), "--comfyui", str(tmp_path / "ComfyUI")]
    offline = {"COMFYUI_SOURCE": source, "NEXTSTEP_VENV": sys.prefix, "PIP_NO_INDEX": "1"}
    demo = subprocess.Popen(
        [*command, "--port", str(free_port())],
        start_new_session=True, env=os.environ | offline, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        output = []
        for line in demo.stdout:
            output.append(line)
            if found := re.match(r"Open (http\S+) and press Run", line):
                break
        else:
            pytest.fail("".join(output))
        page = browser.new_page()
        page.goto(found[1], wait_until="domcontentloaded")
        nodes = [node["type"] for node in read_workflow(FIRST_RUN)["nodes"]]
        opened = "types => String(window.app?.graph?._nodes?.map(node => node.type)) === String(types)"
        page.wait_for_function(opened, arg=nodes, timeout=60_000)
        page.wait_for_timeout(1500)  # nothing comes over it: no other workflow, no greeting
        assert page.evaluate(opened, nodes)
        assert page.get_by_role("dialog").count() == 0
        assert page.evaluate(RUN) == "execution_success"
        assert list((tmp_path / "ComfyUI" / "output").rglob("*.png"))
        page.close()
        os.killpg(demo.pid, signal.SIGINT)  # Ctrl+C in a terminal reaches every process of its group
        output.append(demo.communicate(timeout=30)[0])
    finally:
        if demo.poll() is None:
            demo.terminate()
            demo.communicate(timeout=30)
    said = "".join(output)
    for waiting in ("Downloading ComfyUI", "Installing what is missing", "Starting ComfyUI"):
        assert waiting in said
    assert "Traceback" not in said, said
    assert demo.returncode == 0


def test_a_port_in_use_is_one_sentence() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        command = [sys.executable, "-m", "scripts.demo", "--serve", "--port", str(port)]
        refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"Port {port} is already in use") and refused.stderr.count("\n") == 1
