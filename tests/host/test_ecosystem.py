"""Our nodes among those that ComfyUI brings: what they make goes on, and what comes back is taken."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from comfy_graph import ComfyGraph, node, text_to_image
from PIL import Image

EMBEDDED = "tiny (embedded)"
TILES = {"tile_size": 128, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}


def embedded(prompt: dict, words: str = "a red circle on a blue background", side: int = 64) -> dict:
    """The same graph on the embedded model, whose pictures mean something."""
    prompt["model"]["inputs"]["model_name"] = EMBEDDED
    prompt["positive"]["inputs"]["prompt"] = words
    prompt["latent"]["inputs"] |= {"width": side, "height": side}
    prompt["sampler"]["inputs"]["steps"] = 8
    return prompt


def lower_half(width: int, height: int) -> dict:
    """Core nodes that paint a mask over the lower half of a picture."""
    return {
        "clear": node("SolidMask", value=0.0, width=width, height=height),
        "painted": node("SolidMask", value=1.0, width=width, height=height // 2),
        "mask": node(
            "MaskComposite", destination=["clear", 0], source=["painted", 0], x=0, y=height // 2, operation="add"
        ),
    }


def decoded(samples: str) -> dict:
    return node("NextStepVAEDecode", samples=[samples, 0], vae=["model", 1])


def redrawn(latent: str, **changes) -> dict:
    """Our sampler once more, on another latent."""
    sampler = text_to_image()["sampler"]
    sampler["inputs"] |= {"latent": [latent, 0], "seed": 9} | changes
    return sampler


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().mean().item()


def test_a_saved_latent_decodes_to_the_same_picture(graph: ComfyGraph) -> None:
    drawing = text_to_image()
    picture = graph.value(drawing, "decode")
    drawing["save"] = node("SaveLatent", samples=["sampler", 0], filename_prefix="latents/test")
    (file,) = graph.saved(graph.run(drawing))
    shutil.move(file, graph.base / "input" / "test.latent")
    loading = {
        "model": drawing["model"],
        "load": node("LoadLatent", latent="test.latent"),
        "decode": decoded("load"),
    }
    assert torch.equal(graph.value(loading, "decode"), picture)


def test_latents_of_two_runs_are_decoded_as_a_batch(graph: ComfyGraph) -> None:
    prompt = text_to_image(seed=1)
    prompt["other"] = redrawn("latent", seed=2)
    prompt["batch"] = node("LatentBatch", samples1=["sampler", 0], samples2=["other", 0])
    prompt |= {"decode other": decoded("other"), "decode batch": decoded("batch")}
    alone = torch.cat([graph.value(prompt, "decode"), graph.value(prompt, "decode other")])
    together = graph.value(prompt, "decode batch")
    assert distance(alone[0], alone[1]) > 0.01
    assert torch.allclose(together, alone, atol=1e-4)


def test_an_enlarged_picture_is_encoded_and_drawn_on(graph: ComfyGraph) -> None:
    """Upscale by the round trip through the VAE: enlarge, encode, and draw the lower half anew."""
    prompt = embedded(text_to_image()) | lower_half(128, 128)
    size = {"width": 128, "height": 128}
    prompt["large"] = node("ImageScale", image=["decode", 0], upscale_method="lanczos", crop="disabled", **size)
    prompt["encode"] = node("VAEEncode", pixels=["large", 0], vae=["model", 1])
    prompt["decode encoded"] = decoded("encode")
    prompt["masked"] = node("SetLatentNoiseMask", samples=["encode", 0], mask=["mask", 0])
    prompt["again"] = redrawn("masked", steps=8)
    prompt["decode again"] = decoded("again")

    large, encoded = graph.value(prompt, "large"), graph.value(prompt, "encode")["samples"]
    unrelated = graph.value(embedded(text_to_image(seed=3), "a green star on a white background", 128), "decode")
    round_trip = graph.value(prompt, "decode encoded")
    assert distance(round_trip, large) < distance(unrelated, large) / 5, "it is the same picture"
    samples = graph.value(prompt, "again")["samples"]
    assert torch.equal(samples[:, :, :8], encoded[:, :, :8]), "what is kept is kept bit for bit"
    assert distance(samples[:, :, 8:], encoded[:, :, 8:]) > 0.05
    assert graph.value(prompt, "decode again").shape == (1, 128, 128, 3)


def test_an_enlarged_latent_decodes_and_is_drawn_on(graph: ComfyGraph) -> None:
    prompt = embedded(text_to_image()) | lower_half(128, 128)
    prompt["large"] = node(
        "LatentUpscale", samples=["sampler", 0], upscale_method="nearest-exact", width=128, height=128, crop="disabled"
    )
    prompt["decode large"] = decoded("large")
    prompt["masked"] = node("SetLatentNoiseMask", samples=["large", 0], mask=["mask", 0])
    prompt["again"] = redrawn("masked", steps=8)

    small = graph.value(prompt, "decode").movedim(-1, 1)
    wanted = torch.nn.functional.interpolate(small, scale_factor=2).movedim(1, -1)
    picture = graph.value(prompt, "decode large")
    unrelated = graph.value(embedded(text_to_image(seed=3), "a green star on a white background", 128), "decode")
    assert distance(picture, wanted) < distance(unrelated, wanted) / 2, "roughly the same picture"
    samples, before = graph.value(prompt, "again")["samples"], graph.value(prompt, "large")["samples"]
    assert torch.equal(samples[:, :, :8], before[:, :, :8])
    assert distance(samples[:, :, 8:], before[:, :, 8:]) > 0.05


def test_every_core_vae_node_works_on_our_vae(graph: ComfyGraph) -> None:
    prompt = embedded(text_to_image(), side=128) | lower_half(128, 128)  # the largest that the model knows
    vae, tiles = {"vae": ["model", 1]}, TILES | {"tile_size": 96}
    prompt |= {
        "whole": node("VAEDecode", samples=["sampler", 0], **vae),
        "tiles": node("VAEDecodeTiled", samples=["sampler", 0], **tiles, **vae),
        "encode": node("VAEEncode", pixels=["decode", 0], **vae),
        "encode tiles": node("VAEEncodeTiled", pixels=["decode", 0], **tiles, **vae),
        "encode masked": node("VAEEncodeForInpaint", pixels=["decode", 0], mask=["mask", 0], grow_mask_by=6, **vae),
        "decode encoded": decoded("encode"),
        "decode encoded tiles": decoded("encode tiles"),
    }
    picture = graph.value(prompt, "decode")
    assert torch.equal(graph.value(prompt, "whole"), picture)
    for source in ("tiles", "decode encoded", "decode encoded tiles"):
        assert distance(graph.value(prompt, source), picture) < 0.01, source
    whole, tiled = (graph.value(prompt, source)["samples"] for source in ("encode", "encode tiles"))
    assert distance(tiled, whole) < 0.1 * whole.abs().mean()
    token = tiled.reshape(1, 16, 8, 2, 8, 2).std((1, 3, 5))
    assert (token - 1).abs().max() < 0.02, "the average of several tilings is still normalized, as the model wants it"


def test_inpainting_with_cores_own_encoder(graph: ComfyGraph) -> None:
    prompt = embedded(text_to_image()) | lower_half(64, 64)
    prompt["masked"] = node(
        "VAEEncodeForInpaint", pixels=["decode", 0], vae=["model", 1], mask=["mask", 0], grow_mask_by=6
    )
    prompt["again"] = redrawn("masked", steps=8)
    before, after = graph.value(prompt, "masked")["samples"], graph.value(prompt, "again")["samples"]
    assert torch.equal(after[:, :, :2], before[:, :, :2])
    assert distance(after[:, :, 4:], before[:, :, 4:]) > 0.05


def tiny_upscaler(path: Path) -> None:
    """An ESRGAN checkpoint that enlarges four times, with random weights."""
    from safetensors.torch import save_file
    from spandrel.architectures.ESRGAN import ESRGAN

    torch.manual_seed(0)
    path.parent.mkdir(exist_ok=True)
    save_file(ESRGAN(num_filters=8, num_blocks=1, scale=4).state_dict(), path)


def test_pictures_go_through_cores_resizers(graph: ComfyGraph) -> None:
    prompt = text_to_image()
    image = {"image": ["decode", 0]}
    prompt |= {
        "scale": node("ImageScale", width=96, height=32, upscale_method="bicubic", crop="center", **image),
        "by": node("ImageScaleBy", scale_by=1.5, upscale_method="nearest-exact", **image),
        "total": node(  # resolution_steps: newer hosts ask for it
            "ImageScaleToTotalPixels", megapixels=0.01, upscale_method="area", resolution_steps=1, **image
        ),
    }
    shapes = [tuple(graph.value(prompt, source).shape[1:3]) for source in ("scale", "by", "total")]
    assert shapes == [(32, 96), (96, 72), (118, 89)]


@pytest.mark.skipif(
    importlib.util.find_spec("spandrel") is None, reason="spandrel, ComfyUI's library of upscalers, is not installed"
)
def test_a_picture_goes_through_an_upscale_model(graph: ComfyGraph) -> None:
    tiny_upscaler(graph.base / "models" / "upscale_models" / "tiny.safetensors")
    prompt = text_to_image()
    prompt["upscaler"] = node("UpscaleModelLoader", model_name="tiny.safetensors")
    prompt["large"] = node("ImageUpscaleWithModel", upscale_model=["upscaler", 0], image=["decode", 0])
    prompt["save"]["inputs"]["images"] = ["large", 0]
    with torch.inference_mode():
        upscaler = graph.value(prompt, "upscaler")
        wanted = upscaler(graph.value(prompt, "decode").movedim(-1, 1)).movedim(1, -1).clamp(0, 1)
    assert wanted.std() > 0.001
    assert torch.allclose(graph.value(prompt, "large"), wanted, atol=1e-5)
    (path,) = graph.saved(graph.run(prompt))
    assert Image.open(path).size == (192, 256)


def test_pictures_are_saved_in_every_form(graph: ComfyGraph) -> None:
    prompt = text_to_image()
    prompt["latent"]["inputs"]["batch_size"] = 3
    images, name = {"images": ["decode", 0]}, {"filename_prefix": "every"}
    prompt |= {
        "preview": node("PreviewImage", **images),
        "webp": node("SaveAnimatedWEBP", fps=6.0, lossless=True, quality=80, method="default", **images, **name),
        "png": node("SaveAnimatedPNG", fps=6.0, compress_level=4, **images, **name),
        "video": node("CreateVideo", fps=6.0, **images),
        "mp4": node("SaveVideo", video=["video", 0], format="auto", codec="auto", **name),
    }
    pictures = (graph.value(prompt, "decode").numpy() * 255).clip(0, 255).astype(np.uint8)
    outputs = graph.run(prompt)
    for still in ("save", "preview"):
        files = graph.saved(outputs, still)
        assert np.array_equal(np.stack([np.asarray(Image.open(file)) for file in files]), pictures), still
    for moving in ("webp", "png"):
        (file,) = graph.saved(outputs, moving)
        animation = Image.open(file)
        frames = []
        for number in range(animation.n_frames):
            animation.seek(number)
            frames.append(np.asarray(animation.convert("RGB")))
        assert np.array_equal(np.stack(frames), pictures), moving
    (file,) = graph.saved(outputs, "mp4")
    assert frames_of(file) == (3, 48, 64)


def frames_of(video: Path) -> tuple[int, int, int]:
    """(frames, width, height) of a video file."""
    import av

    with av.open(str(video)) as container:
        frames = list(container.decode(video=0))
    return len(frames), frames[0].width, frames[0].height


def test_primitive_nodes_feed_every_kind_of_widget(graph: ComfyGraph) -> None:
    plain = text_to_image(seed=5, steps=6, cfg=2.5)
    plain["positive"]["inputs"]["prompt"] = "A blue boat, at night."
    fed = text_to_image()
    fed |= {
        "seed": node("PrimitiveInt", value=5),
        "steps": node("PrimitiveInt", value=6),
        "cfg": node("PrimitiveFloat", value=2.5),
        "words": node("PrimitiveStringMultiline", value="A blue boat,"),
        "more words": node("StringConcatenate", string_a=["words", 0], string_b="at night.", delimiter=" "),
        "width": node("PrimitiveInt", value=48),
    }
    fed["sampler"]["inputs"] |= {"seed": ["seed", 0], "steps": ["steps", 0], "cfg": ["cfg", 0]}
    fed["positive"]["inputs"]["prompt"] = ["more words", 0]
    fed["latent"]["inputs"]["width"] = ["width", 0]
    assert torch.equal(graph.value(fed, "decode"), graph.value(plain, "decode"))


@pytest.mark.parametrize(
    ("kind", "value", "input_name", "sentence"),
    [
        ("PrimitiveInt", 0, "steps", "steps is 0"),
        ("PrimitiveFloat", 0.5, "cfg", "cfg is 0.5"),
    ],
)
def test_a_bad_value_through_a_link_is_one_sentence(graph: ComfyGraph, kind, value, input_name, sentence) -> None:
    """A link's value is not known when the graph is queued; the node itself refuses it."""
    prompt = text_to_image()
    prompt["value"] = node(kind, value=value)
    prompt["sampler"]["inputs"][input_name] = ["value", 0]
    with pytest.raises(AssertionError, match=sentence):
        graph.run(prompt)
