"""The quality scores: by hand, beside scikit-image, and on pictures that are degraded more and more."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr
from skimage.filters import gaussian
from skimage.measure import blur_effect

from benchmarks import quality as benchmark
from nextstep_core import NextStepError, NextStepPipeline
from nextstep_core.loading.store import EMBEDDED
from nextstep_core.studio.quality import WEIGHTS, measure_quality, without_banding, without_blocks, without_grain

PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "grass", "rocket")


def levels(picture: np.ndarray) -> torch.Tensor:
    return torch.tensor((picture * 255).round()).float().movedim(-1, 0)


def flat(color: tuple[float, float, float], height: int = 48, width: int = 64) -> np.ndarray:
    return np.broadcast_to(np.array(color, np.float32), (height, width, 3)).copy()


@pytest.fixture(scope="module")
def photographs() -> dict[str, np.ndarray]:
    """Pieces from the middle, where there is most to see."""
    return {name: p[60:260, 100:300] for name, p in benchmark.photographs(PHOTOGRAPHS).items()}


# --- by hand


@pytest.mark.parametrize("width", [0.8, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("contrast", [0.3, 1.0])
def test_the_sharpness_of_an_edge_is_its_width_and_nothing_else(width: float, contrast: float) -> None:
    """Of a step, blurred by a Gaussian, whatever its height. Differences over two pixels, which see it, widen it."""
    step = flat((0.0, 0.0, 0.0))
    step[:, 32:] = contrast
    blurred = gaussian(step, width, mode="nearest", channel_axis=-1)
    assert width <= math.sqrt(1 / measure_quality(blurred).sharpness - 1) <= 1.45 * width
    colored = blurred * np.array([1, 0, 0.5]) + np.array([0, 0.5, 0.1])
    assert measure_quality(colored).sharpness == pytest.approx(measure_quality(blurred).sharpness, rel=0.15)


def test_an_edge_between_colors_of_one_brightness_is_an_edge() -> None:
    picture = flat((0.8, 0.2, 0.2))
    picture[:, 32:] = 0.2, (0.8 - 0.2) * 0.299 / 0.587 + 0.2, 0.2
    assert measure_quality(picture).sharpness > 0.5


def test_color_diversity_by_hand() -> None:
    """Half red, half blue: red-green is 255 or 0, yellow-blue 127.5 or -255; population and sample deviation agree."""
    picture = flat((1.0, 0.0, 0.0))
    picture[:, 32:] = 0.0, 0.0, 1.0
    spread, distance = math.hypot(127.5, 191.25), math.hypot(127.5, -63.75)
    colorfulness = spread + 0.3 * distance
    assert measure_quality(picture).color_diversity == pytest.approx(colorfulness / (colorfulness + 45), rel=1e-3)
    assert measure_quality(flat((0.3, 0.3, 0.3))).color_diversity == 0
    one = measure_quality(flat((1.0, 0.0, 0.0))).color_diversity
    assert one == pytest.approx(0.3 * math.hypot(255, 127.5) / (0.3 * math.hypot(255, 127.5) + 45), rel=1e-3)


def square(top: int, left: int, side: int = 16, height: int = 64, width: int = 64) -> np.ndarray:
    picture = flat((0.2, 0.4, 0.8), height, width)
    picture[top : top + side, left : left + side] = 1.0, 0.8, 0.2
    return picture


def test_composition_balance_by_hand() -> None:
    balance = lambda picture: measure_quality(picture).composition_balance  # noqa: E731
    assert balance(square(24, 24)) == pytest.approx(1, abs=1e-6), "in the middle"
    # Left of the middle: all of it left of the upright axis and on one side of both diagonals, none above or below.
    assert balance(square(24, 0)) == pytest.approx(1 / 4, abs=1e-6)
    # In a corner: on one side of three axes; the fourth is the diagonal that runs through it.
    assert balance(square(0, 0)) == pytest.approx(1 / 4, abs=1e-6)
    assert balance(square(0, 0)) == pytest.approx(balance(square(48, 48)), abs=1e-6)
    assert balance(square(10, 30)) == pytest.approx(balance(square(10, 30)[:, ::-1].copy()), abs=1e-6)
    wide = balance(square(0, 0, 16, 32, 128))
    assert 0 <= wide < 0.5
    assert balance(flat((0.5, 0.2, 0.1))) == 0, "nothing is there"
    both = square(24, 0)
    both[24:40, 48:] = 1.0, 0.8, 0.2
    assert balance(both) == pytest.approx(1, abs=1e-6), "one on either side"


@pytest.mark.parametrize(("step", "wanted"), [(1, 1), (2, 5 / 6), (8, 1 / 2), (64, 0)])
def test_banding_is_the_least_step_of_a_slope(step: int, wanted: float) -> None:
    slope = torch.arange(256).float() // step * step
    assert without_banding(slope.expand(3, 32, 256)) == pytest.approx(wanted)
    edge = torch.cat([torch.full((3, 32, 8), 250.0), slope.expand(3, 32, 256)], dim=2)
    assert without_banding(edge) == pytest.approx(wanted), "a strong edge is no step"


def test_blocks_are_seen_and_edges_elsewhere_are_none() -> None:
    random = torch.Generator().manual_seed(0)
    blocks = (torch.rand(1, 8, 8, generator=random) * 200).repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert without_blocks(blocks.expand(3, -1, -1)) < 0.01
    assert without_blocks(torch.roll(blocks, (4, 4), (1, 2)).expand(3, -1, -1)) == 1
    smooth = torch.linspace(0, 255, 64).expand(3, 64, 64)
    assert without_blocks(smooth) == pytest.approx(1, abs=0.05)
    large = blocks.repeat_interleave(2, 1).repeat_interleave(2, 2)  # as large as JPEG's blocks of color
    red = large * torch.tensor([1.0, -0.299 / 0.587, 0.0])[:, None, None] + 100
    assert without_blocks(red) < 0.2, "blocks of one brightness"


@pytest.mark.parametrize("noise", [2, 5, 10])
def test_grain_is_the_noise_that_is_there(noise: float) -> None:
    """A little less, as it is that of the smoothest parts."""
    slope = np.repeat(np.linspace(0.3, 0.7, 128, dtype=np.float32)[:, None, None], 128, axis=1).repeat(3, axis=2)
    noisy = benchmark.rounded(benchmark.grained(slope, noise))
    assert 0.75 * noise <= 8 * math.sqrt(1 / without_grain(levels(noisy)) - 1) <= noise
    half = noisy.copy()
    half[64:] = slope[64:]
    assert without_grain(levels(half)) > 0.99, "texture is no grain where some of the picture is smooth"


def test_the_total_is_weighted() -> None:
    measured = measure_quality(square(10, 20))
    assert measured.total == pytest.approx(
        0.3 * measured.sharpness
        + 0.2 * measured.color_diversity
        + 0.3 * measured.composition_balance
        + 0.2 * measured.artifact_score
    )
    assert list(measured.named()) == [*WEIGHTS, "total"] and sum(WEIGHTS.values()) == pytest.approx(1)


# --- beside scikit-image, and degraded


def test_sharpness_orders_a_photograph_as_scikit_image_does(photographs) -> None:
    """Crété's blur effect, which is another method, agrees within a picture; between pictures it depends on them."""
    for name, picture in photographs.items():
        worse = [benchmark.rounded(benchmark.blurred(picture, sigma)) for sigma in (0, 1, 2, 3)]
        ours = [measure_quality(one).sharpness for one in worse]
        theirs = [1 - blur_effect(one, channel_axis=-1) for one in worse]
        assert spearmanr(ours, theirs).statistic == 1, name


@pytest.fixture(scope="module")
def groups(photographs) -> dict[str, dict[str, np.ndarray]]:
    torch.set_num_threads(1)
    pipe = NextStepPipeline.from_pretrained(EMBEDDED, dtype=torch.float32)
    prompts = [
        "a red circle on a blue background",
        "a green square on a white background",
        "a yellow star on a purple background",
        "a large blue triangle on an orange background",
    ]
    images = pipe.generate(prompts, height=64, width=64, seed=range(4)).images
    return {"photographs": photographs, "drawn": {text: image.numpy() for text, image in zip(prompts, images)}}


@pytest.mark.parametrize(
    ("score", "by", "least"),
    [
        ("sharpness", "blur", 0.9),
        ("artifact_score", "JPEG", 0.9),
        ("artifact_score", "banding", 0.9),
        ("artifact_score", "noise", 0.85),
        ("color_diversity", "fading", 0.6),
    ],
)
def test_scores_fall_with_what_is_done_to_pictures(groups, score: str, by: str, least: float) -> None:
    """All pictures' values together, photographs and drawings. Color differs from picture to picture by itself."""
    (series,) = (s for s in benchmark.SERIES if (s.score, s.by) == (score, by))
    row = benchmark.correlate(replace(series), groups)
    assert row.pooled >= least
    assert row.each >= 0.98


# --- what is taken


@pytest.mark.parametrize("size", [(16, 16), (16, 17), (23, 16), (16, 300), (65, 33)])
def test_any_size_from_16_by_16(size: tuple[int, int]) -> None:
    picture = torch.rand(*size, 3, generator=torch.Generator().manual_seed(1))
    assert all(0 <= value <= 1 for value in measure_quality(picture).named().values())


def test_extremes_are_numbers() -> None:
    for picture in (flat((0, 0, 0)), flat((1, 1, 1)), flat((0, 1, 0)), np.indices((32, 32)).sum(0)[..., None] % 2.0):
        picture = np.repeat(np.asarray(picture, np.float32), 3 // picture.shape[2], axis=2)
        assert all(0 <= value <= 1 for value in measure_quality(picture).named().values())
    nothing = measure_quality(flat((0.5, 0.5, 0.5)))
    assert (nothing.sharpness, nothing.color_diversity, nothing.composition_balance) == (0, 0, 0)


def test_every_kind_of_picture_is_measured_alike() -> None:
    picture = square(10, 30)
    wanted = pytest.approx(measure_quality(benchmark.rounded(picture)).named(), abs=1e-5)
    file = Image.fromarray((picture * 255).round().astype(np.uint8))
    for same in (torch.tensor(picture), picture.astype(np.float64), file, file.convert("RGBA")):
        assert measure_quality(same).named() == wanted
    assert without_banding(levels(picture)) == 1, "a drawing of two colors has no slopes"


@pytest.mark.parametrize(
    ("picture", "sentence"),
    [
        (torch.zeros(15, 64, 3), "is 15; use a whole number from 16"),
        (torch.zeros(64, 8, 3), "is 8;"),
        (torch.zeros(64, 64, 5), "shape"),
        (torch.zeros(64, 64), "expected a picture"),
        (torch.full((64, 64, 3), float("nan")), "NaN"),
        (torch.zeros(64, 64, 3, dtype=torch.uint8), "uint8"),
        (None, "None"),
        ("picture.png", "'picture.png'"),
    ],
)
def test_what_is_no_picture_is_one_sentence(picture, sentence: str) -> None:
    with pytest.raises(NextStepError) as caught:
        measure_quality(picture)
    assert sentence in str(caught.value)
