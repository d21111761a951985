"""Training examples of the transformer: which texts go with which scenes, and their batches of ids and image tokens.

Places and sizes are continuous, so the picture world is not finite. It is encoded in shards by the frozen VAE, each of
them some thousand pictures that are variations of one another: of eight pictures come two dozen edits. A batch is
looked up, not drawn. A shard is made in half a minute; the more there are, the more places training sees:

    python -m training.data --shards 48
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from nextstep_core.images.latents import PUBLISHED_LATENTS
from nextstep_core.model.vae import AutoencoderKL
from nextstep_core.request.masks import kept_tokens

from .progress import load_if_there, pick_device, save_atomically
from .scenes import (
    CANVASES,
    COLORS,
    LARGE,
    NAMED_APART,
    SIZE_BORDER,
    SQUARE,
    WIDE,
    Edit,
    Scene,
    caption,
    edits_among,
    mask_of,
    place_single,
    place_single_freely,
    render,
    sample_pair,
    sample_three,
    triples,
    vary_pair,
    vary_single,
)
from .tokenizer import BEGIN_OF_IMAGE, END_OF_IMAGE, IMAGE_AREA, IMAGE_PLACEHOLDER, PAD
from .vae_training import newest_vae, to_pixels

# Families of variations in a shard, on the grid and anywhere; "wide" for each of the four canvases.
# Edits of pictures seen before are learned by heart: with a third of these places, edits of two objects cost 0.059 on
# what was seen and 0.081 on what was not. So most of a shard is objects anywhere on the smallest canvas.
FAMILIES = {"single": (30, 300), "pair": (40, 200), "wide": (3, 4), "large": (6, 4), "three": (20, 10)}
# Captions name no place: most pictures drawn from text alone are of the few places of the grid, which keeps the shapes
# clean. What edits keep they learn from the others.
DRAWN_ON_GRID = 0.95
TURNED = 0.35  # of what lies anywhere
# How often each kind is trained: a new shape must be drawn edge by edge, what is removed is gone at once.
EDIT_WEIGHTS = {"recolor": 1.0, "background": 1.2, "replace": 2.0, "remove": 0.5, "exchange": 2.2, "move": 0.9}
# How often an edit of one object is taught as inpainting: the source's own tokens, which tell of what was there, stay
# around what is drawn. A mask is up to so many pixels wider than the object.
INPAINTED, WIDER = 0.3, 8.0
TOKEN_PIXELS = 16
ENCODE_BATCH = 32


@dataclass(frozen=True)
class Example:
    """A text, the picture it edits if any, and the picture to draw; of a masked one only the tokens that are `drawn`
    (T,), the others are the source's."""

    text: str
    source: Scene | None
    target: Scene
    drawn: Tensor | None = None


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


@dataclass(frozen=True)
class Shard:
    """The scenes of a shard, by canvas and in the order of their tokens, and the families that they belong to."""

    scenes: dict[tuple[int, int], list[Scene]]
    families: dict[str, list[list[Scene]]]

    @classmethod
    def by_number(cls, number: int) -> Shard:
        """The shard of this number: always the same."""
        rng, families = random.Random(f"shard {number}"), defaultdict(list)
        shown = triples(held_out=False)

        def turned() -> bool:
            return rng.random() < TURNED

        def add_singles(task: str, canvas: tuple[int, int]) -> None:
            on_grid, free = FAMILIES[task]
            singles = [place_single(rng, rng.choice(shown), canvas=canvas) for _ in range(on_grid)]
            singles += [place_single_freely(rng, rng.choice(shown), canvas, turned=turned()) for _ in range(free)]
            families[task] += [vary_single(rng, scene.objects[0], canvas) for scene in singles]

        add_singles("single", SQUARE)
        for canvas in WIDE:
            add_singles("wide", canvas)
        on_grid, free = FAMILIES["pair"]
        pairs = [sample_pair(rng) for _ in range(on_grid)]
        pairs += [sample_pair(rng, canvas=SQUARE, turned=turned()) for _ in range(free)]
        families["pair"] = [vary_pair(rng, scene) for scene in pairs]
        add_singles("large", LARGE)
        on_grid, free = FAMILIES["three"]
        families["three"] = [[sample_three(rng)] for _ in range(on_grid)]
        families["three"] += [[sample_three(rng, free=True)] for _ in range(free)]
        scenes = {canvas: [Scene(background, (), *canvas) for background in COLORS] for canvas in CANVASES}
        for family in (family for group in families.values() for family in group):
            for scene in family:
                scenes[scene.width, scene.height].append(scene)
        return cls({canvas: list(dict.fromkeys(group)) for canvas, group in scenes.items()}, dict(families))

    @torch.no_grad()
    def encode(self, vae: AutoencoderKL, device: torch.device) -> dict[str, Tensor]:
        """The tokens (n, T, 64) of the scenes of every canvas, float16."""
        return {key(*canvas): encode_scenes(scenes, vae, device) for canvas, scenes in self.scenes.items()}


def encode_scenes(scenes: list[Scene], vae: AutoencoderKL, device: torch.device) -> Tensor:
    """Draw and encode scenes of one canvas; bfloat16 is three times as fast and errs less than the VAE itself."""
    parts = []
    for start in range(0, len(scenes), ENCODE_BATCH):
        pixels = torch.stack([to_pixels(render(scene)) for scene in scenes[start : start + ENCODE_BATCH]])
        with torch.autocast(device.type, torch.bfloat16):
            latents, _ = vae.encode_moments(pixels.to(device, memory_format=torch.channels_last))
        parts.append(PUBLISHED_LATENTS.to_tokens(latents.float()).half().cpu())
    return torch.cat(parts)


def key(width: int, height: int) -> str:
    """How a canvas is called in a shard's file."""
    return f"{width}x{height}"


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard's tokens lie."""
    return folder / "latents" / f"{number:03}.pt"


def make_shards(folder: Path, count: int) -> None:
    """Encode the first `count` shards, those that are not there yet; another process may train on them meanwhile."""
    device = pick_device()
    vae = newest_vae(folder).to(device, memory_format=torch.channels_last).eval()
    for number in range(count):
        if shard_path(folder, number).exists():
            continue
        start, shard = time.monotonic(), Shard.by_number(number)
        save_atomically(shard.encode(vae, device), shard_path(folder, number))
        pictures = sum(map(len, shard.scenes.values()))
        print(f"shard {number}: {pictures} pictures in {time.monotonic() - start:.0f} s", flush=True)


@dataclass
class LatentPool:
    """The image tokens of every shard that is there: drawings and edits by task, tokens found by the scene itself."""

    folder: Path
    count: int = 0
    tokens: dict[Scene, Tensor] = field(default_factory=dict)
    drawings: dict[str, dict[bool, list[Scene]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    edits: dict[str, dict[str, list[Edit]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))

    def take_new_shards(self) -> None:
        """Add the shards that were made since the last call."""
        while tokens := load_if_there(shard_path(self.folder, self.count)):
            self.add(Shard.by_number(self.count), tokens)
            self.count += 1

    def add(self, shard: Shard, tokens: dict[str, Tensor]) -> None:
        """Add a shard with its tokens."""
        for canvas, scenes in shard.scenes.items():
            if len(tokens[key(*canvas)]) != len(scenes):
                raise ValueError(f"A shard in {self.folder} is of other scenes than today's: delete its latents.")
            self.tokens.update(zip(scenes, tokens[key(*canvas)].unbind(), strict=True))
        for task, families in shard.families.items():
            for family in families:
                for scene in family:
                    on_grid = all(thing.on_grid for thing in scene.objects)
                    self.drawings[task_of(task, scene)][on_grid].append(scene)
                for edit in edits_among(family):
                    self.edits[task_of(task, edit.source)][edit.kind].append(edit)

    def look_up(self, scenes: Iterable[Scene]) -> Tensor:
        """Tokens (B, T, 64) of scenes of one canvas."""
        return torch.stack([self.tokens[scene] for scene in scenes]).float()


def task_of(task: str, scene: Scene) -> str:
    """The task, with the canvas of wide pictures: those of one batch are of one size."""
    return task if task != "wide" else key(scene.width, scene.height)


class Examples:
    """Draws batches of each task, with part of the captions dropped for guidance."""

    def __init__(self, pool: LatentPool, tokenizer: Tokenizer, drop: float):
        self.pool, self.drop = pool, drop
        self.encode = lru_cache(maxsize=100_000)(lambda text: tokenizer.encode(text).ids)
        self.pad = tokenizer.token_to_id(PAD)

    def batch(self, rng: random.Random, task: str, count: int) -> Batch:
        """count examples of one task, a name of `FAMILIES` or, but for "three", its edits; all of one canvas."""
        name = task.removesuffix("edit").strip() or "single"
        name = key(*rng.choice(WIDE)) if name == "wide" else name
        if task.endswith("edit"):
            there = self.pool.edits[name]
            kinds = rng.choices(list(there), [EDIT_WEIGHTS[kind] for kind in there], k=count)
            edits = [rng.choice(there[kind]) for kind in kinds]
            return self._collate([self._edited(rng, edit) for edit in edits])
        drawings = self.pool.drawings[name]
        scenes = [rng.choice(drawings[rng.random() < DRAWN_ON_GRID]) for _ in range(count)]
        return self._collate([self._drawing(rng, scene) for scene in scenes])

    def _drawing(self, rng: random.Random, scene: Scene) -> Example:
        plain = all(abs(thing.radius - SIZE_BORDER) >= NAMED_APART for thing in scene.objects)
        text = caption(scene, name_size=len(scene.objects) == 1 and plain and rng.random() < 0.5)
        return Example(self._kept(rng, text), None, scene)

    def _edited(self, rng: random.Random, edit: Edit) -> Example:
        stays = edit.kind not in ("background", "move")  # what changes lies where the object was
        masked = stays and len(edit.source.objects) == 1 and rng.random() < INPAINTED
        drawn = masked_tokens(edit.source, rng.uniform(0, WIDER)) if masked else None
        return Example(self._kept(rng, edit.instruction), edit.source, edit.target, drawn)

    def _kept(self, rng: random.Random, text: str) -> str:
        return "" if rng.random() < self.drop else as_people_write(rng, text)

    def _collate(self, examples: list[Example]) -> Batch:
        rows = [self.encode(prompt_text(example)) for example in examples]
        length = max(map(len, rows))
        ids = torch.tensor([[self.pad] * (length - len(row)) + row for row in rows])
        valid = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in rows])
        sources = [example.source for example in examples]
        source = self.pool.look_up(sources) if sources[0] is not None else None
        target = self.pool.look_up(example.target for example in examples)
        if source is not None:
            all_drawn = torch.ones(target.shape[1], dtype=torch.bool)
            drawn = torch.stack([all_drawn if example.drawn is None else example.drawn for example in examples])
            target = torch.where(drawn[..., None], target, source)
        return Batch(ids, valid, source, target)


def masked_tokens(scene: Scene, wider: float) -> Tensor:
    """(T,), True at tokens that are drawn anew when the only object is masked, with so many pixels around it."""
    return ~kept_tokens(torch.from_numpy(mask_of(scene, wider)), grid_of(scene))


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


def main() -> None:
    """Parse the command line and encode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("train_tiny_runs"), help="where states and weights go")
    parser.add_argument("--shards", type=int, default=48)
    args = parser.parse_args()
    make_shards(args.folder, args.shards)


if __name__ == "__main__":
    main()
