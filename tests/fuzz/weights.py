"""A good checkpoint with one weights file that is not: safetensors, the VAE's pickle, a single file, a GGUF file."""

from __future__ import annotations

import json
import re
import shutil
import struct
import tempfile
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from random import Random
from zipfile import ZipFile

import torch
from safetensors.torch import load, load_file, save
from torch import Tensor

from nextstep_core.loading.build import plan_model
from nextstep_core.loading.comfy_file import save_for_comfyui
from nextstep_core.loading.documents import CARRIED, CONFIG, MARK, VERSION
from nextstep_core.loading.gguf_file import LLAMA_CPP
from nextstep_core.loading.single_file import save_model, save_vae
from tests.hostile_files import HEADERS, PICKLES, rewrite

from . import good
from .case import Case
from .json_mutation import mutated

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
BYTES = (0, 1, 0x7F, 0x80, 0xFF)
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn)
NUMBERS = (0, 1, 2, 31, 32, 95, 96, 97, 2**16, 2**31, 2**32, 2**40, 2**63, 2**64 - 1)
VALUES = (float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e30, 1e-45, 0.0)

KINDS = ("whole", "int8", "int4", "comfyui-int8-convrot", "comfyui-fp8", "packed")
WHOLE = tuple(f"{kind}.safetensors" for kind in KINDS)  # files that hold a checkpoint alone
PACKED = good.CHECKPOINT.parents[1] / "packed.safetensors"

# Formats that the package writes, and whether under llama.cpp's names: of them one is kept as int4 as it is.
GGUF = {
    "q8.gguf": (("Q8_0",), False),
    "q4.gguf": (("Q4_0", "Q4_1"), True),
    "mixed.gguf": (("Q5_0", "BF16", "Q5_1", "F32", "Q4_0", "F16", "MXFP4"), True),
}
THEIRS = {ours: theirs for theirs, ours in LLAMA_CPP.items()}

Change = Callable[[bytes, Random], "tuple[str, bytes]"]


@lru_cache
def files() -> dict[str, bytes]:
    """The good files of every kind, by a name that ends as their files do."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-good-"))
    try:
        save_model(plan_model(good.CHECKPOINT), folder / "whole.safetensors", torch.float32)
        save_model(plan_model(good.CHECKPOINT, "int8"), folder / "int8.safetensors", torch.float32)
        save_model(plan_model(good.CHECKPOINT, "int4"), folder / "int4.safetensors", torch.float32)
        for format in ("int8-convrot", "fp8"):
            save_for_comfyui(
                plan_model(good.CHECKPOINT), folder / f"comfyui-{format}.safetensors", format, torch.float32
            )
        _write_packed(folder / "packed.safetensors")
        save_vae(good.CHECKPOINT / "vae", folder / "vae.safetensors", torch.float32)
        if find_spec("gguf") is not None:
            for name, (kinds, llama_cpp) in GGUF.items():
                _write_gguf(folder / name, kinds, llama_cpp)
        made = {path.name: path.read_bytes() for path in folder.iterdir()}
    finally:
        shutil.rmtree(folder)
    kept = {name: (good.CHECKPOINT / name).read_bytes() for name in (*SHARDS, "vae/checkpoint.pt")}
    return kept | made


def _write_packed(path: Path) -> None:
    """The checkpoint as AutoRound packs it, in a single file that carries its config."""
    recorded, variant = load_file(PACKED), "less-one/"
    tensors = load_file(good.CHECKPOINT / SHARDS[0]) | load_file(good.CHECKPOINT / SHARDS[1])
    packed = {name.removeprefix(variant): t for name, t in recorded.items() if name.startswith(variant)}
    replaced = {f"{name.rpartition('.')[0]}.weight" for name in packed}
    documents = {name: (good.CHECKPOINT / name).read_text() for name in CARRIED if (good.CHECKPOINT / name).exists()}
    said = {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"}
    documents[CONFIG] = json.dumps(json.loads(documents[CONFIG]) | {"quantization_config": said})
    tensors = {name: t for name, t in tensors.items() if name not in replaced} | packed
    path.write_bytes(_marked(save(tensors, {MARK: VERSION} | documents)))


def _write_gguf(path: Path, kinds: tuple[str, ...], llama_cpp: bool) -> None:
    """The transformer with its matrices in these formats, in turn, under their original names or llama.cpp's."""
    import gguf

    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    tensors = load_file(good.CHECKPOINT / SHARDS[0]) | load_file(good.CHECKPOINT / SHARDS[1])
    of_layers = [name for name in tensors if name.startswith("layers.")]
    for number, name in enumerate(("embed_tokens.weight", *of_layers) if llama_cpp else of_layers):
        tensor, kind = tensors[name].float().numpy(), gguf.GGMLQuantizationType[kinds[number % len(kinds)]]
        called = _in_llama_cpp(name) if llama_cpp else name
        if tensor.ndim == 2:
            writer.add_tensor(called, gguf.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(called, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _in_llama_cpp(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("layers."):
        _, layer, stem = stem.split(".", 2)
        return f"blk.{layer}.{THEIRS[stem]}.{kind}"
    return f"{THEIRS[stem]}.{kind}"


def warm_up() -> None:
    good.draw(good.CHECKPOINT)
    files()


def case(rng: Random) -> Case:
    name = rng.choice(sorted(files()))
    path = Path(name)
    if rng.random() < 0.1 and path.suffix != ".gguf":
        return _hostile(name, rng)
    changes = [*ANY, *OF_KIND[path.suffix]]
    what, data = rng.choice(changes)(files()[name], rng)
    quantization = rng.choice((None, None, "int8"))

    def attempt(folder: Path) -> Tensor:
        return _draw(folder, name, data, quantization)

    return Case(f"{name}: {what}", attempt, good.SHAPE)


def _hostile(name: str, rng: Random) -> Case:
    """A file that was never good."""
    kind = rng.choice(sorted(PICKLES if name.endswith(".pt") else HEADERS))
    write = (PICKLES if name.endswith(".pt") else HEADERS)[kind]

    def attempt(folder: Path) -> Tensor:
        path = folder / Path(name).name
        write(path)
        data = path.read_bytes()
        path.unlink()
        try:
            return _draw(folder / "checkpoint", name, data, None)
        finally:
            if (folder / "executed").exists() or (folder / "checkpoint" / "vae" / "executed").exists():
                raise RuntimeError("a payload was executed")

    return Case(f"{name}: {kind}", attempt, good.SHAPE)


def _draw(folder: Path, name: str, data: bytes, quantization: str | None) -> Tensor:
    """Draw with a file of these bytes in the place of a good one."""
    folder.mkdir(exist_ok=True)
    good.put(good.lay_out(folder) / name, data)
    if name in WHOLE:
        return good.draw(folder / name, vae=folder / "vae")
    if name == "vae.safetensors":
        return good.draw(folder, vae=folder / name)
    return good.draw(folder / name if name.endswith(".gguf") else folder, quantization=quantization)


def _cut(data: bytes, rng: Random) -> tuple[str, bytes]:
    length = rng.choice((0, 1, 7, 8, 9, 100, rng.randrange(len(data)), len(data) - 1))
    return f"cut to {length} bytes", data[:length]


def _flip(data: bytes, rng: Random) -> tuple[str, bytes]:
    """Single bits, most of them where a file tells of itself."""
    changed, places = bytearray(data), []
    for _ in range(rng.choice((1, 2, 8, 64))):
        places.append(rng.randrange(rng.choice((min(len(data), 64), min(len(data), 8192), len(data)))))
        changed[places[-1]] ^= 1 << rng.randrange(8)
    return f"bits at {places[:5]}", bytes(changed)


def _set(data: bytes, rng: Random) -> tuple[str, bytes]:
    start, count = rng.randrange(rng.choice((256, len(data)))), rng.choice((1, 4, 8, 4096))
    value = rng.choice(BYTES)
    return f"{count} bytes of {value} at {start}", data[:start] + bytes([value]) * count + data[start + count :]


def _move(data: bytes, rng: Random) -> tuple[str, bytes]:
    start, count = rng.randrange(len(data)), rng.choice((1, 8, 4096))
    if rng.random() < 0.5:
        return f"without {count} bytes at {start}", data[:start] + data[start + count :]
    return f"{count} bytes twice at {start}", data[: start + count] + data[start:]


def _another_kind(data: bytes, rng: Random) -> tuple[str, bytes]:
    name = rng.choice(sorted(files()))
    return f"is {name}", files()[name]


def _header(data: bytes, rng: Random) -> tuple[str, bytes]:
    """Safetensors with another header: other names, shapes, dtypes, places, documents."""
    length = int.from_bytes(data[:8], "little")
    what, text = mutated(data[8 : 8 + length].decode(), rng)
    header = text.encode("utf-8", "surrogatepass")
    stated = rng.choice((len(header), len(header), len(header), length, 2**63, 100_000_001))
    return f"header, {what}", struct.pack("<Q", stated) + header + data[8 + length :]


def _documents(data: bytes, rng: Random) -> tuple[str, bytes]:
    """A single file with another document in its metadata."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    documents = header.get("__metadata__", {})
    if not documents:
        return _header(data, rng)
    name = rng.choice(sorted(documents))
    what, documents[name] = (
        mutated(documents[name], rng)
        if name.endswith(".json")
        else ("another mark", rng.choice(("", "x", "1" * 10_000)))
    )
    text = json.dumps(header, separators=(",", ":")).encode()
    return f"{name} in the metadata, {what}", struct.pack("<Q", len(text)) + text + data[8 + length :]


def _tensor(data: bytes, rng: Random) -> tuple[str, bytes]:
    """Safetensors with a tensor of another value, dtype or shape, without one, or with one more."""
    tensors = load(data)
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__")
    name = rng.choice(sorted(tensors))
    what = _change(tensors, name, rng)
    changed = save(tensors, metadata)
    return what, _marked(changed) if metadata and MARK in metadata else changed


def _marked(data: bytes) -> bytes:
    """A single file, as another program's writer orders it, with its mark in front."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    marked = {"__metadata__": {MARK: VERSION} | header.pop("__metadata__")} | header
    text = json.dumps(marked, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _change(tensors: dict[str, Tensor], name: str, rng: Random) -> str:
    """Change one of `tensors` in place; what was done."""
    tensor, way = tensors[name].clone(), rng.randrange(6)
    if way == 0:
        del tensors[name]
        return f"without {name}"
    if way == 1:
        tensors["surprise\n.weight"] = tensor
        return "a surprise"
    if way == 2:
        dtype = rng.choice(DTYPES)
        tensors[name] = tensor.to(dtype)
        return f"{name} as {dtype}"
    if way == 3:
        tensors[name] = rng.choice((tensor.flatten(), tensor[None], tensor[:-1], tensor[:0])).contiguous()
        return f"{name} of the shape {tuple(tensors[name].shape)}"
    value = rng.choice(VALUES)
    if tensor.is_floating_point():
        flat = tensor.view(-1)
        flat[torch.randint(len(flat), (rng.choice((1, 1, len(flat))),), generator=_torch(rng))] = value
    tensors[name] = tensor
    return f"{name} with {value}"


def _torch(rng: Random) -> torch.Generator:
    return torch.Generator().manual_seed(rng.randrange(2**31))


def _pickled_tensor(data: bytes, rng: Random) -> tuple[str, bytes]:
    """The VAE's archive, saved anew with another tensor."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pt"
        path.write_bytes(data)
        tensors = torch.load(path, weights_only=True)
        what = _change(tensors, rng.choice(sorted(tensors)), rng)
        torch.save(tensors, path)
        return what, path.read_bytes()


def _pickle(data: bytes, rng: Random) -> tuple[str, bytes]:
    """The VAE's archive with a damaged list of tensors; bits at random rarely hit it, and its checksum would tell."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pt"
        path.write_bytes(data)
        with ZipFile(path) as archive:
            text = archive.read("checkpoint/data.pkl")
        what, text = rng.choice((_cut, _flip, _set, _move))(text, rng)
        rewrite(path, {"data.pkl": text})
        return f"pickle, {what}", path.read_bytes()


def _gguf_entry(data: bytes, rng: Random) -> tuple[str, bytes]:
    """A GGUF whose header says something else of a tensor: another name, shape, format or place."""
    changed = bytearray(data)
    names = re.findall(rb"[a-z0-9_.]+\.(?:weight|bias)(?=[\x01\x02]\0\0\0)", data)
    name = rng.choice(names) if names else data[:1]
    at = data.index(name) + len(name)
    axes = data[at]
    fields = {"axes": (at, "<I"), "kind": (at + 4 + 8 * axes, "<I"), "offset": (at + 8 + 8 * axes, "<Q")}
    fields |= {f"axis {n}": (at + 4 + 8 * n, "<Q") for n in range(axes)} | {"length": (at - len(name) - 8, "<Q")}
    what = rng.choice(sorted((*fields, "name", "kind")))
    if what == "name":
        place = at - 1 - rng.randrange(len(name))
        changed[place] = rng.choice(b"a0._\0\n\xff")
        return f"another name for {name[:40]!r}", bytes(changed)
    place, form = fields[what]
    value = rng.choice((*range(42), 96, 32, 31, 2**31, 2**32 - 1)) if what == "kind" else rng.choice(NUMBERS)
    struct.pack_into(form, changed, place, value & (2 ** (8 * struct.calcsize(form)) - 1))
    return f"{what} of {name[:40]!r} is {value}", bytes(changed)


def _gguf_metadata(data: bytes, rng: Random) -> tuple[str, bytes]:
    """A GGUF with one more entry of metadata that is looked at."""
    key, kind, value = rng.choice(
        (
            (b"split.count", 2, struct.pack("<H", rng.choice((0, 1, 2, 65535)))),
            (b"general.alignment", 4, struct.pack("<I", rng.choice((0, 1, 3, 8, 32, 64, 2**31)))),
            (b"general.architecture", 8, struct.pack("<Q", 4) + rng.choice((b"flux", b"\xff\xff\0\n", b"qwen"))),
            (b"x", rng.randrange(20), rng.randbytes(16)),
        )
    )
    version, tensors, entries = struct.unpack_from("<IQQ", data, 4)
    head = data[:4] + struct.pack("<IQQ", version, tensors, entries + 1)
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value
    return f"{key.decode()} is {value[:8]!r}", head + entry + data[len(head) :]


ANY: list[Change] = [_cut, _flip, _set, _move, _another_kind]
OF_KIND: dict[str, list[Change]] = {
    ".safetensors": [_header, _header, _tensor, _tensor, _documents],
    ".pt": [_pickle, _pickle, _pickled_tensor, _pickled_tensor],
    ".gguf": [_gguf_entry, _gguf_entry, _gguf_entry, _gguf_metadata],
}
