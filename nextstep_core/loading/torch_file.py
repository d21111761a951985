"""Plain torch archives (`.pt`): a dictionary of dense tensors, and nothing else, before PyTorch unpickles anything.

`weights_only` keeps code out. It does not keep out what a few bytes may ask for: compressed members, a byte array of
any length, tensors whose strides of 0 make terabytes of one number, keys that take years to hash.
"""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from ..errors import NextStepError, damaged, is_out_of_memory, shown
from .documents import MAX_TENSORS
from .files import check_regular
from .torch_pickle import check_pickle

SUFFIX = ".pt"
# The pickle names each tensor in some hundred bytes; the directory of the archive each of its members.
MAX_PICKLE, MAX_DIRECTORY = 2 << 20, 32 << 20
END, END_64 = b"PK\x05\x06", b"PK\x06\x06"  # what the ends of an archive's directory begin with


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """The tensors of an archive by name, as views of the mapped file; NextStepError for anything else."""
    check_regular(path)
    try:
        _check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (NextStepError, FileNotFoundError):
        raise
    except Exception as error:  # what unpickling raises is whatever the pickle makes it
        if is_out_of_memory(error):  # the file may well be sound
            raise
        raise damaged(path, error) from None
    if not isinstance(state, dict) or not all(type(v) in (Tensor, torch.nn.Parameter) for v in state.values()):
        raise NextStepError(
            "{path} is not a plain dictionary of tensors, so it is not a NextStep weights file.", path=path
        )
    _check_tensors(path, state)
    return state


def _check_archive(path: Path) -> None:
    """Members are stored as they are and within the file, and the pickle names nothing but tensors."""
    size = path.stat().st_size
    if _directory_bytes(path) > MAX_DIRECTORY:
        raise damaged(path, f"a table of contents of more than {MAX_DIRECTORY:,} bytes")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size for m in members):
            raise damaged(path, "compressed members, which PyTorch never writes")
        if sum(member.file_size for member in members) > size:
            raise damaged(path, "overlapping members")
        (pickle,) = (m for m in members if m.filename.endswith("/data.pkl")) if members else (None,)
        if pickle is None or pickle.file_size > MAX_PICKLE:
            raise damaged(path, f"its list of tensors is missing, or larger than {MAX_PICKLE:,} bytes")
        text = archive.read(pickle)
    check_pickle(text)


def _directory_bytes(path: Path) -> int:
    """Length of an archive's directory as its last bytes tell it."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16) - 128))
        tail = file.read()
    end, end_64 = tail.rfind(END), tail.rfind(END_64)
    if end < 0:
        raise zipfile.BadZipFile("it does not end like an archive")
    length: int = struct.unpack_from("<I", tail, end + 12)[0]
    if end_64 >= 0:
        length = max(struct.unpack_from("<Q", tail, end_64 + 40)[0], 0 if length == 0xFFFFFFFF else length)
    return length


def _check_tensors(path: Path, state: dict[str, Tensor]) -> None:
    """Dense tensors under names, with memory of their own in the file."""
    if len(state) > MAX_TENSORS or not all(isinstance(name, str) for name in state):
        raise damaged(path, "too many tensors, or names that are not text")
    needed = 0
    for name, tensor in state.items():
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
            raise damaged(path, f"{shown(name)} is not a plain tensor")
        needed += tensor.numel() * tensor.element_size()
    if needed > os.stat(path).st_size:
        raise damaged(path, f"tensors of {needed:,} bytes in a file of {os.stat(path).st_size:,}")
