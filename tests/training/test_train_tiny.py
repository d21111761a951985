"""What training must share with generation: prompt rows, the forward pass, and files that survive a kill."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from nextstep_core.loading.documents import Documents
from nextstep_core.model.config import NextStepConfig
from nextstep_core.request.layout import Caption, EncodedImage, build_rows
from nextstep_core.request.tokenizer import NextStepTokenizer
from training.data import Example, grid_of, prompt_text
from training.export import model_config
from training.optim import orthogonalize
from training.progress import load_if_there, save_atomically
from training.scenes import EDIT_KINDS, caption, place_single, sample_edit, triples
from training.tokenizer import build_tokenizer, save_tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """The tokenizer as training uses it and as the engine loads it, and the config."""
    folder = tmp_path_factory.mktemp("tokenizer")
    built = build_tokenizer()
    save_tokenizer(built, folder)
    config = NextStepConfig.from_dict(model_config(built))
    return built, NextStepTokenizer.load(Documents(folder), config), config


def some_examples() -> list[Example]:
    rng = random.Random(0)
    scene = place_single(rng, rng.choice(triples(held_out=False)), canvas=(96, 64))
    edits = [sample_edit(rng, kind) for kind in EDIT_KINDS]
    drawings = [Example(caption(scene), None, scene), Example("", None, scene)]
    return drawings + [Example(text, e.source, e.target) for e in edits for text in (e.instruction, "")]


@pytest.mark.parametrize("example", some_examples(), ids=lambda e: e.text or "dropped")
def test_training_rows_are_the_pipelines(tokenizers, example: Example):
    built, engine_tokenizer, config = tokenizers
    images = ()
    if example.source is not None:
        images = (EncodedImage(torch.zeros(16, config.token_dim), grid_of(example.source)),)
    rows = build_rows(
        engine_tokenizer,
        config,
        [Caption("<image>" * len(images) + example.text, images)],
        negative_prompt="",
        positive_prompt="",
        images_per_caption=1,
        grid=grid_of(example.target),
        cfg=1.0,
        cfg_img=1.0,
        bos_before_caption=False,
    )
    assert rows.ids[0].tolist() == built.encode(prompt_text(example)).ids


def test_every_word_of_the_picture_world_is_one_token(tokenizers):
    built, _, _ = tokenizers
    text = "a small purple triangle left of an orange diamond on a white background"
    assert len(built.encode(text).ids) == len(text.split())


def test_orthogonalize_brings_singular_values_near_one():
    matrices = torch.randn(3, 24, 64, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_a_kill_while_saving_leaves_the_old_state(tmp_path: Path, monkeypatch):
    path = tmp_path / "state.pt"
    assert load_if_there(path) is None
    save_atomically({"step": 1}, path)

    def killed(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_atomically({"step": 2}, path)
    assert load_if_there(path) == {"step": 1}
