"""Which model is asked for and where it runs, in words; finding it, and loading it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..decoding.memory import AUTO
from ..errors import NextStepError, check_choice
from ..loading import kept, offers
from ..loading.build import plan_model
from ..loading.checkpoint import DTYPES
from ..loading.download import PUBLISHED_CHECKPOINTS
from ..loading.kept import weights_hash
from ..loading.lora_file import SUFFIXES, resolve_lora
from ..loading.store import resolve_source
from ..pipeline import NextStepPipeline
from ..request.parameters import lora_facts
from ..runtime.devices import best_device
from ..runtime.lora import STRENGTH
from ..runtime.parallel import Ranks
from ..runtime.quantization import RECIPES
from ..sentences import all_of
from .drawing import PipelineArtist
from .machine import default_dtype

PLAIN = "none"
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


@dataclass(frozen=True)
class ModelChoice:
    """What the options say of the model."""

    name: str | None
    folder: Path | None
    quantization: str = PLAIN
    max_memory: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    loras: tuple[str, ...] = ()

    def prepare(self, named: str | None = None) -> PreparedModel:
        """The model that is asked for, else the one that is `named`, else the first that is found; no weights are
        read."""
        check_choice("--quantization", self.quantization, (PLAIN, AUTO, *RECIPES))
        check_choice("--dtype", self.dtype, ("auto", *DTYPES))
        limit = None if self.max_memory is None else bytes_of(self.max_memory)
        loras = tuple(lora_of(text, self.folder) for text in self.loras)
        path, device = find_model(self.name or named, self.folder), pick_device(self.device)
        path = with_weights(path, self.quantization, self.folder)
        plan = plan_model(path, None, device)
        dtype = DTYPES[self.dtype] if self.dtype != "auto" else default_dtype(device, plan.parameters)
        recipe = None if self.quantization == PLAIN or kept.is_shelf(path.parent) else self.quantization
        stored = plan.recipe.name if plan.recipe else recipe or str(dtype).removeprefix("torch.")
        digest = weights_hash(plan)
        facts = {"Model": plan.documents.name, "Model hash": digest, "Weights": stored}
        return PreparedModel(path, device, dtype, recipe, limit, loras, facts, f"{digest} {stored} {dtype}")

    def load(self, named: str | None = None, ranks: Ranks | None = None) -> PipelineArtist:
        """The same model with its weights, or the share of them that this one of `ranks` has."""
        return self.prepare(named).load(ranks)

    def as_data(self, named: str | None = None) -> dict[str, Any]:
        """The choice for another process, perhaps on another machine: with the whole paths of what lies on this one."""
        name = self.name or named
        if name is not None and Path(name).exists():
            name = str(Path(name).resolve())
        folder = None if self.folder is None else str(self.folder.resolve())
        loras = [lora_of(text, self.folder) for text in self.loras]
        named_loras = tuple(f"{file.resolve()}:{strength}" for file, strength in loras)
        return asdict(self) | {"name": name, "folder": folder, "loras": named_loras}


@dataclass(frozen=True)
class PreparedModel:
    """A model that was found, and how it will be loaded; `facts` and `identity` as an artist has them, but for
    LoRAs."""

    path: Path
    device: torch.device
    dtype: torch.dtype
    recipe: str | None
    max_memory: int | None
    loras: tuple[tuple[Path, float], ...]
    facts: dict[str, str]
    identity: str

    def load(self, ranks: Ranks | None = None) -> PipelineArtist:
        """Read its weights, or the share of this one of `ranks`."""
        pipeline = NextStepPipeline.from_pretrained(
            self.path,
            device=self.device,
            dtype=self.dtype,
            quantization=self.recipe,
            max_memory=self.max_memory,
            loras=self.loras,
            ranks=ranks,
        )
        applied = pipeline.engine.loras
        identity = " ".join(filter(None, (self.identity, applied.key)))
        return PipelineArtist(pipeline, self.facts | lora_facts(applied), identity)


def model_folders(folder: Path | None) -> list[Path]:
    """Where models are looked for: the folder that is named, else ComfyUI's where this lies in one, else here."""
    if folder is not None:
        return [folder]
    pack = Path(__file__).resolve().parents[2]
    beside = pack.parent.parent / "models" if pack.parent.name == "custom_nodes" else Path("models")
    return [root for root in (beside / "nextstep", beside / "diffusion_models") if root.is_dir()]


def find_model(name: str | None, folder: Path | None) -> Path:
    """The path of a model by its name in the folders, or by whatever else names one; NextStepError without any."""
    roots = model_folders(folder)
    found = {label: path for label, path in offers.there(roots, roots).items() if label != offers.EMBEDDED_LABEL}
    if name is None:
        if found:
            return next(iter(found.values()))
        raise NextStepError(
            "No model was found in {folders}. Name one with --model, try the small embedded one with --model tiny, or "
            "fetch one: nextstep download NextStep-1.1",
            folders=", ".join(map(str, roots)) or folder or "models/nextstep",
        )
    if (path := offers.find(name, found)) is not None:
        return path
    if name in PUBLISHED_CHECKPOINTS:
        raise NextStepError("{name} is not there yet. Fetch it: nextstep download {name}", name=name)
    return resolve_source(name)


def with_weights(path: Path, quantization: str, folder: Path | None) -> Path:
    """A checkpoint, or the file to load in its stead where only quantized weights were kept of it; NextStepError where
    those are of other formats than the one that is asked for."""
    if not kept.lacks_weights(path):
        return path
    roots = model_folders(folder)
    root = next((root for root in roots if path.is_relative_to(root)), path.parent)
    name = path.relative_to(root).as_posix()
    left = kept.by_recipe([path] if kept.is_shelf(path) else kept.shelves(name, path, roots))
    if quantization == AUTO and left:
        return min(left.values(), key=lambda file: file.stat().st_size)
    if left and quantization not in left:
        raise NextStepError(
            "Of {name} only the weights kept as {kept} are left. Add --quantization with one of these or auto, or get "
            "the checkpoint again: nextstep download",
            name=path.name,
            kept=all_of(left),
        )
    return left.get(quantization, path)


def lora_of(text: str, folder: Path | None) -> tuple[Path, float]:
    """A LoRA as the option names it, and its strength: a path, a name in the folder `loras` beside the models, with or
    without its ending, or one that comes with this."""
    name, sign, number = text.rpartition(":")
    try:
        strength = STRENGTH.check(float(number)) if sign else 1.0
    except NextStepError:
        raise
    except ValueError:  # a colon of the path's own
        name, sign, strength = "", "", 1.0
    name = name if sign else text
    roots = [root.parent / "loras" for root in model_folders(None)]
    roots += [] if folder is None else [folder / "loras", folder.parent / "loras"]
    for root in roots:
        for file in (root / name, root / f"{name}{SUFFIXES[0]}"):
            if name and not Path(name).exists() and file.exists():
                return file, strength
    return resolve_lora(name), strength


def pick_device(name: str) -> torch.device:
    """The device of this name; "auto" is the fastest there is. NextStepError for one that is not there."""
    if name == "auto":
        return best_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:
        raise NextStepError(
            "--device is {name}, which cannot be used here ({reason}). Use auto or cpu.",
            name=name,
            reason=(str(error).splitlines() or [type(error).__name__])[0],
        ) from None
    return device


def bytes_of(text: str) -> int:
    """A size such as 20GB, 1.5g or 800M in bytes; NextStepError for another text."""
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if found is None:
        raise NextStepError("--max-memory is {text!r}; write a size such as 20GB.", text=text[:80])
    return int(float(found[1]) * UNITS[found[2]])


def prepare(choice: Mapping[str, Any]) -> PreparedModel:
    """The model of a choice that came as plain data; see `ModelChoice.as_data`."""
    return ModelChoice(**{**choice, "folder": Path(choice["folder"]) if choice["folder"] else None}).prepare()
