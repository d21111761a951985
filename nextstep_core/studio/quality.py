"""How good a picture is as a picture: sharpness, colors, composition, artifacts, each 0 to 1, more being better.

None of them knows what was asked for. Each measures a width, a ratio or a share, so that it does not depend on how much
there is to see in a picture, and none has a limit beyond which all pictures are alike. docs/quality.md tells how well.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..images.rgb import ImageInput, picture_size, to_pixels
from ..ranges import Range
from ..sentences import Sentence

SIDE = Range(Sentence("The side of a picture that is scored"), 16, 16384)
WEIGHTS = {"sharpness": 0.3, "color_diversity": 0.2, "composition_balance": 0.3, "artifact_score": 0.2}

LEVELS = 255  # of a channel as files hold it
BLOCK = 8  # pixels: a side of JPEG's blocks, of what a latent position covers, and half of an image token's


@dataclass(frozen=True)
class Quality:
    """The scores of one picture, 0 to 1. A high artifact_score means few artifacts."""

    sharpness: float
    color_diversity: float
    composition_balance: float
    artifact_score: float

    @property
    def total(self) -> float:
        """All scores, weighted."""
        return sum(weight * float(getattr(self, name)) for name, weight in WEIGHTS.items())

    def named(self) -> dict[str, float]:
        """Every score by its name, the total too."""
        return {**asdict(self), "total": self.total}


def scores_of(picture: ImageInput) -> dict[str, float]:
    """Every score of a picture by its name, as a run writes them down."""
    return {name: round(value, 4) for name, value in measure_quality(picture).named().items()}


def measure_quality(picture: ImageInput) -> Quality:
    """The scores of a picture, PIL or (H, W, 3) in [0, 1], of at least 16x16 pixels; NextStepError for what is none.

    It is measured as a file of 8 bits a channel would hold it.
    """
    for side in picture_size(picture):
        SIDE.check(side)
    levels = ((to_pixels(picture)[0].cpu() / 2 + 0.5) * LEVELS).round()
    return Quality(sharpness(levels), color_diversity(levels), composition_balance(levels), artifact_score(levels))


# --- sharpness


def sharpness(levels: Tensor) -> float:
    """1 / (1 + width²), where width is the blur of the picture's strongest edges as a standard deviation in pixels.

    Zhuo and Sim, Defocus map estimation from a single image (2011): an edge of width s, blurred once more by a known
    s0, is sqrt(1 + s0²/s²) times less steep, whatever its height is. Of levels (3, H, W) in 0..255; 0 without an edge.
    """
    steep, blurred = _steepness(levels), _steepness(_blurred(levels))
    strongest = _quantile(steep, 0.999)
    edges = steep >= max(strongest / 2, 2.0**2)  # half of the strongest's energy; two levels are no edge
    if not edges.any():
        return 0.0
    ratio = _quantile(steep[edges] / blurred[edges].clamp_min(1e-6), 0.5)
    width_squared = RE_BLUR**2 / max(ratio - 1, 1e-6)
    return 1 / (1 + width_squared)


RE_BLUR = 1.0  # pixels


def _steepness(levels: Tensor) -> Tensor:
    """Squared gradients over all channels, (H - 2, W - 2): edges between colors of one brightness count too."""
    across = (levels[:, 1:-1, 2:] - levels[:, 1:-1, :-2]) / 2
    down = (levels[:, 2:, 1:-1] - levels[:, :-2, 1:-1]) / 2
    return (across**2 + down**2).sum(0)


def _blurred(levels: Tensor) -> Tensor:
    reach = math.ceil(4 * RE_BLUR)
    bell = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * RE_BLUR**2))
    bell = bell / bell.sum()
    padded = F.pad(levels[:, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, bell[None, None, None, :]), bell[None, None, :, None])[:, 0]


# --- color


def color_diversity(levels: Tensor) -> float:
    """How far apart a picture's colors lie, and how far from gray: M / (M + 45), for the colorfulness M.

    Hasler and Süsstrunk, Measuring colourfulness in natural images (2003), where viewers called 45 averagely colorful
    and 109 extremely so. Of levels (3, H, W) in 0..255.
    """
    red, green, blue = levels
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    spread = math.hypot(float(red_green.std()), float(yellow_blue.std()))
    distance = math.hypot(float(red_green.mean()), float(yellow_blue.mean()))
    colorfulness = spread + 0.3 * distance
    return colorfulness / (colorfulness + AVERAGELY_COLORFUL)


AVERAGELY_COLORFUL = 45.0


# --- composition


def composition_balance(levels: Tensor) -> float:
    """1 less how unequal the halves of a picture are in weight: left and right, top and bottom, and on either side of
    both diagonals.

    Wilson and Chatterjee, The assessment of preference for balance (2005), without their comparison of center and rim.
    A pixel weighs as much as its color differs from the picture's median color, if one can see it. Of levels (3, H, W)
    in 0..255; 0 without weight.
    """
    ground = levels.flatten(1).median(1).values[:, None, None]
    weight = F.threshold((levels - ground).norm(dim=0), LEAST_WEIGHT, 0.0)
    total = float(weight.sum())
    if not total:
        return 0.0
    height, width = weight.shape
    down = (torch.arange(height) * 2 - height + 1)[:, None] * width  # -1 to 1 times height * width, in whole numbers
    across = (torch.arange(width) * 2 - width + 1)[None, :] * height
    sides = down, across, down + across, down - across
    return 1 - sum(abs(float((weight * side.sign()).sum())) for side in sides) / total / len(sides)


LEAST_WEIGHT = 8.0  # levels; what a decoder leaves of unevenness is less


# --- artifacts


def artifact_score(levels: Tensor) -> float:
    """The least of three: freedom from blocks, from banding and from grain. Of levels (3, H, W) in 0..255."""
    return min(without_blocks(levels), without_banding(levels), without_grain(levels))


def without_blocks(levels: Tensor) -> float:
    """What the picture's blocks hold of detail, as a share of what they hold when cut half a block further.

    A picture made of blocks, as strong JPEG compression leaves it, has its jumps between them and little within; cut
    elsewhere, the jumps are within. This uses what JPEG forensics rest on (Fan and de Queiroz, Identification of bitmap
    compression history, 2003). Detail is counted in bits: the logarithms of what a cosine transform of a block holds.
    Color is counted at half the size and with less care, as files keep it and eyes see it.
    """
    planes = torch.einsum("pc,chw->phw", torch.tensor(LUMA_AND_COLORS), levels)
    counted = [(planes[0], UNSEEN, 1.0), *((color, UNSEEN_COLOR, 0.25) for color in F.avg_pool2d(planes[1:], 2))]
    own = shifted = LEAST_DETAIL
    for plane, unseen, weight in counted:
        half = BLOCK // 2
        if min(plane.shape) >= BLOCK + half:
            own += weight * _detail(plane, unseen)
            shifted += weight * _detail(plane[half:, half:], unseen)
    return min(1.0, own / shifted)


LUMA_AND_COLORS = (0.299, 0.587, 0.114), (-0.169, -0.331, 0.5), (0.5, -0.419, -0.081)  # JPEG's
LEAST_DETAIL = 1e-4  # bits: below, there is nothing to compare
UNSEEN, UNSEEN_COLOR = 2.0, 8.0  # levels that a frequency may hold unseen; rounding leaves as much as the first


def _detail(plane: Tensor, unseen: float) -> float:
    height, width = (side // BLOCK * BLOCK for side in plane.shape)
    blocks = plane[:height, :width].unfold(0, BLOCK, BLOCK).unfold(1, BLOCK, BLOCK)
    place, frequency = torch.arange(BLOCK) + 0.5, torch.arange(BLOCK)
    cosines = torch.cos(math.pi / BLOCK * frequency[:, None] * place) * math.sqrt(2 / BLOCK)
    cosines[0] /= math.sqrt(2)
    held = (cosines @ blocks @ cosines.T).flatten(2)[..., 1:].abs()
    return float(torch.log2(1 + (held - unseen).clamp_min(0)).mean())


def without_banding(levels: Tensor) -> float:
    """1 where neighboring pixels may differ by a single level, less a sixth for each doubling of the least difference.

    Where a picture has few levels, what should be a slope is a staircase, and its least steps are high. The least is
    the fifth percentile, over all channels, of the differences between neighbors that differ. A channel of two levels
    has no slope.
    """
    sloped = [channel for channel in levels if len(channel.unique()) > 2]
    if not sloped:
        return 1.0
    steps = torch.cat([channel.diff(dim=side).abs().flatten() for channel in sloped for side in (0, 1)])
    steps = steps[steps > 0]
    return max(0.0, 1 - math.log2(max(1.0, _quantile(steps, 0.05))) / 6)


def without_grain(levels: Tensor) -> float:
    """1 / (1 + (noise / 8)²), for the noise of the picture's smoothest parts as a standard deviation in levels.

    Immerkær, Fast noise variance estimation (1996), in blocks, of which the tenth of a hundred counts: texture is no
    noise where some of the picture is smooth.
    """
    mask = torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]])
    rough = F.conv2d(levels[:, None], mask[None, None]).abs().mean(0)
    noise = math.sqrt(math.pi / 2) / 6 * F.avg_pool2d(rough, BLOCK - 2, ceil_mode=True).flatten()
    return 1 / (1 + (_quantile(noise, 0.1) / DISTURBING_NOISE) ** 2)


DISTURBING_NOISE = 8.0  # levels


def _quantile(values: Tensor, share: float) -> float:
    """The value at `share` of a tensor's sorted values; torch.quantile refuses large tensors."""
    values = values.flatten()
    return float(values.kthvalue(1 + round(share * (len(values) - 1))).values)
