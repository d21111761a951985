"""Build the tiny checkpoint's tokenizer: byte-level BPE over the caption corpus, with NextStep's special tokens.

The vocabulary is small because the captions are: the 256 bytes, which can spell any prompt, and merges that make each
word of the picture world one token. Digits stay apart, so that every size prefix "H*W" is made of known parts.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from .scenes import COLORS, RADII, RELATIONS, SHAPES, with_article

END_OF_TEXT = "<|endoftext|>"
PAD = "[PAD]"
IMAGE_AREA = "<|image_area|>"
BEGIN_OF_IMAGE = "<|begin_of_image|>"
END_OF_IMAGE = "<|end_of_image|>"
IMAGE_PLACEHOLDER = "<|image_placeholder|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD, IMAGE_AREA, BEGIN_OF_IMAGE, END_OF_IMAGE, IMAGE_PLACEHOLDER)
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def caption_corpus() -> list[str]:
    """Sentences in which every word of the picture world stands, at a sentence's start and inside it."""
    things = [f"{size} {color} {shape}" for size in RADII for color in COLORS for shape in SHAPES]
    lines = [f"{with_article(thing)} on {with_article(color)} background" for thing in things for color in COLORS]
    lines += [f"{with_article(color)} background" for color in COLORS]
    lines += [f"{with_article(thing)} {relation} {with_article(thing)}" for thing in things for relation in RELATIONS]
    lines += [f"make the {shape} {color}" for shape in SHAPES for color in COLORS]
    lines += [f"make the background {color}" for color in COLORS]
    lines += [f"replace the {shape} with a {other}" for shape in SHAPES for other in SHAPES]
    lines += [f"remove the {shape}" for shape in SHAPES]
    return lines


def build_tokenizer() -> Tokenizer:
    """Train the tokenizer; the result does not depend on anything but this package."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(caption_corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and the two JSON files that state its special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    additional = list(SPECIAL_TOKENS[2:])
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(tokenizer.token_to_id(token)): {"content": token, **flags, "special": True}
                for token in SPECIAL_TOKENS
            },
            "additional_special_tokens": additional,
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": END_OF_TEXT,
            "errors": "replace",
            "model_max_length": 512,
            "pad_token": PAD,
            "padding_side": "left",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2TokenizerFast",
            "unk_token": None,
        },
    )
    _write_json(
        folder / "special_tokens_map.json",
        {
            "additional_special_tokens": [{"content": token, **flags} for token in additional],
            "eos_token": {"content": END_OF_TEXT, **flags},
            "pad_token": {"content": PAD, **flags},
        },
    )


def _write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
