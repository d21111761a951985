"""What lies in folders of models: names that a user can choose from, and the paths behind them."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import NextStepError
from ..model.config import MODEL_TYPES
from .build import VAE_WEIGHT_NAMES
from .checkpoint import INDEX_NAME, SINGLE_NAME
from .documents import CONFIG, find_documents, is_marked
from .gguf_file import SUFFIX as GGUF
from .kept import FOLDER
from .store import vae_beside

DEPTH = 3
MODEL_KEY, VAE_KEY = "model_type", "z_channels"  # of a config; they tell the one kind from the other
VAE_SUFFIXES = (".safetensors", ".sft", ".pt")


def _config_folders(roots: Sequence[Path]) -> list[tuple[Path, Path]]:
    """(root, folder) of every folder with a config.json, a few levels down."""
    found = []
    for root in roots:
        for depth in range(DEPTH + 1):
            found += [(root, config.parent) for config in root.glob("/".join(["*"] * depth + ["config.json"]))]
    return sorted((root, folder) for root, folder in found if FOLDER not in folder.relative_to(root).parts)


def _config(path: Path) -> dict[str, Any]:
    """The config of a folder, or of a single file that carries it; empty where it is unreadable."""
    if is_marked(path):
        return _carried_config(path, path.stat().st_mtime_ns)
    return _read_config(path)


@lru_cache(maxsize=64)
def _carried_config(path: Path, _changed: int) -> dict[str, Any]:
    """Of a file as it is since `_changed`: its header holds a tokenizer of megabytes, and every run asks."""
    return _read_config(path)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return find_documents(path).read(CONFIG)
    except NextStepError:
        return {}


def _is_nextstep(folder: Path) -> bool:
    return _config(folder).get(MODEL_KEY) in MODEL_TYPES


def _hub_cache() -> Path:
    """Where huggingface_hub keeps what it fetched, by its own environment variables."""
    home = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    stated = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(stated or os.path.join(home, "hub")).expanduser()


def cached_models() -> dict[str, Path]:
    """Checkpoints in the Hugging Face cache by hub id, used in place; the newest snapshot of each."""
    return {repo: folder for repo, folder in _snapshots() if _has_weights(folder) and _is_nextstep(folder)}


def cached_vaes() -> dict[str, Path]:
    """VAEs that lie alone in the Hugging Face cache, in the same way."""
    return {repo: folder for repo, folder in _snapshots() if _holds_vae(folder)}


def _snapshots() -> list[tuple[str, Path]]:
    """(hub id, folder) of what is in the Hugging Face cache, the newest last."""
    folders = sorted(_hub_cache().glob("models--*/snapshots/*"), key=lambda path: path.stat().st_mtime)
    return [(f.parent.parent.name.removeprefix("models--").replace("--", "/"), f) for f in folders]


def _holds_vae(folder: Path) -> bool:
    return (folder / VAE_WEIGHT_NAMES[0]).is_file() and VAE_KEY in _config(folder)


def _has_weights(folder: Path) -> bool:
    return (folder / INDEX_NAME).is_file() or (folder / SINGLE_NAME).is_file()


def _single_files(roots: Sequence[Path], holds: str) -> dict[str, Path]:
    """Files that carry a config of their own, a few levels down, whose config has the key `holds`."""
    found: dict[str, Path] = {}
    for root in roots:
        for depth in range(DEPTH + 1):
            for path in sorted(root.glob("/".join(["*"] * depth + ["*.safetensors"]))):
                if FOLDER not in path.relative_to(root).parts and is_marked(path) and holds in _config(path):
                    found.setdefault(path.relative_to(root).as_posix(), path)
    return found


def models(roots: Sequence[Path], file_roots: Sequence[Path] = ()) -> dict[str, Path]:
    """Checkpoints by their path below a root: folders, weights files beside their config, and single files that carry
    it, which are looked for in `file_roots` too."""
    found: dict[str, Path] = {}
    for root, folder in _config_folders(roots):
        if not _is_nextstep(folder):
            continue
        paths = sorted(folder.glob(f"*{GGUF}"))
        if _has_weights(folder):
            paths.insert(0, folder)
        for path in paths or sorted(folder.glob("*.safetensors")) or [folder]:
            found.setdefault(path.relative_to(root).as_posix() if path != root else root.name, path)
    return _single_files([*roots, *file_roots], MODEL_KEY) | found


def vaes(roots: Sequence[Path], vae_roots: Sequence[Path] = ()) -> dict[str, Path]:
    """VAEs by their path below a root: folders that hold one and, in `vae_roots`, files beside their config; single
    files that carry it in either."""
    found: dict[str, Path] = {}
    for root, folder in _config_folders([*roots, *vae_roots]):
        if VAE_KEY not in _config(folder):
            continue
        if (folder / VAE_WEIGHT_NAMES[0]).is_file():
            found.setdefault(folder.relative_to(root).as_posix() if folder != root else root.name, folder)
        elif root in vae_roots:
            files = sorted(path for path in folder.iterdir() if path.suffix in VAE_SUFFIXES)
            found |= {path.relative_to(root).as_posix(): path for path in files}
    return _single_files([*roots, *vae_roots], VAE_KEY) | found


def vae_of(checkpoint: Path, others: Collection[Path]) -> Path | None:
    """The VAE that goes with a checkpoint: its own or, where it has none, the only one of `others`."""
    stated = _config(checkpoint).get("vae_name_or_path")
    try:
        return vae_beside(checkpoint, stated if isinstance(stated, str) else None)
    except NextStepError:
        return next(iter(others)) if len(others) == 1 else None


def fingerprint(path: Path) -> str:
    """Changes when the files of a checkpoint or a VAE change; reads no file."""
    files = sorted(path.iterdir()) if path.is_dir() else [path, path.parent / CONFIG]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return json.dumps([str(path), stats])
