"""The whole recipe: the VAE, pictures, the transformer, what it can do. Started again after a kill, it goes on.

    python -m training --minutes 240                 # from nothing
    python -m training --minutes 90 --shipped        # from the checkpoint that ships

The budget is for all of it. What it makes lies in `train_tiny_runs/checkpoint`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from .progress import load_if_there, pick_device, save_atomically
from .start import start_path
from .vae_training import STEPS

LEAST_MINUTES = 1.0  # of the transformer, where the VAE has taken all
CLOCK = "clock.pt"


def command(module: str, folder: Path, *options: object) -> list[str]:
    """The command line of one step of the recipe."""
    return [sys.executable, "-m", f"training.{module}", "--folder", str(folder), *map(str, options)]


def main() -> None:
    """Parse the command line and run every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("train_tiny_runs"), help="where states and weights go")
    parser.add_argument("--minutes", type=float, default=240.0, help="of training in all")
    parser.add_argument("--shipped", action="store_true", help="begin with the shipped checkpoint, VAE included")
    parser.add_argument("--vae-steps", type=int, help="of each of its stages; 1700 and 5000")
    parser.add_argument("--shards", type=int, default=48)
    parser.add_argument("--workers", type=int, help="processes; as many as there are cores, on a GPU one")
    parser.add_argument(
        "--count", type=int, default=200, help="pictures of the accuracy's first row; 0 measures nothing"
    )
    args = parser.parse_args()
    workers = args.workers or (1 if pick_device().type == "cuda" else os.cpu_count() or 1)

    if args.shipped and not start_path(args.folder).exists():
        subprocess.run(command("start", args.folder), check=True)
    elif not args.shipped:
        train_vae(args.folder, args.vae_steps)
    left = max(LEAST_MINUTES, args.minutes - spent(args.folder))
    subprocess.run(command("data", args.folder, "--shards", 1), check=True)
    with subprocess.Popen(command("data", args.folder, "--shards", args.shards)) as pictures:
        try:
            subprocess.run(command("model_training", args.folder, "--minutes", left, "--workers", workers), check=True)
        finally:
            pictures.terminate()
    if args.count:
        made = args.folder / "checkpoint"
        measured = [sys.executable, "-m", "training.evaluate", "--checkpoint", str(made), "--count", str(args.count)]
        subprocess.run(measured, check=True)


def train_vae(folder: Path, steps: int | None) -> None:
    """Train the VAE, or nothing where it is done, and write down how long it took."""
    start = time.monotonic()
    before = spent(folder)
    try:
        for stage in STEPS:
            options = ("--steps", steps) if steps else ()
            subprocess.run(command("vae_training", folder, "--stage", stage, *options), check=True)
    finally:
        save_atomically({"minutes": before + (time.monotonic() - start) / 60}, folder / CLOCK)


def spent(folder: Path) -> float:
    """Minutes that the VAE has taken in all starts."""
    return (load_if_there(folder / CLOCK) or {"minutes": 0.0})["minutes"]


if __name__ == "__main__":
    main()
