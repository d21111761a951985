"""Texts of every kind on the embedded model, and its tokenizer's two files with parts that are not those of a tokenizer
of ours."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from random import Random
from typing import Any

from torch import Tensor

from nextstep_core.request.tokenizer_file import PATTERNS

from . import good, settings
from .case import Attempt, Case
from .json_mutation import mutated

SIZE = {"height": 32, "width": 48, "steps": 2, "cfg": 2.0, "sampler": "flow-ode"}
SHAPE = (1, 32, 48, 3)
PIECES = (
    "a red circle", " ", "\n", "\t", "\r\n", "\0", "\ufeff", "\u200b", "\u202e", "é", "e\u0301", "火", "😀",
    "👩\u200d👩\u200d👧", "\ud800", "\udfff", "\U0010ffff", "\ufffe", "ﷺ", "ἄ\u0345", "가", "\u1100\u1161\u11a8",
    "'s", "'S", "1", "...", "<|", "|>", "<|image_area|>", "<|image_area|>2*2", "<|begin_of_image|>", "<|end_of_image|>",
    "[PAD]", "<|image_placeholder|>", "<|endoftext|>", "<image", "<image>", "</image>", "(red:1.2)", "{a|b}",
    "%s", "{0}", "$(id)", "../..", "'; --", "a" * 100, "\u0301" * 50, "\u0f71\u0f72" * 20, "ſ", "İ", "ß", "\x7f",
    "\x1b[0m",
)  # fmt: skip
MANY = (1, 1, 1, 1, 2, 3, 10, 50, 70_000)  # characters; the last are more than the model can hold


def regex(pattern: str, kind: str = "Split", **options: Any) -> dict[str, Any]:
    """A part that goes by a pattern."""
    return {"type": kind, "pattern": {"Regex": pattern}} | options


def sequence(name: str, part: Any, count: int) -> dict[str, Any]:
    """The same part so many times."""
    return {"type": "Sequence", name: [part] * count}


def template(*single: Any) -> dict[str, Any]:
    """What a post-processor puts around the ids."""
    return {"type": "TemplateProcessing", "single": list(single), "pair": [], "special_tokens": {}}


NFC, TEXT_ITSELF = {"type": "NFC"}, {"Sequence": {"id": "A", "type_id": 0}}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
PARTS: tuple[Any, ...] = (
    None, 5, "ByteLevel", [], {}, {"type": None}, {"type": "ByteLevel"}, BYTES, BYTES | {"use_regex": True}, NFC,
    {"type": "NFKD"}, {"type": "Lowercase"}, {"type": "Prepend", "prepend": "x" * 100_000}, {"type": "Strip"},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "BertNormalizer"}, {"type": "Whitespace"},
    regex("(a+)+$", behavior="Isolated", invert=False), regex("(?:(?:a|a)*)*b", behavior="Removed", invert=True),
    regex(PATTERNS[1], behavior="MergedWithNext", invert=True), regex(PATTERNS[0], behavior="Removed", invert=False),
    regex("(a+)+$", "Replace", content="x" * 1000), regex("e", "Replace", content="e" * 1000), {"type": "Sequence"},
    {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False},
    sequence("normalizers", NFC, 7), sequence("normalizers", NFC, 5000), sequence("pretokenizers", BYTES, 8),
    sequence("decoders", {"type": "ByteFallback"}, 100), sequence("processors", BYTES, 8), template(),
    template(*[TEXT_ITSELF] * 8), template(*[TEXT_ITSELF] * 9), template({"SpecialToken": {"id": "x", "type_id": 0}}),
    {"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]}, {"type": "CTC"}, {"type": "Digits"},
)  # fmt: skip
MODELS: tuple[dict[str, Any], ...] = (
    {"dropout": 0.5}, {"unk_token": "x"}, {"byte_fallback": True}, {"merges": []}, {"type": "WordLevel"},
    {"fuse_unk": 5}, {"continuing_subword_prefix": "##"}, {"end_of_word_suffix": "</w>"}, {"ignore_merges": True},
)  # fmt: skip


def warm_up() -> None:
    settings.warm_up()
    good.draw(good.CHECKPOINT)


def case(rng: Random) -> Case:
    return rng.choice((_text, _text, _file, _part, _added))(rng)


def _text(rng: Random) -> Case:
    """Any texts, as prompts, as what goes with them, and as lists of prompts."""
    request: dict[str, Any] = {"prompt": _words(rng)}
    if rng.random() < 0.3:
        request["prompt"] = [_words(rng) for _ in range(rng.choice((0, 1, 2, 3)))]
    for name in ("negative_prompt", "positive_prompt"):
        if rng.random() < 0.4:
            request[name] = _words(rng)
    count = len(request["prompt"]) if isinstance(request["prompt"], list) else 1
    what = ", ".join(f"{name}: {str(value)[:40]!r}" for name, value in request.items())
    return Case(what, lambda _: settings.pipeline().generate(**request, **SIZE).images, (count, *SHAPE[1:]))


def _words(rng: Random) -> str:
    text = ""
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        piece = rng.choice(PIECES) if rng.random() < 0.8 else chr(rng.randrange(0x110000))
        text += piece * -(-rng.choice(MANY) // len(piece))
    if rng.random() < 0.05:
        piece = rng.choice(PIECES)
        text += piece * (rng.choice((100_000, 1_000_000, 12_000_000)) // len(piece))
    if rng.random() < 0.1:
        text = unicodedata.normalize(rng.choice(("NFC", "NFD", "NFKD")), text)
    return text


def _file(rng: Random) -> Case:
    """Values changed anywhere in the file, most of them in its vocabulary."""
    file = rng.choice(("tokenizer.json", "tokenizer_config.json", "tokenizer_config.json"))
    what, text = mutated((good.CHECKPOINT / file).read_text(), rng)
    return Case(f"{file}: {what}", _drawn_with(file, text, rng), SHAPE)


def _part(rng: Random) -> Case:
    """Whole parts of the tokenizer replaced by others."""
    data = json.loads((good.CHECKPOINT / "tokenizer.json").read_text())
    names = rng.sample(
        ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding"), rng.choice((1, 1, 2))
    )
    for name in names:
        data[name] = rng.choice(PARTS)
    what = ", ".join(f"{name}: {str(data[name])[:60]}" for name in names)
    return Case(what, _drawn_with("tokenizer.json", json.dumps(data), rng), SHAPE)


def _added(rng: Random) -> Case:
    """Added tokens and vocabularies of other sizes, lengths and ids."""
    data = json.loads((good.CHECKPOINT / "tokenizer.json").read_text())
    flags = {flag: rng.random() < 0.5 for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    count, start = rng.choice((1, 10, 300, 1000, 50_000)), rng.choice((607, 0, 600, 10**9, -1))
    content = rng.choice(("<%d>", " " * 50 + "%d", "a%.0d", "\ud800%d", "\0%d", "%.0d", "x" * 300 + "%d"))
    added = [{"id": start + n, "content": content % n, **flags} for n in range(count)]
    if rng.random() < 0.3:
        data["model"]["vocab"] |= {token["content"]: token["id"] for token in added}
    elif rng.random() < 0.3:
        data["added_tokens"] = added
    else:
        data["added_tokens"] += added
    if rng.random() < 0.3:
        data["model"] |= rng.choice(MODELS)
    what = f"{count} added tokens {content[:20]!r} from {start}"
    return Case(what, _drawn_with("tokenizer.json", json.dumps(data), rng), SHAPE)


def _drawn_with(file: str, text: str, rng: Random) -> Attempt:
    prompt = rng.choice(("A red apple.", "a" * 100 + "!", " " * 300, "<|image_area|>2*2 e\u0301 😀", ""))

    def attempt(folder: Path) -> Tensor:
        good.put(good.lay_out(folder) / file, text)
        return good.draw(folder, prompt=prompt)

    return attempt
