"""Kill a batch run of the command line at random moments until it is done, and compare it with one that was left alone.

    python -m tests.stress.batch --pictures 60 --kills 10

A kill is SIGKILL, at a random moment, such that the run comes a little further each time. At the end there must be
exactly the pictures of the undisturbed run, each within 1/255 of it, none drawn twice after it was written down, and no
more files.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ("a red circle on a blue background", "a green square on a white background", "a large yellow triangle")


def command(job: Path, output: Path) -> list[str]:
    return [sys.executable, "-m", "nextstep_core", "batch", str(job), "--output", str(output), "--together", "4"]


def write_job(folder: Path, pictures: int) -> Path:
    each, rest = divmod(pictures, len(PROMPTS))
    assert not rest, f"a multiple of {len(PROMPTS)} pictures"
    seeds = {"first": 1, "count": each}
    stated = {"model": "tiny", "prompts": list(PROMPTS), "settings": {"size": 64, "steps": 8}, "seeds": seeds}
    path = folder / "job.json"
    path.write_text(json.dumps(stated))
    return path


def finish(job: Path, output: Path) -> float:
    """Seconds of a run to its end."""
    started = time.monotonic()
    done = subprocess.run(command(job, output), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return time.monotonic() - started


def kill_after(job: Path, output: Path, seconds: float) -> bool:
    """Start the run and kill it after so long; whether it was still at work."""
    child = subprocess.Popen(command(job, output), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        child.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return True


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=np.int16)


def faults(alone: Path, killed: Path) -> list[str]:
    """What differs between a run that was left alone and one that was killed."""
    names = {folder: sorted(path.name for path in folder.iterdir()) for folder in (alone, killed)}
    found = [] if names[alone] == names[killed] else [f"other files: {set(names[alone]) ^ set(names[killed])}"]
    pictures = [name for name in names[alone] if name.endswith(".png")]
    for name in pictures:
        if (killed / name).exists() and np.abs(pixels(alone / name) - pixels(killed / name)).max() > 1:
            found.append(f"{name} is another picture")
    keys = Counter(json.loads(line)["key"] for line in (killed / "manifest.jsonl").read_text().splitlines())
    found += [f"{count} records of one picture" for count in keys.values() if count > 1]
    return found if len(keys) == len(pictures) else [*found, f"{len(keys)} records of {len(pictures)} pictures"]


def kill_and_compare(pictures: int, kills: int, seed: int = 0) -> tuple[int, list[str]]:
    """How many kills met the run at work, and what was wrong at the end."""
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job, alone, killed = write_job(folder, pictures), folder / "alone", folder / "killed"
        whole = finish(job, alone)
        idle = finish(job, alone)  # with nothing to draw
        latest = idle + 1.5 * (whole - idle) / kills
        met = sum(kill_after(job, killed, moments.uniform(0, latest)) for _ in range(kills))
        finish(job, killed)
        return met, faults(alone, killed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    met, found = kill_and_compare(options.pictures, options.kills, options.seed)
    print(f"{options.pictures} pictures, {options.kills} kills, {met} of them at work; wrong: {found or 'nothing'}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
