"""Tensors in files: which file holds which tensor, of what shape, and reading them one at a time.

Safetensors shards, alone or behind an index, and plain torch archives (`weights_only`). Everything is checked against
what the modules expect before the first weight is read, so nothing is ever half loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import NextStepError, damaged, is_out_of_memory, plainly, shown
from ..runtime.interrupt import Check, go_on
from . import gguf_file, torch_file
from .documents import INDEX_NAME, Documents, check_header
from .files import check_regular, is_file

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # as users call them
SINGLE_NAME = "model.safetensors"
MAX_NAMES_SHOWN = 8
PIECE = 1 << 26  # bytes that are copied without looking up
MAX_SHARDS = 1_000  # of one index; the published checkpoints have up to a dozen
MAX_FILE_NAME = 255  # characters; no file system takes more
SMALL = 1 << 20  # numbers; norms, biases and scales have fewer

# How safetensors calls what weights are made of; other kinds of numbers are none.
STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
}

Shape: TypeAlias = tuple[int, ...]
Place: TypeAlias = tuple[Path, str]  # a file, and the name in it


@dataclass(frozen=True)
class Derived:
    """A tensor that is computed from others in files."""

    places: tuple[Place, ...]
    make: Callable[..., Tensor]


@dataclass(frozen=True)
class Slice:
    """Of a tensor in a file, what lies from `start` to `stop` along an axis; nothing else of it is read."""

    place: Place
    axis: int
    start: int
    stop: int


Source: TypeAlias = Place | Derived | Slice


def places_of(sources: Iterable[Source]) -> Iterator[Place]:
    """Every place that is read for these sources."""
    for source in sources:
        if isinstance(source, Slice):
            yield source.place
        else:
            yield from source.places if isinstance(source, Derived) else (source,)


@dataclass(frozen=True)
class TensorFiles:
    """Where each tensor lies, which shape it has and of which dtype it is, by the name that the modules use.

    A tensor that has several sources is their concatenation along the axis of its rows. A dtype is None where it is
    none that weights can have.
    """

    where: str
    locations: dict[str, tuple[Source, ...]]
    shapes: dict[str, Shape]
    dtypes: dict[str, torch.dtype | None] = field(default_factory=dict)

    @property
    def paths(self) -> set[Path]:
        """The files in which the tensors lie."""
        return {path for sources in self.locations.values() for path, _ in places_of(sources)}

    def path_of(self, name: str) -> Path:
        """The first file in which a tensor lies."""
        return next(places_of(self.locations[name]))[0]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn every way in which a weights file can be broken into one sentence."""
    try:
        yield
    except FileNotFoundError:
        raise NextStepError(
            "{path} is missing. Download the checkpoint again; finished files are kept.", path=path
        ) from None
    except NextStepError:
        raise
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        if is_out_of_memory(error):  # the file may well be sound
            raise
        raise damaged(path, error) from None


Lying: TypeAlias = "Tensor | gguf_file.Blocks"  # a tensor, or rows that become one when they are asked for
Tensors: TypeAlias = Callable[[str], Lying]  # from a name in a file to what it holds


Held: TypeAlias = tuple[Shape, "torch.dtype | None"]


@dataclass(frozen=True)
class Reader:
    """How one kind of weights file is read. `held` gives shape and dtype of every tensor by its name in the file;
    `recipe` names the quantization nearest to what a file holds, if any."""

    held: Callable[[Path], dict[str, Held]]
    open: Callable[[Path], AbstractContextManager[Tensors]]
    recipe: Callable[[Path], str | None] = lambda path: None
    our_name: Callable[[str], str] = lambda name: name.removeprefix("model.")


def _safetensors_held(path: Path) -> dict[str, Held]:
    check_header(path)
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        return {name: (tuple(s.get_shape()), STORED_DTYPES.get(s.get_dtype())) for name, s in slices.items()}


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Tensors]:
    with safe_open(path, framework="pt") as file:
        yield file.get_tensor


def _torch_held(path: Path) -> dict[str, Held]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in torch_file.read_torch_file(path).items()}


@contextmanager
def _open_torch_file(path: Path) -> Iterator[Tensors]:
    yield torch_file.read_torch_file(path).__getitem__


@contextmanager
def _open_gguf(path: Path) -> Iterator[Tensors]:
    yield gguf_file.open_tensors(path)


_SAFETENSORS = Reader(_safetensors_held, _open_safetensors)
READERS: dict[str, Reader] = {
    ".safetensors": _SAFETENSORS,
    ".sft": _SAFETENSORS,
    torch_file.SUFFIX: Reader(_torch_held, _open_torch_file),
    gguf_file.SUFFIX: Reader(gguf_file.held, _open_gguf, gguf_file.nearest_recipe, gguf_file.our_name),
}


def reader_of(path: Path) -> Reader:
    """The reader for a file's kind; NextStepError for a kind that holds no weights."""
    if path.suffix not in READERS:
        raise NextStepError(
            "{path} is not a weights file; expected one that ends in {endings}.", path=path, endings=", ".join(READERS)
        )
    return READERS[path.suffix]


def _held(path: Path) -> dict[str, Held]:
    with _readable(path):
        check_regular(path)
        return reader_of(path).held(path)


def find_model_files(path: Path) -> TensorFiles:
    """Tensor locations of a checkpoint: a folder (index with shards, or one `model.safetensors`) or one file.

    A GGUF file is completed from the folder it lies in. NextStepError names an absent or unreadable shard, and a tensor
    that the index promises and its shard lacks.
    """
    if path.suffix == gguf_file.SUFFIX:
        return _with_gguf(path)
    if is_file(path):
        return find_tensors(path)
    index = path / INDEX_NAME
    if not is_file(index):
        if is_file(path / SINGLE_NAME):
            return find_model_files(path / SINGLE_NAME)
        raise NextStepError(
            "{path} holds neither {index} nor {single}: the weights are missing.",
            path=path,
            index=INDEX_NAME,
            single=SINGLE_NAME,
        )
    weight_map = Documents(path).read(INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise NextStepError("{index} has no `weight_map` from tensor to file. Download the file again.", index=index)
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_SHARDS:
        raise NextStepError(
            "{index} names {count:,} files; at most {most:,} are allowed. Download it again.",
            index=index,
            count=len(names),
            most=MAX_SHARDS,
        )
    for name in names:
        if Path(name).name != name or not name.isprintable() or len(name) > MAX_FILE_NAME:
            raise NextStepError(
                "{index} points outside its folder ({name}). Do not use this checkpoint.", index=index, name=shown(name)
            )
    shards = {path / name: _held(path / name) for name in names}
    for tensor, name in weight_map.items():
        if tensor not in shards[path / name]:
            raise NextStepError(
                "{file} lacks {tensor}, which {index} says it holds.",
                file=path / name,
                tensor=shown(tensor),
                index=INDEX_NAME,
            )
    return _from_held(path, shards)


def _with_gguf(path: Path) -> TensorFiles:
    has_weights = any(is_file(path.parent / name) for name in (INDEX_NAME, SINGLE_NAME))
    beside = find_model_files(path.parent) if has_weights else TensorFiles("", {}, {})
    held = find_tensors(path)
    return TensorFiles(
        str(path),
        beside.locations | held.locations,
        beside.shapes | held.shapes,
        beside.dtypes | held.dtypes,
    )


def _from_held(where: Path, shards: Mapping[Path, Mapping[str, Held]]) -> TensorFiles:
    locations: dict[str, tuple[Source, ...]] = {}
    shapes: dict[str, Shape] = {}
    dtypes: dict[str, torch.dtype | None] = {}
    for file, held in shards.items():
        our_name = reader_of(file).our_name
        locations |= {our_name(name): ((file, name),) for name in held}
        shapes |= {our_name(name): shape for name, (shape, _) in held.items()}
        dtypes |= {our_name(name): dtype for name, (_, dtype) in held.items()}
    return TensorFiles(str(where), locations, shapes, dtypes)


def find_tensors(path: Path) -> TensorFiles:
    """Tensor locations of one file of any kind in READERS."""
    return _from_held(path, {path: _held(path)})


def check_complete(
    files: TensorFiles,
    expected: Mapping[str, Shape],
    optional: Iterable[str],
    stored: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> None:
    """One NextStepError that lists every tensor of `files` that is missing, unexpected, misshapen or of a wrong dtype.

    Those of `stored` have exactly the dtype that is named there, all others are floats.
    """
    optional = set(optional)
    held = [name for name in expected if name in files.shapes]
    missing = [name for name in expected if name not in files.shapes and name not in optional]
    unexpected = [
        f"{plainly(name)} in {_file(files, name)}"
        for name in files.shapes
        if name not in expected and name not in optional
    ]
    misshapen = [
        f"{name} is {list(files.shapes[name])} in {_file(files, name)}, the config asks for {list(expected[name])}"
        for name in held
        if files.shapes[name] != tuple(expected[name])
    ]
    mistyped = [f"{name} in {_file(files, name)}" for name in held if not _fits_dtype(files, name, stored.get(name))]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:MAX_NAMES_SHOWN])}{' ...' if len(names) > MAX_NAMES_SHOWN else ''}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of a wrong shape", misshapen),
            ("of a wrong dtype", mistyped),
        )
        if names
    ]
    if problems:
        raise NextStepError(
            "The tensors in {where} do not fit its config.json ({problems}). Check that weights and config "
            "belong to the same checkpoint, or download it again.",
            where=files.where,
            problems="; ".join(problems),
        )


def _file(files: TensorFiles, name: str) -> str:
    return files.path_of(name).name


def _fits_dtype(files: TensorFiles, name: str, wanted: torch.dtype | None) -> bool:
    held = files.dtypes.get(name, torch.float32)  # of files whose dtypes nobody asked for
    return held is not None and (held.is_floating_point if wanted is None else held == wanted)


def read_tensors(
    files: TensorFiles,
    names: Iterable[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    keep: Container[str] = (),
    where: Mapping[str, torch.device | str] = MappingProxyType({}),
    check: Check = go_on,
) -> Iterator[tuple[str, Tensor]]:
    """Read tensors by name, each moved to its device and dtype before the next is touched.

    Those of `keep` keep their dtype, and those of `where` go to the device that is named there instead.
    On the CPU in the file's own dtype, those that lie in one place stay views of the memory-mapped file. `check` is
    called between the pieces of what is copied and may raise to stop.
    NextStepError when one holds NaN or infinite values. Matrices that stay views are not looked at: that would read a
    checkpoint of 30 GB a second time. What they make of a picture is found when its tokens are checked.
    """
    paths = {name: [path for path, _ in places_of(files.locations[name])] for name in names}
    order = {path: i for i, path in enumerate(dict.fromkeys(path for name in paths for path in paths[name]))}
    names = sorted(paths, key=lambda name: max(order[path] for path in paths[name]))
    last_use = {path: name for name in names for path in paths[name]}
    with _OpenFiles() as opened:
        for name in names:
            to = None if name in keep else dtype
            sources, shape = files.locations[name], files.shapes[name]
            tensor, is_view = _assemble(opened, sources, shape, where.get(name, device), to, check)
            if not is_view or tensor.ndim != 2 or tensor.numel() <= SMALL:
                check_finite(name, tensor, files.path_of(name))
            yield name, tensor
            opened.close([path for path in paths[name] if last_use[path] == name])


def _assemble(
    opened: _OpenFiles,
    sources: tuple[Source, ...],
    shape: Shape,
    device: torch.device | str,
    dtype: torch.dtype | None,
    check: Check,
) -> tuple[Tensor, bool]:
    """(a tensor from its sources, whether it is what the file holds and not a copy)."""
    part = opened.read(sources[0])
    to = dtype if dtype is not None and part.dtype.is_floating_point else part.dtype
    stays = (part.device, part.dtype) == (torch.device(device), to)
    if len(sources) == 1 and isinstance(part, Tensor) and (stays or not part.ndim):
        return part.to(device, to), stays and not isinstance(sources[0], Derived)
    whole, axis = torch.empty(shape, device=device, dtype=to), rows_axis(shape)
    first = part.shape[axis]
    _copy(part, whole.narrow(axis, 0, first), check)
    del part  # one part in memory at a time
    for source in sources[1:]:
        part = opened.read(source)
        _copy(part, whole.narrow(axis, first, part.shape[axis]), check)
        first += part.shape[axis]
        del part
    return whole, False


def rows_axis(shape: Shape) -> int:
    """The axis of a tensor that counts a matrix's rows: the first, but for the scales and zeros of int4."""
    return 1 if len(shape) == 3 and shape[-1] == 2 else 0


def read_small(source: Source) -> Tensor:
    """A tensor that says how others are to be read; the caller has looked at its size."""
    with _OpenFiles() as opened:
        held = opened.read(source)
        return (held if isinstance(held, Tensor) else held[:]).clone()


def check_finite(name: str, tensor: Tensor, path: Path) -> None:
    """NextStepError when floats that were read from `path` hold NaN or infinite values."""
    if not tensor.is_floating_point() or _is_finite(tensor):
        return
    raise NextStepError(
        "{path}: {name} holds NaN, or numbers that {dtype} cannot hold. Download the file again, or "
        "choose another dtype.",
        path=path,
        name=plainly(name),
        dtype=str(tensor.dtype).removeprefix("torch."),
    )


def _is_finite(tensor: Tensor) -> bool:
    if tensor.dtype.itemsize == 1:
        return all(bool(piece.to(torch.float16).isfinite().all()) for piece in tensor.flatten().split(SMALL))
    # A sum reads the tensor once and needs no memory. It may overflow where no number did: then they are looked at.
    return bool(tensor.sum().isfinite()) or all(bool(p.isfinite().all()) for p in tensor.flatten().split(SMALL))


def _copy(source: Lying, target: Tensor, check: Check) -> None:
    """Copy `source` to `target`, a piece at a time."""
    rows = max(1, PIECE * len(source) // max(1, source.nbytes))
    for start in range(0, len(source), rows):
        check()
        target[start : start + rows] = source[start : start + rows]


class _OpenFiles:
    """Weights files, opened when the first tensor is read and closed when they are told to."""

    def __init__(self) -> None:
        self._stacks: dict[Path, ExitStack] = {}
        self._tensors: dict[Path, Tensors] = {}

    def read(self, source: Source) -> Lying:
        if isinstance(source, Derived):
            return source.make(*map(self.read, source.places))
        if isinstance(source, Slice):
            whole = self.read(source.place)
            assert isinstance(whole, Tensor), "GGUF files are refused before"
            # The whole is a view of the mapped file, of which only what is copied here, or used later, is read.
            return whole.narrow(source.axis, source.start, source.stop - source.start).contiguous()
        path, name = source
        with _readable(path):
            if path not in self._tensors:
                stack = self._stacks[path] = ExitStack()
                self._tensors[path] = stack.enter_context(reader_of(path).open(path))
            return self._tensors[path](name)

    def close(self, paths: Iterable[Path]) -> None:
        for path in set(paths):
            self._tensors.pop(path, None)
            if path in self._stacks:
                self._stacks.pop(path).close()

    def __enter__(self) -> _OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(list(self._stacks))


def shapes_of(module: nn.Module) -> dict[str, Shape]:
    """Names and shapes of a module's state dict."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
