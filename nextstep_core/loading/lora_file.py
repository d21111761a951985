"""LoRA files: pairs of matrices by the names that trainers give them, checked against the model they are to change.

Read are the layouts of peft (with `adapter_config.json` beside, where there is one), of diffusers, and of kohya's
scripts. What a file is for is told by names and shapes, before any matrix is read.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NextStepError, check_choice, damaged, shown
from ..model.config import NextStepConfig
from ..model.nextstep import NextStepModel
from ..ranges import Range
from ..runtime.interrupt import Check, go_on
from ..runtime.lora import Adapter, LowRank
from ..runtime.memory import check_room
from ..sentences import Sentence
from .checkpoint import TensorFiles, check_finite, find_tensors, read_tensors
from .documents import Documents, file_metadata, parse_object
from .files import check_regular, is_folder, stat_of
from .fusion import parts_of
from .store import ASSETS

log = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".sft")
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_CONFIG = "lora_adapter_metadata"  # of a file of its own, in the file's metadata
RANK = Range(Sentence("The rank"), 1, 4096)
ALPHA = Range("lora_alpha", -1e6, 1e6)
DOWN, UP = ("lora_A", "lora_down", "lora.down"), ("lora_B", "lora_up", "lora.up")
# A layer's name, what the tensor is of it, and peft's name for the adapter where its own call did not save the file.
MATRIX = re.compile(rf"(.+)\.({'|'.join(map(re.escape, DOWN + UP))})(?:\.[^.]+)?\.weight")
ALPHA_NAME = re.compile(r"(.+)\.alpha")
# What else is called an adapter of low rank, by what its tensors' names hold.
OTHER_KINDS = {
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".oft_": "OFT",
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
}
# For what models files are made that are not for this one, by what their layers' names hold.
OTHER_MODELS = {
    "double_blocks": "Flux",
    "single_blocks": "Flux",
    "single_transformer_blocks": "Flux",
    "down_blocks": "Stable Diffusion",
    "input_blocks": "Stable Diffusion",
    "lora_te": "Stable Diffusion",
    "joint_blocks": "Stable Diffusion 3",
    "cross_attn": "Wan",
    "img_mlp": "Qwen-Image",
}
CHANGES_WEIGHTS = ("pissa", "olora", "corda", "loftq")  # ways to begin that leave other weights than those in the model
DOTTED = ("base_model.", "model.", "module.", "transformer.", "diffusion_model.", "unet.")
KOHYA = ("lora_unet_", "lora_transformer_", "lora_", "lycoris_")
HASH_DIGITS = 12  # of the sum that sites know a LoRA file by
BLOCK = 1 << 24  # bytes that are summed up without looking up
MOST_NAMED = 4
EMBEDDED_LORAS = {"night": ASSETS / "night"}  # made for the embedded model, as `training/lora.py` says


@dataclass(frozen=True)
class Slot:
    """A linear layer as trainers know it, `rows` x `columns`: the rows from `start` on of the model's `layer`, of so
    many `in_all`."""

    layer: str
    start: int
    rows: int
    columns: int
    in_all: int


@dataclass(frozen=True)
class Pair:
    """The two matrices of one layer, by their names in the file: down (rank, columns) and up (rows, rank)."""

    down: str
    up: str
    rank: int
    rows: int
    columns: int
    alpha: str | None = None


@dataclass(frozen=True)
class LoraFile:
    """A file that holds a LoRA, of whatever model. Nothing of it is read but its header and what lies beside.

    `pairs` are by the layers' names in the file, `others` are tensors of no pair, and `config` is what peft says.
    """

    path: Path
    files: TensorFiles
    pairs: Mapping[str, Pair]
    others: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What users call it."""
        return self.path.parent.name if self.path.name == PEFT_FILE else self.path.stem

    def fitted(self, config: NextStepConfig) -> FittedLora:
        """The file for a model of this shape; NextStepError where it is for another one."""
        slots = slots_of(config)
        by_kohya = {name.replace(".", "_"): name for name in slots}
        found: dict[str, Pair] = {}
        unused = [*self.others]
        for stated, pair in self.pairs.items():
            name = _layer_name(stated, slots, by_kohya)
            if name is None:
                unused.append(stated)
                continue
            slot = slots[name]
            if (pair.rows, pair.columns) != (slot.rows, slot.columns):
                raise NextStepError(
                    "{path} is a LoRA for another model: its {name} is for a layer of {rows} x {columns}, and this "
                    "model's has {own_rows} x {own_columns}.",
                    path=self.path,
                    name=shown(stated),
                    rows=pair.rows,
                    columns=pair.columns,
                    own_rows=slot.rows,
                    own_columns=slot.columns,
                )
            if name in found:
                raise NextStepError(
                    "{path} changes {name} twice, under two names. Export it again.", path=self.path, name=name
                )
            found[name] = pair
        if not found:
            raise self._foreign()
        if unused:
            log.warning("NextStep: %s", unused_in_words(self.name, unused))
        return FittedLora(self, {name: slots[name] for name in found}, found, tuple(unused))

    def _foreign(self) -> NextStepError:
        names = [*self.pairs]
        kind = next((kind for sign, kind in OTHER_MODELS.items() if any(sign in name for name in names)), None)
        if kind is not None:
            return NextStepError(
                "{path} is a LoRA for {kind} (its layers are called {names}). Choose one that was trained on "
                "NextStep-1.",
                path=self.path,
                kind=kind,
                names=_some(names),
            )
        return NextStepError(
            "{path} is a LoRA for another model: no layer of this one is called {names}. Choose one that was trained "
            "on NextStep-1.",
            path=self.path,
            names=_some(names),
        )


@dataclass(frozen=True)
class FittedLora:
    """A file whose `pairs` change these layers of the model, by their published names. `unused` fits nothing."""

    file: LoraFile
    slots: Mapping[str, Slot]
    pairs: Mapping[str, Pair]
    unused: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Changes when the files change that it is read from; reads none of them."""
        return fingerprint(self.file.path)

    def read(self, check: Check = go_on) -> Adapter:
        """The matrices on the host, as the model's layers take them; `check` may raise to stop.

        NextStepError for one that holds NaN or infinite values.
        """
        path, names = self.file.path, [n for pair in self.pairs.values() for n in (pair.down, pair.up, pair.alpha) if n]
        numbers = sum(math.prod(self.file.files.shapes[name]) for name in names)
        check_room(numbers * torch.float32.itemsize, Sentence("{name}", name=self.file.name))
        tensors: dict[str, Tensor] = {}
        for name, tensor in read_tensors(self.file.files, names, check=check):
            check_finite(name, tensor, path)
            # A copy, because who trains one writes the file again and again.
            tensors[name] = tensor.to(torch.float32 if tensor.dtype.itemsize == 1 else tensor.dtype, copy=True)
        scales = {name: self._scale(name, pair, tensors) for name, pair in self.pairs.items()}
        of_layers: dict[str, list[tuple[Slot, LowRank]]] = {}
        for name, pair in self.pairs.items():
            low = LowRank(tensors[pair.down], tensors[pair.up], torch.full((pair.rank,), scales[name]))
            of_layers.setdefault(self.slots[name].layer, []).append((self.slots[name], low))
        layers = {layer: _joined(own) for layer, own in of_layers.items()}
        header, digest = _sums(path, check)
        stated = sorted(scales.items())
        identity = sha256(f"{header} {digest} {stated}".encode()).hexdigest()
        return Adapter(self.file.name, identity, digest[:HASH_DIGITS], layers, self.unused)

    def _scale(self, name: str, pair: Pair, tensors: Mapping[str, Tensor]) -> float:
        """What the pair counts at strength 1: alpha over the rank, as its trainer meant it."""
        if pair.alpha is not None:
            stated = tensors[pair.alpha]
            return ALPHA.check(float(stated.real)) / pair.rank
        config = self.file.config
        if "lora_alpha" not in config:
            return 1.0
        alpha = next((v for k, v in config["alpha_pattern"].items() if _matches(name, k)), config["lora_alpha"])
        return float(alpha) / (math.sqrt(pair.rank) if config.get("use_rslora") else pair.rank)


def resolve_lora(source: str | Path) -> Path:
    """Where a LoRA lies that a user names: a path, or the name of one that comes with this. NextStepError for what is
    neither."""
    if not isinstance(source, (str, Path)):
        raise NextStepError("The LoRA is {what}. Give a .safetensors file.", what=shown(source))
    with suppress(RuntimeError, OSError, ValueError):  # of a user who is not there, and of what can be no path
        if str(source) and (path := Path(source).expanduser()).exists():
            return path.resolve()
    if str(source) in EMBEDDED_LORAS:
        return EMBEDDED_LORAS[str(source)]
    raise NextStepError("There is no LoRA {name}. Give the path of a .safetensors file.", name=shown(str(source)))


def find_lora(path: Path) -> LoraFile:
    """The LoRA in a file, or in the folder that peft saved one to; NextStepError for what is none, or none that is read
    here."""
    if is_folder(path):
        path = path / PEFT_FILE
    if path.suffix not in SUFFIXES:
        raise NextStepError("{path} is not a LoRA file; expected one that ends in .safetensors.", path=path)
    try:
        check_regular(path)
    except (OSError, ValueError) as error:  # a ValueError for what can be no path
        raise NextStepError(
            "{path} is not readable ({reason}).", path=path, reason=getattr(error, "strerror", None) or error
        ) from None
    files = find_tensors(path)
    matrices = {name: found for name in files.shapes if (found := MATRIX.fullmatch(name))}
    kind = next((kind for sign, kind in OTHER_KINDS.items() if any(sign in name for name in files.shapes)), None)
    if kind is not None:
        raise NextStepError("{path} is a {kind}, which is not read: only plain LoRA is.", path=path, kind=kind)
    if not matrices:
        raise NextStepError(
            "{path} is no LoRA: it holds no pairs of matrices, but {names}.", path=path, names=_some(files.shapes)
        )
    halves: dict[str, dict[bool, str]] = {}
    for name, found in matrices.items():
        own = halves.setdefault(found[1], {})
        if (is_up := found[2] in UP) in own:
            raise NextStepError(
                "{path} changes {name} twice, under two names. Export it again.", path=path, name=found[1]
            )
        own[is_up] = name
    alphas = {found[1]: name for name in files.shapes if (found := ALPHA_NAME.fullmatch(name))}
    pairs = {name: _pair(path, files, name, own, alphas.get(name)) for name, own in halves.items()}
    used = {name for pair in pairs.values() for name in (pair.down, pair.up, pair.alpha)}
    others = tuple(name for name in files.shapes if name not in used)
    return LoraFile(path, files, pairs, others, _config(path, pairs))


def read_lora(path: Path, config: NextStepConfig, check: Check = go_on) -> Adapter:
    """The LoRA in a file for a model of this shape; NextStepError where there is none."""
    return find_lora(path).fitted(config).read(check)


def fingerprint(path: Path) -> str:
    """Changes when the files change that the LoRA at `path` is read from; reads none of them, and raises nothing.

    A hash, as that of a checkpoint is, and for the same reason.
    """
    file = path / PEFT_FILE if is_folder(path) else path
    found = [str(file), *(stat_of(part) for part in (file, file.parent / PEFT_CONFIG))]
    return sha256(json.dumps(found).encode(errors="surrogatepass")).hexdigest()


def slots_of(config: NextStepConfig) -> dict[str, Slot]:
    """Every linear layer of the model, by its published name."""
    slots: dict[str, Slot] = {}
    for layer, module in NextStepModel(config, device="meta").named_modules():
        if isinstance(module, nn.Linear):
            start, ending = 0, ".weight"
            in_all, columns = module.weight.shape
            for part, rows in (parts_of(layer + ending, config) or {layer + ending: in_all}).items():
                slots[part.removesuffix(ending)] = Slot(layer, start, rows, columns, in_all)
                start += rows
    return slots


def unused_in_words(name: str, unused: Iterable[str]) -> Sentence:
    """What the user is told of tensors that fit no layer."""
    names = [*unused]
    return Sentence(
        "{count} of what LoRA {name} holds fits no layer and is not used: {names}.",
        count=len(names),
        name=name,
        names=_some(names),
    )


def _some(names: Iterable[str]) -> str:
    """A few names of a file, as a message shows them."""
    names = [*names]
    return ", ".join(str(shown(name)) for name in names[:MOST_NAMED]) + (" ..." if len(names) > MOST_NAMED else "")


def _pair(path: Path, files: TensorFiles, name: str, own: Mapping[bool, str], alpha: str | None) -> Pair:
    if len(own) < 2:
        lacks = DOWN[0] if True in own else UP[0]
        raise NextStepError(
            "{path}: {name} has no {half}. Download or export the file again.", path=path, name=shown(name), half=lacks
        )
    down, up = (files.shapes[own[is_up]] for is_up in (False, True))
    fitting = len(down) == len(up) == 2 and down[0] == up[1] and 0 not in (*down, *up)
    dtypes = [files.dtypes[own[is_up]] for is_up in (False, True)]
    if not fitting or not all(dtype is not None and dtype.is_floating_point for dtype in dtypes):
        raise NextStepError(
            "{path}: the two matrices of {name} do not go together ({down} and {up}). Download or export the file "
            "again.",
            path=path,
            name=shown(name),
            down=_in_short(down, dtypes[0]),
            up=_in_short(up, dtypes[1]),
        )
    if alpha is not None and math.prod(files.shapes[alpha]) != 1:
        raise NextStepError(
            "{path}: {name} is no single number. Download or export the file again.", path=path, name=shown(alpha)
        )
    return Pair(own[False], own[True], RANK.check(down[0]), up[0], down[1], alpha)


def _in_short(shape: Iterable[int], dtype: torch.dtype | None) -> str:
    return f"{' x '.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"


def _config(path: Path, pairs: Mapping[str, Pair]) -> Mapping[str, Any]:
    """What peft says of a file, checked; empty where nothing does, or where the file says it by itself."""
    if any(pair.alpha is not None for pair in pairs.values()):
        return {}
    documents = Documents(path.parent)
    if documents.has(PEFT_CONFIG):
        config, where = documents.read(PEFT_CONFIG), documents.where(PEFT_CONFIG)
    else:
        text, where = file_metadata(path).get(DIFFUSERS_CONFIG), Sentence("{file}", file=path)
        stated = {} if text is None else parse_object(text, where)
        config = {key.partition(".")[2]: value for key, value in stated.items()}
    if not config:
        return {}
    check_choice(Sentence("{where}: {name}", where=where, name="peft_type"), config.get("peft_type", "LORA"), ["LORA"])
    begun = config.get("init_lora_weights")
    if config.get("use_dora") or (isinstance(begun, str) and begun.startswith(CHANGES_WEIGHTS)):
        kind = "DoRA" if config.get("use_dora") else str(shown(begun))
        raise NextStepError("{path} is a {kind}, which is not read: only plain LoRA is.", path=path, kind=kind)
    patterns = [config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
    if not all(isinstance(pattern, dict) for pattern in patterns):
        raise damaged(path.parent / PEFT_CONFIG, "rank_pattern and alpha_pattern are objects")
    for alpha in (config.get("lora_alpha", 1), *patterns[1].values()):
        ALPHA.check(alpha)
    ranks = {pair.rank for pair in pairs.values()}
    if "r" in config and not patterns[0] and ranks != {config["r"]}:
        raise NextStepError(
            "{where} says rank {stated}, and {file} has {rank}: they do not belong together. Put the file into a "
            "folder of its own, or get both again.",
            where=where,
            stated=shown(config["r"]),
            file=path.name,
            rank=", ".join(map(str, sorted(ranks)[:MOST_NAMED])),
        )
    return {**config, "alpha_pattern": patterns[1]}


def _layer_name(stated: str, slots: Mapping[str, Slot], by_kohya: Mapping[str, str]) -> str | None:
    """The published name of a layer that a file calls so; None where there is none."""
    name, before = stated, None
    while name != before and name not in slots:
        before = name
        name = next((name.removeprefix(p) for p in DOTTED if name.startswith(p)), name)
    if name in slots:
        return name
    flat = next((stated.removeprefix(p) for p in KOHYA if stated.startswith(p)), stated)
    return by_kohya.get(flat) or by_kohya.get(flat.removeprefix("model_"))


def _matches(name: str, key: str) -> bool:
    """Whether a pattern of peft's means a layer; it means a name, or the end of one."""
    return name == key or name.endswith(f".{key}")


def _joined(own: list[tuple[Slot, LowRank]]) -> LowRank:
    """The parts of one layer as one: each part's ranks beside the others', and its rows where they belong."""
    if len(own) == 1 and own[0][0].rows == own[0][0].in_all:
        return own[0][1]
    dtype = own[0][1].up.dtype
    for _, low in own:
        dtype = torch.promote_types(torch.promote_types(dtype, low.up.dtype), low.down.dtype)
    up = torch.zeros(own[0][0].in_all, sum(len(low.scale) for _, low in own), dtype=dtype)
    rank = 0
    for slot, low in own:
        up[slot.start : slot.start + slot.rows, rank : rank + len(low.scale)] = low.up
        rank += len(low.scale)
    return LowRank(torch.cat([low.down.to(dtype) for _, low in own]), up, torch.cat([low.scale for _, low in own]))


def _sums(path: Path, check: Check) -> tuple[str, str]:
    """Checksums of a file's header, and of all behind it, by which sites know a LoRA."""
    header, rest = sha256(), sha256()
    with path.open("rb") as file:
        start = file.read(8)
        header.update(start + file.read(int.from_bytes(start, "little")))
        while block := file.read(BLOCK):
            check()
            rest.update(block)
    return header.hexdigest(), rest.hexdigest()
