"""Fetch a published checkpoint into a folder, when somebody asks for it.

    python -m nextstep_core.loading.download NextStep-1.1 --to ComfyUI/models/nextstep

huggingface_hub does the transfer in a process of its own, which is killed when the caller raises: so Interrupt works at
once, and what is on disk is resumed the next time. Its settings (HF_HOME, HF_ENDPOINT, tokens, offline mode) hold.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import NextStepError, check_choice
from .store import HUB_FILES

PUBLISHED_CHECKPOINTS = {
    "NextStep-1.1": "stepfun-ai/NextStep-1.1",
    "NextStep-1.1-Pretrain": "stepfun-ai/NextStep-1.1-Pretrain",
    "NextStep-1-Large": "stepfun-ai/NextStep-1-Large",
    "NextStep-1-Large-Edit": "stepfun-ai/NextStep-1-Large-Edit",
    "NextStep-1-Large-Pretrain": "stepfun-ai/NextStep-1-Large-Pretrain",
    "NextStep-1-f8ch16-Tokenizer": "stepfun-ai/NextStep-1-f8ch16-Tokenizer",
}
POLL_SECONDS = 0.5
HASH_BLOCK = 1 << 24
CONFIG = "config.json"


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository; sha256 is known for large ones."""

    path: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class Download:
    """What is to be fetched, at one commit, and where to."""

    repo_id: str
    commit: str
    folder: Path
    files: tuple[RemoteFile, ...]

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(file.size for file in self.files)

    @property
    def fetched(self) -> int:
        """Bytes on disk, unfinished files included."""
        whole = sum(file.size for file in self.files if self.is_whole(file))
        parts = (self.folder / ".cache" / "huggingface").rglob("*.incomplete")
        return min(self.size, whole + sum(part.stat().st_size for part in parts))

    def is_whole(self, file: RemoteFile) -> bool:
        """Whether a file is on disk in its full size."""
        path = self.folder / file.path
        return path.is_file() and path.stat().st_size == file.size

    def describe(self) -> str:
        """One line for the user, before anything is fetched."""
        return f"{self.repo_id}: {self.size / 1e9:.2f} GB in {len(self.files)} files, to {self.folder}"


def plan_download(name_or_repo: str, root: Path, revision: str = "main") -> Download:
    """Ask the hub what a checkpoint consists of; only files that the engine reads, nothing executable.

    It will lie in root / its own name. NextStepError when the hub cannot be reached, has no such repository or
    revision, or the disk has too little room.
    """
    from huggingface_hub import HfApi

    repo_id = PUBLISHED_CHECKPOINTS.get(name_or_repo, name_or_repo)
    try:
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
    except Exception as error:  # the hub's exception types moved between versions
        raise NextStepError(f"{repo_id} at {revision} could not be found on Hugging Face ({_reason(error)}).") from None
    wanted = [s for s in info.siblings or () if any(fnmatch.fnmatch(s.rfilename, pattern) for pattern in HUB_FILES)]
    files = tuple(RemoteFile(s.rfilename, s.size or 0, s.lfs["sha256"] if s.lfs else None) for s in wanted)
    if CONFIG not in {file.path for file in files}:
        raise NextStepError(f"{repo_id} has no {CONFIG}, so it is not a NextStep checkpoint.")
    if any(".." in PurePosixPath(file.path).parts or PurePosixPath(file.path).is_absolute() for file in files):
        raise NextStepError(f"{repo_id} names files outside its folder. Do not use it.")
    plan = Download(repo_id, info.sha or revision, root / repo_id.split("/")[-1], files)
    check_room(plan)
    return plan


def check_room(plan: Download) -> None:
    """NextStepError when the disk cannot take what is still missing."""
    existing = next(path for path in (plan.folder, *plan.folder.parents) if path.exists())
    missing, free = plan.size - plan.fetched, shutil.disk_usage(existing).free
    if missing > free:
        raise NextStepError(
            f"{plan.repo_id} needs {missing / 1e9:.2f} GB more, and {existing} has {free / 1e9:.2f} GB free. "
            "Make room, or put the model folder on another disk with extra_model_paths.yaml."
        )


def download(plan: Download, on_progress: Callable[[int, int], None]) -> Path:
    """Fetch, resuming what is there, and verify; the folder. `on_progress` gets (bytes, of bytes) and stops by raising.

    config.json comes last, so that no model list shows a folder before it is whole.
    """
    paths = sorted((file.path for file in plan.files), key=lambda path: (path == CONFIG, path))
    request = json.dumps({"repo": plan.repo_id, "commit": plan.commit, "folder": str(plan.folder), "paths": paths})
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "nextstep_core.loading.download", "--fetch"]
    process = subprocess.Popen(
        command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stderr is not None, "both are pipes"
    try:
        process.stdin.write(request + "\n")
        process.stdin.flush()  # and left open: when this process dies, the child sees its end
        while process.poll() is None:
            on_progress(plan.fetched, plan.size)
            time.sleep(POLL_SECONDS)
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0:
        reason = (process.stderr.read().strip().splitlines() or ["it stopped"])[-1]
        raise NextStepError(
            f"{plan.repo_id} was not downloaded completely ({reason}). Run the download again to resume."
        )
    verify(plan, on_progress)
    return plan.folder


def verify(plan: Download, on_progress: Callable[[int, int], None]) -> None:
    """NextStepError, after removing the file, for one whose size or checksum is not the hub's.

    By hand: while it fetches, huggingface_hub compares sizes alone, and its `verify_repo_checksums` (1.1 and newer)
    cannot be interrupted.
    """
    for file in plan.files:
        path = plan.folder / file.path
        right = plan.is_whole(file) and (file.sha256 is None or _sha256(path, plan, on_progress) == file.sha256)
        if not right:
            path.unlink(missing_ok=True)
            raise NextStepError(f"{path} was damaged during the download and was removed. Run the download again.")
    on_progress(plan.size, plan.size)


def _sha256(path: Path, plan: Download, on_progress: Callable[[int, int], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
            on_progress(plan.size, plan.size)
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _fetch(request: dict[str, Any]) -> None:
    """The child process: one file after another, until done or until the parent is gone."""
    from huggingface_hub import hf_hub_download

    threading.Thread(target=_exit_with_parent, daemon=True).start()
    for path in request["paths"]:
        hf_hub_download(request["repo"], path, revision=request["commit"], local_dir=request["folder"])


def _exit_with_parent() -> None:
    sys.stdin.read()  # returns when the parent's end of the pipe is closed
    os._exit(1)


def _show(done: int, size: int) -> None:
    print(f"\r{done / 1e9:8.2f} of {size / 1e9:.2f} GB", end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", help=f"a hub id, or one of {', '.join(PUBLISHED_CHECKPOINTS)}")
    parser.add_argument("--to", type=Path, default=Path("models/nextstep"), help="folder that holds your models")
    parser.add_argument("--revision", default="main", help="branch, tag or commit")
    parser.add_argument("--dry-run", action="store_true", help="say what would be fetched, and stop")
    parser.add_argument("--fetch", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fetch:
        _fetch(json.loads(sys.stdin.readline()))
        return
    try:
        if "/" not in str(options.name):
            check_choice("name", options.name, PUBLISHED_CHECKPOINTS)
        plan = plan_download(options.name, options.to, options.revision)
        print(plan.describe())
        if not options.dry_run:
            print(f"\nDone: {download(plan, _show)}")
    except NextStepError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
