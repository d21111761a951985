"""Fetch a published checkpoint into a folder, when somebody asks for it.

    nextstep download NextStep-1.1 --models ComfyUI/models/nextstep

huggingface_hub does the transfer in a process of its own, which is killed when the caller raises: so Interrupt works at
once, and what is on disk is resumed the next time. Its settings (HF_HOME, HF_ENDPOINT, tokens, offline mode) hold.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import NextStepError, check_choice, not_written, shown
from ..runtime.interrupt import Check, go_on
from ..sentences import Sentence
from .hub import check_form, reach, refusal
from .locks import held
from .store import HUB_FILES
from .transfer import SUFFIX, UNFINISHED, fetch_file

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

log = logging.getLogger(__name__)
T = TypeVar("T")

PUBLISHED_CHECKPOINTS = {
    "NextStep-1.1": "stepfun-ai/NextStep-1.1",
    "NextStep-1.1-Pretrain": "stepfun-ai/NextStep-1.1-Pretrain",
    "NextStep-1-Large": "stepfun-ai/NextStep-1-Large",
    "NextStep-1-Large-Edit": "stepfun-ai/NextStep-1-Large-Edit",
    "NextStep-1-Large-Pretrain": "stepfun-ai/NextStep-1-Large-Pretrain",
    "NextStep-1.1-W4A16-AutoRound": "INCModel/NextStep-1.1-W4A16-AutoRound",
    "NextStep-1-f8ch16-Tokenizer": "stepfun-ai/NextStep-1-f8ch16-Tokenizer",
}
POLL_SECONDS = 0.25
HUB_SECONDS = 30.0  # that the hub may take to answer a question
HASH_BLOCK = 1 << 24
CONFIG, NEWEST = "config.json", "main"
# Bytes; file systems take 255, and what is unfinished has a longer name. Characters of it with its folders.
MAX_FILE_NAME, MAX_PATH = 200, 1_000
REVISION = re.compile(r"[\w.][\w./-]{0,255}")


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository, with the hub's checksum: sha256 of a large one, git's of a small one."""

    path: str
    size: int
    sha256: str | None
    git_sha1: str | None = None

    @property
    def checksum(self) -> str | None:
        """What `digest` comes to for the right bytes; None where the hub tells nothing."""
        return self.sha256 or self.git_sha1

    def digest(self) -> Any:
        """A hash object that the file's bytes are to be given to."""
        if self.sha256 is not None:
            return hashlib.sha256()
        return hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)  # as git names its files


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
        parts = (self.folder / UNFINISHED).rglob(f"*{SUFFIX}")
        return min(self.size, whole + sum(map(_size, parts)))

    def is_whole(self, file: RemoteFile) -> bool:
        """Whether a file is on disk in its full size."""
        path = self.folder / file.path
        return path.is_file() and _size(path) == file.size

    def describe(self) -> str:
        """One line for the user, before anything is fetched."""
        return f"{self.repo_id}: {self.size / 1e9:.2f} GB in {len(self.files)} files, to {self.folder}"


def _size(path: Path) -> int:
    """Bytes of a file; 0 where another run has just moved it away."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def check_repo_id(name_or_repo: str) -> str:
    """The hub id behind a published checkpoint's name, or an id as it is; NextStepError for what can be neither."""
    if not isinstance(name_or_repo, str) or "/" not in name_or_repo:
        check_choice("name", name_or_repo, PUBLISHED_CHECKPOINTS)
        return PUBLISHED_CHECKPOINTS[name_or_repo]
    check_form(name_or_repo)
    return name_or_repo


def folder_name(repo_id: str) -> str:
    """What a repository's folder is called. Only a published one gets its bare name, by which settings are chosen."""
    return repo_id.split("/")[-1] if repo_id in PUBLISHED_CHECKPOINTS.values() else repo_id.replace("/", "--")


def already_there(name_or_repo: str, root: Path) -> Path | None:
    """The folder of a checkpoint that was fetched to the end, in whichever version; None where it was not."""
    folder = root / folder_name(check_repo_id(name_or_repo))
    begun = next((folder / UNFINISHED).rglob(f"*{SUFFIX}"), None)
    return folder if begun is None and (folder / CONFIG).is_file() else None


def _while_checking(ask: Callable[[], T], check: Check) -> T:
    """What `ask` returns; `check` is called until it does, and may raise to wait no longer."""
    executor = ThreadPoolExecutor(1)
    try:
        answer = executor.submit(ask)
        while not wait([answer], POLL_SECONDS).done:
            check()
        return answer.result()
    finally:
        executor.shutdown(wait=False)


def plan_download(name_or_repo: str, root: Path, revision: str = NEWEST, check: Check = go_on) -> Download:
    """Ask the hub what a checkpoint consists of; only files that the engine reads, nothing executable.

    It will lie in root / `folder_name`. `check` is called while the hub is asked and may raise to stop. NextStepError
    when the name cannot be one, the hub cannot be reached, has no such repository or revision, or the disk has too
    little room.
    """
    from huggingface_hub import HfApi

    repo_id = check_repo_id(name_or_repo)
    if not isinstance(revision, str) or not REVISION.fullmatch(revision):
        raise NextStepError("revision is {revision}; give a branch, a tag or a commit.", revision=shown(revision))
    folder = root / folder_name(repo_id)

    def ask() -> ModelInfo:
        return HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=HUB_SECONDS)

    info = _while_checking(lambda: reach(repo_id, ask, folder), check)
    wanted = [s for s in info.siblings or () if any(fnmatch.fnmatch(s.rfilename, pattern) for pattern in HUB_FILES)]
    files = tuple(_remote_file(sibling) for sibling in wanted)
    if CONFIG not in {file.path for file in files}:
        raise NextStepError("{repo_id} has no config.json, so it is not a NextStep checkpoint.", repo_id=repo_id)
    for file in files:
        if not _is_inside(file.path):
            raise NextStepError(
                "{repo_id} names a file outside its folder, or one that no folder can hold ({file}). Do not use it.",
                repo_id=repo_id,
                file=shown(file.path),
            )
    plan = Download(repo_id, info.sha or revision, folder, files)
    check_room(plan)
    return plan


def _is_inside(path: str) -> bool:
    """Whether a file of a repository lies in its folder, under a name that every system can write and no other
    understands differently."""
    parts = PurePosixPath(path).parts
    names = path.isprintable() and len(path) <= MAX_PATH and not any(sign in path for sign in '\\:*?"<>|')
    return names and not {"..", "/"} & set(parts) and all(len(part.encode()) <= MAX_FILE_NAME for part in parts)


def _remote_file(sibling: RepoSibling) -> RemoteFile:
    sha256, size = sibling.lfs["sha256"] if sibling.lfs else None, sibling.size or 0
    if not isinstance(size, int) or size < 0:
        raise NextStepError(
            "The hub says that {file} has a size of {size}. Do not use it.",
            file=shown(sibling.rfilename),
            size=shown(size),
        )
    return RemoteFile(sibling.rfilename, size, sha256, sibling.blob_id)


def check_room(plan: Download) -> None:
    """NextStepError when the disk cannot take what is still missing."""
    existing = next(path for path in (plan.folder, *plan.folder.parents) if path.exists())
    missing, free = plan.size - plan.fetched, shutil.disk_usage(existing).free
    if missing > free:
        raise NextStepError(
            "{repo_id} needs {missing:.2f} GB more, and {disk} has {free:.2f} GB free. Make room, or put the "
            "model folder on another disk with extra_model_paths.yaml.",
            repo_id=plan.repo_id,
            missing=missing / 1e9,
            disk=existing,
            free=free / 1e9,
        )


def download(plan: Download, on_progress: Callable[[int, int], None]) -> Path:
    """Fetch, resuming what is there, and verify; the folder. `on_progress` gets (bytes, of bytes) and stops by raising.

    config.json comes last, so that no model list shows a folder before it is whole. While another run fetches into the
    folder, this one waits, and then finds the files there. NextStepError when the folder cannot be written or a file
    arrives damaged.
    """
    own = plan.folder / UNFINISHED
    told = False

    def wait_for_the_other() -> None:
        nonlocal told
        if not told:
            log.warning("Another run is downloading %s. Waiting for it.", plan.folder)
            told = True
        on_progress(plan.fetched, plan.size)

    try:
        own.mkdir(parents=True, exist_ok=True)
        with held(own / "nextstep.lock", wait_for_the_other):
            _transfer(plan, on_progress)
            verify(plan, on_progress)
    except OSError as error:
        raise not_written(plan.folder, error, plan.size - plan.fetched) from None
    return plan.folder


def _transfer(plan: Download, on_progress: Callable[[int, int], None]) -> None:
    """Fetch the files in a process of its own, which ends with this one or when `on_progress` raises."""
    files = sorted((f.path == CONFIG, f.path, f.size, f.checksum or plan.commit) for f in plan.files)
    request = json.dumps({"repo": plan.repo_id, "commit": plan.commit, "folder": str(plan.folder), "files": files})
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "nextstep_core.loading.download", "--fetch"]
    environment = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:  # a pipe that nobody reads fills up
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said, text=True
        )
        assert process.stdin is not None, "it is a pipe"
        try:
            with suppress(BrokenPipeError):  # it died at once, and has said why
                process.stdin.write(request + "\n")
                process.stdin.flush()  # and left open: when this process dies, the child sees its end
            while process.poll() is None:
                on_progress(plan.fetched, plan.size)
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
            with suppress(BrokenPipeError):
                process.stdin.close()
        said.seek(0)
        lines = said.read().strip().splitlines()
    if process.returncode != 0:
        raise NextStepError(
            "{reason} What has arrived is kept, and the next run resumes the download.", reason=_why(plan, lines)
        )


def _why(plan: Download, said: list[str]) -> Sentence:
    """Why the child failed, by its last line: its own sentence, or the end of a traceback."""
    if not said:
        return refusal(plan.repo_id, Sentence("it stopped"), plan.folder).sentence
    try:
        return Sentence.from_data(json.loads(said[-1]))
    except (ValueError, TypeError, KeyError, AttributeError):
        return refusal(plan.repo_id, Sentence("{reason}", reason=said[-1].rstrip(".")), plan.folder).sentence


def verify(plan: Download, on_progress: Callable[[int, int], None]) -> None:
    """NextStepError, after removing the file, for one whose size or checksum is not the hub's.

    By hand: while it fetches, huggingface_hub compares sizes alone, and its `verify_repo_checksums` (1.1 and newer)
    cannot be interrupted.
    """
    for file in plan.files:
        path = plan.folder / file.path
        told = file.checksum
        right = plan.is_whole(file) and (told is None or _checksum(file, path, plan, on_progress) == told)
        if not right:
            path.unlink(missing_ok=True)
            raise NextStepError(
                "{path} was damaged during the download and was removed. Run the download again.", path=path
            )
    on_progress(plan.size, plan.size)


def _checksum(file: RemoteFile, path: Path, plan: Download, on_progress: Callable[[int, int], None]) -> str:
    digest = file.digest()
    with path.open("rb") as opened:
        while block := opened.read(HASH_BLOCK):
            digest.update(block)
            on_progress(plan.size, plan.size)
    return str(digest.hexdigest())


def _fetch(request: dict[str, Any]) -> None:
    """The child process: one file after another, until done or until the parent is gone; where it fails, its last line
    is the sentence that says why, as JSON."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    repo, commit, folder = request["repo"], request["commit"], Path(request["folder"])
    try:
        for _, path, size, content in request["files"]:
            reach(repo, partial(fetch_file, repo, commit, path, size, content, folder), folder)
    except NextStepError as error:
        sys.exit(json.dumps(error.sentence.as_data()))


def _exit_with_parent() -> None:
    sys.stdin.read()  # returns when the parent's end of the pipe is closed
    os._exit(1)


if __name__ == "__main__":
    if sys.argv[1:] == ["--fetch"]:  # a child of ours
        _fetch(json.loads(sys.stdin.readline()))
    else:
        sys.exit("This command is now: nextstep download, or python -m nextstep_core download, with --models for --to.")
