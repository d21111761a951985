"""What a download consists of and what counts as done, without a hub."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import threading
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from nextstep_core import NextStepError
from nextstep_core.loading import download
from nextstep_core.loading.download import Download, RemoteFile, check_room, plan_download, verify

# On Windows a backslash goes up, and a colon to another disk.
OUTSIDE = ("../config.json", "a/../../x.json", "/etc/x.json", "a\\..\\..\\x.json", "c:x.json", "C:\\x.json")
IMPOSSIBLE = ("a\nb.json", "a\0b.json", "\ud800.json", "é" * 120 + ".json", "a/" * 2000 + "x.json", "\u202enosj.json")
DIGEST = hashlib.sha256(b"12345").hexdigest()
FILES = (RemoteFile("config.json", 3, None), RemoteFile("vae/checkpoint.pt", 5, DIGEST))


@pytest.fixture
def plan(tmp_path: Path) -> Download:
    return Download("someone/x", "c0ffee", tmp_path / "deep" / "x", FILES)


def put(plan: Download, name: str, data: bytes) -> Path:
    path = plan.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def sibling(name: str, size: int | None = 1, sha256: str | None = None) -> SimpleNamespace:
    lfs = None if sha256 is None else {"sha256": sha256}
    return SimpleNamespace(rfilename=name, size=size, blob_id=f"git of {name}", lfs=lfs)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list:
    """The siblings that the hub lists; the first entry records what was asked."""
    listed = [None]

    def model_info(self, repo: str, **options):
        listed[0] = (repo, options)
        return SimpleNamespace(siblings=listed[1:] or None, sha="c0ffee")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    return listed


def test_what_is_on_disk_counts(plan: Download) -> None:
    assert (plan.size, plan.fetched) == (8, 0)
    put(plan, "config.json", b"123")
    put(plan, "vae/checkpoint.pt", b"1234")
    assert plan.fetched == 3 and plan.is_whole(FILES[0]) and not plan.is_whole(FILES[1])
    put(plan, ".cache/huggingface/download/vae/x.incomplete", b"1234")
    assert plan.fetched == 7
    put(plan, ".cache/huggingface/download/vae/y.incomplete", b"1234")
    assert plan.fetched == 8, "never more than all"
    assert all(word in plan.describe() for word in ("someone/x", "0.00 GB", "2 files", str(plan.folder)))


@pytest.mark.parametrize(("free", "fits"), [(5, True), (4, False)])
def test_there_must_be_room_for_what_is_missing(plan: Download, monkeypatch, free: int, fits: bool) -> None:
    put(plan, "config.json", b"123")
    asked = []
    monkeypatch.setattr(
        download.shutil, "disk_usage", lambda path: asked.append(path) or namedtuple("usage", "free")(free)
    )
    if fits:
        check_room(plan)
    else:
        with pytest.raises(NextStepError, match="someone/x.*0.00 GB"):
            check_room(plan)
    assert asked == [plan.folder]
    check_room(Download("x", "c", plan.folder / "not" / "there", ()))
    assert asked[-1] == plan.folder, "the disk of the folder that is there"


def test_a_file_of_another_size_or_sum_is_removed(plan: Download) -> None:
    told = []
    config, weights = put(plan, "config.json", b"123"), put(plan, "vae/checkpoint.pt", b"12345")
    verify(plan, lambda done, size: told.append((done, size)))
    assert told[-1] == (8, 8) and len(told) == 2, "one block, and the end"
    for path, wrong, right in ((config, b"12", b"123"), (weights, b"12346", b"12345")):
        path.write_bytes(wrong)
        with pytest.raises(NextStepError, match=path.name):
            verify(plan, lambda *_: None)
        assert not path.exists()
        path.write_bytes(right)


def test_only_what_the_engine_reads_is_planned(hub: list, tmp_path: Path) -> None:
    hub += [
        sibling("config.json", 3),
        sibling("vae/checkpoint.pt", 5, DIGEST),
        sibling("modeling.py"),
        sibling("x.bin"),
    ]
    hub += [sibling("big.safetensors", None)]
    plan = plan_download("someone/x", tmp_path, "v1")
    repo, options = hub[0]
    assert (repo, options["revision"], options["files_metadata"]) == ("someone/x", "v1", True) and options["timeout"]
    sums = (None, DIGEST, None)
    assert plan.files == tuple(
        RemoteFile(name, size, sha256, f"git of {name}")
        for name, size, sha256 in zip(("config.json", "vae/checkpoint.pt", "big.safetensors"), (3, 5, 0), sums)
    )
    assert plan_download("NextStep-1.1", tmp_path).repo_id == "stepfun-ai/NextStep-1.1"
    assert hub[0][1]["revision"] == "main"


@pytest.mark.parametrize(
    ("named", "folder"),
    [
        ("NextStep-1.1", "NextStep-1.1"),
        ("stepfun-ai/NextStep-1-Large-Edit", "NextStep-1-Large-Edit"),
        ("someone/NextStep-1.1", "someone--NextStep-1.1"),
    ],
)
def test_only_a_published_checkpoint_gets_a_published_name(hub: list, tmp_path: Path, named: str, folder: str) -> None:
    """Settings are chosen by that name, and a fine-tune must not be taken for the original, nor written over it."""
    hub += [sibling("config.json")]
    assert plan_download(named, tmp_path).folder == tmp_path / folder


WRONG = [("a/b/c", "main"), ("../x", "main"), ("a/..", "main"), ("a/b?c=d", "main"), ("a/" + "b" * 200, "main")]
WRONG += [("a//b", "main"), ("/etc/passwd", "main"), ("", "main"), ("NextStep-9", "main"), ("a/b\n", "main")]
WRONG += [("a/b", ""), ("a/b", "-x"), ("a/b", "main\n"), ("a/b", "x" * 300), ("a/b", "a b")]


@pytest.mark.parametrize(("name", "revision"), WRONG)
def test_what_can_be_no_name_never_meets_the_network(hub: list, tmp_path: Path, name: str, revision: str) -> None:
    with pytest.raises(NextStepError):
        plan_download(name, tmp_path, revision)
    assert hub[0] is None


def test_asking_the_hub_can_be_given_up(hub: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    def silent(self, repo: str, **options):
        answered.wait(60)

    class Interrupted(Exception):
        pass

    def check() -> None:
        raise Interrupted

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", silent)
    with pytest.raises(Interrupted):
        plan_download("someone/x", tmp_path, check=check)
    answered.set()


def test_a_small_file_is_checked_by_git_s_sum(plan: Download) -> None:
    """Its size alone says little; `git hash-object` of the three bytes 123."""
    whole = replace(plan, files=(RemoteFile("config.json", 3, None, "d800886d9c86731ae5c4a62b0b77c437015e00d2"),))
    path = put(plan, "config.json", b"123")
    verify(whole, lambda *_: None)
    path.write_bytes(b"124")
    with pytest.raises(NextStepError, match=r"config\.json"):
        verify(whole, lambda *_: None)
    assert not path.exists()


def test_a_part_that_is_moved_away_meanwhile_counts_nothing(plan: Download, monkeypatch: pytest.MonkeyPatch) -> None:
    put(plan, ".cache/huggingface/download/x.incomplete", b"1234").unlink()
    gone = plan.folder / ".cache/huggingface/download/x.incomplete"
    monkeypatch.setattr(Path, "rglob", lambda *_: iter([gone]))
    assert plan.fetched == 0


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "no room"), (errno.EROFS, "cannot be written"), (errno.EIO, "Check the disk")]
)
def test_a_folder_that_takes_nothing_is_one_sentence(plan: Download, monkeypatch, number: int, words: str) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(NextStepError, match=words) as caught:
        download.download(plan, lambda *_: None)
    assert str(plan.folder) in str(caught.value)


def test_what_is_no_checkpoint_is_refused(hub: list, tmp_path: Path) -> None:
    with pytest.raises(NextStepError, match="config.json"):
        plan_download("someone/x", tmp_path)
    for name in (*OUTSIDE, *IMPOSSIBLE):
        hub[1:] = [sibling("config.json"), sibling(name)]
        with pytest.raises(NextStepError, match="outside"):
            plan_download("someone/x", tmp_path)


@pytest.mark.parametrize(
    "value", [None, 5, b"a/b", {}, [], "a/b/c", "../x", "ä/ö", "a/b\n", "a/" + "x" * 5000], ids=ascii
)
def test_what_can_be_no_repository_or_revision_is_one_sentence(hub: list, tmp_path: Path, value: object) -> None:
    for names in ((value, "main"), *([("someone/x", value)] if not isinstance(value, str) else [])):
        with pytest.raises(NextStepError) as caught:
            plan_download(names[0], tmp_path, names[1])
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("size", ["12", -1, 1.5, [3]])
def test_a_list_with_a_size_that_is_none_is_refused(hub: list, tmp_path: Path, size: object) -> None:
    hub[1:] = [sibling("config.json"), sibling("model.safetensors", size)]
    with pytest.raises(NextStepError, match="'model.safetensors' has a size of"):
        plan_download("stepfun-ai/NextStep-1.1", tmp_path)


def test_a_child_that_ends_at_once_is_told_with_what_it_said(plan: Download, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it dies before or after it was told what to fetch."""
    script = "import sys; sys.stdin.close(); sys.exit('no such module')"
    began = download.subprocess.Popen
    monkeypatch.setattr(
        download.subprocess,
        "Popen",
        lambda _, **options: waited(began([sys.executable, "-c", script], **options)),
    )
    with pytest.raises(NextStepError, match="was not downloaded: no such module"):
        download.download(plan, lambda *_: None)


def waited(process):
    process.wait()
    return process
