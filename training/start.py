"""Begin with a checkpoint that is there instead of with nothing: its VAE, its transformer, its language head.

    python -m training.start                        # the shipped one
    python -m training.start --checkpoint FOLDER

Run it before the other steps; what it writes they take for their own results. A checkpoint with fewer layers than the
recipe has now is deepened: it draws what it drew, and learns on from there.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from nextstep_core.loading.fusion import parts_of
from nextstep_core.loading.store import ASSETS
from nextstep_core.model.config import NextStepConfig

from .export import model_config
from .progress import save_atomically
from .tokenizer import build_tokenizer

SHIPPED = ASSETS / "tiny"
LAYER = re.compile(r"layers\.(\d+)\.(.+)")
ADDS_TO_THE_STREAM = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def start_path(folder: Path) -> Path:
    """Where the transformer's first weights lie, if they are not drawn by lot."""
    return folder / "start.pt"


def joined(tensors: dict[str, Tensor], wanted: dict[str, Tensor], config: NextStepConfig) -> dict[str, Tensor]:
    """Tensors under a checkpoint's names as the modules have them, for the names in `wanted`."""
    state = {}
    for name in wanted:
        parts = parts_of(name, config)
        state[name] = torch.cat([tensors[part] for part in parts]) if parts else tensors[name]
    return state


def deepened(tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """A checkpoint's tensors with so many layers. Those added are spread over the depth, each a copy of the one before
    it that adds nothing yet, so what the network computes is unchanged (Chen et al., arXiv 1511.05641)."""
    there = 1 + max(int(match[1]) for match in map(LAYER.fullmatch, tensors) if match)
    # of 5 layers that become 7: 0, 1, 1 again, 2, 3, 3 again, 4
    taken = sorted([*range(there), *(there * (2 * i + 1) // (2 * (layers - there)) for i in range(layers - there))])
    grown = {name: tensor for name, tensor in tensors.items() if not LAYER.fullmatch(name)}
    of_layers = [(int(match[1]), match[2], tensors[match[0]]) for match in map(LAYER.fullmatch, tensors) if match]
    for new, old in enumerate(taken):
        again = old in taken[:new]
        for number, name, tensor in of_layers:
            if number == old:
                added = again and name in ADDS_TO_THE_STREAM
                grown[f"layers.{new}.{name}"] = torch.zeros_like(tensor) if added else tensor
    return grown


def main() -> None:
    """Parse the command line and copy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("train_tiny_runs"), help="where states and weights go")
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED, help="a folder as model_training exports it")
    args = parser.parse_args()
    vae = torch.load(args.checkpoint / "vae" / "checkpoint.pt", map_location="cpu", weights_only=True)
    save_atomically({name: tensor.float() for name, tensor in vae.items()}, args.folder / "vae_joint.pt")
    (shard,) = args.checkpoint.glob("model-*.safetensors")
    layers = model_config(build_tokenizer())["num_hidden_layers"]
    tensors = {name: tensor.float() for name, tensor in load_file(shard).items()}
    save_atomically(deepened(tensors, layers), start_path(args.folder))


if __name__ == "__main__":
    main()
