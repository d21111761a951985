"""What lies in folders of models, by name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from nextstep_core.loading.catalog import cached_models, fingerprint, models, vae_of, vaes

MODEL, VAE, OTHER = {"model_type": "nextstep"}, {"z_channels": 16}, {"model_type": "llama"}
INDEX = "model.safetensors.index.json"


def put(path: Path, config: dict | str | None, *files: str) -> Path:
    """A folder with a config and empty files."""
    path.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    for file in files:
        (path / file).touch()
    return path


def carry(path: Path, config: dict) -> Path:
    """A single file that carries its config."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.zeros(1)}, path, metadata={"nextstep": "1", "config.json": json.dumps(config)})
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    marked = {"__metadata__": {"nextstep": "1", **header.pop("__metadata__")}, **header}
    text = json.dumps(marked, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    return path


def test_checkpoints_by_their_path_below_a_root(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    put(one / "sharded", MODEL, INDEX)
    put(one / "single", {"model_type": "stepx_llama"}, "model.safetensors")
    put(one / "a" / "b" / "c", MODEL, INDEX)
    put(one / "a" / "b" / "c" / "too deep", MODEL, INDEX)
    put(one / "gguf", MODEL, "Q8.gguf", "Q4.gguf")
    put(one / "both", MODEL, INDEX, "Q4.gguf")
    put(one / "renamed", MODEL, "mine.safetensors")
    put(one / "empty", MODEL)
    put(one / "llama", OTHER, INDEX)
    put(one / "broken", "{", INDEX)
    put(one / "no config", None, INDEX)
    put(two / "sharded", MODEL, INDEX)
    put(two, MODEL, INDEX)
    assert models([one, two]) == {
        "sharded": one / "sharded",  # of the first root that has the name
        "single": one / "single",
        "a/b/c": one / "a" / "b" / "c",
        "gguf/Q4.gguf": one / "gguf" / "Q4.gguf",
        "gguf/Q8.gguf": one / "gguf" / "Q8.gguf",
        "both": one / "both",
        "both/Q4.gguf": one / "both" / "Q4.gguf",
        "renamed/mine.safetensors": one / "renamed" / "mine.safetensors",
        "empty": one / "empty",  # to be named with what it lacks
        "two": two,  # the root itself
    }


def test_single_files_are_looked_for_in_further_roots(tmp_path: Path) -> None:
    root, files = put(tmp_path / "nextstep", None), tmp_path / "diffusion_models"
    model, deep = carry(files / "own.safetensors", MODEL), carry(files / "a" / "b" / "c" / "x.safetensors", MODEL)
    carry(files / "a" / "b" / "c" / "d" / "too deep.safetensors", MODEL)
    carry(files / "vae.safetensors", VAE)
    save_file({"a": torch.zeros(1)}, files / "flux.safetensors")
    put(files / "folder", MODEL, INDEX)
    assert models([root], [files]) == {"own.safetensors": model, "a/b/c/x.safetensors": deep}
    also = carry(root / "own.safetensors", MODEL)
    assert models([root], [files])["own.safetensors"] == also, "the pack's own folder first"


def test_a_changed_single_file_is_read_again(tmp_path: Path) -> None:
    path = carry(tmp_path / "x.safetensors", VAE)
    assert not models([tmp_path]) and vaes([tmp_path]) == {"x.safetensors": path}
    carry(path, MODEL)
    os.utime(path, ns=(1, 1))
    assert models([tmp_path]) == {"x.safetensors": path} and not vaes([tmp_path])


def test_vaes_are_folders_and_in_their_own_roots_also_files(tmp_path: Path) -> None:
    root, own = tmp_path / "nextstep", tmp_path / "vae"
    folder = put(root / "x" / "vae", VAE, "checkpoint.pt")
    put(root / "files", VAE, "a.safetensors")
    put(root / "model", MODEL, "checkpoint.pt")
    named = put(own, VAE, "a.safetensors", "b.pt", "c.sft", "d.txt")
    whole = put(own / "whole", VAE, "checkpoint.pt", "a.safetensors")
    put(own / "foreign", {"latent_channels": 16}, "a.safetensors")
    carried = carry(own / "one" / "vae.safetensors", VAE)
    assert vaes([root], [own]) == {
        "x/vae": folder,
        "a.safetensors": named / "a.safetensors",
        "b.pt": named / "b.pt",
        "c.sft": named / "c.sft",
        "whole": whole,
        "one/vae.safetensors": carried,
    }
    alone = put(tmp_path / "alone", VAE, "checkpoint.pt")
    assert vaes([alone]) == {"alone": alone}


def test_the_vae_of_a_checkpoint(tmp_path: Path) -> None:
    """Its own, else the only other one; of two the user has to say which."""
    model, one, two = put(tmp_path / "m", MODEL, INDEX), tmp_path / "one", tmp_path / "two"
    assert vae_of(model, []) is None and vae_of(model, [one]) == one and vae_of(model, [one, two]) is None
    own = put(model / "vae", VAE)
    assert vae_of(model, [one]) == own
    named = put(model / "named", VAE)
    put(model, MODEL | {"vae_name_or_path": "named/"})
    assert vae_of(model, [one]) == named
    put(model, MODEL | {"vae_name_or_path": 3})
    assert vae_of(model, [one]) == own, "what is no path is as good as nothing"


def test_the_newest_whole_snapshot_of_the_hubs_cache_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert cached_models() == {}
    snapshots = tmp_path / "models--someone--x--y" / "snapshots"
    for n, name in enumerate(("new", "old")):
        put(snapshots / name, MODEL, INDEX)
        os.utime(snapshots / name, (1000 - n, 1000 - n))
    put(snapshots / "unfinished", MODEL)
    put(tmp_path / "models--someone--llama" / "snapshots" / "0", OTHER, INDEX)
    assert cached_models() == {"someone/x/y": snapshots / "new"}


def test_a_fingerprint_changes_with_the_files(tmp_path: Path) -> None:
    folder = put(tmp_path / "a", MODEL, INDEX)
    (folder / "weights").write_bytes(b"1")
    seen = [fingerprint(folder)]
    (folder / "weights").write_bytes(b"12")
    seen.append(fingerprint(folder))
    os.utime(folder / "weights", ns=(5, 5))
    seen.append(fingerprint(folder))
    (folder / "weights").rename(folder / "renamed")
    seen.append(fingerprint(folder))
    seen.append(fingerprint(Path(shutil.copytree(folder, tmp_path / "b"))))
    assert len(set(seen)) == 5 and fingerprint(folder) == seen[3]
    file = folder / "renamed"
    before = fingerprint(file)
    (folder / "config.json").write_text("{}")
    assert fingerprint(file) != before, "the config beside a file belongs to it"
    before = fingerprint(file)
    (folder / "other").touch()
    assert fingerprint(file) == before
