"""The usual mistakes with a model's files, and whether a model that is whole can be used here."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from ..errors import NextStepError
from ..loading import catalog, hub, offers
from ..loading.build import VAE_WEIGHT_NAMES
from ..loading.documents import CONFIG, INDEX_NAME, Documents
from ..loading.files import read_head
from ..loading.store import ASSETS, EMBEDDED
from ..loading.transfer import SUFFIX, UNFINISHED
from ..runtime.devices import kind_of
from ..runtime.memory import format_bytes
from .finding import OK, PROBLEM, WARNING, Finding
from .machine import Model

LFS = b"version https://git-lfs"  # what a file begins with that Git put in the place of a large one
UNFINISHED_ENDS = (SUFFIX, ".part", ".crdownload", ".aria2", ".download")
WEIGHTS = (".safetensors", ".sft", ".gguf", ".pt")
MOST_NAMED = 3


def files(roots: Sequence[Path]) -> Iterator[Finding]:
    """Files that stand for others, or that did not come to their end."""
    for root in roots:
        for folder, names in catalog.walk(root):
            if UNFINISHED.parts[0] in folder.parts:
                continue
            yield from _pointers(folder, names)
            yield from _unfinished(folder, names)
            if INDEX_NAME in names:
                yield from _missing_shards(folder, names)
                if CONFIG not in names:
                    yield Finding(
                        PROBLEM,
                        f"{folder} holds weights and no {CONFIG}.",
                        f"Copy {CONFIG}, tokenizer.json and the others of its documents there, or download it again.",
                        str(folder),
                    )


def _pointers(folder: Path, names: Sequence[str]) -> Iterator[Finding]:
    pointers = [name for name in names if name.endswith((*WEIGHTS, ".json")) and _begins(folder / name, LFS)]
    if pointers:
        yield Finding(
            PROBLEM,
            f"{folder}: {_named(pointers)} {'is' if len(pointers) == 1 else 'are'} what Git puts in the place of a "
            "large file, not the file.",
            "Run git lfs pull in that folder, or download the checkpoint instead of cloning it.",
            str(folder),
        )


def _begins(path: Path, start: bytes) -> bool:
    try:
        return read_head(path, len(start)) == start
    except (OSError, NextStepError):
        return False


def _unfinished(folder: Path, names: Sequence[str]) -> Iterator[Finding]:
    parts = [name for name in names if name.endswith(UNFINISHED_ENDS)]
    with suppress(OSError):
        parts += [part.name.partition(SUFFIX)[0] for part in sorted((folder / UNFINISHED).rglob(f"*{SUFFIX}"))]
    if parts:
        yield Finding(
            WARNING,
            f"{folder} holds a download that did not end ({_named(parts)}).",
            "Download it again: it goes on where it stopped. If it is complete, delete these files.",
            str(folder),
        )


def _missing_shards(folder: Path, names: Sequence[str]) -> Iterator[Finding]:
    try:
        weight_map = Documents(folder).read(INDEX_NAME).get("weight_map")
    except NextStepError:
        return  # which is told where the checkpoint itself is looked at
    stated = weight_map.values() if isinstance(weight_map, dict) else ()
    missing = sorted({name for name in stated if isinstance(name, str) and name not in names})
    if missing:
        yield Finding(
            PROBLEM,
            f"{folder} lacks {len(missing)} of the files that its index names: {_named(missing)}.",
            "Download the checkpoint again; finished files are kept.",
            str(folder),
        )


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMED]) + (" ..." if len(names) > MOST_NAMED else "")


def checkpoints(found: Sequence[Model], told: Container[str], device: torch.device) -> Iterator[Finding]:
    """Whether each can be read, has a VAE and fits, and whether there is one for making and one for editing. What is
    wrong with those in the folders `told` is known."""
    own = [model for model in found if Path(model.path) != ASSETS / EMBEDDED]
    for model in own:
        if model.problem is None or model.path not in told:
            yield from _checkpoint(model, device)
    if not own:
        yield from _nothing_there()
    usable = [model for model in own if model.problem is None]
    if usable and all(model.purpose == "text to image" for model in usable):
        yield Finding(
            WARNING,
            "None of the models here was trained to edit pictures.",
            f"For edits, download {offers.EDITING}.",
        )
    if usable and all(model.purpose == "editing" for model in usable):
        yield Finding(
            WARNING,
            "The models here are for editing; they draw less well from text alone.",
            f"For pictures from text, download {offers.CHECKPOINTS[0]}.",
        )


def _checkpoint(model: Model, device: torch.device) -> Iterator[Finding]:
    if model.problem is not None:
        yield Finding(
            PROBLEM, f"{model.name} cannot be used: {model.problem}", "Do what it says, or download it again."
        )
        return
    if model.vae is None:
        yield Finding(
            PROBLEM,
            f"{model.name} has no VAE beside it, so there is no picture to be had from it.",
            f"Copy the checkpoint's vae folder ({CONFIG} and {VAE_WEIGHT_NAMES[0]}) there, or download "
            f"{offers.VAE_ALONE}.",
            model.path,
        )
    if model.chosen is None:
        least = min((format.needed for format in model.formats), default=0)
        yield Finding(
            PROBLEM,
            f"{model.name} does not fit {kind_of(device)} in any format: the smallest needs {format_bytes(least)}.",
            "Close other programs, or use a device with more memory.",
            model.path,
        )
        return
    chosen = next(format for format in model.formats if format.quantization == model.chosen)
    if chosen.fits == "streamed":
        yield Finding(
            WARNING,
            f"{model.name} fits only as {model.chosen} with {format_bytes(chosen.streamed)} streamed for every token, "
            "which is slow.",
            "Close other programs that use the card.",
            model.path,
        )
    elif model.vae is not None:
        yield Finding(OK, f"{model.name} is complete; quantization {model.chosen} fits", where=model.path)


def _nothing_there() -> Iterator[Finding]:
    variable = hub.forbidden()
    remedy = f"Download {offers.CHECKPOINTS[0]}."
    if variable is not None:
        remedy = f"Unset {variable}, which forbids downloads, and download {offers.CHECKPOINTS[0]}."
    yield Finding(WARNING, "There is no model but the small one that comes along.", remedy)
