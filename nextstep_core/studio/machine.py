"""What this machine is, which models lie on it, which of them fit in which format, and how long a picture takes."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import __version__
from ..decoding.budget import Budget, Fit
from ..decoding.estimate import Estimate, estimate
from ..decoding.memory import AUTOMATIC
from ..errors import NextStepError, is_out_of_memory
from ..loading import catalog, kept, offers
from ..loading.build import ModelPlan, find_vae, plan_model
from ..loading.documents import CONFIG
from ..loading.published import published, purpose_of
from ..model.config import VAEConfig
from ..runtime.cpu import cpu_dtype
from ..runtime.devices import best_device, device_name, free_bytes, host_bytes, kind_of, room_bytes, total_bytes
from ..runtime.quantization import RECIPES

UNQUANTIZED = "none"
PUBLISHED_VAE = VAEConfig(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=16)
SIZE = (512, 512)
CPU = torch.device("cpu")
# In the order in which "auto" takes them, and then the others: each loses more than the one before.
TRIED = (None, *(name for name in RECIPES if not name.startswith("int4-g")))


@dataclass(frozen=True)
class Memory:
    """Bytes in all and free; None where the system does not tell."""

    total: int | None
    free: int | None


@dataclass(frozen=True)
class Format:
    """A way to store a checkpoint's weights: `weights` and all that is `needed` for a picture in bytes, and whether it
    fits: "whole", "streamed" (with so many bytes `streamed` for every token, which is slower) or "no"."""

    quantization: str
    weights: int
    needed: int
    fits: str
    streamed: int

    @classmethod
    def of(cls, fit: Fit) -> Format:
        """From the memory plan's own."""
        how = "no" if fit.streamed is None else "streamed" if fit.streamed else "whole"
        return cls(fit.recipe or UNQUANTIZED, fit.weights, fit.needed, how, fit.streamed or 0)


@dataclass(frozen=True)
class Model:
    """A checkpoint that was found. `purpose` is None where nobody knows; `vae` is the path of the one that goes with
    it.

    `formats` are the ways to store its weights, or the one that they are stored in already; `chosen` is the first that
    fits best, and `seconds` what a picture of `Status.size` takes in it, about. Where the files cannot be used,
    `problem` says why, and nothing else is known.
    """

    name: str
    path: str
    purpose: str | None = None
    vae: str | None = None
    dtype: str | None = None
    bytes_on_disk: int | None = None
    formats: tuple[Format, ...] = ()
    chosen: str | None = None
    seconds: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Status:
    """Everything that `nextstep status` tells. `size` is width and height of the picture that formats and seconds are
    for."""

    nextstep: str
    python: str
    torch: str
    system: str
    kind: str
    device: str
    memory: Memory
    host: Memory
    folder: str
    disk_free: int | None
    size: tuple[int, int]
    models: tuple[Model, ...]
    vaes: tuple[str, ...]


def status(
    roots: Sequence[Path],
    file_roots: Sequence[Path] = (),
    *,
    device: torch.device | None = None,
    size: tuple[int, int] = SIZE,
    times: bool = True,
) -> Status:
    """The machine and the models below `roots`, single files below `file_roots` included. `size` is (width, height).

    With `times` a part of every model is timed, which takes some seconds for a large one on a CPU.
    """
    device = best_device() if device is None else device
    folder = roots[0] if roots else Path()
    return Status(
        nextstep=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        system=platform.platform(),
        kind=kind_of(device),
        device=device_name(device),
        memory=Memory(total_bytes(device), room_bytes(device)),
        host=Memory(host_bytes(), free_bytes(CPU)),
        folder=str(folder),
        disk_free=disk_free(folder),
        size=size,
        models=models(roots, file_roots, device, size, times),
        vaes=tuple(offers.vaes_there(roots)),
    )


def models(
    roots: Sequence[Path], file_roots: Sequence[Path], device: torch.device, size: tuple[int, int], times: bool
) -> tuple[Model, ...]:
    """The checkpoints that are there, each with what it takes on `device`."""
    vaes = tuple(catalog.vaes(roots).values()) or tuple(catalog.cached_vaes().values())
    return tuple(
        described(name, path, vaes, device, size, times) for name, path in offers.there(roots, file_roots).items()
    )


def described(
    name: str, path: Path, vaes: Sequence[Path], device: torch.device, size: tuple[int, int], times: bool
) -> Model:
    """A checkpoint: what of it can be said without reading its weights."""
    try:
        left = kept.by_recipe([path]) if kept.is_shelf(path) else {}
        plan = plan_model(next(iter(left.values()), path), None, device)
        vae_path = catalog.vae_of(path, vaes)
        vae = None if vae_path is None else vae_config(vae_path)
        settings = published(plan.documents, plan.config).text_to_image
    except NextStepError as error:
        return Model(offers.bare(name), str(path), problem=str(error))
    try:
        size_on_disk = sum(file.stat().st_size for file in kept.source_files(plan))
    except OSError as error:  # a file went away since it was listed
        return Model(offers.bare(name), str(path), problem=f"{path} changed meanwhile ({error.strerror}).")
    dtype = default_dtype(device, plan.parameters)
    formats = tuple(map(Format.of, fits(plan, vae or PUBLISHED_VAE, device, dtype, size)))
    chosen = best(formats)
    pace = None
    if times and chosen is not None:
        recipe = None if chosen.quantization == UNQUANTIZED else chosen.quantization
        width, height = size
        arguments = plan.config, vae or PUBLISHED_VAE, settings, height, width, device, dtype, recipe, chosen.streamed
        pace = _estimated(*arguments)
    return Model(
        name=offers.bare(name),
        path=str(path),
        purpose=purpose_of(plan.documents.name),
        vae=None if vae_path is None else str(vae_path),
        dtype=str(dtype).removeprefix("torch."),
        bytes_on_disk=size_on_disk,
        formats=formats,
        chosen=None if chosen is None else chosen.quantization,
        seconds=None if pace is None else pace.picture,
    )


def vae_config(path: Path) -> VAEConfig:
    """The shape of the VAE at `path`; NextStepError when its files are not all there."""
    _, documents = find_vae(path)
    return VAEConfig.from_dict(documents.read(CONFIG), documents.where(CONFIG))


def default_dtype(device: torch.device, parameters: int) -> torch.dtype:
    """What weights are stored and computed in where nobody says it."""
    free = free_bytes(CPU)
    return torch.bfloat16 if device.type != "cpu" else cpu_dtype(parameters, free or 0)


def fits(plan: ModelPlan, vae: VAEConfig, device: torch.device, dtype: torch.dtype, size: tuple[int, int]) -> list[Fit]:
    """What each format takes of what `device` has free now; that of the file alone where it has one, and of a GGUF file
    the one nearest to it and the smallest, as `auto` chooses between them."""
    room = room_bytes(device)
    budget = Budget.beside(device, total_bytes(device) if room is None else room, dtype, vae)
    width, height = size
    recipes: Iterable[str | None] = TRIED
    if plan.recipe is not None:
        recipes = dict.fromkeys((plan.recipe.name, *(() if plan.stored else AUTOMATIC[-1:])))
    usable = (name for name in recipes if not (name == "fp8" and device.type == "mps"))
    return [budget.fit(plan, name, height, width) for name in usable]


def best(formats: Sequence[Format]) -> Format | None:
    """The first that fits whole; else the one of which least is streamed; None where nothing fits."""
    usable = [format for format in formats if format.fits != "no"]
    return min(usable, key=lambda format: format.streamed, default=None)


def _estimated(*arguments: object) -> Estimate | None:
    """None where there is no memory for timing."""
    try:
        return estimate(*arguments)  # type: ignore[arg-type]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None


def disk_free(folder: Path) -> int | None:
    """Bytes that are free where a folder is or will be."""
    there = next((path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()), None)
    try:
        return None if there is None else shutil.disk_usage(there).free
    except OSError:
        return None
