"""What training must share with generation: prompt rows, the forward pass, and files that survive a kill."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nextstep_core.loading.documents import Documents
from nextstep_core.model.config import NextStepConfig
from nextstep_core.model.transformer import whole_span
from nextstep_core.model.vae import AutoencoderKL
from nextstep_core.request.layout import Caption, EncodedImage, build_rows
from nextstep_core.request.masks import kept_tokens
from nextstep_core.request.tokenizer import NextStepTokenizer
from training import __main__ as recipe
from training import data
from training.data import Example, Examples, LatentPool, Shard, grid_of, masked_tokens, prompt_text
from training.export import model_config
from training.model_training import Trainee, checkpoint_tensors
from training.optim import orthogonalize
from training.progress import load_if_there, save_atomically
from training.scenes import (
    CANVASES,
    EDIT_KINDS,
    LARGE,
    WIDE,
    caption,
    is_held_out,
    mask_of,
    place_is_held_out,
    place_single,
    place_single_freely,
    render,
    sample_edit,
    triples,
)
from training.start import SHIPPED, deepened, start_path
from training.start import main as start_from
from training.tokenizer import build_tokenizer, save_tokenizer
from training.vae_training import newest_vae, to_pixels


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


@pytest.fixture
def few_families(monkeypatch):
    """Shards small enough to encode in a test."""
    monkeypatch.setattr(data, "FAMILIES", dict.fromkeys(data.FAMILIES, (1, 2)))


def encode_mean_color(scenes, *_) -> torch.Tensor:
    """What a scene shows, in place of its latents, so that a row can be told from another's."""
    means = torch.stack([to_pixels(render(scene)).mean((1, 2)) for scene in scenes])
    width, height = scenes[0].width, scenes[0].height
    return means.repeat(1, 22)[:, None, :64].expand(-1, width * height // 256, -1).half()


def test_a_batch_holds_the_tokens_of_what_it_says(tmp_path: Path, tokenizers, few_families, monkeypatch):
    monkeypatch.setattr(data, "encode_scenes", encode_mean_color)
    monkeypatch.setattr(data, "INPAINTED", 0.5)
    pool = LatentPool(tmp_path)
    shard = Shard.by_number(0)
    pool.add(shard, shard.encode(None, torch.device("cpu")))
    examples = Examples(pool, tokenizers[0], drop=0.0)
    collated = []
    collate = examples._collate
    monkeypatch.setattr(examples, "_collate", lambda those: collated.append(those) or collate(those))
    for task in (*data.FAMILIES, "edit", "pair edit", "wide edit", "large edit"):
        batch = examples.batch(random.Random(task), task, 16)
        assert len({(e.target.width, e.target.height) for e in collated[-1]}) == 1
        size = collated[-1][0].target.width, collated[-1][0].target.height
        assert (size == LARGE) == task.startswith(("large", "three")) and (size in WIDE) == task.startswith("wide")
        wanted = encode_mean_color([e.target for e in collated[-1]]).float()
        assert (batch.source is not None) == task.endswith("edit")
        if batch.source is not None:
            assert torch.equal(batch.source, encode_mean_color([e.source for e in collated[-1]]).float())
            for row, example in enumerate(collated[-1]):
                if example.drawn is not None:
                    wanted[row] = torch.where(example.drawn[:, None], wanted[row], batch.source[row])
        assert torch.equal(batch.target, wanted)
        assert any(e.drawn is not None for e in collated[-1]) == (task in ("edit", "wide edit", "large edit"))


def test_what_is_masked_in_training_is_what_inpainting_draws():
    rng = random.Random(0)
    for _ in range(20):
        scene = place_single_freely(rng, rng.choice(triples(held_out=False)))
        drawn = [not kept for kept in kept_tokens(torch.from_numpy(mask_of(scene)), grid_of(scene))]
        assert masked_tokens(scene, wider=0.0).tolist() == drawn
        assert masked_tokens(scene, wider=64.0).all()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_drawings_from_text_are_of_the_grid_as_often_as_is_asked(
    tmp_path: Path, tokenizers, few_families, monkeypatch, share: float
):
    monkeypatch.setattr(data, "encode_scenes", encode_mean_color)
    monkeypatch.setattr(data, "DRAWN_ON_GRID", share)
    pool = LatentPool(tmp_path)
    shard = Shard.by_number(0)
    pool.add(shard, shard.encode(None, torch.device("cpu")))
    examples, drawn = Examples(pool, tokenizers[0], drop=0.0), []
    collate = examples._collate
    monkeypatch.setattr(examples, "_collate", lambda those: drawn.extend(those) or collate(those))
    for task in data.FAMILIES:
        examples.batch(random.Random(task), task, 16)
    assert {all(o.on_grid for o in example.target.objects) for example in drawn} == {bool(share)}


def test_shards_hold_nothing_that_is_held_out_and_are_always_the_same():
    first, second = Shard.by_number(1), Shard.by_number(1)
    assert first == second != Shard.by_number(2)
    scenes = [scene for group in first.scenes.values() for scene in group]
    assert set(first.scenes) == set(CANVASES)
    things = [(o, scene.background) for scene in scenes for o in scene.objects]
    assert not any(is_held_out(o.color, o.shape, background) or place_is_held_out(o) for o, background in things)


def test_training_goes_on_from_a_checkpoint_that_is_there(tmp_path: Path, tokenizers, monkeypatch):
    monkeypatch.setattr("sys.argv", ["start", "--folder", str(tmp_path)])
    start_from()
    trainee = Trainee(tokenizers[2])
    trainee.load_checkpoint(load_if_there(start_path(tmp_path)))
    shipped = load_file(SHIPPED / "model-00001-of-00001.safetensors")
    again = checkpoint_tensors(trainee)
    assert set(again) == set(shipped)
    assert all(torch.equal(again[name], tensor.float()) for name, tensor in shipped.items())
    assert isinstance(newest_vae(tmp_path), AutoencoderKL)


def test_what_was_encoded_of_other_scenes_is_refused(tmp_path: Path, few_families, monkeypatch):
    monkeypatch.setattr(data, "encode_scenes", encode_mean_color)
    shard = Shard.by_number(0)
    tokens = shard.encode(None, torch.device("cpu"))
    tokens["64x64"] = tokens["64x64"][1:]
    with pytest.raises(ValueError, match="delete"):
        LatentPool(tmp_path).add(shard, tokens)


@pytest.mark.parametrize("layers", [7, 9, 16])
def test_a_deepened_model_computes_what_it_computed(tokenizers, layers: int) -> None:
    """The layers that are added add nothing yet, stand apart from each other, and are learned from at once."""
    _, _, config = tokenizers
    before, after = (Trainee(replace(config, num_hidden_layers=count)) for count in (config.num_hidden_layers, layers))
    after.load_checkpoint(deepened(checkpoint_tensors(before), layers))
    embeds, valid = torch.randn(2, 9, config.hidden_size), torch.ones(2, 9, dtype=torch.bool)
    hidden = [one.model(embeds, whole_span(one.config, valid, torch.float32)) for one in (before, after)]
    assert torch.equal(*hidden)
    hidden[1].sum().backward()
    added = [layer.mlp.down_proj.weight for layer in after.model.layers if not layer.mlp.down_proj.weight.any()]
    assert len(added) == layers - config.num_hidden_layers
    assert all(weight.grad.any() for weight in added)


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    """The steps that the whole recipe starts, each as its module and options; none runs, and the VAE takes a minute."""
    found: list[list[str]] = []

    class Child:
        def __init__(self, command: list[str], **_) -> None:
            found.append(command[2:])
            clock[0] += 60.0 * (command[2] == "training.vae_training")

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None: ...

        def terminate(self) -> None: ...

    clock = [0.0]
    monkeypatch.setattr(recipe.subprocess, "run", Child)
    monkeypatch.setattr(recipe.subprocess, "Popen", Child)
    monkeypatch.setattr(recipe.time, "monotonic", lambda: clock[0])
    return found


def test_the_whole_recipe_is_one_command(tmp_path: Path, started, monkeypatch) -> None:
    """The VAE's minutes count, also those before a kill; shards are made beside the transformer's training."""
    monkeypatch.setattr("sys.argv", ["training", "--folder", str(tmp_path), "--minutes", "10", "--workers", "2"])
    for turn in (1, 2):
        started.clear()
        recipe.main()
        names = [command[0].removeprefix("training.") for command in started]
        assert names == ["vae_training", "vae_training", "data", "data", "model_training", "evaluate"]
        training = started[4]
        assert training[training.index("--minutes") + 1] == str(10.0 - 2 * turn)
    monkeypatch.setattr("sys.argv", ["training", "--folder", str(tmp_path / "other"), "--shipped", "--count", "0"])
    started.clear()
    recipe.main()
    assert [command[0] for command in started][0] == "training.start" and "training.vae_training" not in str(started)
