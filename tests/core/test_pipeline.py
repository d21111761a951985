"""The public calls: what they take when nothing is said, and how pictures come and go."""

from __future__ import annotations

import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from nextstep_core import NextStepError, NextStepPipeline
from nextstep_core.images.rgb import to_pixels
from nextstep_core.runtime.interrupt import go_on

SMALL = {"height": 32, "width": 48, "steps": 2, "cfg": 1.0, "sampler": "flow-ode"}
PICTURE = torch.rand(32, 48, 3, generator=torch.Generator().manual_seed(0))


def test_defaults_are_those_of_the_documentation() -> None:
    given = {name: p.default for name, p in inspect.signature(NextStepPipeline.generate).parameters.items()}
    assert (given["height"], given["width"], given["num_images_per_prompt"], given["seed"]) == (512, 512, 1, 0)
    left_to_the_checkpoint = ("cfg", "cfg_img", "cfg_schedule", "steps", "shift", "sampler", "use_norm", "images")
    assert all(given[name] is None for name in (*left_to_the_checkpoint, "vae_tile", "callback"))
    loading = {n: p.default for n, p in inspect.signature(NextStepPipeline.from_pretrained).parameters.items()}
    assert (loading["device"], loading["dtype"], loading["cuda_graphs"]) == ("cpu", torch.bfloat16, True)


def test_what_is_not_said_is_the_checkpoints_own(pipeline) -> None:
    """For making and for editing, which differ in their shift."""
    seen = []
    published = replace(
        pipeline.engine.published,
        text_to_image=replace(pipeline.engine.published.text_to_image, steps=2, cfg=1.0),
        editing=replace(pipeline.engine.published.editing, steps=3, cfg=1.0),
    )
    engine = replace(pipeline.engine, published=published)
    pipe = NextStepPipeline(engine, pipeline.vae, pipeline.device, pipeline.dtype)
    make_job = type(engine).make_job

    def watched(self, captions, grid, settings, **options):
        seen.append(settings)
        return make_job(self, captions, grid, settings, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(engine), "make_job", watched)
        pipe.generate("A", height=32, width=48)
        pipe.generate("<image>A", images=PICTURE, height=32, width=48)
    assert seen == [published.text_to_image, published.editing]


def test_every_setting_arrives(pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(Exception):
        pass

    def watched(self, captions, grid, settings, **options):
        raise Seen(captions, grid, settings, options)

    monkeypatch.setattr(type(pipeline.engine), "make_job", watched)

    def check() -> None:
        pass

    said = {"cfg": 2.5, "cfg_img": 1.5, "cfg_schedule": "linear", "steps": 7, "shift": 1.25, "sampler": "flow-sde"}
    said |= {"lookahead": "fast", "steps_schedule": "checked"}
    others = {"seed": 9, "negative_prompt": "n", "positive_prompt": "p"}
    with pytest.raises(Seen) as caught:
        size = {"height": 32, "width": 48}
        pipeline.generate(["A", "B"], **said, **others, **size, use_norm=False, num_images_per_prompt=3, check=check)
    captions, grid, settings, options = caught.value.args
    assert [c.text for c in captions] == ["A", "B"] and grid == (2, 3)
    assert all(getattr(settings, name) == value for name, value in {**said, "use_norm": False}.items())
    assert options == {**others, "images_per_caption": 3, "check": check}


@torch.inference_mode()
def test_an_encoded_picture_by_hand(pipeline) -> None:
    """Scale and shift go to the mean, the scale alone to the standard deviation; both are cut into tokens."""
    engine = replace(pipeline.engine, latents=replace(pipeline.engine.latents, scale=2.0, shift=3.0))
    vae = pipeline.vae
    config = vae.config
    pipe = NextStepPipeline(engine, vae, pipeline.device, pipeline.dtype)
    mean, logvar = vae.encode_moments(to_pixels(PICTURE))
    vae.config = replace(config, deterministic=False)
    try:
        encoded = pipe.encode_image(PICTURE)
    finally:
        vae.config = config
    assert encoded.grid == (2, 3) and encoded.tokens.shape == (6, 64)
    assert torch.equal(encoded.tokens, engine.latents.cut((mean - 3) * 2)[0])
    assert torch.equal(encoded.std, engine.latents.cut(torch.exp(logvar / 2) * 2)[0])
    assert pipe.encode_image(PICTURE).std is None, "deterministic"


def test_what_comes_out_by_hand(pipeline) -> None:
    out = pipeline.generate("A", **SMALL)
    latents = pipeline.engine.latents.to_latents(out.tokens, (2, 3))
    assert torch.equal(out.latents, latents)
    with torch.inference_mode():
        pixels = pipeline.vae.decode(latents)
    assert (out.images - ((pixels + 1) / 2).clamp(0, 1).movedim(1, -1)).abs().max() <= 1e-6
    assert {t.dtype for t in (out.images, out.latents, out.tokens)} == {torch.float32}
    assert out.images.shape == (1, 32, 48, 3)


def test_one_picture_is_a_list_of_one_and_any_sequence_will_do(pipeline) -> None:
    array = PICTURE.numpy()
    kinds = [PICTURE, [PICTURE], (PICTURE,), array, [array]]
    drawn = [pipeline.generate("<image>A", images=images, **SMALL).tokens for images in kinds]
    assert all(torch.equal(tokens, drawn[0]) for tokens in drawn)
    assert isinstance(array, np.ndarray)
    batch = [pipeline.generate(prompts, **SMALL).tokens for prompts in (["A"], ("A",), "A")]
    assert torch.equal(batch[0], batch[1]) and torch.equal(batch[0], batch[2])


def test_images_go_to_their_prompts_in_order(pipeline) -> None:
    captions = pipeline._captions(["<image>A", "B", "<image><image>"], [PICTURE, 1 - PICTURE, PICTURE / 2], None, go_on)
    assert [len(c.images) for c in captions] == [1, 0, 2]
    with torch.inference_mode():
        alone = [pipeline.encode_image(p).tokens for p in (PICTURE, 1 - PICTURE, PICTURE / 2)]
    ours = [image.tokens for caption in captions for image in caption.images]
    assert all(torch.equal(a, b) for a, b in zip(ours, alone, strict=True))


@pytest.mark.parametrize("prompt", [[], ()])
def test_no_prompt_is_nothing_to_draw(pipeline, prompt) -> None:
    with pytest.raises(NextStepError, match="at least one prompt"):
        pipeline.generate(prompt, **SMALL)


def test_a_picture_that_is_too_large_is_refused_before_it_is_read(pipeline, monkeypatch) -> None:
    """A file of kilobytes may stand for gigabytes."""
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was read"))
    with pytest.raises(NextStepError, match="height is 13000"):
        pipeline.encode_image(Image.new("1", (16, 13000)))


PLACEHOLDER = "<|image_placeholder|>"


@pytest.mark.parametrize("texts", [{"prompt": f"<image>x{PLACEHOLDER}"}, {"negative_prompt": PLACEHOLDER}], ids=str)
def test_a_text_that_spells_a_part_of_a_picture_is_refused_beside_pictures(pipeline, texts: dict[str, str]) -> None:
    engine = pipeline.engine
    assert engine.tokenizer.encode(PLACEHOLDER) == [engine.config.image_placeholder_id]
    with pytest.raises(NextStepError, match=r"spells .*placeholder.*<image>"):
        pipeline.generate(**{"prompt": "<image>x"} | texts, images=PICTURE, **SMALL | {"cfg": 2.0, "cfg_img": 1.5})
    assert pipeline.generate(f"x{PLACEHOLDER}", **SMALL).images.isfinite().all(), "without pictures it is a text"
