"""Editing, masks, resuming and batches through the nodes' functions, on the embedded model where meaning matters."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from comfy_graph import ComfyGraph
from scene_reader import read_scene

RED, BLUE = (0xE0, 0x20, 0x20), (0x20, 0x50, 0xE0)


@pytest.fixture(scope="module")
def kit(graph: ComfyGraph) -> SimpleNamespace:
    """The pack's modules and the embedded model, as the nodes use them."""
    loaders, sampler = graph.pack("nodes.loaders"), graph.pack("nodes.sampler")
    model = loaders.load_model(graph.pack("nodes.catalog").EMBEDDED_LABEL, loaders.LoadOptions("fp32"))
    return SimpleNamespace(
        model=model,
        vae=model.vae,
        sampler=sampler,
        prompts=graph.pack("nodes.prompts"),
        latents=graph.pack("nodes.latents"),
        host=graph.pack("nodes.host"),
        boxes=graph.pack("nodes.all_in_one"),
        error=graph.pack("nextstep_core.errors").NextStepError,
    )


def square_picture() -> torch.Tensor:
    """(1, 64, 64, 3): a red square on blue, on token borders."""
    picture = torch.tensor(BLUE).float().expand(1, 64, 64, 3).clone() / 255
    picture[:, 16:48, 16:48] = torch.tensor(RED).float() / 255
    return picture


def draw(
    kit: SimpleNamespace, positive, latent: dict, seed: int = 1, on_interrupt: str = "discard", **settings
) -> dict:
    chosen = kit.model.engine.recommended(positive.editing).override(**settings)
    with torch.inference_mode():
        return kit.sampler.sample(kit.model, positive, None, latent, seed, chosen, on_interrupt)


def seen(kit: SimpleNamespace, latent: dict) -> list:
    return [read_scene((p * 255).round().byte().numpy()) for p in kit.latents.decode_latent(kit.vae, latent)]


def tokens_of(kit: SimpleNamespace, latent: dict) -> torch.Tensor:
    return kit.model.engine.latents.to_tokens(latent["samples"])


@torch.inference_mode()
def test_an_edit_changes_what_was_asked(kit) -> None:
    positive, latent = kit.prompts.encode_edit(
        kit.model, kit.vae, square_picture().repeat(4, 1, 1, 1), "<image>make the square yellow", kit.prompts.KEEP_SIZE
    )
    assert latent["samples"].shape == (4, 16, 8, 8)
    readings = seen(kit, draw(kit, positive, latent))
    colors = [reading.objects[0].color for reading in readings if reading.objects]
    assert colors.count("yellow") >= 3
    assert [reading.background for reading in readings].count("blue") >= 3


@torch.inference_mode()
def test_cfg_img_pulls_towards_the_input(kit) -> None:
    """With nothing asked, more of it brings the pictures closer to those that were put in."""
    pictures = torch.cat([square_picture(), 1 - square_picture(), square_picture().flip(-1)]).repeat(4, 1, 1, 1)
    positive, latent = kit.prompts.encode_edit(kit.model, kit.vae, pictures, "<image>", kit.prompts.KEEP_SIZE)

    def distance(cfg_img: float) -> float:
        drawn = draw(kit, positive, latent, cfg=1.0, cfg_img=cfg_img)
        return (kit.latents.decode_latent(kit.vae, drawn) - pictures).pow(2).mean().item()

    assert distance(4.0) < 0.9 * distance(1.05)


@torch.inference_mode()
def test_a_mask_keeps_its_tokens_bit_for_bit_and_the_picture_there(kit) -> None:
    picture = square_picture()
    encoded = {"samples": kit.vae.encode(picture)}
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:, :] = 1
    positive = kit.prompts.encode_prompt(kit.model, "a red square on a blue background")
    out = draw(kit, positive, {**encoded, "noise_mask": mask})
    before, after = tokens_of(kit, encoded), tokens_of(kit, out)
    assert torch.equal(before[:, :8], after[:, :8])
    assert (before[:, 8:] - after[:, 8:]).abs().max() > 0.1
    top = kit.latents.decode_latent(kit.vae, out)[:, :24]  # away from the border, where the decoder mixes
    round_trip = kit.latents.decode_latent(kit.vae, encoded)[:, :24]
    own_error = (round_trip - picture[:, :24]).pow(2).mean()
    assert (top - picture[:, :24]).pow(2).mean() <= 2 * own_error + 1e-3
    assert torch.equal(out["noise_mask"], mask), "as the core sampler, which hands the mask on"


@torch.inference_mode()
def test_what_is_drawn_under_a_mask_fits_what_is_kept(kit) -> None:
    """Continue a picture from its top half: the background goes on in the color that was kept."""
    picture = torch.tensor(BLUE).float().expand(1, 64, 64, 3) / 255
    mask = torch.zeros(64, 64)
    mask[32:] = 1
    positive = kit.prompts.encode_prompt(kit.model, "a red circle on a blue background")
    out = draw(kit, positive, {"samples": kit.vae.encode(picture), "noise_mask": mask[None]})
    (reading,) = seen(kit, out)
    assert reading.background == "blue"


def stopping(kit, patch, token: int) -> None:
    """The user stops the run after `token` tokens."""
    update = kit.host.ProgressReporter.update

    def stop(self, done, *rest):
        update(self, done, *rest)
        if done == token:
            raise kit.host.Interrupted

    patch.setattr(kit.host.ProgressReporter, "update", stop)


@torch.inference_mode()
def interrupted_at(kit, monkeypatch, token: int, **options) -> dict:
    """A run that the user stops after `token` tokens."""
    with monkeypatch.context() as patch:
        stopping(kit, patch, token)
        return draw(kit, kit.prompts.encode_prompt(kit.model, "a small green star on a white background"), **options)


@pytest.mark.parametrize("token", [1, 9, 15])
def test_a_kept_run_goes_on_to_the_same_picture(kit, monkeypatch, token: int) -> None:
    empty = kit.latents.empty_latent(64, 64, 2)
    positive = kit.prompts.encode_prompt(kit.model, "a small green star on a white background")
    whole = draw(kit, positive, empty, seed=5)
    kept = interrupted_at(kit, monkeypatch, token, latent=empty, seed=5, on_interrupt="keep")
    assert torch.equal(tokens_of(kit, kept)[:, :token], tokens_of(kit, whole)[:, :token])
    assert not tokens_of(kit, kept)[:, token:].any()
    resumed = draw(kit, positive, kept, seed=5)
    assert torch.equal(resumed["samples"], whole["samples"])
    assert set(resumed) == set(whole), "nothing is left of the interruption"


def test_a_kept_inpainting_gets_its_mask_back(kit, monkeypatch) -> None:
    with torch.inference_mode():
        latent = {"samples": kit.vae.encode(square_picture()), "noise_mask": torch.zeros(1, 1, 64, 64)}
        latent["noise_mask"][..., 16:48, :] = 1
        positive = kit.prompts.encode_prompt(kit.model, "a small green star on a white background")
        whole = draw(kit, positive, latent, seed=5)
        kept = interrupted_at(kit, monkeypatch, 7, latent=latent, seed=5, on_interrupt="keep")
        again = interrupted_at(kit, monkeypatch, 9, latent=kept, seed=5, on_interrupt="keep")
        resumed = draw(kit, positive, again, seed=5)
    assert torch.equal(resumed["noise_mask"], latent["noise_mask"]) and set(resumed) == set(whole)
    assert (resumed["samples"] - whole["samples"]).abs().max() <= 1e-3


def test_the_node_goes_on_with_what_it_kept_of_just_this_run(kit, monkeypatch) -> None:
    positive = kit.prompts.encode_prompt(kit.model, "a small green star on a white background")
    empty, sample, canvases = kit.latents.empty_latent(64, 64, 1), kit.sampler.sample, []
    widgets = {"steps": 4, "cfg": 3.0, "shift": 1.0, "cfg_schedule": "constant", "sampler": "auto", "use_norm": "auto"}

    def execute(**changed) -> dict:
        arguments = {"model": kit.model, "positive": positive, "latent": empty, "seed": 5, "on_interrupt": "keep"}
        return kit.sampler.NextStepSampler.execute(**{**arguments, **widgets, **changed}).result[0]

    def recording(model, positive, negative, latent, *rest) -> dict:
        canvases.append(latent)
        return sample(model, positive, negative, latent, *rest)

    whole = execute(on_interrupt="discard")

    def fingerprints() -> list[int]:
        """With the seed as a widget, and with one that is linked."""
        fingerprint = kit.sampler.NextStepSampler.fingerprint_inputs
        return [fingerprint(seed=seed, **widgets, on_interrupt="keep", model=None) for seed in (5, None)]

    before = fingerprints()
    monkeypatch.setattr(kit.sampler, "sample", recording)
    with monkeypatch.context() as patch:
        stopping(kit, patch, 6)
        part = execute()
    assert fingerprints() == [count + 1 for count in before], "so that the host does not take the part for the whole"
    other = execute(seed=6), execute(cfg=2.0), execute(latent=kit.latents.empty_latent(64, 64, 1))
    assert not any(kit.sampler.PARTIAL in canvas for canvas in canvases), "none of these was interrupted"
    assert torch.equal(execute()["samples"], whole["samples"]) and canvases[-1] is part
    assert torch.equal(other[2]["samples"], whole["samples"])
    execute()
    assert canvases[-1] is empty, "what is finished begins anew"


def test_an_interrupted_run_is_discarded_unless_asked(kit, monkeypatch) -> None:
    with pytest.raises(kit.host.Interrupted):
        interrupted_at(kit, monkeypatch, 5, latent=kit.latents.empty_latent(64, 64, 1))


def test_interrupt_stops_within_one_token(kit, monkeypatch) -> None:
    import comfy.model_management as mm

    projector, drawn = kit.model.engine.model.image_out_projector, []
    forward = projector.forward

    def counting(hidden):
        drawn.append(1)
        if len(drawn) == 4:
            mm.interrupt_current_processing(True)
        return forward(hidden)

    monkeypatch.setattr(projector, "forward", counting)
    with pytest.raises(kit.host.Interrupted):
        draw(kit, kit.prompts.encode_prompt(kit.model, "a red circle"), kit.latents.empty_latent(64, 64, 1))
    assert len(drawn) == 4


@torch.inference_mode()
def test_one_box_equals_the_separate_nodes(kit) -> None:
    settings = {
        "steps": 6, "cfg": 3.0, "cfg_schedule": "constant", "shift": 1.0, "sampler": "auto", "use_norm": "auto",
    }  # fmt: skip
    image, latent, info = kit.boxes.NextStepTextToImage.execute(
        kit.model, kit.vae, "a red circle", "", 64, 64, 1, 3, **settings
    ).result
    separate = draw(
        kit,
        kit.prompts.encode_prompt(kit.model, "a red circle"),
        kit.latents.empty_latent(64, 64, 1),
        3,
        steps=6,
        cfg=3.0,
    )
    assert torch.equal(latent["samples"], separate["samples"])
    assert torch.equal(image, kit.latents.decode_latent(kit.vae, separate))
    assert info.texts[0].startswith("a red circle\nSteps: 6, ")
    edited, *_ = kit.boxes.NextStepImageEdit.execute(
        kit.model,
        kit.vae,
        square_picture(),
        "make the square green",
        "",
        kit.prompts.FIT,
        64,
        96,
        3,
        **settings,
        cfg_img=1.0,
    ).result
    assert edited.shape == (1, 96, 64, 3)
    arguments = (kit.model, kit.vae, square_picture(), "make the square green", "", kit.prompts.KEEP_SIZE, 64, 64, 3)
    weak, strong = (
        kit.boxes.NextStepImageEdit.execute(*arguments, **settings, cfg_img=value).result[0] for value in (1.5, 4.0)
    )
    assert (weak - strong).abs().max() > 0.05, "the widget reaches the picture"


@torch.inference_mode()
def test_pictures_of_any_kind_are_brought_to_size(kit) -> None:
    def size_of(picture: torch.Tensor, size: str, width: int = 64, height: int = 64) -> tuple:
        _, latent = kit.prompts.encode_edit(kit.model, kit.vae, picture, "<image>x", size, width, height)
        return tuple(latent["samples"].shape[-2:])

    assert size_of(torch.rand(1, 70, 90, 3), kit.prompts.KEEP_SIZE) == (8, 10)
    assert size_of(torch.rand(1, 70, 90, 1), kit.prompts.FIT, 96, 64) == (8, 12)
    assert size_of(torch.rand(1, 30, 60, 4), kit.prompts.NEAREST, 256, 256) == (22, 46)
    assert size_of(torch.rand(1, 64, 64, 3), kit.prompts.NEAREST, 64, 64) == (8, 8), "about as large as asked"
    from nextstep_core.images.rgb import cover, to_rgb

    clear = torch.zeros(1, 8, 8, 4)
    assert torch.equal(to_rgb(clear), torch.ones(1, 8, 8, 3)), "what is transparent is white"
    stripes = torch.zeros(1, 32, 64, 3)
    stripes[:, :, 16:48] = 1
    assert torch.equal(cover(stripes, 32, 32), torch.ones(1, 32, 32, 3)), "the center is kept"


@torch.inference_mode()
def test_several_slots_make_one_picture_of_a_batch(kit) -> None:
    pictures = square_picture().repeat(2, 1, 1, 1)
    one, latent = kit.prompts.encode_edit(kit.model, kit.vae, pictures, "<image><image>x", kit.prompts.KEEP_SIZE)
    assert len(one.captions) == 1 and len(one.captions[0].images) == 2 and latent["samples"].shape[0] == 1
    each, latent = kit.prompts.encode_edit(kit.model, kit.vae, pictures, "<image>x", kit.prompts.KEEP_SIZE)
    assert len(each.captions) == 2 and latent["samples"].shape[0] == 2


def test_a_size_that_is_half_linked_is_told_without_a_number_that_nobody_wrote(kit) -> None:
    validate = kit.latents.NextStepEmptyLatent.validate_inputs
    assert validate(width=72) == "width is 72; use a multiple of 16, such as 64."
    assert validate(width=72, height=96) == str(pytest.raises(kit.error, kit.latents.empty_latent, 72, 96, 1).value)
    assert validate(height=96) is True and validate() is True


@torch.inference_mode()
@pytest.mark.parametrize("text", ["make it red", "<Image>make it red", "<IMAGE>make it red"])
def test_a_picture_that_is_not_placed_stands_in_front(kit, text: str) -> None:
    encoded, _ = kit.prompts.encode_edit(kit.model, kit.vae, square_picture(), text, kit.prompts.KEEP_SIZE)
    assert [caption.text for caption in encoded.captions] == ["<image>make it red"]


BAD_EDITS = {
    "too many slots": ({"instruction": "<image><image>x"}, "has 2 <image> slots for 1 input image"),
    "empty picture": ({"image": torch.zeros(0, 64, 64, 3)}, "expected (batch, height, width, 3)"),
    "NaN": ({"image": torch.full((1, 64, 64, 3), float("nan"))}, "NaN"),
    "odd size": ({"size": "width and height", "width": 72}, "The nearest size is 64x64"),
}


@pytest.mark.parametrize("name", BAD_EDITS)
def test_a_bad_edit_is_one_sentence(kit, name: str) -> None:
    change, sentence = BAD_EDITS[name]
    arguments = {
        "image": square_picture(),
        "instruction": "<image>x",
        "size": "keep",
        "width": 64,
        "height": 64,
    } | change
    with pytest.raises(kit.error) as caught:
        kit.prompts.encode_edit(kit.model, kit.vae, **arguments)
    assert sentence in str(caught.value)


def bad_latents() -> dict[str, tuple[dict, str]]:
    plain, image = torch.zeros(2, 16, 8, 8), torch.zeros(1, 64, 64)
    different = torch.stack([torch.zeros(64, 64), torch.ones(64, 64)])
    return {
        "mask of another picture": ({"samples": plain, "noise_mask": torch.ones(1, 64, 96)}, "The mask is 96x64"),
        "empty mask": ({"samples": plain, "noise_mask": image}, "nothing to draw"),
        "different masks": ({"samples": plain, "noise_mask": different}, "Use one mask for the whole batch"),
        "odd size": ({"samples": torch.zeros(1, 16, 8, 9)}, "The nearest size is"),
        "NaN": ({"samples": plain * float("nan"), "noise_mask": image + 1}, "Encode the picture again"),
    }


@pytest.mark.parametrize("name", bad_latents())
def test_a_bad_latent_is_one_sentence_before_the_model_is_asked(kit, monkeypatch, name: str) -> None:
    latent, sentence = bad_latents()[name]
    monkeypatch.setattr(kit.host, "bring_to_device", lambda *_: pytest.fail("long work began"))
    with pytest.raises(kit.error) as caught:
        draw(kit, kit.prompts.encode_prompt(kit.model, "a red circle"), latent)
    assert sentence in str(caught.value)


@torch.inference_mode()
def test_what_is_not_finite_is_an_error_that_says_where_it_began(kit, monkeypatch) -> None:
    nan = float("nan")
    decodes = SimpleNamespace(decode=lambda latents: torch.full((1, 64, 64, 3), nan))
    encodes = SimpleNamespace(encode=lambda pixels: torch.full((len(pixels), 16, 8, 8), nan))
    latent = kit.latents.empty_latent(64, 64, 1)
    with pytest.raises(kit.error, match="^This latent holds NaN"):
        kit.latents.decode_latent(kit.vae, {"samples": latent["samples"] * nan})
    with pytest.raises(kit.error, match="^The picture that the VAE decoded"):
        kit.latents.decode_latent(decodes, latent)
    with pytest.raises(kit.error, match="^An input image that the VAE encoded"):
        kit.prompts.encode_edit(kit.model, encodes, square_picture(), "<image>x", kit.prompts.KEEP_SIZE)
    positive = kit.prompts.encode_prompt(kit.model, "a red circle")
    final = kit.model.engine.model.head.final_layer.linear.weight
    kept = final.detach().clone()
    final.view(-1)[0] = nan
    try:
        with pytest.raises(kit.error, match="^Token 1 of 16 holds NaN"):
            draw(kit, positive, latent)
        with pytest.raises(kit.error, match="^What was drawn until the interrupt"):
            interrupted_at(kit, monkeypatch, 5, latent=latent, on_interrupt="keep")
    finally:
        final.copy_(kept)
    assert draw(kit, positive, latent)["samples"].isfinite().all()


@torch.inference_mode()
def test_prompts_in_a_batch_are_drawn_as_they_are_alone(kit) -> None:
    prompts = [
        kit.prompts.encode_prompt(kit.model, p) for p in ("a red circle", "a small green star on a white background")
    ]
    (batch,) = kit.prompts.NextStepPromptBatch.execute(*prompts).result
    together = draw(kit, batch, kit.latents.empty_latent(64, 64, 2))["samples"]
    alone = [draw(kit, p, kit.latents.empty_latent(64, 64, 1))["samples"] for p in prompts]
    assert (together - torch.cat(alone)).abs().max() <= 1e-3  # float noise, grown along the chain of tokens
    assert (together[0] - together[1]).abs().max() > 0.5


@torch.inference_mode()
def test_a_batch_that_does_not_go_round_is_one_sentence(kit) -> None:
    positive, _ = kit.prompts.encode_edit(
        kit.model, kit.vae, square_picture().repeat(2, 1, 1, 1), "<image>x", kit.prompts.KEEP_SIZE
    )
    with pytest.raises(kit.error, match="a batch of 3 for 2 prompts"):
        draw(kit, positive, kit.latents.empty_latent(64, 64, 3))


def test_aspect_ratios_are_the_trained_ones(kit) -> None:
    from nextstep_core.request.sizes import BASES, GRIDS, RATIOS, ratio_size

    assert len(RATIOS) == 17
    for columns, rows in GRIDS:
        for base in BASES:
            width, height = ratio_size(next(n for n, g in RATIOS.items() if g == (columns, rows)), base)
            assert width % 16 == height % 16 == 0
            assert abs(width * height / base**2 - 1) < 0.08
    assert kit.latents.NextStepAspectRatio.execute("18:14 landscape", "512").result == (576, 448)


def test_a_mode_that_does_not_exist_is_one_sentence(kit) -> None:
    prompt, latent = kit.prompts.encode_prompt(kit.model, "a red circle"), kit.latents.empty_latent(64, 64, 1)
    settings = {"cfg": 2.0, "cfg_schedule": "constant", "steps": 4, "shift": 1.0, "sampler": "auto", "use_norm": "auto"}
    calls = {
        "use_norm is 'maybe'; choose one of auto, on, off": lambda: kit.sampler.settings_for(
            kit.model, False, **{**settings, "use_norm": "maybe"}
        ),
        "sampler is 'euler'; choose one of score-sde-1.0": lambda: kit.sampler.settings_for(
            kit.model, False, **{**settings, "sampler": "euler"}
        ),
        "on_interrupt is 'save'; choose one of discard, keep": lambda: draw(kit, prompt, latent, on_interrupt="save"),
        "size is 'big'; choose one of nearest": lambda: kit.prompts.encode_edit(
            kit.model, kit.vae, square_picture(), "<image>x", "big"
        ),
        "dtype is 'int8'; choose one of auto, bf16": lambda: kit.host.pick_dtypes("int8", 1),
        "base is '500'; choose one of 256": lambda: kit.latents.NextStepAspectRatio.execute("16:16 square", "500"),
    }
    for sentence, call in calls.items():
        with pytest.raises(kit.error, match=sentence):
            call()


def test_one_box_checks_all_before_a_picture_is_encoded_or_drawn(kit, monkeypatch) -> None:
    """Whatever it would have told after minutes of work: another model's VAE, and values that come by a link."""
    monkeypatch.setattr(kit.host, "encode", lambda *_: pytest.fail("a picture was encoded"))
    monkeypatch.setattr(kit.host, "bring_to_device", lambda *_: pytest.fail("a picture was drawn"))
    settings = {"steps": 2, "cfg": 1.0, "cfg_schedule": "constant", "shift": 1.0, "sampler": "auto", "use_norm": "auto"}
    other = SimpleNamespace(latent_channels=4, encode=kit.vae.encode, decode=kit.vae.decode)
    many, half = square_picture().expand(65, -1, -1, -1), "half \ud800"
    for change, sentence in (
        ({"vae": other}, "makes latents of 4 channels; the model needs 16"),
        ({"seed": -1}, "seed is -1"),
        ({"negative": half}, "half of a character"),
        ({"cfg": 0.0}, "cfg is 0"),
        ({"image": many}, "batch_size is 65"),
    ):
        given = {"vae": kit.vae, "seed": 3, "negative": "", "image": square_picture()} | change
        own = settings | {name: value for name, value in change.items() if name in settings}
        vae, negative, seed = given["vae"], given["negative"], given["seed"]
        with pytest.raises(kit.error) as caught:
            kit.boxes.NextStepImageEdit.execute(
                kit.model, vae, given["image"], "x", negative, kit.prompts.KEEP_SIZE, 64, 64, seed, **own
            )
        assert sentence in str(caught.value)
        if "image" not in change:
            with pytest.raises(kit.error) as caught:
                kit.boxes.NextStepTextToImage.execute(kit.model, vae, "x", negative, 64, 64, 1, seed, **own)
            assert sentence in str(caught.value)


def test_the_vae_of_prepare_picture_goes_on_in_tiles_and_tells_nan(graph: ComfyGraph, kit) -> None:
    prepare = graph.pack("nodes.pictures").NextStepPreparePicture.execute
    tried: list[dict] = []

    def encode(pixels: torch.Tensor, **options: int) -> torch.Tensor:
        tried.append(options)
        if not options:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return torch.zeros(len(pixels), 16, 8, 8)

    vae = SimpleNamespace(encode=encode, encode_tiled=encode, decode=encode)
    arguments = (square_picture(), "crop", "width and height", "512", 64, 64)
    assert prepare(*arguments, vae=vae).result[-1]["samples"].shape == (1, 16, 8, 8)
    assert len(tried) == 2 and tried[1]["tile_x"] > 0
    nan = SimpleNamespace(encode=lambda pixels: torch.full((1, 16, 8, 8), float("nan")), decode=encode)
    with pytest.raises(kit.error, match="An input image that the VAE encoded holds NaN"):
        prepare(*arguments, vae=nan)
    with pytest.raises(kit.error, match="connect the vae output"):
        prepare(*arguments, vae=5)


def test_a_preset_is_shown_and_goes_where_it_is_linked(kit, graph: ComfyGraph, monkeypatch) -> None:
    presets, said = graph.pack("nodes.presets"), []
    monkeypatch.setattr(kit.host, "show_text", said.append)
    own = kit.model.engine.recommended()
    assert presets.NextStepPreset.execute(kit.model, "draft").result == (512, 512, 20, 6.0, own.cfg_img, own.shift, "")
    assert presets.NextStepPreset.execute(kit.model, "edit").result[-1] == "Copy original image."
    assert said[0] == f"512x512, 20 steps, cfg 6, shift {own.shift:g}"
    presets.NextStepPreset.execute(kit.model, "premium")
    assert "1024x1024 was not part of the training" in said[-1]
    assert "'x'; choose one of draft" in presets.NextStepPreset.validate_inputs("x")


@torch.inference_mode()
@pytest.mark.parametrize(("preset", "shown"), [("draft", "20 steps, cfg 6, shift 1"), ("off", None)])
def test_a_box_tells_at_the_end_what_its_preset_put_in_the_place_of_widgets(
    kit, graph: ComfyGraph, monkeypatch, preset: str, shown: str | None
) -> None:
    presets, said = graph.pack("nodes.presets"), []
    small = replace(presets.find_preset("draft", presets.preset_file()), width=64, height=48)
    monkeypatch.setattr(presets, "find_preset", lambda *_: small)
    monkeypatch.setattr(kit.host, "show_text", said.append)
    widgets = {"cfg_schedule": "constant", "sampler": "auto", "use_norm": "auto"}
    arguments = kit.model, kit.vae, "a red circle", "", 64, 64, 1, 3
    kit.boxes.NextStepTextToImage.execute(*arguments, preset=preset, **widgets, steps=2, cfg=2.0, shift=1.0)
    tokens, *rest = said[-1].split("\n")
    assert " tokens in " in tokens
    assert rest == ([f"64x48, {shown}"] if shown else [])


@torch.inference_mode()
def test_a_preset_of_the_user_s_file_takes_the_place_of_widgets(kit, graph: ComfyGraph, monkeypatch) -> None:
    file = graph.pack("nodes.presets").preset_file()
    widgets = {"cfg_schedule": "constant", "sampler": "auto", "use_norm": "auto"}
    before = graph.pack("nodes.presets").NextStepPreset.fingerprint_inputs()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('{"mine": {"width": 96, "height": 64, "steps": 5, "cfg": 2, "negative_prompt": "a square"}}')
    try:
        assert graph.pack("nodes.presets").NextStepPreset.fingerprint_inputs() != before
        box = kit.boxes.NextStepTextToImage
        arguments = kit.model, kit.vae, "a red circle", "", 64, 64, 1, 3
        by_name = box.execute(*arguments, preset="mine", **widgets, steps=9, cfg=7.0, shift=1.0).result
    finally:
        file.unlink()
    by_hand = box.execute(
        kit.model, kit.vae, "a red circle", "a square", 96, 64, 1, 3, **widgets, steps=5, cfg=2.0,
        shift=kit.model.engine.recommended().shift,
    ).result  # fmt: skip
    assert torch.equal(by_name[0], by_hand[0]) and by_name[2] == by_hand[2]


def test_an_output_folder_that_takes_nothing_is_one_sentence(kit, monkeypatch, tmp_path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(kit.host.folders.folder_paths, "get_output_directory", lambda: str(tmp_path))
    with pytest.raises(kit.error, match="output folder cannot be written to .*file"):
        kit.host.new_files("file/picture", 64, 64, 1, ".png")


def test_a_model_s_card_tells_what_it_is_for_what_it_takes_and_how_long(kit, graph: ComfyGraph, monkeypatch) -> None:
    card = graph.pack("nodes.information").NextStepModelInfo
    monkeypatch.setattr(kit.model, "seconds_per_token", None)
    (text,) = card.execute(kit.model, 128, 64).result
    weights = sum(p.nbytes for p in kit.model.patcher.model.parameters())
    assert text.startswith("tiny: NextStep-1, for text and editing\n")
    assert f"weights: {weights / 1e6:.1f} MB as float32, hash {kit.model.facts['hash']}" in text
    assert "128x64: 32 tokens, " in text and "all of it fits" in text and "draw a picture once" in text
    monkeypatch.setattr(kit.model, "seconds_per_token", 0.5)
    monkeypatch.setattr(kit.host, "free_memory", lambda _: weights)
    (text,) = card.execute(kit.model, 128, 64).result
    assert "about 16.0 s, at the rate of the last run" in text and "streamed" in text
    assert card.validate_inputs(width=72) == "width is 72; use a multiple of 16, such as 64."


@pytest.mark.parametrize(
    ("name", "editing", "words"),
    [
        ("NextStep-1.1", True, "not trained to edit"),
        ("NextStep-1-Large-Edit", False, "is for editing"),
        ("NextStep-1.1", False, None),
        ("NextStep-1-Large-Edit", True, None),
        ("tiny", True, None),
        ("tiny", False, None),
    ],
)
def test_a_checkpoint_that_was_not_made_for_this_is_told(kit, monkeypatch, name: str, editing: bool, words) -> None:
    said = []
    monkeypatch.setattr(kit.host, "show_text", said.append)
    monkeypatch.setitem(kit.model.facts, "model", name)
    with torch.inference_mode():
        encoded, latent = kit.prompts.encode_edit(kit.model, kit.vae, square_picture(), "x", kit.prompts.KEEP_SIZE)
        draw(kit, encoded if editing else kit.prompts.encode_prompt(kit.model, "x"), latent, steps=2)
    assert kit.model.seconds_per_token > 0
    time, *rest = said[-1].split("\n")
    assert time.startswith("16 tokens in ")
    assert (words in rest[0]) if words else not rest


def test_a_batch_is_saved_under_the_next_free_names(kit, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(kit.host.folders.folder_paths, "get_output_directory", lambda: str(tmp_path))
    (tmp_path / "x_00004_.png").touch()
    files = kit.host.new_files("x", 64, 64, 2, ".png")
    assert [file.path for file in files] == [tmp_path / "x_00005_.png", tmp_path / "x_00006_.png"]
    named = kit.host.new_files("of/%batch_num%", 64, 64, 2, ".jpg")
    assert [file.shown["filename"] for file in named] == ["0_00001_.jpg", "1_00002_.jpg"]
    assert {file.shown["subfolder"] for file in named} == {"of"}


@pytest.mark.parametrize("preset", [3, None, {"a": 1}, ["draft"]])
def test_a_preset_that_is_no_name_is_one_sentence(kit, graph: ComfyGraph, preset: object) -> None:
    with pytest.raises(kit.error, match="choose one of draft"):
        graph.pack("nodes.presets").NextStepPreset.execute(kit.model, preset)


@torch.inference_mode()
def test_the_frames_of_a_drawing_end_in_the_picture(kit, graph: ComfyGraph) -> None:
    make = graph.pack("nodes.frames").NextStepDrawingFrames.execute
    positive = kit.prompts.encode_prompt(kit.model, "a red circle on a blue background")
    drawn = draw(kit, positive, kit.latents.empty_latent(64, 64, 1))
    picture = kit.latents.decode_latent(kit.vae, drawn)
    (frames,) = make(drawn, kit.vae, 4, 1, 512).result
    assert frames.shape == (5, 64, 64, 3)
    for n, frame in enumerate(frames[:4]):  # a row of tokens each
        assert torch.equal(frame[: 16 * (n + 1)], picture[0, : 16 * (n + 1)].cpu())
        assert (frame[16 * (n + 1) :] == 0.5).all()
    assert torch.equal(frames[4], frames[3])


@torch.inference_mode()
def test_the_frames_of_an_interrupted_masked_run_show_what_was_kept_and_what_was_drawn(kit, graph, monkeypatch) -> None:
    make = graph.pack("nodes.frames").NextStepDrawingFrames.execute
    mask = torch.zeros(1, 64, 64)
    mask[:, 32:] = 1
    masked = {"samples": kit.vae.encode(square_picture()), "noise_mask": mask}
    kept = interrupted_at(kit, monkeypatch, 12, latent=masked, on_interrupt="keep")
    (frames,) = make(kept, kit.vae, 4, 0, 512).result
    gray = (frames == 0.5).all(-1)
    assert not gray[:, :32].any(), "what the mask did not cover is there from the start"
    assert [int(frame[32:48, 8::16].all(0).sum()) for frame in gray] == [3, 2, 1, 0], "the row that was drawn"
    assert gray[:, 48:].all(), "the row that was not"
    positive = kit.prompts.encode_prompt(kit.model, "a small green star on a white background")
    (frames,) = make(draw(kit, positive, kept), kit.vae, 8, 0, 512).result
    gray = (frames == 0.5).all(-1)
    assert not gray[:, :32].any() and gray[0, 48:].all() and not gray[-1].any(), "once resumed, the whole drawing"
