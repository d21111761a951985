"""One `.safetensors` file that holds a checkpoint whole: weights in any format, config and tokenizer in its metadata.

    nextstep convert NextStep-1.1 nextstep-1.1-int8.safetensors --quantization int8
    nextstep convert NextStep-1.1 nextstep-vae.safetensors --vae

Tensors are converted and written one at a time, so a checkpoint of any size needs the memory of its largest matrix.
"""

from __future__ import annotations

import errno
import glob
import json
import math
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from ..errors import NextStepError, not_written, shown
from ..runtime.interrupt import Check, go_on
from ..runtime.quantization import Held, Storage
from ..runtime.quantization.products import WEIGHT_ALIGNMENT
from ..sentences import Sentence
from .build import ModelPlan, find_vae, load_vae_state
from .checkpoint import DTYPES, read_tensors
from .documents import CARRIED, CONFIG, IN_LAYOUT, MARK, NAME, QUANTIZATION, VERSION
from .locks import held

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}

Report = Callable[[int, int], None]
Reading = Callable[[torch.dtype, "Report | None", Check], Iterable[tuple[str, Tensor]]]
PART = ".part"  # ends the name of a file that is being written
BLOCK = 1 << 24  # bytes that are written without looking up


class StreamedFile:
    """A safetensors file whose tensors are written one at a time; safetensors' own writer wants all of them at once.

    `like` gives each tensor's shape and dtype (its values are not read). The file appears under its name when whole;
    until then it has another, which no other writer has.
    """

    def __init__(self, path: Path, like: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        self.path, self._part = path, path.with_name(f"{path.name}.{secrets.token_hex(4)}{PART}")
        self._places: dict[str, tuple[int, int]] = {}
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        end = 0
        for name, tensor in sorted(like.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
            start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
            self._places[name] = start, end
            shape = list(tensor.shape)
            header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        # What starts at a multiple of the alignment is multiplied as it lies in the file, without a copy.
        text += b" " * (-(8 + len(text)) % WEIGHT_ALIGNMENT)
        self._data_start = 8 + len(text)
        self.size = self._data_start + end
        self._head = len(text).to_bytes(8, "little") + text

    def write(self, name: str, tensor: Tensor, check: Check = go_on) -> None:
        """Write a tensor to its place; `check` is called before each block and may raise to stop."""
        start, end = self._places.pop(name)
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        if data.nbytes != end - start:
            raise ValueError(f"{name} has {data.nbytes} bytes, {end - start} were announced")
        self._file.seek(self._data_start + start)
        for first in range(0, data.nbytes, BLOCK):
            check()
            self._file.write(data[first : first + BLOCK].data)

    def __enter__(self) -> StreamedFile:
        self._file = self._part.open("xb")
        try:
            self._file.write(self._head)
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        try:
            if failed is None:
                self._file.flush()
                os.fsync(self._file.fileno())  # or a power cut could leave the name without the bytes
            self._file.close()
            if failed is not None:
                return
            if self._places:
                raise ValueError(f"never written: {', '.join(self._places)}")
            os.replace(self._part, self.path)
        finally:
            self._file.close()
            self._part.unlink(missing_ok=True)


def save_model(
    plan: ModelPlan,
    path: Path,
    dtype: torch.dtype,
    work_on: torch.device | str = "cpu",
    report: Report | None = None,
    check: Check = go_on,
    reading: Reading | None = None,
) -> int:
    """Write the planned checkpoint, in the plan's format, to one file at `path`; its size in bytes.

    `reading` takes the place of the plan's own, where its matrices are to be fitted to something. What is not quantized
    is stored in `dtype`. `report` gets (tensors done, of how many) and may raise to stop; `check` may too, and is
    called between the pieces of a tensor. NextStepError when the file cannot be written, or another run is writing it.
    """
    if isinstance(plan.recipe, Held):
        raise quantized_already(plan.files.where, plan.recipe)
    if plan.stored:
        raise NextStepError("{where} is already a single file of this kind. Copy it instead.", where=plan.files.where)
    embedding = read_tensors(plan.files, plan.text_embedding_names, dtype=dtype, check=check)
    read = plan.read_model("cpu", dtype, report, work_on, check) if reading is None else reading(dtype, report, check)
    tensors = chain(embedding, read)
    return write_file(path, empty_like(plan, dtype), marks_of(plan), tensors, check)


def quantized_already(where: str, storage: Storage) -> NextStepError:
    """The refusal to convert what is quantized."""
    return NextStepError(
        "{where} is already quantized to {format}. Convert the original checkpoint.", where=where, format=storage.name
    )


def marks_of(plan: ModelPlan) -> dict[str, str]:
    """The metadata of a planned checkpoint's single file: what it is, and its documents."""
    documents = plan.documents
    marks = {MARK: VERSION, "format": "pt", NAME: documents.name}
    if plan.recipe is not None:
        layout = "" if plan.layout is None else f"{IN_LAYOUT}{plan.layout.name}"
        marks[QUANTIZATION] = f"{plan.recipe.name}{layout}"
    return marks | {name: documents.text(name) for name in CARRIED if documents.has(name)}


def save_vae(vae: Path, path: Path, dtype: torch.dtype) -> int:
    """Write a VAE folder or file to one `.safetensors` with its config in the metadata; its size in bytes."""
    _, documents = find_vae(vae)
    _, state = load_vae_state(vae, dtype)
    return write_file(path, state, {MARK: VERSION, "format": "pt", CONFIG: documents.text(CONFIG)}, state.items())


def write_file(
    path: Path,
    like: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    tensors: Iterable[tuple[str, Tensor]],
    check: Check = go_on,
) -> int:
    """Write `tensors`, of which `like` gives shapes and dtypes, to a safetensors file at `path`; its size in bytes.

    NextStepError when it cannot be written, or another run is writing it.
    """
    _check_name(path)
    file = StreamedFile(path, like, metadata)
    taken = Sentence("Another run is writing {path}. Wait until it has finished, or choose another name.", path=path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with held(path.with_name(f".{path.name}.lock"), taken):
            for left in path.parent.glob(f"{glob.escape(path.name)}.*{PART}"):
                left.unlink()  # by a run that was killed: none is alive, or it would hold the lock
            if file.size > shutil.disk_usage(path.parent).free:
                raise OSError(errno.ENOSPC, "")
            with file:
                for name, tensor in tensors:
                    file.write(name, tensor, check)
    except OSError as error:
        raise not_written(path, error, file.size) from None
    return file.size


def _check_name(path: Path) -> None:
    try:
        possible = path.name and "\0" not in str(path) and os.fsencode(path)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise NextStepError("{name} cannot be the name of a file. Choose another.", name=shown(str(path)))


def empty_like(plan: ModelPlan, dtype: torch.dtype) -> dict[str, Tensor]:
    """Meta tensors of everything that the file will hold."""
    state = plan.empty_model().state_dict()
    stored = {name for name, t in state.items() if t.dtype not in DTYPES.values() or name.endswith(".weight_scale")}
    shapes = {name: plan.files.shapes[name] for name in plan.text_embedding_names}
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    return empty | {name: t if name in stored else t.to(dtype) for name, t in state.items()}


if __name__ == "__main__":
    sys.exit("This command is now: nextstep convert, or python -m nextstep_core convert, without --to.")
