"""The checkpoint's tokenizer: its special tokens, and files that do not belong to the config."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint_files import edit_json

from nextstep_core import NextStepError
from nextstep_core.loading.documents import Documents
from nextstep_core.request.tokenizer import NextStepTokenizer

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
