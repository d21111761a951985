"""What lies in folders of models: names that a user can choose from, and the paths behind them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import NextStepError
from ..model.config import MODEL_TYPES
from .build import VAE_WEIGHT_NAMES
from .checkpoint import SINGLE_NAME
from .documents import CALIBRATION, CONFIG, INDEX_NAME, find_documents, is_marked
from .files import can_be_shown, is_file, is_folder, stat_of
from .gguf_file import SUFFIX as GGUF
from .kept import FOLDER
from .store import vae_beside

DEPTH = 3
# Entries of one root that are looked at: a link to a whole disk must not make the host wait.
MAX_ENTRIES = 20_000
MODEL_KEY, VAE_KEY = "model_type", "z_channels"  # of a config; they tell the one kind from the other
VAE_SUFFIXES = (".safetensors", ".sft", ".pt")

log = logging.getLogger(__name__)


def walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """(folder, names in it) of a root and the folders a few levels down, in order; links are followed, but not back up.

    What may not be read is passed over, and so are names that a dropdown cannot show.
    """
    left = MAX_ENTRIES
    waiting = deque([(root, 0, frozenset[tuple[int, int]]())])
    while waiting:
        folder, depth, above = waiting.popleft()
        try:
            status = os.stat(folder)
            with os.scandir(folder) as entries:
                seen = sorted((entry.name, _is_folder(entry)) for entry in islice(entries, left + 1))
        except OSError:
            continue
        identity = status.st_dev, status.st_ino
        if identity in above:
            continue
        left -= len(seen)
        if left < 0:
            log.warning("NextStep: %s holds more than %d files; the rest is ignored", root, MAX_ENTRIES)
            return
        seen = [(name, is_folder) for name, is_folder in seen if can_be_shown(name)]
        yield folder, [name for name, _ in seen]
        if depth < DEPTH:
            below = (folder / name for name, is_folder in seen if is_folder and name != FOLDER)
            waiting += [(path, depth + 1, above | {identity}) for path in below]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circle of links
        return False


def _config_folders(roots: Sequence[Path]) -> list[tuple[Path, Path]]:
    """(root, folder) of every folder with a config.json, a few levels down."""
    return sorted((root, folder) for root in roots for folder, names in walk(root) if CONFIG in names)


def _files(folder: Path, *suffixes: str) -> list[Path]:
    """Regular files of these kinds in a folder, in order, that can hold weights."""
    try:
        names = sorted(filter(can_be_shown, os.listdir(folder)))
    except OSError:
        return []
    names = [name for name in names if name.endswith(suffixes) and not name.endswith(CALIBRATION)]
    return [folder / name for name in names if is_file(folder / name)]


def _config(path: Path) -> dict[str, Any]:
    """The config of a folder, or of a single file that carries it; empty where it is unreadable."""
    if is_marked(path):
        return _carried_config(path, _changed(path))
    return _read_config(path)


def _changed(path: Path) -> int:
    """When a file was changed, in nanoseconds; 0 where it is gone."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


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
    kind = _config(folder).get(MODEL_KEY)
    return isinstance(kind, str) and kind in MODEL_TYPES


def cached_models() -> dict[str, Path]:
    """Checkpoints in the Hugging Face cache by hub id, used in place; the newest snapshot of each."""
    return {repo: folder for repo, folder in _snapshots() if _has_weights(folder) and _is_nextstep(folder)}


def cached_vaes() -> dict[str, Path]:
    """VAEs that lie alone in the Hugging Face cache, in the same way."""
    return {repo: folder for repo, folder in _snapshots() if _holds_vae(folder)}


def _snapshots() -> list[tuple[str, Path]]:
    """(hub id, folder) of what is in the Hugging Face cache, the newest last."""
    from huggingface_hub import constants

    try:
        # Not by `scan_cache_dir`, which looks at every file of every repository: dropdowns ask often.
        folders = sorted(Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*"), key=_changed)
    except OSError:
        return []
    named = [(f.parent.parent.name.removeprefix("models--").replace("--", "/"), f) for f in folders]
    return [(repo, folder) for repo, folder in named if can_be_shown(repo)]


def _holds_vae(folder: Path) -> bool:
    return is_file(folder / VAE_WEIGHT_NAMES[0]) and VAE_KEY in _config(folder)


def _has_weights(folder: Path) -> bool:
    return is_file(folder / INDEX_NAME) or is_file(folder / SINGLE_NAME)


def _single_files(roots: Sequence[Path], holds: str) -> dict[str, Path]:
    """Files that carry a config of their own, a few levels down, whose config has the key `holds`."""
    found: dict[str, Path] = {}
    for root in roots:
        for folder, names in walk(root):
            for path in (folder / name for name in names if name.endswith(".safetensors")):
                if is_marked(path) and holds in _config(path):
                    found.setdefault(path.relative_to(root).as_posix(), path)
    return found


def models(roots: Sequence[Path], file_roots: Sequence[Path] = ()) -> dict[str, Path]:
    """Checkpoints by their path below a root: folders, weights files beside their config, and single files that carry
    it, which are looked for in `file_roots` too."""
    found: dict[str, Path] = {}
    for root, folder in _config_folders(roots):
        if not _is_nextstep(folder):
            continue
        paths = _files(folder, GGUF)
        if _has_weights(folder):
            paths.insert(0, folder)
        for path in paths or _files(folder, ".safetensors") or [folder]:
            found.setdefault(path.relative_to(root).as_posix() if path != root else root.name, path)
    return _single_files([*roots, *file_roots], MODEL_KEY) | found


def vaes(roots: Sequence[Path], vae_roots: Sequence[Path] = ()) -> dict[str, Path]:
    """VAEs by their path below a root: folders that hold one and, in `vae_roots`, files beside their config; single
    files that carry it in either."""
    found: dict[str, Path] = {}
    for root, folder in _config_folders([*roots, *vae_roots]):
        if VAE_KEY not in _config(folder):
            continue
        if is_file(folder / VAE_WEIGHT_NAMES[0]):
            found.setdefault(folder.relative_to(root).as_posix() if folder != root else root.name, folder)
        elif root in vae_roots:
            found |= {path.relative_to(root).as_posix(): path for path in _files(folder, *VAE_SUFFIXES)}
    return _single_files([*roots, *vae_roots], VAE_KEY) | found


def vae_of(checkpoint: Path, others: Collection[Path]) -> Path | None:
    """The VAE that goes with a checkpoint: its own or, where it has none, the only one of `others`."""
    stated = _config(checkpoint).get("vae_name_or_path")
    try:
        return vae_beside(checkpoint, stated if isinstance(stated, str) else None)
    except NextStepError:
        return next(iter(others)) if len(others) == 1 else None


def fingerprint(path: Path) -> str:
    """Changes when the files of a checkpoint or a VAE change; reads no file, and raises nothing.

    A hash, since the host writes it into pictures, which people share: it names no folder of theirs.
    """
    try:
        files = sorted(path.iterdir()) if is_folder(path) else [path, path.parent / CONFIG]
    except OSError:
        files = []
    found = json.dumps([str(path), [found for file in files if (found := stat_of(file)) is not None]])
    return hashlib.sha256(found.encode(errors="surrogatepass")).hexdigest()
