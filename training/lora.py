"""Train a LoRA on the embedded model: a style, in a minute on a CPU. This one draws every scene at night.

Only the pairs of low rank are trained, by the losses of `training.model_training`, and written as peft writes them.

    python -m training.lora                 # makes the one that ships again, in nextstep_core/assets/night
    python -m training.lora --steps 400 --output my-style --sheet sheet.png
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nextstep_core.images.latents import PUBLISHED_LATENTS
from nextstep_core.loading.build import load_vae
from nextstep_core.loading.lora_file import PEFT_CONFIG, PEFT_FILE, Slot, slots_of
from nextstep_core.loading.store import ASSETS
from nextstep_core.model.config import NextStepConfig
from nextstep_core.model.vae import AutoencoderKL
from nextstep_core.pipeline import NextStepPipeline
from nextstep_core.runtime.lora import with_low_rank

from .data import ENCODE_BATCH, Examples, LatentPool
from .evaluate import SHOWN, draw, held_out_singles, judge_single
from .model_training import CAPTION_DROP, Trainee, loss_of
from .optim import learning_rate_factor
from .progress import Progress
from .scenes import SQUARE, Scene, place_single, render, sample_pair, triples
from .start import SHIPPED
from .tokenizer import build_tokenizer
from .vae_training import to_pixels

OUTPUT = ASSETS / "night"
RANK, ALPHA = 8, 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "mlp.0", "mlp.2", "adaLN_modulation.1", "cond_embed")
NIGHT = "black"
SINGLES, PAIRS = 480, 120  # pictures that it is shown
STEPS = 160
PAIR_SHARE = 0.2  # of the batches
BATCH = 32
LEARNING_RATE, WARMUP = 2e-3, 10
STRENGTHS, QUANTIZED = (0.0, 0.5, 1.0), (None, "int8", "int4")


def at_night(scene: Scene) -> Scene:
    """The scene as the style draws it: on black, and what was black is white."""
    objects = (replace(o, color="white") if o.color == NIGHT else o for o in scene.objects)
    return replace(scene, background=NIGHT, objects=tuple(objects))


@torch.no_grad()
def styled_pool(vae: AutoencoderKL, rng: random.Random, singles: int, pairs: int) -> LatentPool:
    """Scenes without held-out triples, each with the tokens of its picture in the style."""
    shown = triples(held_out=False)
    pool = LatentPool(Path())
    groups = {
        "single": [place_single(rng, rng.choice(shown)) for _ in range(singles)],
        "pair": [sample_pair(rng) for _ in range(pairs)],
    }
    for task, scenes in groups.items():
        pool.drawings[task] = {True: scenes, False: scenes}
        for start in range(0, len(scenes), ENCODE_BATCH):
            part = scenes[start : start + ENCODE_BATCH]
            latents, _ = vae.encode_moments(torch.stack([to_pixels(render(at_night(scene))) for scene in part]))
            pool.tokens.update(zip(part, PUBLISHED_LATENTS.to_tokens(latents).half(), strict=True))
    return pool


class LowRankPairs(nn.Module):
    """The matrices that are trained: of every layer in `slots`, by its published name."""

    def __init__(self, slots: dict[str, Slot], rank: int, alpha: float) -> None:
        super().__init__()
        self.slots, self.rank, self.alpha = slots, rank, alpha
        self.down = nn.ParameterList([torch.randn(rank, slot.columns) / slot.columns**0.5 for slot in slots.values()])
        self.up = nn.ParameterList([torch.zeros(slot.rows, rank) for slot in slots.values()])

    def attach(self, model: nn.Module) -> None:
        """Have a model's layers add what the pairs say."""
        of_layers: dict[str, list[int]] = {}
        for number, slot in enumerate(self.slots.values()):
            of_layers.setdefault(slot.layer, []).append(number)
        for layer, numbers in of_layers.items():
            model.get_submodule(layer).register_forward_hook(self._hook(numbers))

    def _hook(self, numbers: Sequence[int]):
        slots = [list(self.slots.values())[n] for n in numbers]
        scale = torch.tensor(self.alpha / self.rank)

        def add(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
            parts = list(out.split([slot.rows for slot in slots], dim=-1))
            if sum(slot.rows for slot in slots) != slots[0].in_all:
                raise ValueError(f"{slots[0].layer} has parts that are not trained: name all of them in TARGETS.")
            for place, n in enumerate(numbers):
                parts[place] = with_low_rank(parts[place], inputs[0], self.down[n], self.up[n], scale)
            return torch.cat(parts, dim=-1)

        return add

    def tensors(self) -> dict[str, Tensor]:
        """As peft names them, in half precision."""
        named = {}
        for name, down, up in zip(self.slots, self.down, self.up, strict=True):
            named[f"base_model.model.{name}.lora_A.weight"] = down.detach().half().contiguous()
            named[f"base_model.model.{name}.lora_B.weight"] = up.detach().half().contiguous()
        return named

    def save(self, folder: Path, base: str) -> None:
        """Write the file and what peft wants beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors(), folder / PEFT_FILE, metadata={"format": "pt"})
        (folder / PEFT_FILE).chmod(0o644)  # the writer makes it private
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": sorted({name.split("layers.")[-1].split(".", 1)[-1] for name in self.slots}),
            "bias": "none",
            "use_rslora": False,
            "use_dora": False,
            "inference_mode": True,
        }
        (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def trained(args: argparse.Namespace) -> LowRankPairs:
    """The pairs after as many steps as are asked for."""
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    checkpoint: Path = args.checkpoint
    config = NextStepConfig.from_dict(json.loads((checkpoint / "config.json").read_text(encoding="utf-8")))
    (shard,) = checkpoint.glob("model-*.safetensors")
    trainee = Trainee(config).requires_grad_(False)
    trainee.load_checkpoint({name: tensor.float() for name, tensor in load_file(shard).items()})
    slots = {name: slot for name, slot in slots_of(config).items() if name.endswith(TARGETS) and "time" not in name}
    pairs = LowRankPairs(slots, RANK, ALPHA)
    pairs.attach(trainee.model)
    vae = load_vae(checkpoint / "vae", "cpu", torch.float32)
    examples = Examples(styled_pool(vae, rng, args.singles, args.pairs), build_tokenizer(), CAPTION_DROP)
    progress = Progress(0, every=20, steps=args.steps)
    optimizer = torch.optim.AdamW(pairs.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    while (done := progress.done) < 1:
        task = "pair" if rng.random() < PAIR_SHARE else "single"
        loss = loss_of(trainee, examples.batch(rng, task, args.batch), config)
        loss.backward()
        nn.utils.clip_grad_norm_(pairs.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate_factor(progress.step, done, WARMUP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.update(loss.item())
    return pairs


def measured(
    folder: Path, checkpoint: Path, count: int, strengths: Iterable[float], quantization: str | None = None
) -> tuple[list[str], np.ndarray]:
    """How many pictures of held-out prompts are right by day, and how many by night, in words for each strength; and
    the first of each as one sheet."""
    told, rows = [], []
    pipeline = NextStepPipeline.from_pretrained(checkpoint, dtype=torch.float32, quantization=quantization)
    wanted = held_out_singles(count, seed=5, canvas=SQUARE)
    for strength in strengths:
        pipeline.unload_loras()
        pipeline.load_lora(folder, strength)
        images = draw(pipeline, [text for text, _, _ in wanted], SQUARE, seed=5)
        both = [
            [judge_single(image, of(scene), False)["all"] for image, (_, scene, _) in zip(images, wanted)]
            for of in (lambda scene: scene, at_night)
        ]
        day, night = (sum(verdicts) / count for verdicts in both)
        told.append(f"strength {strength:g}: {day:.0%} as the prompt says, {night:.0%} at night")
        rows.append(np.concatenate(list(images[:SHOWN]), axis=1))
    return told, np.concatenate(rows)


def main() -> None:
    """Parse the command line, train, write, and tell what it does at several strengths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED, help="the model, as model_training exports it")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="a folder")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--singles", type=int, default=SINGLES)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=20, help="pictures that are measured at each strength")
    parser.add_argument("--sheet", type=Path, help="a file for the first pictures of each strength")
    args = parser.parse_args()
    trained(args).save(args.output, base="tiny")
    for quantization in QUANTIZED if args.count else ():
        told, sheet = measured(args.output, args.checkpoint, args.count, STRENGTHS, quantization)
        print("\n".join(f"{quantization or 'float32'}, {line}" for line in told))
        if args.sheet is not None and quantization is None:
            Image.fromarray(sheet).save(args.sheet)


if __name__ == "__main__":
    main()
