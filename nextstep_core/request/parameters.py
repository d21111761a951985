"""What a picture was made with, as the one line of text that image browsers and model sites read.

The form is the one that AUTOMATIC1111's web UI writes and that most readers know: the prompt, a line with the negative
prompt, and a last line of `Name: value` pairs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from ..runtime.lora import Stack
from ..sampling.falling import CONSTANT
from ..sampling.settings import OFF, GenerationSettings

PRODUCT = "ComfyUI-NextStep"
LORAS, LORA_HASHES = "LoRAs", "Lora hashes"
NO_NAME = re.compile('[<>:,"]')  # what would end a name where it is read


def parameters_text(
    prompt: str,
    negative_prompt: str,
    settings: GenerationSettings,
    *,
    seed: int,
    size: tuple[int, int],
    facts: Mapping[str, str],
) -> str:
    """The text for one picture of `size` (width, height) in pixels; `facts` are added as they are, such as the model.
    LoRAs are told as `lora_facts` says.

    The prompt comes first, so that a line of it that begins like the second part is taken for it by readers; lines are
    joined to avoid that.
    """
    pairs = {
        "Steps": settings.steps,
        "Sampler": settings.sampler,
        "CFG scale": f"{settings.cfg:g}",
        "Seed": seed,
        "Size": f"{size[0]}x{size[1]}",
        "Image CFG scale": f"{settings.cfg_img:g}" if settings.cfg_img != 1 else "",
        "CFG schedule": settings.cfg_schedule if settings.cfg_schedule != "constant" else "",
        "Timestep shift": f"{settings.shift:g}",
        "Normalized tokens": "yes" if settings.use_norm else "",
        "Steps schedule": settings.steps_schedule if settings.steps_schedule != CONSTANT else "",
        "Lookahead": settings.lookahead if settings.lookahead != OFF else "",
        **facts,
    }
    lines = [_one_line(f"{prompt} {pairs.pop(LORAS, '')}")]
    if negative_prompt:
        lines.append(f"Negative prompt: {_one_line(negative_prompt)}")
    return "\n".join([*lines, ", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items() if value != "")])


def lora_facts(loras: Stack) -> dict[str, str]:
    """What a picture tells of the LoRAs that it was drawn with; nothing without any.

    The names and strengths stand behind the prompt, as they do where they are written into it, and the sums by which
    sites find the files among the other values.
    """
    parts = [(NO_NAME.sub("_", lora.name), strength, lora.digest) for lora, strength in loras.active.parts]
    if not parts:
        return {}
    tags = " ".join(f"<lora:{name}:{strength:g}>" for name, strength, _ in parts)
    return {LORAS: tags, LORA_HASHES: ", ".join(f"{name}: {digest}" for name, _, digest in parts)}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _quoted(value: object) -> str:
    text = _one_line(str(value))
    return json.dumps(text, ensure_ascii=False) if any(sign in text for sign in ',:"') else text
