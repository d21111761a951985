"""What a model drew of a few prompts: the inputs that its weights are for, small enough to lie beside a checkpoint.

Everything that its layers multiply comes of these ids and tokens again, so nothing else is kept. `compensated` stores
weights for them, and `conditions` tells how far a model with other weights is from the one that drew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import NextStepError, damaged
from ..model.config import NextStepConfig
from ..model.nextstep import NextStepModel, TextEmbedding
from ..model.positions import has_codes
from ..model.transformer import Span, whole_span
from ..ranges import Range
from ..sentences import Sentence
from .documents import CALIBRATION, file_metadata
from .files import check_regular
from .single_file import write_file

MARK, VERSION = "nextstep.calibration", "1"
WEIGHTS, GRID = "weights", "grid"  # in the metadata: the hash of the weights that drew, and rows x columns of tokens
PROMPTS = Range(Sentence("The number of prompts to calibrate with"), 2, 128)
LARGEST_TOKEN = 1000.0  # those that models draw have unit variance
LARGEST = 256 << 20  # bytes of a file
MOST_POSITIONS = 1 << 17  # where a config states no limit
HELD_OUT = 8  # of so many prompts, one is kept to measure with
AGAIN = Sentence("Make it anew with nextstep calibrate.")


@dataclass(frozen=True)
class Drawn:
    """Prompts and their pictures: ids and valid (branches * pictures, L), as the transformer reads them, and tokens
    (pictures, rows * columns, token_dim) of the `grid`."""

    ids: Tensor
    valid: Tensor
    tokens: Tensor
    grid: tuple[int, int]

    @property
    def pictures(self) -> int:
        """How many pictures there are."""
        return len(self.tokens)

    @property
    def known(self) -> Drawn:
        """Those that weights may be fitted to."""
        return self.part([n for n in range(self.pictures) if n % HELD_OUT != HELD_OUT - 1 and n + 1 < self.pictures])

    @property
    def held_out(self) -> Drawn:
        """The others, to measure with."""
        return self.part([n for n in range(self.pictures) if n % HELD_OUT == HELD_OUT - 1 or n + 1 == self.pictures])

    def part(self, pictures: Sequence[int]) -> Drawn:
        """These pictures alone, in all branches."""
        branches = range(len(self.ids) // self.pictures)
        rows = [branch * self.pictures + n for branch in branches for n in pictures]
        return replace(self, ids=self.ids[rows], valid=self.valid[rows], tokens=self.tokens[list(pictures)])

    def embeds(
        self, text_embedding: TextEmbedding, image_in_projector: nn.Module, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """What the transformer reads: (rows, L + tokens - 1, hidden), for the last token is never fed."""
        text = text_embedding(self.ids).to(device, dtype)
        fed = image_in_projector(self.tokens[:, :-1].to(device, dtype))
        return torch.cat([text, fed.repeat(len(text) // len(fed), 1, 1)], dim=1)

    def span(self, config: NextStepConfig, device: torch.device, dtype: torch.dtype) -> Span:
        """Where these rows stand."""
        fed = torch.ones(len(self.ids), self.tokens.shape[1] - 1, dtype=torch.bool)
        return whole_span(config, torch.cat([self.valid, fed], dim=1).to(device), dtype)

    def places(self, hidden: Tensor) -> Tensor:
        """Of hidden states (rows, L + tokens - 1, hidden), those that tokens are sampled from."""
        return hidden[:, self.ids.shape[1] - 1 :]


def conditions(model: NextStepModel, text_embedding: TextEmbedding, drawn: Drawn, dtype: torch.dtype) -> Tensor:
    """What the transformer hands to the head for every token that was drawn, given the tokens before it: (rows, tokens,
    hidden) float32."""
    device = model.norm.weight.device
    embeds = drawn.embeds(text_embedding, model.image_in_projector, device, dtype)
    hidden = drawn.places(model(embeds, drawn.span(model.config, device, dtype)))
    return projected(model.image_out_projector, model.position_codes(drawn.grid, hidden), hidden)


def projected(image_out_projector: nn.Module, codes: Tensor | None, hidden: Tensor) -> Tensor:
    """The conditions of hidden states (rows, tokens, hidden)."""
    conditions: Tensor = image_out_projector(hidden if codes is None else hidden + codes)
    return conditions.float()


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth|."""
    return float((value - truth).norm() / truth.norm())


def calibration_path(checkpoint: Path) -> Path:
    """Where the calibration of a checkpoint lies: in its folder, or beside its file."""
    if checkpoint.is_dir():
        return checkpoint / CALIBRATION
    return checkpoint.with_name(f"{checkpoint.stem}.{CALIBRATION}")


def save_calibration(path: Path, drawn: Drawn, weights: str) -> int:
    """Write what was drawn by the weights of this hash; bytes. NextStepError where it cannot be written."""
    tensors = {"ids": drawn.ids.int(), "valid": drawn.valid.to(torch.uint8), "tokens": drawn.tokens.float().cpu()}
    marks = {MARK: VERSION, WEIGHTS: weights, GRID: "x".join(map(str, drawn.grid))}
    return write_file(path, tensors, marks, tensors.items())


def load_calibration(path: Path, config: NextStepConfig, weights: str) -> Drawn:
    """What a file holds; NextStepError for one that is none, or that another model or other weights drew."""
    try:
        check_regular(path)
        size = path.stat().st_size
    except OSError:
        raise NextStepError("{path} does not exist. Make it with nextstep calibrate.", path=path) from None
    if size > LARGEST:
        raise damaged(path, f"{size:,} bytes, where at most {LARGEST:,} are allowed")
    marks = file_metadata(path)
    if marks.get(MARK) != VERSION:
        raise NextStepError("{path} is no calibration of this version. {again}", path=path, again=AGAIN)
    if marks.get(WEIGHTS) != weights:
        raise NextStepError("{path} was made with other weights than these. {again}", path=path, again=AGAIN)
    try:
        held = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, error) from None
    drawn = _drawn(held, marks.get(GRID, ""), config)
    if drawn is None:
        raise NextStepError("{path} does not fit this model. {again}", path=path, again=AGAIN)
    return drawn


def _drawn(held: dict[str, Tensor], grid: str, config: NextStepConfig) -> Drawn | None:
    """The parts as what was drawn; None where they do not go together or with the model."""
    kinds = {"ids": (torch.int32, 2), "valid": (torch.uint8, 2), "tokens": (torch.float32, 3)}
    if {name: (tensor.dtype, tensor.ndim) for name, tensor in held.items()} != kinds:
        return None
    ids, valid, tokens = (held[name] for name in kinds)
    sides = grid.split("x")
    if len(sides) != 2 or not all(side.isascii() and side.isdigit() and 0 < len(side) < 5 for side in sides):
        return None
    rows, columns = map(int, sides)
    fits = (
        0 not in (*ids.shape, *tokens.shape)
        and ids.shape == valid.shape
        and PROMPTS.minimum <= len(tokens) <= PROMPTS.maximum
        and len(ids) in [branches * len(tokens) for branches in (1, 2, 3)]
        and tokens.shape[1:] == (rows * columns, config.token_dim)
        and ids.shape[1] + rows * columns <= (config.max_position_embeddings or MOST_POSITIONS)
        and (not config.use_gen_pos_embed or has_codes(config, (rows, columns)))
        and 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size
        and bool((tokens.abs() <= LARGEST_TOKEN).all())  # NaN is not
        and bool((valid <= 1).all())
        and bool((valid[:, 1:] >= valid[:, :-1]).all())  # only the left is padded
        and bool(valid[:, -1].all())
    )
    return Drawn(ids.long(), valid.bool(), tokens, (rows, columns)) if fits else None
