"""Tensors in files: which file holds which tensor, of what shape, and reading them one at a time.

Safetensors shards, alone or behind an index, and plain torch archives (`weights_only`). Everything is checked against
what the modules expect before the first weight is read, so nothing is ever half loaded.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import NextStepError, damaged
from . import gguf_file
from .documents import INDEX_NAME, Documents

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # as users call them
SINGLE_NAME = "model.safetensors"
MAX_NAMES_SHOWN = 8

Shape: TypeAlias = tuple[int, ...]
Place: TypeAlias = tuple[Path, str]  # a file, and the name in it


@dataclass(frozen=True)
class TensorFiles:
    """Where each tensor lies and which shape it has, by the name that the modules use.

    A tensor that lies in several places is their concatenation along the first axis.
    """

    where: str
    locations: dict[str, tuple[Place, ...]]
    shapes: dict[str, Shape]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn every way in which a weights file can be broken into one sentence."""
    try:
        yield
    except FileNotFoundError:
        raise NextStepError(f"{path} is missing. Download the checkpoint again; finished files are kept.") from None
    except (
        SafetensorError,
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as e:
        if isinstance(e, NextStepError):
            raise
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise damaged(path, reason) from None


Tensors: TypeAlias = Callable[[str], Tensor]  # from a name in a file to its tensor


@dataclass(frozen=True)
class Reader:
    """How one kind of weights file is read. `recipe` names the quantization nearest to what a file holds, if any."""

    shapes: Callable[[Path], dict[str, Shape]]
    open: Callable[[Path], AbstractContextManager[Tensors]]
    recipe: Callable[[Path], str | None] = lambda path: None
    our_name: Callable[[str], str] = lambda name: name.removeprefix("model.")


def _safetensors_shapes(path: Path) -> dict[str, Shape]:
    if not path.is_file():
        raise FileNotFoundError
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Tensors]:
    with safe_open(path, framework="pt") as file:
        yield file.get_tensor


def _read_torch_archive(path: Path) -> dict[str, Tensor]:
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise NextStepError(f"{path} is not a plain dictionary of tensors, so it is not a NextStep weights file.")
    return state


def _torch_archive_shapes(path: Path) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in _read_torch_archive(path).items()}


@contextmanager
def _open_torch_archive(path: Path) -> Iterator[Tensors]:
    yield _read_torch_archive(path).__getitem__


@contextmanager
def _open_gguf(path: Path) -> Iterator[Tensors]:
    yield gguf_file.open_tensors(path)


_SAFETENSORS = Reader(_safetensors_shapes, _open_safetensors)
READERS: dict[str, Reader] = {
    ".safetensors": _SAFETENSORS,
    ".sft": _SAFETENSORS,
    ".pt": Reader(_torch_archive_shapes, _open_torch_archive),
    gguf_file.SUFFIX: Reader(gguf_file.shapes, _open_gguf, gguf_file.nearest_recipe, gguf_file.our_name),
}


def reader_of(path: Path) -> Reader:
    """The reader for a file's kind; NextStepError for a kind that holds no weights."""
    if path.suffix not in READERS:
        raise NextStepError(f"{path} is not a weights file; expected one that ends in {', '.join(READERS)}.")
    return READERS[path.suffix]


def _shapes(path: Path) -> dict[str, Shape]:
    with _readable(path):
        return reader_of(path).shapes(path)


def find_model_files(path: Path) -> TensorFiles:
    """Tensor locations of a checkpoint: a folder (index with shards, or one `model.safetensors`) or one file.

    A GGUF file is completed from the folder it lies in. NextStepError names an absent or unreadable shard, and a tensor
    that the index promises and its shard lacks.
    """
    if path.suffix == gguf_file.SUFFIX:
        return _with_gguf(path)
    if path.is_file():
        return find_tensors(path)
    index = path / INDEX_NAME
    if not index.is_file():
        if (path / SINGLE_NAME).is_file():
            return find_model_files(path / SINGLE_NAME)
        raise NextStepError(f"{path} holds neither {INDEX_NAME} nor {SINGLE_NAME}: the weights are missing.")
    weight_map = Documents(path).read(INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise NextStepError(f"{index} has no `weight_map` from tensor to file. Download the file again.")
    shards: dict[Path, dict[str, Shape]] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise NextStepError(f"{index} points outside its folder ({name!r}). Do not use this checkpoint.")
        shards[path / name] = _shapes(path / name)
    for tensor, name in weight_map.items():
        if tensor not in shards[path / name]:
            raise NextStepError(f"{path / name} lacks `{tensor}`, which {INDEX_NAME} says it holds.")
    return _from_shapes(path, shards)


def _with_gguf(path: Path) -> TensorFiles:
    has_weights = any((path.parent / name).is_file() for name in (INDEX_NAME, SINGLE_NAME))
    beside = find_model_files(path.parent) if has_weights else TensorFiles("", {}, {})
    held = find_tensors(path)
    return TensorFiles(str(path), beside.locations | held.locations, beside.shapes | held.shapes)


def _from_shapes(where: Path, shards: Mapping[Path, Mapping[str, Shape]]) -> TensorFiles:
    locations: dict[str, tuple[Place, ...]] = {}
    shapes: dict[str, Shape] = {}
    for file, held in shards.items():
        our_name = reader_of(file).our_name
        locations |= {our_name(name): ((file, name),) for name in held}
        shapes |= {our_name(name): shape for name, shape in held.items()}
    return TensorFiles(str(where), locations, shapes)


def find_tensors(path: Path) -> TensorFiles:
    """Tensor locations of one file of any kind in READERS."""
    return _from_shapes(path, {path: _shapes(path)})


def check_complete(files: TensorFiles, expected: Mapping[str, Shape], optional: Iterable[str]) -> None:
    """One NextStepError that lists every missing, unexpected and misshapen tensor of `files`."""
    optional = set(optional)
    missing = [n for n in expected if n not in files.shapes and n not in optional]
    unexpected = [n for n in files.shapes if n not in expected and n not in optional]
    misshapen = [
        f"{n} is {list(files.shapes[n])} in {files.locations[n][0][0].name}, the config asks for {list(shape)}"
        for n, shape in expected.items()
        if n in files.shapes and files.shapes[n] != tuple(shape)
    ]
    unexpected = [f"{n} in {files.locations[n][0][0].name}" for n in unexpected]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:MAX_NAMES_SHOWN])}{' ...' if len(names) > MAX_NAMES_SHOWN else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of a wrong shape", misshapen))
        if names
    ]
    if problems:
        raise NextStepError(
            f"The tensors in {files.where} do not fit its config.json ({'; '.join(problems)}). "
            "Check that weights and config belong to the same checkpoint, or download it again."
        )


def read_tensors(
    files: TensorFiles,
    names: Iterable[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    keep: Container[str] = (),
    where: Mapping[str, torch.device | str] = MappingProxyType({}),
) -> Iterator[tuple[str, Tensor]]:
    """Read tensors by name, each moved to its device and dtype before the next is touched.

    Those of `keep` keep their dtype, and those of `where` go to the device that is named there instead.
    On the CPU in the file's own dtype, those that lie in one place stay views of the memory-mapped file.
    """
    order = {path: i for i, path in enumerate(dict.fromkeys(p for n in names for p, _ in files.locations[n]))}
    names = sorted(names, key=lambda n: max(order[path] for path, _ in files.locations[n]))
    last_use = {path: name for name in names for path, _ in files.locations[name]}
    with _OpenFiles() as opened:
        for name in names:
            to = None if name in keep else dtype
            yield name, _assemble(opened, files.locations[name], files.shapes[name], where.get(name, device), to)
            opened.close([path for path, _ in files.locations[name] if last_use[path] == name])


def _assemble(
    opened: _OpenFiles, places: tuple[Place, ...], shape: Shape, device: torch.device | str, dtype: torch.dtype | None
) -> Tensor:
    first = opened.read(*places[0])
    to = dtype if first.is_floating_point() else None
    if len(places) == 1:
        return first.to(device=device, dtype=to)
    whole = torch.empty(shape, device=device, dtype=to or first.dtype)
    whole[: len(first)] = first
    row = len(first)
    del first  # one part in memory at a time
    for place in places[1:]:
        part = opened.read(*place)
        whole[row : row + len(part)] = part
        row += len(part)
    return whole


class _OpenFiles:
    """Weights files, opened when the first tensor is read and closed when they are told to."""

    def __init__(self) -> None:
        self._stacks: dict[Path, ExitStack] = {}
        self._tensors: dict[Path, Tensors] = {}

    def read(self, path: Path, name: str) -> Tensor:
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
