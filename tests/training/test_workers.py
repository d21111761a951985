"""Workers of one training, as processes: they end with the one that started them, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.comfy_server import free_port

ROOT = Path(__file__).resolve().parents[2]
TRAINING = """
import os, time
from pathlib import Path
from training.parallel import run_team

def work(team, folder):
    (folder / str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    run_team(2, {port}, work, Path({folder!r}))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_no_worker_outlives_the_training(tmp_path: Path) -> None:
    """The next start would find their port taken, and both would write the same files."""
    workers, script = tmp_path / "workers", tmp_path / "train.py"
    workers.mkdir()
    script.write_text(TRAINING.format(port=free_port(), folder=str(workers)))
    # As in the background of a shell: PyTorch's own interrupt for orphans is not heard there.
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, str(script)]
    training = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        wait_for(lambda: len(list(workers.iterdir())) == 2)
    finally:
        training.send_signal(signal.SIGKILL)
        training.wait()
    found = [int(worker.name) for worker in workers.iterdir()]
    wait_for(lambda: not any(map(is_running, found)))


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/status")  # nobody may have collected it yet
    return not status.exists() or "State:\tZ" not in status.read_text()


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
