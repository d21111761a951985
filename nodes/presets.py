"""Presets: one name in place of many widgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..nextstep_core.loading.catalog import fingerprint
from ..nextstep_core.request.presets import Preset, find_preset, preset_names
from ..nextstep_core.sampling.settings import GenerationSettings
from . import host
from .language import Node
from .types import CATEGORY, HostModel, ModelSocket, check_sockets

FILE = "nextstep_presets.json"
OFF = "off"
WRITTEN = f"Presets of your own: {FILE} in ComfyUI's user folder."


def preset_file() -> Path:
    """Where a user's presets are."""
    return host.user_folder() / FILE


def preset_input() -> io.Input:
    """The widget of nodes that draw in one step."""
    return io.Combo.Input(
        "preset",
        options=[OFF, *preset_names(preset_file())],
        default=OFF,
        optional=True,
        tooltip="In place of size, steps, cfg, cfg_img and shift, and of the negative prompt if that is empty. "
        + WRITTEN,
    )


def resolved(model: HostModel, name: str) -> tuple[Preset, GenerationSettings]:
    """The preset of this name and what it comes to with a checkpoint, which the node shows."""
    preset = find_preset(name, preset_file())
    chosen = preset.over(model.engine.recommended(preset.editing))
    host.show_text(in_words(preset, chosen))
    return preset, chosen


def applied(
    model: HostModel, name: str, width: int, height: int, negative_prompt: str, settings: dict[str, Any]
) -> tuple[int, int, str, dict[str, Any], str]:
    """(width, height, negative prompt, settings) of a node's widgets under the preset that it names, and in words what
    it put in their place."""
    if name == OFF:
        return width, height, negative_prompt, settings, ""
    preset, chosen = resolved(model, name)
    numbers = {"steps": chosen.steps, "cfg": chosen.cfg, "shift": chosen.shift}
    if "cfg_img" in settings:
        numbers["cfg_img"] = chosen.cfg_img
    negative_prompt = negative_prompt or preset.negative_prompt
    return preset.width, preset.height, negative_prompt, settings | numbers, in_words(preset, chosen)


def in_words(preset: Preset, chosen: GenerationSettings) -> str:
    """What a preset comes to, for the node."""
    guidance = f"cfg {chosen.cfg:g}" + (f", cfg_img {chosen.cfg_img:g}" if chosen.cfg_img != 1 else "")
    line = f"{preset.width}x{preset.height}, {chosen.steps} steps, {guidance}, shift {chosen.shift:g}"
    return "\n".join(part for part in (line, preset.note) if part)


class NextStepPreset(Node):
    """Size and settings by a name, for the widgets of other nodes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepPreset",
            display_name="NextStep Preset",
            category=CATEGORY,
            description="Size, settings and negative prompt under one name, to be linked into the widgets of NextStep "
            "Empty Latent, NextStep Sampler and NextStep Encode Prompt.",
            search_aliases=["nextstep", "preset", "quality", "settings"],
            inputs=[
                ModelSocket.Input(
                    "model", tooltip="From Load NextStep Model: published and edit are its own settings."
                ),
                io.Combo.Input(
                    "preset",
                    options=preset_names(preset_file()),
                    default="standard",
                    tooltip="draft: 512x512, fast. standard: 768x768. premium: 1024x1024, slow, and larger than what "
                    "was trained. published, edit: as the authors of the checkpoint run it. " + WRITTEN,
                ),
            ],
            outputs=[
                io.Int.Output("width", display_name="width", tooltip="In pixels."),
                io.Int.Output("height", display_name="height", tooltip="In pixels."),
                io.Int.Output("steps", display_name="steps", tooltip="For the sampler."),
                io.Float.Output("cfg", display_name="cfg", tooltip="For the sampler."),
                io.Float.Output("cfg_img", display_name="cfg_img", tooltip="For the sampler, to edit."),
                io.Float.Output("shift", display_name="shift", tooltip="For the sampler."),
                io.String.Output("negative_prompt", display_name="negative prompt", tooltip="What to avoid."),
            ],
        )

    @classmethod
    def validate_inputs(cls, preset: str | None = None) -> bool | str:
        if preset is not None:  # as it is while it is linked
            find_preset(preset, preset_file())
        return True

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        return fingerprint(preset_file())

    @classmethod
    def execute(cls, model: HostModel, preset: str) -> io.NodeOutput:
        check_sockets(model=model)
        found, chosen = resolved(model, preset)
        return io.NodeOutput(
            found.width, found.height, chosen.steps, chosen.cfg, chosen.cfg_img, chosen.shift, found.negative_prompt
        )
