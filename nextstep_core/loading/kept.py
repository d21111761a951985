"""Quantized once: the converted weights of a checkpoint, kept as a single file and found again.

They lie in a folder of their own beside the models, one for each checkpoint, with all that the checkpoint is needed
for: when its files are deleted, what was converted still draws.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from glob import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import NextStepError
from ..runtime.interrupt import Check, go_on
from ..runtime.quantization.search import METHOD
from ..sentences import Sentence
from .build import ModelPlan, find_vae
from .checkpoint import DTYPES, read_tensors
from .documents import CALIBRATION, CARRIED, CONFIG, file_metadata, is_marked
from .files import can_be_shown
from .locks import held
from .single_file import PART, StreamedFile, empty_like, marks_of
from .store import vae_beside

FOLDER = ".quantized"  # of the first model folder that takes it
SOURCE = "nextstep.source"  # in a file's metadata: `fingerprint` of what it was made from
SUFFIX = ".safetensors"
SPARE = 5 * 10**9  # bytes that a disk must have left beside what is kept on it
HASHED = 10**6  # bytes at either end of a file
SLASH = "--"  # in the name of a folder, for the slash of a checkpoint in a folder

log = logging.getLogger(__name__)


def shelves(name: str, checkpoint: Path, roots: Sequence[Path]) -> list[Path]:
    """The folders for what is kept of the checkpoint called `name`, the best first: in the root that holds it."""
    near = sorted(roots, key=lambda root: not checkpoint.is_relative_to(root))
    return [root / FOLDER / name.replace("/", SLASH) for root in near]


def all_shelves(roots: Sequence[Path]) -> dict[str, Path]:
    """The folders in which something is kept, by the name of its checkpoint."""
    found: dict[str, Path] = {}
    for root in roots:
        for folder in sorted((root / FOLDER).glob("*")):
            if can_be_shown(folder.name) and any(is_marked(path) for path in folder.glob(f"*{SUFFIX}")):
                found.setdefault(folder.name.replace(SLASH, "/"), folder)
    return found


def is_shelf(path: Path) -> bool:
    """Whether a path is such a folder."""
    return path.parent.name == FOLDER


def lacks_weights(checkpoint: Path) -> bool:
    """Whether a checkpoint's folder holds no weights any more, so that only what was kept of them can be loaded."""
    if is_shelf(checkpoint) or not checkpoint.is_dir():
        return is_shelf(checkpoint)
    return all(path.name.endswith(CALIBRATION) for path in checkpoint.glob(f"*{SUFFIX}"))


def by_recipe(folders: Iterable[Path]) -> dict[str, Path]:
    """What is kept in these folders, whole, by the name of its recipe."""
    files = (path for folder in folders for path in sorted(folder.glob(f"*{SUFFIX}")) if _is_whole(path))
    found: dict[str, Path] = {}
    for path in files:
        found.setdefault(path.stem.rpartition("-")[0], path)
    return found


def find(plan: ModelPlan, dtype: torch.dtype, folders: Iterable[Path]) -> Path | None:
    """The file that was kept when this plan was carried out before, if what it was made from has not changed since."""
    source = fingerprint(plan)
    for folder in folders:
        path = folder / file_name(plan, dtype)
        if _is_whole(path) and file_metadata(path).get(SOURCE) == source:
            return path
    return None


def file_name(plan: ModelPlan, dtype: torch.dtype) -> str:
    """What a plan's converted weights are called, with everything that is not quantized in `dtype`."""
    assert plan.recipe is not None, "only what is quantized is kept"
    return f"{plan.recipe.name}-{next(name for name, own in DTYPES.items() if own == dtype)}{SUFFIX}"


def fingerprint(plan: ModelPlan) -> str:
    """Changes when one of the files changes that a plan is made from, or how int4 is fitted to them; reads none."""
    files = plan.files.paths
    files |= {path for name in CARRIED if (path := plan.documents.folder / name).is_file()}
    stats = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    # What was kept of other formats than int4 stays good.
    made = [METHOD] if plan.recipe is not None and plan.recipe.has_layouts else []
    return hashlib.sha256(json.dumps([*stats, *made]).encode()).hexdigest()


def source_files(plan: ModelPlan) -> list[Path]:
    """The weights files that are not needed any more for a plan that is kept."""
    return sorted(plan.files.paths)


def weights_hash(plan: ModelPlan) -> str:
    """Ten hex digits that tell weights apart, from the sizes of their files and the first and last MB of each.

    The checksum of whole files would be another minute of reading.
    """
    digest = hashlib.sha256()
    for path in source_files(plan):
        size = path.stat().st_size
        digest.update(f"{size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(HASHED))
            file.seek(max(0, size - HASHED))
            digest.update(file.read(HASHED))
    return digest.hexdigest()[:10]


def place(plan: ModelPlan, dtype: torch.dtype, folders: Iterable[Path]) -> Path | None:
    """The first of `folders` that can take the converted weights; None where no disk has room or may be written to."""
    size = sum(tensor.nbytes for tensor in _contents(plan, dtype).values())
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(folder).free >= size + SPARE:
                return folder
            reason = f"there is no room for {size / 1e9:.1f} GB and {SPARE / 1e9:.0f} GB to spare"
        except OSError as error:
            reason = str(error)
        log.info("NextStep: the quantized weights are not kept in %s: %s", folder, reason)
    return None


def keep(
    plan: ModelPlan, dtype: torch.dtype, folder: Path, tensors: Iterable[tuple[str, Tensor]], check: Check = go_on
) -> Iterator[tuple[str, Tensor]]:
    """The plan's tensors as they come from `tensors`, each also written to the file in `folder`.

    The file appears under its name once all have come. A disk that fails ends the keeping, not the loading. `check` is
    called all the while and may raise to stop.
    """
    marks = marks_of(plan) | {SOURCE: fingerprint(plan)}
    contents = _contents(plan, dtype)
    with _Copy(folder / file_name(plan, dtype), contents, marks, check) as copy:
        copy.write_vae(plan)
        for name in plan.text_embedding_names:
            copy.write(name, contents[name])
        del contents
        for name, tensor in tensors:
            copy.write(name, tensor)
            yield name, tensor
            del tensor  # it is the receiver's, who may lay it out anew


def _contents(plan: ModelPlan, dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything that is kept, without memory: the text embedding as it lies in its files, the others on meta."""
    return empty_like(plan, dtype) | dict(read_tensors(plan.files, plan.text_embedding_names))


def _is_whole(path: Path) -> bool:
    """Whether a file was written to its end: its header and its length agree."""
    try:
        return is_marked(path) and CONFIG in file_metadata(path)
    except NextStepError:
        return False


class _Copy:
    """The file that is kept; where it cannot be written it is given up, with a warning and no error."""

    def __init__(self, path: Path, contents: Mapping[str, Tensor], marks: Mapping[str, str], check: Check) -> None:
        self._path, self._check, self._open = path, check, ExitStack()
        self._file: StreamedFile | None = StreamedFile(path, contents, marks)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, unless an earlier one could not be written."""
        if self._file is not None:
            with self._given_up_on_failure():
                self._file.write(name, tensor, self._check)

    def write_vae(self, plan: ModelPlan) -> None:
        """Put the checkpoint's own VAE beside, under the name that its config states."""
        if self._file is not None and plan.documents.carried is None:
            with self._given_up_on_failure():
                copy_vae(plan, self._path.parent)

    @contextmanager
    def _given_up_on_failure(self) -> Iterator[None]:
        try:
            yield
        except (OSError, NextStepError) as error:
            log.warning("NextStep: the quantized weights are not kept as %s: %s", self._path, error)
            self._file = None
            self._open.__exit__(type(error), error, None)

    def __enter__(self) -> _Copy:
        assert self._file is not None, "nothing has failed yet"
        with self._given_up_on_failure():
            self._open.enter_context(
                held(self._path.with_name(f".{self._path.name}.lock"), Sentence("another run is writing it"))
            )
            for left in self._path.parent.glob(f"{escape(self._path.name)}.*{PART}"):
                left.unlink()  # by a run that was killed: none is alive, or it would hold the lock
            self._open.enter_context(self._file)
        return self

    def __exit__(self, *failure: Any) -> None:
        with self._given_up_on_failure():
            self._open.__exit__(*failure)


def copy_vae(plan: ModelPlan, folder: Path) -> None:
    """Copy the VAE that lies in a checkpoint's folder, if one does, to the same place below `folder`."""
    try:
        vae = vae_beside(plan.documents.folder, plan.config.vae_name_or_path)
        weights, _ = find_vae(vae)
    except NextStepError:
        return
    target = folder / vae.relative_to(plan.documents.folder.resolve())
    target.mkdir(parents=True, exist_ok=True)
    for file in (weights, vae / CONFIG):
        part = target / f"{file.name}.part"
        shutil.copyfile(file, part)
        part.replace(target / file.name)
