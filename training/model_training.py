"""Train the tiny transformer with its flow-matching head, on the engine's own modules.

One pass sees the text and all image tokens of a row (teacher forcing). Losses: flow matching with velocity target
data - noise at several logit-normal times per token, and a small language loss on the text (arXiv 2508.10711).

    python -m training.model_training --minutes 90
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nextstep_core.loading.fusion import split
from nextstep_core.model.config import NextStepConfig
from nextstep_core.model.nextstep import NextStepModel, TextEmbedding
from nextstep_core.model.transformer import Span, whole_span
from nextstep_core.pipeline import NextStepPipeline
from training.evaluate import measure_edits, measure_pairs, measure_singles

from .data import Batch, Examples, LatentPool, make_shards
from .export import export_checkpoint, model_config
from .optim import Average, Optimizers, learning_rate_factor
from .parallel import Team, run_team
from .progress import Progress, load_if_there, pick_device, save_atomically
from .scenes import CANVASES
from .start import joined, start_path
from .tokenizer import build_tokenizer
from .vae_training import newest_vae

TIMES_PER_TOKEN = 4
LANGUAGE_WEIGHT = 0.01
CAPTION_DROP = 0.1
TOKEN_NOISE = 0.25  # the most noise on tokens that are fed back, against the drift of sampled ones
SOURCE_NOISE = 0.05  # the most noise on an input image's tokens, for pictures that were drawn and not rendered
BATCH = {"single": 64, "pair": 64, "wide": 48, "large": 24, "three": 24}
BATCH |= {"edit": 48, "wide edit": 24, "pair edit": 48, "large edit": 12}
FIRST_WEIGHTS = {"single": 0.7, "pair": 0.1, "wide": 0.1, "edit": 0.1}
LATER_WEIGHTS = {"single": 0.12, "pair": 0.06, "wide": 0.05, "large": 0.04, "three": 0.05}
LATER_WEIGHTS |= {"edit": 0.42, "wide edit": 0.02, "pair edit": 0.23, "large edit": 0.01}
FIRST_SHARE = 0.15  # of the time, with the first weights
SAVE_SECONDS = 120
NEW_SHARDS_EVERY = 100  # steps
ADAM_NAMES = ("embed_tokens", "lm_head", "image_in_projector", "input_proj", "final_layer.linear", "time_embed.mlp.0")


class Trainee(nn.Module):
    """The engine's modules and the language head, which only training needs."""

    def __init__(self, config: NextStepConfig):
        super().__init__()
        self.config = config
        self.model = NextStepModel(config)
        self.text = TextEmbedding(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._initialize()

    def _initialize(self) -> None:
        # text about as large as projected image tokens; every block of the head starts as the identity
        nn.init.normal_(self.text.embed_tokens.weight, std=0.5)
        for block in (*self.model.head.res_blocks, self.model.head.final_layer):
            nn.init.zeros_(block.adaLN_modulation[1].weight)
            nn.init.zeros_(block.adaLN_modulation[1].bias)
        nn.init.zeros_(self.model.head.final_layer.linear.weight)
        nn.init.zeros_(self.model.head.final_layer.linear.bias)

    def load_checkpoint(self, tensors: dict[str, Tensor]) -> None:
        """Take the tensors of a checkpoint, under the names that they have there."""
        for module in (self.model, self.text):
            module.load_state_dict(joined(tensors, module.state_dict(), self.config))
        self.lm_head.load_state_dict({"weight": tensors["lm_head.weight"]})

    def forward(self, batch: Batch, span: Span, fed: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """The weighted loss; fed (B, T - 1, 64) are the tokens fed back, times (K, B, T) and noise (K, B, T, 64)."""
        length = batch.ids.shape[1]
        embeds = self.text(batch.ids)
        if batch.source is not None:
            slots = (batch.ids == self.config.image_placeholder_id)[..., None]
            embeds = embeds.masked_scatter(slots, self.model.image_in_projector(batch.source).to(embeds.dtype))
        embeds = torch.cat([embeds, self.model.image_in_projector(fed).to(embeds.dtype)], dim=1)
        hidden = self.model(embeds, span)
        flow = self._flow_loss(self.model.image_out_projector(hidden[:, length - 1 :]), batch.target, times, noise)
        return flow + LANGUAGE_WEIGHT * self._language_loss(hidden[:, : length - 1], batch)

    def _flow_loss(self, condition: Tensor, target: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        head = self.model.head
        codes = head.time_embed(times.flatten(), condition.dtype).view(*times.shape, -1)
        share = times[..., None]
        velocity = head.velocity((1 - share) * noise + share * target, head.modulations(codes, condition))
        return F.mse_loss(velocity.float(), target - noise)

    def _language_loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        wanted = batch.ids[:, 1:]
        readable = batch.valid[:, :-1] & (wanted != self.config.image_placeholder_id)
        logits = self.lm_head(hidden).float().transpose(1, 2)
        losses = F.cross_entropy(logits, wanted, reduction="none")
        return (losses * readable).sum() / readable.sum()


def with_noise(tokens: Tensor, most: float) -> Tensor:
    """Add noise of a strength drawn for each row, up to `most`."""
    return tokens + most * torch.rand(len(tokens), 1, 1, device=tokens.device) * torch.randn_like(tokens)


def loss_of(trainee: nn.Module, batch: Batch, config: NextStepConfig) -> Tensor:
    """Draw times and noises for a batch and return its loss."""
    target, device = batch.target, batch.target.device
    fed = target[:, :-1]
    fed = with_noise(fed, TOKEN_NOISE)
    if batch.source is not None:
        batch = replace(batch, source=with_noise(batch.source, SOURCE_NOISE))
    times = torch.sigmoid(torch.randn(TIMES_PER_TOKEN, *target.shape[:2], device=device))
    noise = torch.randn(TIMES_PER_TOKEN, *target.shape, device=device)
    valid = F.pad(batch.valid, (0, fed.shape[1]), value=True)
    # rows are far too short for the fused attention kernels, whose backward pass would take a sixth of the time
    with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        return trainee(batch, whole_span(config, valid, torch.float32), fed, times, noise)


def checkpoint_tensors(trainee: Trainee) -> dict[str, Tensor]:
    """The trained tensors under a NextStep checkpoint's names."""
    model = split(trainee.model.state_dict(), trainee.config)
    parts = (model, trainee.text.state_dict(), {"lm_head.weight": trainee.lm_head.weight})
    return {name: tensor for part in parts for name, tensor in part.items()}


def running_accuracy(folder: Path, seed: int) -> str:
    """Draw and read a few held-out prompts with the checkpoint as it would ship."""
    pipeline = NextStepPipeline.from_pretrained(folder, device=pick_device(), dtype=torch.float32)
    singles = measure_singles(pipeline, count=40, seed=seed)
    edits = measure_edits(pipeline, count=16, seed=seed)
    wide = measure_singles(pipeline, count=10, seed=seed, canvas=CANVASES[1 + seed % (len(CANVASES) - 1)])
    pairs = measure_pairs(pipeline, count=20, seed=seed)
    pair_edits = measure_edits(pipeline, count=12, seed=seed, pair=True)
    others = {"edits": edits, "wide": wide, "pairs": pairs, "pair edits": pair_edits}
    rest = ", ".join(f"{name} {score.share('all'):.0%}" for name, score in others.items())
    return f"held-out {singles}; {rest}"


def train(team: Team, args: argparse.Namespace) -> None:
    """Run or resume; the averaged weights are exported to folder/checkpoint again and again."""
    device, folder = pick_device(), args.folder
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    config = NextStepConfig.from_dict(model_config(tokenizer))
    pool = LatentPool(folder)
    pool.take_new_shards()
    examples = Examples(pool, tokenizer, CAPTION_DROP)
    trainee = Trainee(config).to(device)
    optimizers = Optimizers(trainee, args.muon_lr, args.adam_lr, ADAM_NAMES, decay=0.05)
    average = Average(trainee, decay=0.998)
    shown = Trainee(config).to(device)
    state_path, step, seconds = folder / "model_state.pt", 0, 0.0
    first_share = FIRST_SHARE
    if first := load_if_there(start_path(folder)):
        first_share = 0.0
        trainee.load_checkpoint(first)
        average = Average(trainee, decay=0.998)
    if state := load_if_there(state_path):
        trainee.load_state_dict(state["trainee"])
        optimizers.load_state_dict(state["optimizers"])
        average.load(state["average"])
        step, seconds = state["step"], state["seconds"]
    print(f"{sum(p.numel() for p in trainee.parameters()) / 1e6:.2f}M parameters, from step {step}", flush=True)
    progress = Progress(step, every=100, minutes=args.minutes, seconds=seconds)
    saved = evaluated = time.monotonic()

    done = progress.done
    while done < 1:
        # every step draws from its own seed, so a resumed run continues the same stream
        rng = random.Random(f"{args.seed} model {progress.step}")
        weights = FIRST_WEIGHTS if done < first_share else LATER_WEIGHTS
        task = rng.choices(list(weights), list(weights.values()))[0]
        rng.seed(f"{args.seed} model {progress.step} worker {team.rank}")
        torch.manual_seed(rng.getrandbits(40))
        loss = loss_of(trainee, examples.batch(rng, task, BATCH[task] // team.size).to(device), config)
        loss.backward()
        done = team.average(trainee.parameters(), progress.done)  # all workers must agree on the clock
        torch.nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimizers.step(learning_rate_factor(progress.step, done, warmup=200))
        average.update(trainee, progress.step)
        if progress.step % NEW_SHARDS_EVERY == 0:
            pool.take_new_shards()
        if not team.leads:
            progress.step += 1
            continue
        progress.update(loss.item())
        now = time.monotonic()
        if done >= 1 or now - saved > SAVE_SECONDS:
            states = {"trainee": trainee.state_dict(), "optimizers": optimizers.state_dict()}
            clock = {"step": progress.step, "seconds": progress.seconds}
            save_atomically({**states, **clock, "average": average.values}, state_path)
            average.copy_to(shown)
            export_checkpoint(folder / "checkpoint", checkpoint_tensors(shown), newest_vae(folder), tokenizer)
            saved = time.monotonic()
        if done >= 1 or now - evaluated > 60 * args.evaluate_minutes:
            progress.say(running_accuracy(folder / "checkpoint", seed=progress.step))
            evaluated = time.monotonic()


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("train_tiny_runs"), help="where states and weights go")
    parser.add_argument("--minutes", type=float, default=90.0, help="of training in all, over which the rate decays")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--muon-lr", type=float, default=3e-3)
    parser.add_argument("--adam-lr", type=float, default=1.5e-3)
    parser.add_argument("--evaluate-minutes", type=float, default=8.0)
    parser.add_argument("--workers", type=int, default=1, help="processes; on a CPU, one for each core")
    parser.add_argument("--port", type=int, default=29511, help="where the workers meet on this machine")
    args = parser.parse_args()
    make_shards(args.folder, 1)  # what training cannot begin without
    run_team(args.workers, args.port, train, args)


if __name__ == "__main__":
    main()
