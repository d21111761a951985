"""Training examples of the transformer: which texts go with which scenes, and their batches of ids and image tokens.

The picture world is finite, so every picture is encoded once by the frozen VAE; a batch is looked up, not drawn.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from tokenizers import Tokenizer
from torch import Tensor

from nextstep_core.images.latents import PUBLISHED_LATENTS
from nextstep_core.model.vae import AutoencoderKL

from .scenes import (
    CANVASES,
    COLORS,
    EDIT_KINDS,
    GRID,
    RADII,
    SQUARE,
    Edit,
    Scene,
    SceneObject,
    caption,
    render,
    sample_edit,
    sample_pair,
    triples,
)
from .tokenizer import BEGIN_OF_IMAGE, END_OF_IMAGE, IMAGE_AREA, IMAGE_PLACEHOLDER, PAD
from .vae_training import to_pixels

# how many scenes of these kinds are encoded; there are more than need be seen
PAIR_COUNT = 10000
PAIR_EDIT_COUNT = 3000
WIDE_COUNT = 1500
TOKEN_PIXELS = 16
ENCODE_BATCH = 32


@dataclass(frozen=True)
class Example:
    """A text, the picture it edits if any, and the picture to draw."""

    text: str
    source: Scene | None
    target: Scene


@dataclass(frozen=True)
class Batch:
    """Prompt ids (B, L), left padded, ending in the begin-of-image id; valid is False at padding.

    source (B, n, 64) stands at the placeholders; target (B, T, 64) is to be drawn.
    """

    ids: Tensor
    valid: Tensor
    source: Tensor | None
    target: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        source = None if self.source is None else self.source.to(device)
        return Batch(self.ids.to(device), self.valid.to(device), source, self.target.to(device))


def training_singles(canvas: tuple[int, int]) -> list[Scene]:
    """Every one-object scene of a canvas whose triple is not held out."""
    width, height = canvas
    places = itertools.product((-GRID, 0, GRID), repeat=2)
    return [
        Scene(background, (SceneObject(shape, color, size, width // 2 + dx, height // 2 + dy),), width, height)
        for (dx, dy), size, (color, shape, background) in itertools.product(places, RADII, triples(held_out=False))
    ]


def training_scenes(canvas: tuple[int, int]) -> list[Scene]:
    """What is encoded of a canvas: empty scenes; for 64x64 all single objects and some pairs, else some singles."""
    rng = random.Random(f"scenes {canvas}")
    empty = [Scene(background, (), *canvas) for background in COLORS]
    if canvas != SQUARE:
        return rng.sample(training_singles(canvas), WIDE_COUNT) + empty
    pairs = [sample_pair(rng) for _ in range(PAIR_COUNT)]
    edited = [scene for edit in training_pair_edits() for scene in (edit.source, edit.target)]
    return list(dict.fromkeys(training_singles(canvas) + empty + pairs + edited))


def training_pair_edits() -> list[Edit]:
    """Edits of one of two objects: too many to find both pictures among scenes drawn by lot."""
    rng = random.Random("pair edits")
    return [sample_edit(rng, EDIT_KINDS[i % len(EDIT_KINDS)], pair=True) for i in range(PAIR_EDIT_COUNT)]


class LatentPool:
    """The image tokens of every training scene, (n, T, 64) for each canvas, found by the scene itself."""

    def __init__(self, tokens: dict[str, Tensor]):
        self.tokens = tokens
        self.scenes = {canvas: training_scenes(canvas) for canvas in CANVASES}
        for canvas, scenes in self.scenes.items():
            if len(tokens[self.key(*canvas)]) != len(scenes):
                raise ValueError(f"latents.pt does not hold the {len(scenes)} scenes of {canvas}: delete it.")
        self.rows = {scene: row for scenes in self.scenes.values() for row, scene in enumerate(scenes)}
        self.singles = [scene for scene in self.scenes[SQUARE] if len(scene.objects) == 1]
        self.pair_edits = training_pair_edits()
        self.pairs = [scene for scene in self.scenes[SQUARE] if len(scene.objects) == 2]

    @staticmethod
    def key(width: int, height: int) -> str:
        """How a canvas is called in `tokens`."""
        return f"{width}x{height}"

    @classmethod
    @torch.no_grad()
    def encode(cls, vae: AutoencoderKL, device: torch.device) -> LatentPool:
        """Draw and encode every training scene; this takes minutes on a CPU."""
        tokens = {}
        for canvas in CANVASES:
            scenes, parts = training_scenes(canvas), []
            for start in range(0, len(scenes), ENCODE_BATCH):
                pixels = torch.stack([to_pixels(render(scene)) for scene in scenes[start : start + ENCODE_BATCH]])
                latents, _ = vae.encode_moments(pixels.to(device))
                parts.append(PUBLISHED_LATENTS.to_tokens(latents).half().cpu())
            tokens[cls.key(*canvas)] = torch.cat(parts)
            print(f"encoded {len(scenes)} pictures of {canvas[0]}x{canvas[1]}", flush=True)
        return cls(tokens)

    def look_up(self, scenes: Iterable[Scene]) -> Tensor:
        """Tokens (B, T, 64) of scenes of one canvas."""
        scenes = list(scenes)
        table = self.tokens[self.key(scenes[0].width, scenes[0].height)]
        return table[[self.rows[scene] for scene in scenes]].float()


class Examples:
    """Draws batches of each task, with part of the captions dropped for guidance."""

    def __init__(self, pool: LatentPool, tokenizer: Tokenizer, drop: float):
        self.pool, self.drop = pool, drop
        self.encode = lru_cache(maxsize=100_000)(lambda text: tokenizer.encode(text).ids)
        self.pad = tokenizer.token_to_id(PAD)

    def batch(self, rng: random.Random, task: str, count: int) -> Batch:
        """count examples of one task, "single", "pair" or "wide" and their edits; all of one canvas."""
        canvas = rng.choice(CANVASES[1:]) if task.startswith("wide") else SQUARE
        if task.endswith("edit"):
            edits = [self._edit(rng, canvas, task == "pair edit") for _ in range(count)]
            return self._collate([Example(self._kept(rng, e.instruction), e.source, e.target) for e in edits])
        scenes = {"single": self.pool.singles, "pair": self.pool.pairs, "wide": self.pool.scenes[canvas]}[task]
        return self._collate([self._drawing(rng, rng.choice(scenes)) for _ in range(count)])

    def _edit(self, rng: random.Random, canvas: tuple[int, int], pair: bool) -> Edit:
        if pair:
            return rng.choice(self.pool.pair_edits)
        while True:
            edit = sample_edit(rng, rng.choice(EDIT_KINDS), canvas=canvas)
            if edit.source in self.pool.rows and edit.target in self.pool.rows:
                return edit

    def _drawing(self, rng: random.Random, scene: Scene) -> Example:
        text = caption(scene, name_size=len(scene.objects) == 1 and rng.random() < 0.5)
        return Example(self._kept(rng, text), None, scene)

    def _kept(self, rng: random.Random, text: str) -> str:
        return "" if rng.random() < self.drop else as_people_write(rng, text)

    def _collate(self, examples: list[Example]) -> Batch:
        rows = [self.encode(prompt_text(example)) for example in examples]
        length = max(map(len, rows))
        ids = torch.tensor([[self.pad] * (length - len(row)) + row for row in rows])
        valid = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in rows])
        sources = [example.source for example in examples]
        source = self.pool.look_up(sources) if sources[0] is not None else None
        return Batch(ids, valid, source, self.pool.look_up(example.target for example in examples))


def as_people_write(rng: random.Random, text: str) -> str:
    """The exact sentence, or sometimes with another article, a capital or a full stop."""
    if rng.random() < 0.3:
        text = text.replace("an orange", "a orange")
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.15 else text


def prompt_text(example: Example) -> str:
    """The row as the pipeline lays it out: input image, text, size prefix, begin of image."""
    image = ""
    if example.source is not None:
        rows, columns = grid_of(example.source)
        image = f"{IMAGE_AREA}{rows}*{columns}{BEGIN_OF_IMAGE}{IMAGE_PLACEHOLDER * (rows * columns)}{END_OF_IMAGE}"
    rows, columns = grid_of(example.target)
    return f"{image}{example.text}{IMAGE_AREA}{rows}*{columns}{BEGIN_OF_IMAGE}"


def grid_of(scene: Scene) -> tuple[int, int]:
    """(rows, columns) of image tokens."""
    return scene.height // TOKEN_PIXELS, scene.width // TOKEN_PIXELS
