"""Input pictures of any kind, by hand."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from nextstep_core import NextStepError
from nextstep_core.errors import shown
from nextstep_core.images.rgb import cover, picture_size, to_pixels, to_rgb

COLORS = torch.rand(1, 4, 6, 3, generator=torch.Generator().manual_seed(0))


def with_alpha(colors: torch.Tensor, alpha: float) -> torch.Tensor:
    return torch.cat([colors, torch.full((*colors.shape[:-1], 1), alpha)], dim=-1)


def test_opaque_is_its_color_clear_is_white_and_between_is_mixed() -> None:
    assert torch.equal(to_rgb(with_alpha(COLORS, 1.0)), COLORS)
    assert torch.equal(to_rgb(with_alpha(COLORS, 0.0)), torch.ones_like(COLORS))
    assert (to_rgb(with_alpha(COLORS, 0.25)) - (0.25 * COLORS + 0.75)).abs().max() <= 1e-6


def test_gray_is_repeated_with_and_without_alpha() -> None:
    gray = COLORS[..., :1]
    assert torch.equal(to_rgb(gray), gray.repeat(1, 1, 1, 3))
    assert torch.equal(to_rgb(with_alpha(gray, 1.0)), gray.repeat(1, 1, 1, 3))


def test_values_come_as_float32_in_range() -> None:
    out = to_rgb(COLORS.double() * 4 - 2)
    assert out.dtype == torch.float32 and torch.equal(out, (COLORS * 4 - 2).clamp(0, 1))


@pytest.mark.parametrize("shape", [(4, 6, 3), (1, 0, 6, 3), (1, 4, 6, 5), (1, 4, 6, 0)], ids=str)
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(NextStepError, match=rf"the shape \({', '.join(map(str, shape))}\)"):
        to_rgb(torch.zeros(shape))


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (torch.zeros(1, 4, 6, 3, dtype=torch.uint8), "uint8"),
        (torch.zeros(1, 4, 6, 3, dtype=torch.complex64), "complex64"),
        ("a picture", "'a picture'"),
        ({}, "a dict"),
    ],
)
def test_other_values_than_fractions_are_refused(image: object, kind: str) -> None:
    with pytest.raises(NextStepError, match=f"An input image .*{kind}"):
        to_rgb(image)


@pytest.mark.parametrize(
    "image", [5, None, [], np.zeros(4), np.array([None]), torch.tensor(1.0)], ids=lambda value: str(shown(value))
)
def test_what_is_no_picture_is_refused(image: object) -> None:
    with pytest.raises(NextStepError, match="An input image is .*expected a picture"):
        to_pixels(image)


@pytest.mark.parametrize("kind", [">f4", object, "U1"])
def test_numbers_that_pytorch_does_not_know_are_refused(kind: object) -> None:
    with pytest.raises(NextStepError, match="An input image of .* numbers cannot be read"):
        to_pixels(np.zeros((4, 6, 3)).astype(kind))


@pytest.mark.parametrize("shape", [(1, 100_000), (100_000, 1)], ids=str)
def test_of_a_sliver_only_the_middle_is_enlarged(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    picture = torch.zeros(1, *shape, 3)
    picture[:, shape[0] // 2 - 1 : shape[0] // 2 + 1, shape[1] // 2 - 1 : shape[1] // 2 + 1] = 1
    interpolate, sizes = torch.nn.functional.interpolate, []
    monkeypatch.setattr(
        torch.nn.functional, "interpolate", lambda x, size, **how: sizes.append(size) or interpolate(x, size, **how)
    )
    assert cover(picture, 64, 64).shape == (1, 64, 64, 3)
    assert max(sizes[0]) <= 4 * 64
    assert cover(picture, 64, 64).mean() > 0.5


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_must_be_finite(value: float) -> None:
    broken = COLORS.clone()
    broken[0, 1, 2, 0] = value
    with pytest.raises(NextStepError, match="NaN"):
        to_rgb(broken)


def test_the_middle_is_kept_in_both_directions() -> None:
    """A bar in the middle fills the picture; what is left and right, or above and below, is cut off."""
    wide, high = torch.zeros(1, 32, 64, 3), torch.zeros(1, 64, 32, 3)
    wide[:, :, 16:48] = 1
    high[:, 16:48] = 1
    for picture in (wide, high):
        assert torch.equal(cover(picture, 32, 32), torch.ones(1, 32, 32, 3))


def test_covering_keeps_proportions() -> None:
    """Half as large: 40x60 covers 10x30 as 20x30, of which the middle 10 columns stay."""
    picture = (torch.arange(40.0) / 40).view(1, 1, 40, 1).expand(1, 60, 40, 3)
    out = cover(picture, width=10, height=30)
    assert out.shape == (1, 30, 10, 3)
    halved = picture[:, ::2, ::2] + 0.0125  # between two columns of 1/40
    assert (out - halved[:, :, 5:15]).abs().max() <= 1e-3
    assert torch.equal(cover(picture, 40, 60), picture), "a picture of the size stays as it is"


def test_shrinking_averages() -> None:
    """Of eight columns one is white: none is left out, and none is hit by chance."""
    picture = torch.zeros(1, 64, 64, 3)
    picture[:, :, ::8] = 1
    inside = cover(picture, 8, 8)[:, :, 2:-2]
    assert (inside - 1 / 8).abs().max() <= 0.01


@pytest.mark.parametrize("size", [(33, 7), (7, 33), (1, 1), (100, 3), (64, 64)])
def test_any_size_is_covered(size: tuple[int, int]) -> None:
    out = cover(torch.rand(2, 31, 47, 3), *size)
    assert out.shape == (2, size[1], size[0], 3) and out.min() >= 0 and out.max() <= 1


def test_every_kind_of_picture_is_the_same_pixels() -> None:
    array = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 14
    floats = array.astype(np.float32) / 255
    expected = torch.from_numpy(floats).permute(2, 0, 1)[None] * 2 - 1
    clear = np.concatenate([array, np.zeros((2, 3, 1), np.uint8)], axis=2)
    pictures = [Image.fromarray(array), Image.fromarray(array).convert("RGBA"), floats, torch.from_numpy(floats)]
    pictures.append(torch.from_numpy(floats)[None].repeat(2, 1, 1, 1))  # of a batch, the first
    for picture in pictures:
        assert to_pixels(picture).shape == expected.shape
        assert (to_pixels(picture) - expected).abs().max() <= 1e-6
    assert torch.equal(to_pixels(Image.fromarray(clear)), torch.ones(1, 3, 2, 3))
    gray = Image.fromarray(array[..., 0])
    assert (to_pixels(gray) - expected[:, :1]).abs().max() <= 1e-6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_the_way_up_that_its_file_says(orientation: int) -> None:
    picture, file, says = Image.new("RGB", (4, 2), "red"), io.BytesIO(), Image.Exif()
    picture.paste("blue", (0, 0, 2, 2))
    says[0x0112] = orientation
    picture.save(file, "PNG", exif=says)
    with Image.open(file) as image:
        size = picture_size(image)
        pixels = to_pixels(image)
    assert size == tuple(pixels.shape[2:]) == ((4, 2) if orientation > 4 else (2, 4))
    assert (pixels[0, 2, 0, 0] > 0) == (orientation in (1, 4, 5, 6)), "what was at the left"


def test_gray_of_sixteen_bits_is_gray() -> None:
    picture = Image.fromarray(np.full((2, 3), 0x8000, np.uint16))
    assert picture.mode == "I;16" and to_pixels(picture).abs().max() < 0.01


def test_a_file_that_is_cut_off_is_one_sentence() -> None:
    """PIL reads a file when its pixels are asked for."""
    file = io.BytesIO()
    Image.fromarray((COLORS[0] * 255).byte().numpy()).resize((64, 64)).save(file, "PNG")
    cut = Image.open(io.BytesIO(file.getvalue()[:200]))
    assert picture_size(cut) == (64, 64)
    with pytest.raises(NextStepError, match=r"cannot be read \(.*truncated"):
        to_pixels(cut)


@pytest.mark.parametrize(
    "other",
    [
        torch.nested.nested_tensor([torch.zeros(3, 3), torch.zeros(2, 3)]),
        COLORS.to(torch.float8_e4m3fn),
        COLORS.to("meta"),
        COLORS.to_sparse(),
        None,
        "x.png",
    ],
    ids=str,
)
def test_the_size_of_what_is_no_picture_is_one_sentence(other: object) -> None:
    for look in (picture_size, to_pixels):
        with pytest.raises(NextStepError, match="An input image"):
            look(other)
