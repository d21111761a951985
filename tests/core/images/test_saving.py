"""Saved pictures, opened by a library that reads them as image browsers do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sd_parsers import ParserManager

from nextstep_core import NextStepError
from nextstep_core.images.saving import FORMATS, save_picture
from nextstep_core.request.parameters import parameters_text
from nextstep_core.sampling.settings import GenerationSettings

PICTURE = torch.rand(48, 64, 3, generator=torch.Generator().manual_seed(0))
PROMPT, NEGATIVE = "a red circle, 雪 ünder it", "blurry, ugly"
NOTES = {"prompt": '{"1": {"class_type": "X", "inputs": {}}}', "workflow": '{"nodes": []}', "nextstep": "{}"}
TEXT = parameters_text(
    PROMPT,
    NEGATIVE,
    GenerationSettings(),
    seed=7,
    size=(64, 48),
    facts={"Model": "NextStep-1.1", "Model hash": "0123456789"},
)


@pytest.mark.parametrize("format", FORMATS)
def test_other_programs_read_what_was_saved(tmp_path: Path, format: str) -> None:
    path = tmp_path / f"picture{FORMATS[format]}"
    save_picture(path, PICTURE, format, 95, TEXT, NOTES)
    read = ParserManager().parse(path)
    assert [prompt.value for prompt in read.prompts] == [PROMPT]
    assert [prompt.value for prompt in read.negative_prompts] == [NEGATIVE]
    (sampler,) = read.samplers
    assert sampler.name == "score-sde-1.0" and (sampler.model.name, sampler.model.hash) == (
        "NextStep-1.1",
        "0123456789",
    )
    assert sampler.parameters == {"steps": "50", "seed": "7", "cfg_scale": "7.5"}
    assert read.metadata["Size"] == "64x48"


def test_a_png_holds_text_and_notes_raw_and_every_pixel(tmp_path: Path) -> None:
    save_picture(tmp_path / "x.png", PICTURE, "png", parameters=TEXT, notes=NOTES)
    image = Image.open(tmp_path / "x.png")
    assert image.text == {"parameters": TEXT, **NOTES}
    assert (torch.from_numpy(np.array(image)).view(-1, 3) - (PICTURE.view(-1, 3) * 255).round()).abs().max() == 0


def test_webp_holds_notes_where_comfyui_looks_and_is_lossless_at_100(tmp_path: Path) -> None:
    for quality in (80, 100):
        save_picture(tmp_path / "x.webp", PICTURE, "webp", quality, TEXT, NOTES)
        image = Image.open(tmp_path / "x.webp")
        apart = (torch.from_numpy(np.array(image)).view(-1, 3) - (PICTURE.view(-1, 3) * 255).round()).abs().max()
        assert (apart == 0) == (quality == 100)
    exif = image.getexif()
    assert exif[0x0110] == f"prompt:{NOTES['prompt']}" and exif[0x010F] == f"workflow:{NOTES['workflow']}"


def test_a_jpeg_leaves_notes_out_that_it_cannot_hold_and_keeps_the_text(tmp_path: Path) -> None:
    save_picture(tmp_path / "x.jpg", PICTURE, "jpeg", 90, TEXT, {"workflow": "x" * 70_000})
    assert ParserManager().parse(tmp_path / "x.jpg").prompts[0].value == PROMPT
    save_picture(tmp_path / "x.jpg", PICTURE, "jpeg", 90, "x" * 70_000, {})
    assert not Image.open(tmp_path / "x.jpg").getexif()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": "gif"}, "format is 'gif'; choose one of png, jpeg, webp"),
        ({"quality": 0}, "quality is 0; use a whole number from 1 to 100"),
        ({"path": Path("no/such/folder/x.png")}, r"x.png could not be written \(No such file"),
    ],
)
def test_what_cannot_be_saved_is_one_sentence(tmp_path: Path, change: dict, sentence: str) -> None:
    with pytest.raises(NextStepError, match=sentence):
        save_picture(**{"path": tmp_path / "x", "picture": PICTURE, "format": "png", **change})
