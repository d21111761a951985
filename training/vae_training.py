"""Train the small f8, 16-channel VAE: first encoder and decoder together, then the decoder alone.

The encoder's latents are normalized over channels, and noise is added to them in training (arXiv 2508.10711), so that
a token the transformer draws slightly wrong still decodes to a right picture. Freezing the encoder after the first
stage fixes the latents: the transformer can be trained while the decoder goes on learning corners.

    python -m training.vae_training --stage joint
    python -m training.vae_training --stage decoder
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nextstep_core.model.config import VAEConfig
from nextstep_core.model.vae import AutoencoderKL

from .optim import Average, Optimizers, learning_rate_factor
from .progress import Progress, load_if_there, pick_device, save_atomically
from .scenes import CANVASES, COLORS, SHAPES, SQUARE, Scene, place_single, place_single_freely, render, sample_pair

CONFIG = VAEConfig(
    in_channels=3,
    ch=64,  # 32 groups need at least two channels each: one channel a group erases flat color
    out_ch=3,
    ch_mult=(1, 1, 1, 1),
    num_res_blocks=1,
    z_channels=16,
    scaling_factor=1.0,
    shift_factor=0.0,
    deterministic=True,
    encoder_norm=True,
    psz=1,
)
CROP = 32
PIXELS_PER_STEP = {"joint": 24 * CROP * CROP, "decoder": 16 * CROP * CROP}
STEPS = {"joint": 1700, "decoder": 5000}
RATES = {"joint": (6e-3, 3e-3), "decoder": (3e-3, 1.5e-3)}  # of Muon and of Adam
NOISE = {"joint": 0.3, "decoder": 0.2}  # the largest share of noise in the normalized latents
FULL_PICTURES_AFTER = 0.6  # of the joint stage; crops are cheaper, but group norm must see whole pictures in the end
FREE_SHARE = 0.6  # of objects that lie anywhere instead of on the grid
TURNED_SHARE = 0.4  # of those
PAIR_SHARE = 0.5  # of 64x64 pictures: small shapes are the hardest
EVALUATE_EVERY = 200


def to_pixels(image: np.ndarray) -> Tensor:
    """(height, width, 3) uint8 to (3, height, width) in -1..1."""
    return torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1


def random_scene(rng: random.Random, canvas: tuple[int, int]) -> Scene:
    """Any scene at all: the VAE sees no captions, so nothing is held out from it."""
    free = rng.random() < FREE_SHARE
    turned = rng.random() < TURNED_SHARE
    if canvas == SQUARE and rng.random() < PAIR_SHARE:
        return sample_pair(rng, canvas=SQUARE if free else None, turned=turned)
    color, background = rng.sample(list(COLORS), 2)
    triple = color, rng.choice(SHAPES), background
    return place_single_freely(rng, triple, canvas, turned=turned) if free else place_single(rng, triple, canvas=canvas)


def batch_of_pictures(rng: random.Random, pixels: int, crops: bool) -> Tensor:
    """(n, 3, height, width) of about this many pixels; crops keep the latents' 8-pixel phase."""
    if not crops:
        width, height = rng.choice(CANVASES) if rng.random() < 0.4 else CANVASES[0]
        count = max(1, pixels // (width * height))
        return torch.stack([to_pixels(render(random_scene(rng, (width, height)))) for _ in range(count)])
    cut = []
    for _ in range(pixels // CROP**2):
        image = render(random_scene(rng, (64, 64)))
        x, y = (8 * rng.randrange((64 - CROP) // 8 + 1) for _ in range(2))
        cut.append(to_pixels(image[y : y + CROP, x : x + CROP]))
    return torch.stack(cut)


def newest_vae(folder: Path) -> AutoencoderKL:
    """The frozen encoder, with the best decoder there is so far."""
    vae = AutoencoderKL(CONFIG)
    path = folder / "vae_decoder.pt"
    state = torch.load(path if path.exists() else folder / "vae_joint.pt", map_location="cpu", weights_only=True)
    vae.load_state_dict(state)
    return vae


def reconstruction_loss(out: Tensor, pixels: Tensor) -> Tensor:
    """Squared error decides the PSNR; a little absolute error keeps flat areas flat."""
    return F.mse_loss(out, pixels) + 0.1 * F.l1_loss(out, pixels)


@torch.no_grad()
def psnr(vae: AutoencoderKL, device: torch.device, count: int = 48) -> float:
    """Reconstruction PSNR in dB over fixed 64x64 pictures, clamped as shown."""
    rng = random.Random("vae evaluation")
    pixels = torch.stack([to_pixels(render(random_scene(rng, SQUARE))) for _ in range(count)]).to(device)
    out = vae.decode(vae.encode_moments(pixels)[0]).clamp(-1, 1)
    return -10 * math.log10(F.mse_loss(out, pixels).item() / 4)


def train(stage: str, folder: Path, steps: int, seed: int) -> None:
    """Run or resume one stage; the averaged weights end in folder/vae_{stage}.pt."""
    device = pick_device()
    torch.manual_seed(seed)
    vae = AutoencoderKL(CONFIG).to(device)
    if stage == "decoder":
        vae.load_state_dict(torch.load(folder / "vae_joint.pt", map_location="cpu", weights_only=True))
        vae.encoder.requires_grad_(False)
    optimizers = Optimizers(vae, *RATES[stage], adam_names=("conv_in", "decoder.conv_out"))
    average = Average(vae, decay=0.998)
    state_path = folder / f"vae_{stage}_state.pt"
    first_step = 0
    if state := load_if_there(state_path):
        vae.load_state_dict(state["vae"])
        optimizers.load_state_dict(state["optimizers"])
        average.load(state["average"])
        first_step = state["step"]
    shown = AutoencoderKL(CONFIG).to(device).eval()
    progress = Progress(first_step, every=50, steps=steps)

    for step in range(first_step, steps):
        # every step draws from its own seed, so a resumed run continues the same stream
        rng = random.Random(f"{seed} {stage} {step}")
        torch.manual_seed(rng.getrandbits(40))
        crops = stage == "joint" and step < FULL_PICTURES_AFTER * steps
        pixels = batch_of_pictures(rng, PIXELS_PER_STEP[stage], crops).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            latents = vae.encode_moments(pixels)[0].float()
            share = NOISE[stage] * torch.rand(len(latents), 1, 1, 1, device=device)
            out = vae.decode(latents + share * torch.randn_like(latents))
        loss = reconstruction_loss(out.float(), pixels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizers.step(learning_rate_factor(step, progress.done, warmup=100))
        average.update(vae, step)
        progress.update(loss.item())
        if (step + 1) % EVALUATE_EVERY == 0 or step + 1 == steps:
            average.copy_to(shown)
            progress.say(f"PSNR {psnr(shown, device):.2f} dB")
            save_atomically(shown.state_dict(), folder / f"vae_{stage}.pt")
            states = {"vae": vae.state_dict(), "optimizers": optimizers.state_dict(), "average": average.values}
            save_atomically({**states, "step": step + 1}, state_path)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("joint", "decoder"), required=True)
    parser.add_argument("--folder", type=Path, default=Path("train_tiny_runs"), help="where states and weights go")
    parser.add_argument("--steps", type=int, help="of the stage; 1700 and 5000")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    train(args.stage, args.folder, args.steps or STEPS[args.stage], args.seed)


if __name__ == "__main__":
    main()
