"""Begin with a checkpoint that is there instead of with nothing: its VAE, its transformer, its language head.

    python -m training.start                        # the shipped one
    python -m training.start --checkpoint FOLDER

Run it before the other steps; what it writes they take for their own results.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from nextstep_core.loading.fusion import parts_of
from nextstep_core.loading.store import ASSETS
from nextstep_core.model.config import NextStepConfig

from .progress import save_atomically

SHIPPED = ASSETS / "tiny"


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


def main() -> None:
    """Parse the command line and copy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("train_tiny_runs"), help="where states and weights go")
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED, help="a folder as model_training exports it")
    args = parser.parse_args()
    vae = torch.load(args.checkpoint / "vae" / "checkpoint.pt", map_location="cpu", weights_only=True)
    save_atomically({name: tensor.float() for name, tensor in vae.items()}, args.folder / "vae_joint.pt")
    (shard,) = args.checkpoint.glob("model-*.safetensors")
    save_atomically({name: tensor.float() for name, tensor in load_file(shard).items()}, start_path(args.folder))


if __name__ == "__main__":
    main()
