"""What the dropdowns offer: names for what lies in the model folders, and what to do where one is not there."""

from __future__ import annotations

from pathlib import Path

from ..nextstep_core.errors import NextStepError, shown
from ..nextstep_core.loading import catalog
from ..nextstep_core.loading.store import ASSETS, EMBEDDED
from . import host

EMBEDDED_LABEL = f"{EMBEDDED} (embedded)"
NOTHING_FOUND = "no model found"


def models() -> dict[str, Path]:
    """Checkpoints by the name that the dropdown shows: those in the host's folders, then those in the Hugging Face
    cache, and the embedded one last."""
    found = catalog.models(host.model_roots(), host.single_file_roots())
    found |= {f"{repo} (Hugging Face cache)": folder for repo, folder in catalog.cached_models().items()}
    if (ASSETS / EMBEDDED).is_dir():
        found[EMBEDDED_LABEL] = ASSETS / EMBEDDED
    return found


def vaes() -> dict[str, Path]:
    """VAEs by the name that the dropdown shows, the embedded one last."""
    found = catalog.vaes(host.model_roots(), host.vae_roots())
    if (ASSETS / EMBEDDED / "vae").is_dir():
        found[EMBEDDED_LABEL] = ASSETS / EMBEDDED / "vae"
    return found


def vae_of(checkpoint: Path) -> Path | None:
    """The VAE that goes with a checkpoint: its own or, where it has none, the only other one there is."""
    others = [path for name, path in vaes().items() if name != EMBEDDED_LABEL]
    return catalog.vae_of(checkpoint, others)


def fingerprint(checkpoint: Path) -> str:
    """Changes when the files of a checkpoint change, or another VAE goes with it."""
    vae_path = vae_of(checkpoint)
    return catalog.fingerprint(checkpoint) + ("" if vae_path is None else catalog.fingerprint(vae_path))


def _find(name: str, among: dict[str, Path], kind: str, ways: str) -> Path:
    if isinstance(name, str) and name in among:
        return among[name]
    folders = " or ".join(str(root) for root in host.model_roots())
    what = f"There is no NextStep {kind}"
    if name != NOTHING_FOUND:
        what = f"The NextStep {kind} {shown(name)} is not there"
    raise NextStepError(f"{what}. Three ways to get one: {ways.format(folders)}. Then press R to refresh the node.")


MODEL_WAYS = (
    "run Download NextStep Model; put a folder from Hugging Face (such as stepfun-ai/NextStep-1.1) into {}; "
    "or put a single file (such as nextstep-1.1-int8.safetensors) into models/diffusion_models"
)
VAE_WAYS = (
    "run Download NextStep Model for NextStep-1-f8ch16-Tokenizer; put that folder from Hugging Face into {}; "
    "or put a single file (nextstep-vae.safetensors) into models/vae"
)


def find_model(name: str) -> Path:
    """Path of the checkpoint that the dropdown calls `name`; NextStepError says how to get one if it is not there."""
    return _find(name, models(), "model", MODEL_WAYS)


def find_vae(name: str) -> Path:
    """Path of the VAE that the dropdown calls `name`; NextStepError says how to get one if it is not there."""
    return _find(name, vaes(), "VAE", VAE_WAYS)
