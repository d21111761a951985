"""The checkpoint's tokenizer: its special tokens, and files that do not belong to the config."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import edit_json

from nextstep_core import NextStepError
from nextstep_core.loading.documents import Documents
from nextstep_core.request.layout import Caption
from nextstep_core.request.tokenizer import NextStepTokenizer
from nextstep_core.request.tokenizer_file import PATTERNS, check_token

BOS = 606


def load(folder: Path, pipeline, **config) -> NextStepTokenizer:
    return NextStepTokenizer.load(Documents(folder), replace(pipeline.engine.config, **config))


def test_ids_and_text_go_both_ways(pipeline) -> None:
    tokenizer = pipeline.engine.tokenizer
    for text in ("Two birds.", " a  b ", "<|image_area|>3*4", "é 火", "Hello , world !"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|begin_of_image|>") == [603]
    assert tokenizer.bos_token is None
    assert len(tokenizer.encode("word " * 2000)) > 1000, "never cut, whatever model_max_length says"


def test_a_post_processor_adds_its_own(checkpoint: Path, pipeline) -> None:
    """As tokenizers of other families do; special tokens are still known, and looked up without it."""
    bos = {"id": "<|beginoftext|>", "type_id": 0}
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": bos}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {bos["id"]: {"id": bos["id"], "ids": [BOS], "tokens": [bos["id"]]}},
    }
    edit_json(checkpoint / "tokenizer.json", post_processor=template)
    tokenizer, plain = load(checkpoint, pipeline), pipeline.engine.tokenizer.encode("Two birds.")
    assert tokenizer.encode("Two birds.") == [BOS, *plain]
    assert tokenizer.encode("Two birds.", special=False) == plain


@pytest.mark.parametrize("bos", ["<|beginoftext|>", {"content": "<|beginoftext|>", "special": True}], ids=str)
def test_a_bos_token_is_stated_in_either_form(checkpoint: Path, pipeline, bos: object) -> None:
    edit_json(checkpoint / "tokenizer_config.json", bos_token=bos)
    assert load(checkpoint, pipeline).bos_token == "<|beginoftext|>"


def test_tokens_that_only_the_settings_declare_are_added(checkpoint: Path, pipeline) -> None:
    vocabulary = json.loads((checkpoint / "tokenizer.json").read_text())
    vocabulary["added_tokens"] = vocabulary["added_tokens"][:2]
    (checkpoint / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert load(checkpoint, pipeline).encode("<|image_area|>a") == pipeline.engine.tokenizer.encode("<|image_area|>a")


@pytest.mark.parametrize("name", ["boi", "eoi", "image_placeholder_id"])
def test_an_id_of_another_token_is_one_sentence(checkpoint: Path, pipeline, name: str) -> None:
    with pytest.raises(NextStepError, match="tokenizer.json.*config.json"):
        load(checkpoint, pipeline, **{name: 639})


def test_what_is_no_tokenizer_is_one_sentence(checkpoint: Path, pipeline) -> None:
    (checkpoint / "tokenizer.json").write_text("{}")
    with pytest.raises(NextStepError, match="tokenizer.json"):
        load(checkpoint, pipeline)


class Panic(BaseException):
    """What the library's own panic is to Python: no Exception."""


class Panicking:
    """A tokenizer library of which every call ends so."""

    def __init__(self, ends: BaseException) -> None:
        self.ends = ends

    def encode_batch_fast(self, *_: Any, **__: Any) -> Any:
        raise self.ends

    decode = encode_batch_fast


@pytest.mark.parametrize("ends", [Panic("over"), Exception("over"), MemoryError("over")], ids=repr)
def test_whatever_the_library_raises_is_one_sentence(pipeline, monkeypatch, ends: BaseException) -> None:
    tokenizer = NextStepTokenizer(Panicking(ends), None, pipeline.engine.config)
    for call in (lambda: tokenizer.encode("a"), lambda: tokenizer.decode([1])):
        with pytest.raises(NextStepError, match="over"):
            call()
    import tokenizers

    def from_str(text: str) -> None:
        raise ends

    monkeypatch.setattr(tokenizers, "Tokenizer", type("Broken", (), {"from_str": staticmethod(from_str)}))
    with pytest.raises(NextStepError, match="tokenizer.json.*over"):
        load(Path("tests/data/golden/tiny-a").absolute(), pipeline)


@pytest.mark.parametrize("ends", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_who_stops_the_program_is_not_held_up(pipeline, ends: type[BaseException]) -> None:
    with pytest.raises(ends):
        NextStepTokenizer(Panicking(ends()), None, pipeline.engine.config).encode("a")


LONG = {
    "spaces": " " * 11_000_000,
    "words": "a red circle " * 6_000,
    "kanji": "火" * 22_000,
}


@pytest.mark.parametrize("place", ["prompt", "negative_prompt", "positive_prompt"])
@pytest.mark.parametrize("text", LONG)
def test_what_no_context_holds_is_refused_before_it_is_counted(pipeline, monkeypatch, place: str, text: str) -> None:
    encode, seen = NextStepTokenizer.encode, []
    monkeypatch.setattr(NextStepTokenizer, "encode", lambda self, t, *a: seen.append(len(t)) or encode(self, t, *a))
    with pytest.raises(NextStepError, match=r"bytes long; .*4,096 tokens.* 65,536") as caught:
        pipeline.generate(**{"prompt": "a", "height": 32, "width": 32, place: LONG[text]})
    assert max(seen, default=0) < 100 and len(str(caught.value)) < 200


def test_what_a_context_may_hold_is_counted(pipeline) -> None:
    tokenizer = pipeline.engine.tokenizer
    assert tokenizer.check_length("The prompt", "x" * 65_536)
    with pytest.raises(NextStepError, match="65537|65,537"):
        tokenizer.check_length("The prompt", "x" * 65_537)
    unstated = NextStepTokenizer(
        tokenizer._backend, None, replace(pipeline.engine.config, max_position_embeddings=None)
    )
    assert unstated.check_length("The prompt", "x" * 2**20)
    with pytest.raises(NextStepError, match="1,048,577"):
        unstated.check_length("The prompt", "x" * (2**20 + 1))


def test_prompts_are_bounded_together_too(pipeline) -> None:
    with pytest.raises(NextStepError, match="17 prompts are 1,105,000"):
        pipeline.generate(["x" * 65_000] * 17, height=32, width=32)
    with pytest.raises(NextStepError, match="The prompt is a dict"):
        Caption({})


def test_equal_prompts_are_read_once(pipeline, monkeypatch) -> None:
    encode, seen = NextStepTokenizer.encode, []
    monkeypatch.setattr(NextStepTokenizer, "encode", lambda self, t, *a: seen.append(t) or encode(self, t, *a))
    settings = pipeline.engine.recommended()
    pipeline.engine.make_job([Caption("a red circle")], (2, 2), settings, seed=1, images_per_caption=8)
    assert seen.count("a red circle") == 1


SPLIT = {"type": "Split", "pattern": {"Regex": PATTERNS[0]}, "behavior": "Isolated", "invert": False}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
EVIL = {"Regex": "(a+)+$"}
TEMPLATE = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}], "pair": []}


def token(content: Any, number: Any = 606) -> dict[str, Any]:
    return {"id": number, "content": content, "special": True} | dict.fromkeys(
        ("single_word", "lstrip", "rstrip", "normalized"), False
    )


def test_the_longest_token_that_may_be() -> None:
    assert check_token("x" * 256, "there") == "x" * 256


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_published_patterns_are_taken(checkpoint: Path, pipeline, pattern: str) -> None:
    split = {**SPLIT, "pattern": {"Regex": pattern}}
    edit_json(
        checkpoint / "tokenizer.json",
        normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]},
        post_processor={"type": "Sequence", "processors": [BYTE_LEVEL, {**TEMPLATE, "special_tokens": {}}]},
    )
    assert load(checkpoint, pipeline).encode("Two birds.") == pipeline.engine.tokenizer.encode("Two birds.")


HOSTILE_PARTS = {
    "a catastrophic split": (
        {"pre_tokenizer": {**SPLIT, "pattern": EVIL}},
        "pre_tokenizer Split has an unknown pattern",
    ),
    "the same in a sequence": (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{**SPLIT, "pattern": EVIL}, BYTE_LEVEL]}},
        "pre_tokenizer Split has an unknown pattern",
    ),
    "a replacement": ({"normalizer": {"type": "Replace", "pattern": EVIL, "content": ""}}, "normalizer is 'Replace'"),
    "a long chain": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 9}},
        "normalizer is not a sequence",
    ),
    "a chain of chains": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": []}]}},
        "normalizer is 'Sequence'",
    ),
    "another decoder": ({"decoder": {"type": "Replace", "pattern": EVIL, "content": ""}}, "decoder is 'Replace'"),
    "decoders in a row": ({"decoder": {"type": "Sequence", "decoders": []}}, "decoder is not a sequence"),
    "a text for a part": ({"post_processor": "x" * 5000}, "post_processor is 'xxx"),
    "a number for a step": ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [None]}}, "pre_tokenizer is None"),
    "a list for a kind": ({"decoder": {"type": []}}, "decoder is a list"),
    "a long template": (
        {"post_processor": {**TEMPLATE, "single": TEMPLATE["single"] * 9, "special_tokens": {}}},
        "post_processor TemplateProcessing",
    ),
    "a template of many ids": (
        {"post_processor": {**TEMPLATE, "special_tokens": {"a": {"id": "a", "ids": [1] * 9, "tokens": []}}}},
        "post_processor TemplateProcessing",
    ),
    "another model": ({"model": {"type": "Unigram", "vocab": []}}, "model is 'Unigram'"),
    "no model": ({"model": None}, "model is None"),
    "a vocabulary that is none": ({"model": {"type": "BPE", "vocab": [], "merges": []}}, "no vocabulary"),
    "a long token": ({"model": {"type": "BPE", "vocab": {"x" * 257: 0}, "merges": []}}, "longer than 256"),
    "a negative id": ({"model": {"type": "BPE", "vocab": {"x": -1}, "merges": []}}, "the id of 'x' is -1"),
    "an endless id": ({"model": {"type": "BPE", "vocab": {"x": 10**90}, "merges": []}}, "number of 91 digits"),
    "one id twice": ({"model": {"type": "BPE", "vocab": {"x": 7, "y": 7}, "merges": []}}, "the same id 7"),
    "merges at random": (
        {"model": {"type": "BPE", "vocab": {"x": 7}, "merges": [], "dropout": 0.5}},
        "at random",
    ),
    "merges of nothing": ({"model": {"type": "BPE", "vocab": {"x": 7}, "merges": [1, {}]}}, "not a usable tokenizer"),
    "thousands of added tokens": ({"added_tokens": [token(f"<{n}>", n) for n in range(1001)]}, "added tokens is 1001"),
    "an added token that is none": ({"added_tokens": [5]}, "an added token is 5"),
    "added tokens of no list": ({"added_tokens": {"a": 1}}, "`added_tokens` is a dict"),
    "an added number": ({"added_tokens": [token(5)]}, "a token is 5"),
    "an added id": ({"added_tokens": [token("a", "606")]}, "the id of 'a' is '606'"),
    "an added id of another": ({"added_tokens": [token("<a>", 5)]}, "have the same id 5"),
}


@pytest.mark.parametrize("name", HOSTILE_PARTS)
def test_a_tokenizer_of_another_kind_is_refused_by_name(checkpoint: Path, pipeline, name: str) -> None:
    parts, sentence = HOSTILE_PARTS[name]
    edit_json(checkpoint / "tokenizer.json", **parts)
    with pytest.raises(NextStepError, match=r"tokenizer\.json") as caught:
        load(checkpoint, pipeline)
    assert sentence in str(caught.value) and len(str(caught.value)) < 500 + len(str(checkpoint))


HOSTILE_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"bos_token": 5}, "`bos_token`: a token is 5"),
    ({"eos_token": {"content": []}}, "`eos_token`: a token is a list"),
    ({"pad_token": ["[PAD]"]}, "`pad_token`: a token is a list"),
    ({"bos_token": "x" * 5000}, "longer than 256"),
    ({"added_tokens_decoder": [1]}, "`added_tokens_decoder` is not an object"),
    ({"added_tokens_decoder": {"a": token("<a>")}}, "for the id 'a'"),
    ({"added_tokens_decoder": {"9" * 5000: token("<a>")}}, "(5,000 characters)"),
    ({"added_tokens_decoder": {"²": token("<a>")}}, "for the id '²'"),
    ({"added_tokens_decoder": {"5": "<a>"}}, "'<a>' for the id '5'"),
    ({"added_tokens_decoder": {"5": {}}}, "a token is None"),
    ({"added_tokens_decoder": {"5": token("<" * 257)}}, "longer than 256"),
    ({"added_tokens_decoder": {str(n): token(f"<{n}>") for n in range(1001)}}, "at most 1000"),
]


@pytest.mark.parametrize(("settings", "sentence"), HOSTILE_SETTINGS, ids=[sentence for _, sentence in HOSTILE_SETTINGS])
def test_wrong_tokenizer_settings_are_one_sentence(checkpoint: Path, pipeline, settings: dict, sentence: str) -> None:
    edit_json(checkpoint / "tokenizer_config.json", **settings)
    with pytest.raises(NextStepError, match=r"tokenizer_config\.json") as caught:
        load(checkpoint, pipeline)
    assert sentence in str(caught.value)


def test_half_a_character_in_a_token_is_one_sentence(checkpoint: Path, pipeline) -> None:
    edit_json(checkpoint / "tokenizer_config.json", bos_token="\ud800")
    with pytest.raises(NextStepError, match="bos_token"):
        load(checkpoint, pipeline)


def test_an_id_that_the_model_does_not_know_is_one_sentence(checkpoint: Path, pipeline) -> None:
    known = 610
    edit_json(
        checkpoint / "tokenizer.json",
        added_tokens=[
            *json.loads((checkpoint / "tokenizer.json").read_text())["added_tokens"],
            token("<beyond>", 607),
            token("<far>", 608),
        ],
    )
    assert load(checkpoint, pipeline, vocab_size=known).encode("<far>") == [608]
    with pytest.raises(NextStepError, match="the id 608, but the model knows only 608"):
        load(checkpoint, pipeline, vocab_size=608).encode("<far>")


def test_more_than_any_published_tokenizer_has_is_refused_unbuilt(checkpoint: Path, pipeline, monkeypatch) -> None:
    """A million tokens take 700 MB until the library has them."""
    monkeypatch.setattr("tokenizers.Tokenizer.from_str", lambda *_: pytest.fail("it was built"), raising=False)
    model = json.loads((checkpoint / "tokenizer.json").read_text())["model"]
    many = {"vocab": model["vocab"] | {f"é{n}": 10_000 + n for n in range(200_000)}}, {"merges": ["a b"] * 300_001}
    for change in many:
        edit_json(checkpoint / "tokenizer.json", model=model | change)
        with pytest.raises(NextStepError, match=r"the number of (tokens|merges) is \d+; use a whole number from"):
            load(checkpoint, pipeline)
