"""What may be named, and what may not: nothing outside a checkpoint, no code from the hub."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from checkpoint_files import edit_json

from nextstep_core import NextStepError, NextStepPipeline
from nextstep_core.loading.store import ASSETS, HUB_FILES, resolve_source, vae_beside


@pytest.fixture
def outside(checkpoint: Path) -> Path:
    """The checkpoint's own VAE, whole and usable, beside the checkpoint's folder instead of in it."""
    return Path(shutil.move(checkpoint / "vae", checkpoint.parent / "outside"))


def test_a_whole_vae_outside_the_checkpoint_is_refused(checkpoint: Path, outside: Path) -> None:
    for stated in ("../outside", str(outside)):
        with pytest.raises(NextStepError, match="VAE"):
            vae_beside(checkpoint, stated)
        edit_json(checkpoint / "config.json", vae_name_or_path=stated)
        with pytest.raises(NextStepError, match="VAE"):
            NextStepPipeline.from_pretrained(checkpoint)


def test_a_link_out_of_the_checkpoint_is_refused(checkpoint: Path, outside: Path) -> None:
    (checkpoint / "vae").symlink_to(outside)
    with pytest.raises(NextStepError, match="VAE"):
        vae_beside(checkpoint, None)


def test_a_linked_checkpoint_has_its_own_vae(checkpoint: Path) -> None:
    link = checkpoint.parent / "link"
    link.symlink_to(checkpoint)
    assert vae_beside(link, "vae/") == vae_beside(checkpoint / "model.safetensors", None) == checkpoint / "vae"
    (checkpoint / "vae").rename(checkpoint / "other")
    assert vae_beside(checkpoint, "other") == checkpoint / "other"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict]:
    """What the hub's library is asked for; nothing is in its cache."""
    calls: list[dict] = []

    def snapshot_download(hub_id: str, **options: object) -> str:
        calls.append({"id": hub_id, **options})
        if options.get("local_files_only"):
            raise FileNotFoundError
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_the_hub_is_asked_for_what_the_engine_reads_and_no_code(asked: list[dict], tmp_path: Path) -> None:
    assert resolve_source("someone/NextStep-1.1") == tmp_path
    assert [call.get("local_files_only", False) for call in asked] == [True, False], "the cache first"
    for call in asked:
        wanted = lambda name: any(fnmatch.fnmatch(name, p) for p in call["allow_patterns"])  # noqa: B023, E731
        assert all(map(wanted, ("config.json", "model-00001-of-00002.safetensors", "vae/checkpoint.pt", "merges.txt")))
        assert not any(map(wanted, ("modeling.py", "vae/x.py", "x.pt", "pytorch_model.bin", "a.so", "x.pkl", "x.sh")))
        assert call["id"] == "someone/NextStep-1.1" and set(call["allow_patterns"]) == set(HUB_FILES)


def test_what_the_hub_does_not_have_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(NextStepError, match="^someone/else was not downloaded: no route\\. By hand"):
        resolve_source("someone/else")


def test_names_of_no_checkpoint_do_not_reach_the_hub(asked: list[dict]) -> None:
    for name in ("/nowhere/at/all", "one", "a/b/c", "someone/na me", "../x/y"):
        with pytest.raises(NextStepError, match=f"^{name} "):
            resolve_source(name)
    assert not asked


def test_a_path_comes_before_the_embedded_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_source("tiny") == ASSETS / "tiny"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert resolve_source("tiny") == tmp_path / "tiny"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_source("~/tiny") == tmp_path / "tiny"


@pytest.mark.parametrize(
    "source",
    [None, 5, {}, b"x", "~nobody-at-all/x", "x" * 5000, "a/" + "b" * 500, "a\0b", "a/b\n", "../x", "ä/ö"],
    ids=ascii,
)
def test_what_can_be_no_source_is_one_short_sentence_without_network(source: object, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the network was asked"))
    with pytest.raises(NextStepError) as caught:
        resolve_source(source)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
