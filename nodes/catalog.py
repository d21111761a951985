"""What lies in the model folders: names for the dropdowns, and the paths behind them."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..nextstep_core.config import MODEL_TYPES
from ..nextstep_core.errors import NextStepError
from ..nextstep_core.loading.build import VAE_WEIGHT_NAMES
from ..nextstep_core.loading.checkpoint import INDEX_NAME, SINGLE_NAME
from ..nextstep_core.loading.documents import CONFIG, find_documents, is_marked
from ..nextstep_core.loading.gguf_file import SUFFIX as GGUF
from ..nextstep_core.loading.sources import ASSETS, EMBEDDED, vae_beside
from . import host

EMBEDDED_LABEL = f"{EMBEDDED} (embedded)"
NOTHING_FOUND = "no model found"
DEPTH = 3
MODEL_KEY, VAE_KEY = "model_type", "z_channels"  # of a config; they tell the one kind from the other
VAE_SUFFIXES = (".safetensors", ".sft", ".pt")


def _config_folders(roots: list[Path]) -> list[tuple[Path, Path]]:
    """(root, folder) of every folder with a config.json, a few levels down."""
    found = []
    for root in roots:
        for depth in range(DEPTH + 1):
            found += [(root, config.parent) for config in root.glob("/".join(["*"] * depth + ["config.json"]))]
    return sorted(found)


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


def _cached_models() -> dict[str, Path]:
    """Checkpoints in the Hugging Face cache, used in place; the newest snapshot of each."""
    found = {}
    snapshots = sorted(_hub_cache().glob("models--*/snapshots/*"), key=lambda path: path.stat().st_mtime)
    for folder in snapshots:
        if _has_weights(folder) and _is_nextstep(folder):
            repo = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
            found[f"{repo} (Hugging Face cache)"] = folder
    return found


def _has_weights(folder: Path) -> bool:
    return (folder / INDEX_NAME).is_file() or (folder / SINGLE_NAME).is_file()


def _single_files(roots: list[Path], holds: str) -> dict[str, Path]:
    """Files that carry a config of their own, a few levels down, whose config has the key `holds`."""
    found = {}
    for root in roots:
        for depth in range(DEPTH + 1):
            for path in sorted(root.glob("/".join(["*"] * depth + ["*.safetensors"]))):
                if is_marked(path) and holds in _config(path):
                    found.setdefault(path.relative_to(root).as_posix(), path)
    return found


def models() -> dict[str, Path]:
    """Checkpoints by the name that the dropdown shows: folders, weights files beside their config, single files that
    carry it, the Hugging Face cache, and the embedded one last."""
    found = {}
    for root, folder in _config_folders(host.model_roots()):
        if not _is_nextstep(folder):
            continue
        paths = sorted(folder.glob(f"*{GGUF}"))
        if _has_weights(folder):
            paths.insert(0, folder)
        for path in paths or sorted(folder.glob("*.safetensors")) or [folder]:
            found.setdefault(path.relative_to(root).as_posix() if path != root else root.name, path)
    found = _single_files([*host.model_roots(), *host.single_file_roots()], MODEL_KEY) | found | _cached_models()
    if (ASSETS / EMBEDDED).is_dir():
        found[EMBEDDED_LABEL] = ASSETS / EMBEDDED
    return found


def vaes() -> dict[str, Path]:
    """VAEs by name: folders that hold one, in the model folders, and files in the VAE folders beside their config."""
    found = {}
    for root, folder in _config_folders([*host.model_roots(), *host.vae_roots()]):
        if VAE_KEY not in _config(folder):
            continue
        if (folder / VAE_WEIGHT_NAMES[0]).is_file():
            found.setdefault(folder.relative_to(root).as_posix() if folder != root else root.name, folder)
        elif root in host.vae_roots():
            files = sorted(path for path in folder.iterdir() if path.suffix in VAE_SUFFIXES)
            found |= {path.relative_to(root).as_posix(): path for path in files}
    found = _single_files([*host.model_roots(), *host.vae_roots()], VAE_KEY) | found
    if (ASSETS / EMBEDDED / "vae").is_dir():
        found[EMBEDDED_LABEL] = ASSETS / EMBEDDED / "vae"
    return found


def vae_of(checkpoint: Path) -> Path | None:
    """The VAE that goes with a checkpoint: its own or, where it has none, the only other one there is."""
    stated = _config(checkpoint).get("vae_name_or_path")
    try:
        return vae_beside(checkpoint, stated if isinstance(stated, str) else None)
    except NextStepError:
        others = [path for name, path in vaes().items() if name != EMBEDDED_LABEL]
        return others[0] if len(others) == 1 else None


def _find(name: str, among: dict[str, Path], kind: str, ways: str) -> Path:
    if name in among:
        return among[name]
    folders = " or ".join(str(root) for root in host.model_roots())
    what = f"There is no NextStep {kind}" if name == NOTHING_FOUND else f"The NextStep {kind} {name!r} is not there"
    raise NextStepError(f"{what}. Three ways to get one: {ways.format(folders)}. Then press R to refresh the node.")


MODEL_WAYS = (
    "run Download NextStep Model; put a folder from Hugging Face (such as stepfun-ai/NextStep-1.1) into {}; "
    "or put a single file (such as nextstep-1.1-int8.safetensors) into models/diffusion_models"
)
VAE_WAYS = (
    "run Download NextStep Model for NextStep-1-f8ch16-Tokenizer; put that folder from Hugging Face into {}; "
    "or put a single file (nextstep-vae.safetensors) into models/vae"
)


def find_model(name: str) -> Path:
    """Path of the checkpoint that the dropdown calls `name`; NextStepError says how to get one if it is not there."""
    return _find(name, models(), "model", MODEL_WAYS)


def find_vae(name: str) -> Path:
    """Path of the VAE that the dropdown calls `name`; NextStepError says how to get one if it is not there."""
    return _find(name, vaes(), "VAE", VAE_WAYS)


def fingerprint(path: Path) -> str:
    """Changes when the files behind a dropdown name change; reads no file."""
    files = sorted(path.iterdir()) if path.is_dir() else [path, path.parent / CONFIG]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return json.dumps([str(path), stats])
