"""Folders and documents from strangers: listing never raises, never waits, and reads little."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from nextstep_core import NextStepError
from nextstep_core.loading import catalog
from nextstep_core.loading.catalog import cached_models, fingerprint, models, vae_of, vaes
from nextstep_core.loading.documents import Documents, file_metadata, is_marked, parse_object

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="pipes, devices and odd names in folders"),
    pytest.mark.timeout(60),
]

MODEL, INDEX = '{"model_type": "nextstep"}', "model.safetensors.index.json"
DEEP, LONG = "[" * 100_000, '{"model_type": "nextstep", "seed": ' + "9" * 5000 + "}"
CONFIGS = {
    "deep": DEEP.encode(),
    "deep objects": b'{"a":' * 100_000,
    "long number": LONG.encode(),
    "no text": b"\xff\xfe\x00",
    "half a character": b'{"model_type": "\\ud800"}',
    "list as a kind": b'{"model_type": ["nextstep"]}',
    "table as a kind": b'{"model_type": {}}',
    "not a number": b'{"model_type": "nextstep", "shift": NaN}',
    "twice": b'{"model_type": "llama", "model_type": "nextstep"}',
    "huge": MODEL.encode() + b" " * (8 << 20),
}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A root with one checkpoint that must be found whatever lies beside it."""
    folder = tmp_path / "good"
    folder.mkdir()
    (folder / "config.json").write_text(MODEL)
    (folder / INDEX).touch()
    return tmp_path


def check(root: Path) -> None:
    assert models([root], [root]) == {"good": root / "good"}
    assert vaes([root], [root]) == {}
    for folder in [*root.iterdir(), root]:
        fingerprint(folder)
        vae_of(folder, [])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bad_config_hides_itself_alone(good: Path, name: str) -> None:
    (good / "bad").mkdir()
    (good / "bad" / "config.json").write_bytes(CONFIGS[name])
    (good / "bad" / INDEX).touch()
    check(good)


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/tty", "/proc/kmsg", "..", "nowhere", "config.json"])
@pytest.mark.parametrize("name", ["config.json", "x.safetensors", "checkpoint.pt", "x.gguf"])
def test_links_are_opened_only_where_they_lead_to_files(good: Path, name: str, target: str) -> None:
    (good / "bad").mkdir()
    (good / "bad" / name).symlink_to(target)
    check(good)


@pytest.mark.parametrize("name", ["config.json", "x.safetensors", "x.gguf"])
def test_a_pipe_is_not_waited_for(good: Path, name: str) -> None:
    (good / "bad").mkdir()
    os.mkfifo(good / "bad" / name)
    check(good)
    with pytest.raises(NextStepError, match="not a regular file"):
        Documents(good / "bad").text(name)
    assert not is_marked(good / "bad" / name)
    with pytest.raises(NextStepError, match="not a regular file"):
        file_metadata(good / "bad" / name)


def test_circles_of_links_end(good: Path) -> None:
    (good / "around").symlink_to(good)
    (good / "itself").symlink_to("itself")
    (good / "good" / "up").symlink_to("..")
    check(good)


def test_odd_names_are_passed_over(good: Path) -> None:
    for name in (b"line\nbreak", b"half \xff", b"bell\x07"):
        folder = os.path.join(os.fsencode(good), name)
        os.mkdir(folder)
        for file in ("config.json", INDEX):
            Path(os.fsdecode(folder), file).write_text(MODEL)
    check(good)


def test_a_folder_that_may_not_be_read_hides_itself_alone(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by a patch, since root may read everything."""
    (good / "locked").mkdir()
    scandir = os.scandir

    def guarded(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    check(good)


def test_thousands_of_folders_are_looked_at_up_to_a_limit(
    good: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for n in range(300):
        (good / f"z{n}").mkdir()
    check(good)
    monkeypatch.setattr(catalog, "MAX_ENTRIES", 100)
    assert models([good]) == {} and "more than 100 files" in caplog.text


def test_a_broken_link_in_the_hubs_cache(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(good))
    snapshots = good / "models--someone--x" / "snapshots"
    snapshots.mkdir(parents=True)
    (snapshots / "gone").symlink_to("nowhere")
    (snapshots / "0").symlink_to(good / "good")
    for name in (b"models--half--\xff", b"models--line--break\n"):
        odd = Path(os.fsdecode(os.path.join(os.fsencode(good), name)), "snapshots")
        odd.mkdir(parents=True)
        (odd / "0").symlink_to(good / "good")
    assert cached_models() == {"someone/x": snapshots / "0"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (DEEP, "nested"),
        (LONG, "5,000 digits"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "-Infinity"),
        ('{"a": 1e999}', "1e999"),
        ('{"a": {"b": 1, "b": 2}}', "'b' appears twice"),
        ('{"a": [' + "0," * 2_000_001 + "0]}", "2,000,00"),
    ],
    ids=lambda text: text[:20],
)
def test_json_that_means_nothing_is_one_sentence(text: str, reason: str) -> None:
    with pytest.raises(NextStepError, match=f"^there .*{reason}") as caught:
        parse_object(text, "there")
    assert len(str(caught.value)) < 300


def test_json_that_is_right_is_read_as_it_is() -> None:
    data = {"a": [1, -2, 2**64, 0.5, -1e30, None, True], "b": {"a": {"a": "\u00e9 \U0001f600"}}}
    assert parse_object(json.dumps(data), "there") == data


def test_documents_are_bounded_by_what_they_are(tmp_path: Path) -> None:
    for name, limit in (("config.json", 1 << 20), ("tokenizer.json", 32 << 20)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(limit + 1)
        with pytest.raises(NextStepError, match=f"{name} holds {limit + 1:,} bytes"):
            Documents(tmp_path).text(name)
        with pytest.raises(NextStepError, match=f"{name} in its metadata.* holds {limit + 1:,} characters"):
            Documents(tmp_path, {name: " " * (limit + 1)}, tmp_path / "x").text(name)


def test_a_header_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((65 << 20).to_bytes(8, "little") + b'{"__metadata__":{"nextstep":"1"')
        file.truncate(66 << 20)
    assert is_marked(path)
    with pytest.raises(NextStepError, match="a header of 68,157,440 bytes"):
        file_metadata(path)
    many = b"{" + b'"a":{"data_offsets":0},' * 100_001 + b"}"
    path.write_bytes(len(many).to_bytes(8, "little") + many)
    with pytest.raises(NextStepError, match="100,001 tensors"):
        file_metadata(path)
