"""What a user may name as a checkpoint: a path, a hub id, or the embedded "tiny"."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from ..errors import NextStepError, plainly, shown
from .files import is_folder
from .hub import check_form, reach

EMBEDDED = "tiny"
ASSETS = Path(__file__).resolve().parent.parent / "assets"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

# Only what the engine reads: no Python files, no pickle but the VAE's (which is loaded with weights_only).
HUB_FILES = ("*.json", "*.safetensors", "merges.txt", "vae/config.json", "vae/checkpoint.pt", "checkpoint.pt")


def resolve_source(source: str | Path) -> Path:
    """The local folder or file behind `source`.

    A hub id is looked up in the Hugging Face cache first and downloaded only where it is not there. NextStepError when
    it is nothing of all this or cannot be fetched.
    """
    if not isinstance(source, (str, Path)):
        raise NextStepError(
            "The checkpoint is {what}. Give a folder, a .safetensors file or a hub id.", what=shown(source)
        )
    with suppress(RuntimeError, OSError, ValueError):  # of a user who is not there, and of what can be no path
        if (path := Path(source).expanduser()).exists():
            return path.resolve()
    if str(source) == EMBEDDED and (ASSETS / EMBEDDED).is_dir():
        return ASSETS / EMBEDDED
    if not HUB_ID.fullmatch(str(source)):
        raise NextStepError(
            "{source} does not exist. Give a checkpoint folder, a .safetensors file or a hub id.",
            source=plainly(str(source)),
        )
    return _from_hub(str(source))


def _from_hub(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    check_form(hub_id)
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(HUB_FILES), local_files_only=True))
    except Exception:  # not cached (its exception type moved between versions of huggingface_hub)
        pass
    return Path(reach(hub_id, lambda: snapshot_download(hub_id, allow_patterns=list(HUB_FILES))))


def vae_beside(checkpoint: Path, stated: str | None) -> Path:
    """The VAE folder that belongs to a checkpoint: what its config states, relative to its own folder, else `vae`."""
    folder = checkpoint if is_folder(checkpoint) else checkpoint.parent
    try:
        wanted = (folder / (stated or "vae")).resolve()
        inside = wanted.is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a circle of links, or what can be no name
        inside = False
    if inside and is_folder(wanted):
        return wanted
    raise NextStepError(
        "{folder} holds no VAE ({stated}). Put the checkpoint's vae folder there, or name a VAE: the "
        "published one is stepfun-ai/NextStep-1-f8ch16-Tokenizer.",
        folder=folder,
        stated=shown(stated or "vae"),
    )
