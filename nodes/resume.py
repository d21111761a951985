"""An interrupted run, taken up again where it stopped, also after ComfyUI was closed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..nextstep_core.errors import check_text, damaged
from ..nextstep_core.images.rgb import is_plain
from ..nextstep_core.loading.catalog import fingerprint
from ..nextstep_core.loading.documents import check_header
from ..nextstep_core.loading.files import check_regular
from ..nextstep_core.request.masks import undrawn_tokens
from ..nextstep_core.sentences import Sentence
from . import host
from .language import Node, in_users_language
from .sampler import PARTIAL
from .types import CATEGORY, check_sockets

NOTHING_UNFINISHED = Sentence("nothing unfinished of this size: starts a new picture")
SAMPLES = "latent_tensor"  # as the host's Save Latent names what it writes


def unfinished(filename_prefix: str) -> tuple[Path, Tensor, Tensor] | None:
    """(file, latents (B, C, h, w), (rows, columns) bool where they are undrawn) of the last latent that was saved under
    this name; None when there is none, or when it is finished. NextStepError for a file that cannot be read."""
    check_text("filename_prefix", filename_prefix)
    file = host.last_saved_latent(filename_prefix)
    if file is None:
        return None
    try:
        check_regular(file)
        check_header(file)
        with safe_open(file, framework="pt") as opened:
            samples = opened.get_tensor(SAMPLES)
    except (OSError, SafetensorError) as error:
        raise damaged(file, error) from None
    if not (is_plain(samples) and samples.is_floating_point()):
        raise damaged(file, f"{samples.dtype} values")
    undrawn = undrawn_tokens(samples)
    return (file, samples, undrawn) if undrawn.any() else None


class NextStepResume(Node):
    """A canvas, with what an interrupted run left on it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepResume",
            display_name="NextStep Resume",
            category=CATEGORY,
            description="Resumes an interrupted picture from the last latent that Save Latent wrote under this name, "
            "if it is unfinished and has the size of the canvas. Otherwise starts a new picture on the canvas. Set "
            "on_interrupt to keep in NextStep Sampler, and its seed to fixed.",
            search_aliases=["nextstep", "resume", "continue", "interrupted", "load latent"],
            inputs=[
                io.Latent.Input("latent", tooltip="The canvas that the run started with."),
                io.String.Input(
                    "filename_prefix",
                    default="NextStep/unfinished",
                    tooltip="As in the Save Latent node after the sampler.",
                ),
            ],
            outputs=[io.Latent.Output("canvas", display_name="latent", tooltip="Goes to NextStep Sampler.")],
        )

    @classmethod
    def fingerprint_inputs(cls, filename_prefix: str, **_: Any) -> str:
        found = unfinished(filename_prefix)
        return "" if found is None else fingerprint(found[0])

    @classmethod
    def execute(cls, latent: dict[str, Any], filename_prefix: str) -> io.NodeOutput:
        check_sockets(latent=latent)
        found = unfinished(filename_prefix)
        if found is None or found[1].shape != latent["samples"].shape:
            host.show_text(in_users_language(NOTHING_UNFINISHED))
            return io.NodeOutput(latent)
        _, samples, undrawn = found
        done, total = int((~undrawn).sum()), undrawn.numel()
        resumes = Sentence("resumes: {done:,} of {total:,} tokens are done", done=done, total=total)
        host.show_text(in_users_language(resumes))
        rest = undrawn.float()[None, None]
        before = latent.get("noise_mask")
        return io.NodeOutput({**latent, "samples": samples, "noise_mask": rest, PARTIAL: before})
