"""What a picture was made with, as the one line of text that image browsers and model sites read.

The form is the one that AUTOMATIC1111's web UI writes and that most readers know: the prompt, a line with the negative
prompt, and a last line of `Name: value` pairs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from ..sampling.settings import OFF, GenerationSettings

PRODUCT = "ComfyUI-NextStep"


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
        "Lookahead": settings.lookahead if settings.lookahead != OFF else "",
        **facts,
    }
    lines = [_one_line(prompt)]
    if negative_prompt:
        lines.append(f"Negative prompt: {_one_line(negative_prompt)}")
    return "\n".join([*lines, ", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items() if value != "")])


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _quoted(value: object) -> str:
    text = _one_line(str(value))
    return json.dumps(text, ensure_ascii=False) if any(sign in text for sign in ',:"') else text
