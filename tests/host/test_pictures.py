"""Photographs of any size, comparisons and interrupted runs, through the nodes in the host's executor."""

from __future__ import annotations

import errno
import os
import shutil
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from comfy_graph import ComfyGraph, node, text_to_image
from PIL import Image, ImageSequence

PREPARE = {"mode": "crop", "size": "nearest aspect ratio", "base": "256", "width": 64, "height": 64}
SAMPLER = {"steps": 2, "cfg": 1.0, "cfg_schedule": "constant", "shift": 1.0, "sampler": "auto", "use_norm": "auto"}


def photograph(graph: ComfyGraph, name: str, width: int, height: int, hole: tuple[int, int, int, int] | None) -> str:
    """A picture in the host's input folder whose alpha is clear in `hole`."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    pixels = np.stack([across, down, 255 - across, np.full_like(across, 255)], -1).astype(np.uint8)
    if hole is not None:
        pixels[hole[1] : hole[3], hole[0] : hole[2], 3] = 0
    Image.fromarray(pixels).save(graph.base / "input" / name)
    return name


def test_a_photograph_goes_through_an_edit_and_comes_back_in_its_own_size(graph: ComfyGraph) -> None:
    prompt = {
        "load": node("LoadImage", image=photograph(graph, "photo.png", 4000, 3000, None)),
        "model": node("NextStepModelLoader", model_name="tiny-a", dtype="fp32"),
        "prepare": node("NextStepPreparePicture", image=["load", 0], mask=["load", 1], **PREPARE | {"mode": "resize"}),
        "edit": node(
            "NextStepEditEncode", model=["model", 0], vae=["model", 1], image=["prepare", 0], instruction="<image>x",
            size="keep", width=512, height=512,
        ),
        "sampler": node(
            "NextStepSampler", model=["model", 0], positive=["edit", 0], latent=["edit", 1], seed=1, **SAMPLER
        ),
        "decode": node("NextStepVAEDecode", samples=["sampler", 0], vae=["model", 1]),
        "back": node("NextStepPasteBack", image=["decode", 0], original=["prepare", 2], feather=16),
    }  # fmt: skip
    assert graph.value(prompt, "prepare").shape == (1, 224, 288, 3)
    assert graph.value(prompt, "prepare", 5) == "4000x3000, resized to 288x224: 252 tokens"
    assert graph.value(prompt, "back").shape == (1, 3000, 4000, 3)


def test_a_photograph_is_inpainted_around_its_mask_alone(graph: ComfyGraph) -> None:
    photo = photograph(graph, "hole.png", 4000, 3000, (2900, 1400, 3100, 1600))
    prompt = {
        "load": node("LoadImage", image=photo),
        "model": node("NextStepModelLoader", model_name="tiny-a", dtype="fp32"),
        "prepare": node(
            "NextStepPreparePicture", image=["load", 0], mask=["load", 1], area="around the mask", vae=["model", 1],
            **PREPARE,
        ),
        "positive": node("NextStepTextEncode", model=["model", 0], prompt="x"),
        "sampler": node(
            "NextStepSampler", model=["model", 0], positive=["positive", 0], latent=["prepare", 6], seed=1, **SAMPLER
        ),
        "decode": node("NextStepVAEDecode", samples=["sampler", 0], vae=["model", 1]),
        "back": node("NextStepPasteBack", image=["decode", 0], original=["prepare", 2], feather=16),
    }  # fmt: skip
    assert (
        graph.value(prompt, "prepare", 5) == "4000x3000, cut to 400x400 at (2800, 1300), resized to 256x256: 256 tokens"
    )
    before, after = graph.value(prompt, "load"), graph.value(prompt, "back")
    changed = (before != after).any(-1)[0].nonzero()
    assert changed.amin(0).tolist() >= [1370, 2870] and changed.amax(0).tolist() <= [1630, 3130]
    inside = (before - after)[:, 1400:1600, 2900:3100].abs().mean()
    assert inside > 0.01, "something was drawn there"


@pytest.mark.parametrize("unpainted", [torch.zeros(1, 64, 64), torch.zeros(1, 480, 640), None])
def test_without_a_painted_mask_the_whole_picture_is_taken(graph: ComfyGraph, unpainted) -> None:
    prepare = graph.pack("nodes.pictures").NextStepPreparePicture
    picture, mask, original, *_ = prepare.execute(
        torch.rand(1, 480, 640, 3), **PREPARE, mask=unpainted, area="around the mask"
    ).result
    assert picture.shape == (1, 224, 288, 3) and not mask.any() and original.mask is None


def test_what_no_model_could_draw_is_refused_before_anything_is_encoded(graph: ComfyGraph) -> None:
    pictures, prompts = graph.pack("nodes.pictures"), graph.pack("nodes.prompts")
    error = graph.pack("nextstep_core.errors").NextStepError
    photo, prepare = torch.zeros(1, 3000, 4000, 3), pictures.NextStepPreparePicture
    loaders = graph.pack("nodes.loaders")
    model = loaders.load_model("tiny-a", loaders.LoadOptions("fp32"))
    calls = {
        "46,750 tokens; at most 8,192": lambda: prepare.execute(photo, **PREPARE | {"mode": "keep"}),
        "46,750 tokens; at most 8,192 ": lambda: prompts.encode_edit(model, None, photo, "<image>x", "keep"),
        "The mask is 64x64, but the picture is 4000x3000": lambda: prepare.execute(
            photo, **PREPARE, mask=torch.ones(1, 64, 64)
        ),
        "2 masks for 1 pictures": lambda: prepare.execute(photo, **PREPARE, mask=torch.ones(2, 3000, 4000)),
        "The nearest size is 64x64": lambda: prepare.execute(
            photo, **PREPARE | {"size": "width and height", "width": 72}
        ),
        "mode is 'tile'; choose one of crop, pad, resize, keep": lambda: prepare.execute(
            photo, **PREPARE | {"mode": "tile"}
        ),
        "margin is nan": lambda: prepare.execute(photo, **PREPARE, margin=float("nan")),
        "feather is -1": lambda: pictures.NextStepPasteBack.execute(
            photo, prepare.execute(photo, **PREPARE).result[2], -1
        ),
        "3 pictures do not match 2 originals": lambda: pictures.NextStepPasteBack.execute(
            torch.zeros(3, 16, 16, 3), pictures.Original(torch.zeros(2, 16, 16, 3), None, None), 0
        ),
    }
    for sentence, call in calls.items():
        with pytest.raises(error, match=sentence.strip()):
            call()


def test_every_combination_is_drawn_and_labelled(graph: ComfyGraph) -> None:
    prompt = text_to_image()
    prompt["compare"] = node(
        "NextStepCompare", cfg="2, 3", steps="4, 6, 8", shift="1", sampler="auto", quantization="none"
    )
    prompt["model"]["inputs"]["quantization"] = ["compare", 4]
    for output, name in enumerate(("cfg", "steps", "shift", "sampler")):
        prompt["sampler"]["inputs"][name] = ["compare", output]
    prompt["grid"] = node("NextStepLabelledGrid", image=["decode", 0], columns=["compare", 6], labels=["compare", 5])
    sheet = graph.value(prompt, "grid")
    contact_sheet = graph.pack("nextstep_core.images.contact_sheet").contact_sheet
    alone = [graph.value(text_to_image(cfg=cfg, steps=steps), "decode")[0] for steps in (4, 6, 8) for cfg in (2.0, 3.0)]
    labels = [f"cfg {cfg}, steps {steps}" for steps in (4, 6, 8) for cfg in (2, 3)]
    assert torch.equal(sheet, contact_sheet(alone, labels, 2))


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ({"cfg": "5, , 7"}, "cfg lists ''; write numbers"),
        ({"cfg": ""}, "cfg lists ''; write numbers"),
        ({"steps": "12, 7.5"}, "steps lists '7.5'; write whole numbers"),
        ({"cfg": "0.5"}, "cfg is 0.5"),
        ({"sampler": "euler"}, "sampler is 'euler'; choose one of auto"),
        ({"quantization": "int3"}, "quantization is 'int3'; choose one of none"),
        ({"cfg": "2, 3, 4, 5, 6, 7, 8, 9, 10", "steps": "1, 2, 3, 4, 5, 6, 7, 8"}, "make 72 pictures; at most 64"),
    ],
)
def test_a_bad_list_is_told_before_anything_runs(graph: ComfyGraph, texts: dict[str, str], sentence: str) -> None:
    answer = graph.pack("nodes.compare").NextStepCompare.validate_inputs(**texts)
    assert sentence in answer


def test_an_interrupted_picture_is_finished_from_its_file(graph: ComfyGraph, monkeypatch) -> None:
    prompt = text_to_image(on_interrupt="keep")
    whole = graph.value(prompt, "sampler")["samples"]
    prompt["resume"] = node("NextStepResume", latent=["latent", 0], filename_prefix="NextStep/test")
    prompt["sampler"]["inputs"]["latent"] = ["resume", 0]
    prompt["save"] = node("SaveLatent", samples=["sampler", 0], filename_prefix="NextStep/test")
    host = graph.pack("nodes.host")
    update = host.ProgressReporter.update

    def stop(self, done, *rest, **named):
        update(self, done, *rest, **named)
        if done == 5 and self._bar.total == 12:
            raise host.Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(host.ProgressReporter, "update", stop)
        graph.run(deepcopy(prompt))  # the host notes in it whether a node has changed
    found = graph.pack("nodes.resume").unfinished("NextStep/test")
    assert found is not None and found[2].flatten().tolist() == [False] * 5 + [True] * 7
    assert torch.equal(graph.value(deepcopy(prompt), "sampler")["samples"], whole)
    graph.run(deepcopy(prompt))
    assert graph.pack("nodes.resume").unfinished("NextStep/test") is None, "the last one is finished"


def test_resume_begins_anew_on_another_canvas_and_names_a_broken_file(graph: ComfyGraph) -> None:
    resume, folder = graph.pack("nodes.resume"), graph.base / "output" / "NextStep"
    folder.mkdir(parents=True, exist_ok=True)
    from safetensors.torch import save_file

    save_file({"latent_tensor": torch.zeros(1, 16, 8, 8)}, folder / "other_00001_.latent")
    canvas = {"samples": torch.zeros(1, 16, 8, 6)}
    assert resume.NextStepResume.execute(canvas, "NextStep/other").result[0] is canvas
    (folder / "other_00002_.latent").write_bytes(b"torn")
    with pytest.raises(graph.pack("nextstep_core.errors").NextStepError, match="other_00002_.latent is damaged"):
        resume.NextStepResume.execute(canvas, "NextStep/other")


def test_pictures_are_offered_once_and_never_over_what_is_there(graph: ComfyGraph, tmp_path, monkeypatch) -> None:
    host, source, target = graph.pack("nodes.host"), tmp_path / "from", tmp_path / "to"
    shutil.copytree(graph.pack("nodes").PICTURES, source)
    target.mkdir()
    monkeypatch.setattr(host.folders.folder_paths, "get_input_directory", lambda: str(target))
    first, *others = sorted(path.name for path in source.iterdir())
    (target / first).write_bytes(b"mine")
    host.offer_pictures(source)
    assert (target / first).read_bytes() == b"mine"
    assert others and all((target / name).read_bytes() == (source / name).read_bytes() for name in others)
    monkeypatch.setattr(host.folders.folder_paths, "get_input_directory", lambda: str(tmp_path / "not there"))
    host.offer_pictures(source)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 7.0, -5.0])
def test_a_mask_of_other_numbers_is_refused_or_is_a_mask(graph: ComfyGraph, value: float) -> None:
    """Half of it is painted, so that it counts; the rest would come out black."""
    mask = torch.ones(1, 64, 64)
    mask[:, :32] = value
    nodes = graph.pack("nodes.pictures")
    prepare, back = nodes.NextStepPreparePicture.execute, nodes.NextStepPasteBack.execute
    picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    if not abs(value) < float("inf"):
        with pytest.raises(graph.pack("nextstep_core.errors").NextStepError, match="mask holds NaN or infinite"):
            prepare(picture, "crop", "width and height", "512", 64, 64, mask)
        return
    taken, fitted, original, *_ = prepare(picture, "crop", "width and height", "512", 64, 64, mask).result
    assert set(fitted.unique().tolist()) <= {0.0, 1.0}
    (pasted,) = back(1 - taken, original, 16).result
    assert pasted.min() >= 0 and pasted.max() <= 1


@pytest.mark.parametrize("kind", [torch.int32, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_resume_names_a_file_of_other_numbers(graph: ComfyGraph, kind: torch.dtype) -> None:
    from safetensors.torch import save_file

    folder = graph.base / "output" / "NextStep"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"latent_tensor": torch.zeros(1, 16, 8, 6).to(kind)}, folder / "kinds_00001_.latent")
    with pytest.raises(graph.pack("nextstep_core.errors").NextStepError, match="kinds_00001_.latent is damaged"):
        graph.pack("nodes.resume").NextStepResume.execute({"samples": torch.zeros(1, 16, 8, 6)}, "NextStep/kinds")


def test_resume_waits_for_no_pipe(graph: ComfyGraph) -> None:
    folder = graph.base / "output" / "NextStep"
    folder.mkdir(parents=True, exist_ok=True)
    os.mkfifo(folder / "pipe_00001_.latent")
    with pytest.raises(graph.pack("nextstep_core.errors").NextStepError, match="not a regular file"):
        graph.pack("nodes.resume").NextStepResume.execute({"samples": torch.zeros(1, 16, 8, 6)}, "NextStep/pipe")


def test_a_full_disk_leaves_no_half_a_picture_and_the_pack_loads(graph: ComfyGraph, tmp_path, monkeypatch) -> None:
    host, source, target = graph.pack("nodes.host"), tmp_path / "from", tmp_path / "to"
    source.mkdir()
    target.mkdir()
    (source / "picture.png").write_bytes(bytes(100))
    monkeypatch.setattr(host.folders.folder_paths, "get_input_directory", lambda: str(target))

    def full(path: Path) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", full)
        host.offer_pictures(source)
    assert not list(target.iterdir())
    host.offer_pictures(source)
    assert (target / "picture.png").read_bytes() == bytes(100)
    host.offer_pictures(tmp_path / "not packed")


def test_the_frames_of_a_batch_become_an_animation_and_a_video_by_core_nodes(graph: ComfyGraph) -> None:
    prompt = text_to_image()
    prompt["latent"]["inputs"]["batch_size"] = 2
    prompt["frames"] = node(
        "NextStepDrawingFrames", samples=["sampler", 0], vae=["model", 1], frames=4, hold=2, longest_side=64
    )
    prompt["animation"] = node(
        "SaveAnimatedWEBP",
        images=["frames", 0], filename_prefix="frames", fps=8.0, lossless=True, quality=80, method="default",
    )  # fmt: skip
    prompt["video"] = node("CreateVideo", images=["frames", 0], fps=8.0)
    prompt["save"] = node("SaveVideo", video=["video", 0], filename_prefix="frames", format="auto", codec="auto")
    outputs = graph.run(prompt)
    (animation,), (video,) = graph.saved(outputs, "animation"), graph.saved(outputs, "save")
    opened = Image.open(animation)
    assert opened.size == (64, 42), "two of 48x64, reduced to 32x42"
    shown = [frame.load() and frame.info["duration"] for frame in ImageSequence.Iterator(opened)]
    assert sum(shown) == 6 * 125, "milliseconds; frames that are alike may be one"
    assert video.suffix == ".mp4" and video.stat().st_size > 0
