"""Weights files that ask for more than they hold, or for something else than weights; each writes itself to a path."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from pickle import encode_long
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HUGE = 1 << 40


class Called:
    """Pickles as the call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def with_pickle(path: Path, value: object) -> None:
    """A torch archive whose list of tensors is a pickle of `value`."""
    text = io.BytesIO()
    pickle.Pickler(text, protocol=2).dump(value)
    torch.save({"a": torch.zeros(4)}, path)
    rewrite(path, {"data.pkl": text.getvalue()})


def with_code(path: Path, *operations: bytes) -> None:
    """A torch archive whose list of tensors are these operations of a pickle."""
    torch.save({"a": torch.zeros(4)}, path)
    rewrite(path, {"data.pkl": b"\x80\x02" + b"".join(operations) + b"."})


def pairs(depth: int) -> bytes:
    """A tuple of itself twice, of itself twice, ...: quickly written, and hashed in 2**depth steps."""
    return b")" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(depth))


def of_one_hash(count: int) -> bytes:
    """So many numbers that Python's hash cannot tell apart, as keys."""
    keys = (encode_long(n * (2**61 - 1)) for n in range(1, count))
    return b"(" + b"".join(b"\x8a%c%bN" % (len(key), key) for key in keys) + b"u"


def storage(key: bytes) -> bytes:
    """What names a tensor's memory, under this key."""
    return b"(X\x07\0\0\0storagectorch\nFloatStorage\n" + key + b"X\x03\0\0\0cpuK\x04tQ"


def rewrite(path: Path, changes: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Write an archive anew with other members, by the ends of their names, or compressed."""
    with zipfile.ZipFile(path) as archive:
        members = {m.filename: archive.read(m) for m in archive.infolist()}
    for end, data in changes.items():
        (name,) = (name for name in members if name.endswith(end))
        members[name] = data
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def bomb(path: Path) -> None:
    torch.save({"a": torch.zeros(64 << 20, dtype=torch.uint8)}, path)
    rewrite(path, {}, zipfile.ZIP_DEFLATED)


def many_members(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}))
        for number in range(700):
            archive.writestr(f"{number}{'a' * 60_000}", b"")


def shared(path: Path) -> None:
    one = torch.zeros(1 << 20)
    torch.save({str(n): one for n in range(2000)}, path)


PICKLES: dict[str, Callable[[Path], None]] = {
    "a call of the system": lambda path: with_pickle(path, Called(os.system, f"touch {path.parent}/executed")),
    "an evaluation": lambda path: with_pickle(path, Called(eval, f"open({str(path.parent / 'executed')!r}, 'w')")),
    "a byte array": lambda path: with_pickle(path, {"a": Called(bytearray, HUGE)}),
    "a named function": lambda path: with_pickle(path, {"a": os.system}),
    "strides of 0": lambda path: torch.save({"a": torch.zeros(1).expand(1 << 20, 1 << 20)}, path),
    "sparse": lambda path: torch.save(sparse(), path),
    "quantized": lambda path: torch.save({"a": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)}, path),
    "meta": lambda path: torch.save({"a": torch.empty(1 << 20, 1 << 20, device="meta")}, path),
    "one tensor under many names": shared,
    "a key of pairs of pairs": lambda path: with_code(path, b"}", pairs(60), b"K\x01s"),
    "a key deeper than the stack": lambda path: with_code(path, b"})", b"\x85" * 300_000, b"K\x01s"),
    "keys of one hash": lambda path: with_code(path, b"}", of_one_hash(150_000)),
    "a storage of pairs of pairs": lambda path: with_code(path, b"}X\x01\0\0\0a", storage(pairs(60)), b"s"),
    "a dictionary made of pairs of pairs": lambda path: with_code(
        path, b"ccollections\nOrderedDict\n", pairs(60), b"K\x01\x86\x85\x85R"
    ),
    "attributes made of pairs of pairs": lambda path: with_code(
        path, b"ccollections\nOrderedDict\n)R", pairs(60), b"K\x01\x86\x85b"
    ),
    "what is not there": lambda path: with_code(path, b"}K\x01ss"),
    "no tensors": lambda path: torch.save({"a": 1}, path),
    "names that are none": lambda path: torch.save({1: torch.zeros(1)}, path),
    "a list": lambda path: torch.save([torch.zeros(1)], path),
    "a module": lambda path: torch.save(torch.nn.Linear(1, 1), path),
    "compressed": bomb,
    "a directory of megabytes": many_members,
    "a plain pickle": lambda path: path.write_bytes(pickle.dumps(Called(os.system, f"touch {path.parent}/executed"))),
    "the format before archives": lambda path: torch.save({}, path, _use_new_zipfile_serialization=False),
    "an archive of nothing": lambda path: zipfile.ZipFile(path, "w").close(),
    "nothing": lambda path: path.write_bytes(b""),
    "an end alone": lambda path: path.write_bytes(b"PK\5\6" + b"\xff" * 18),
}


def sparse() -> dict[str, Tensor]:
    return {"a": torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (1 << 20, 1 << 20))}


def with_header(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    """A safetensors file of a header as it is, whose stated length may be a lie."""
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


OTHERWISE = rb'"%d":{"dtype":"F32","shape":[0],"data\u005foffsets":[0,0]}'
HEADERS: dict[str, Callable[[Path], None]] = {
    "a header without end": lambda path: with_header(path, b"{}", length=2**63),
    "a header of 99 MB": lambda path: with_header(path, b"{" + b" " * (99 << 20) + b"}"),
    "deep": lambda path: with_header(path, b'{"a":' * 100_000),
    "a hole": lambda path: with_header(path, b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', b"\0" * 8),
    "twice the same bytes": lambda path: with_header(
        path,
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"\0" * 4,
    ),
    "behind the end": lambda path: with_header(path, b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}', b"\0"),
    "another size": lambda path: with_header(
        path, b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}', b"\0" * 4
    ),
    "a size beyond numbers": lambda path: with_header(
        path, b'{"a":{"dtype":"F32","shape":[9223372036854775807,9],"data_offsets":[0,4]}}', b"\0" * 4
    ),
    "tensors whose parts are written in another way": lambda path: with_header(
        path, b"{%b}" % b",".join(OTHERWISE % n for n in range(100_001))
    ),
    "texts about nothing": lambda path: with_header(
        path, b'{"__metadata__":{%b}}' % b",".join(b'"%d":""' % n for n in range(400_000))
    ),
    "axes without end": lambda path: with_header(
        path, b'{"a":{"dtype":"F32","shape":[%b],"data_offsets":[0,0]}}' % b",".join([b"0"] * 1_000_000)
    ),
    "no header": lambda path: path.write_bytes(b"\1\2"),
}


def change(path: Path, name: str, tensor: Tensor) -> None:
    """Write a safetensors file anew with another tensor."""
    save_file(load_file(path) | {name: tensor}, path)
