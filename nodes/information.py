"""What a loaded checkpoint is for, and what it takes on this machine."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io

from ..nextstep_core.loading.published import purpose_of
from ..nextstep_core.request.layout import Caption
from ..nextstep_core.request.parameters import lora_facts
from ..nextstep_core.runtime.memory import format_bytes
from ..nextstep_core.sentences import Sentence
from . import host
from .language import Node
from .types import CATEGORY, HostModel, ModelSocket, check_sockets
from .widgets import check_sides, side_inputs

PURPOSES = {"editing": "for editing pictures", "text to image": "for pictures from text", None: "for text and editing"}
TYPICAL = "A photograph of a lighthouse on a rocky coast at dusk, waves below, warm light in the lantern room."


def unsuited(model: HostModel, editing: bool) -> Sentence | None:
    """A sentence for a run that a checkpoint was not published for; None where it was, or where nobody knows."""
    name = model.facts["model"]
    if editing and purpose_of(name) == "text to image":
        return Sentence("{model} was not trained to edit: choose NextStep-1-Large-Edit for that.", model=name)
    if not editing and purpose_of(name) == "editing":
        return Sentence("{model} is for editing: NextStep-1.1 draws better from text alone.", model=name)
    return None


def described(model: HostModel, width: int, height: int) -> str:
    """Kind, family, weights, memory and time of a picture of this size, a line each."""
    engine, facts = model.engine, model.facts
    grid = engine.grid(height, width)
    settings = replace(engine.recommended(), cfg=max(engine.recommended().cfg, 2.0))  # guidance makes two rows
    job = engine.make_job([Caption(TYPICAL)], grid, settings, seed=0)
    each, tokens = engine.working_bytes(job, model.dtype), grid[0] * grid[1]
    family = "1.1" if engine.published.is_1_1 else "1"
    weights, free = model.patcher.model_size(), host.free_memory(model.patcher)
    beside = each + engine.lora_bytes(model.dtype)
    fits = "all of it fits" if weights + beside <= free else "weights are streamed, which is slower"
    if model.seconds_per_token is None:
        pace = "time: draw a picture once, then it is told here"
    else:
        pace = f"time: about {model.seconds_per_token * tokens:.1f} s, at the rate of the last run"
    return "\n".join(
        [
            f"{facts['model']}: NextStep-{family}, {PURPOSES[purpose_of(facts['model'])]}",
            f"weights: {format_bytes(weights)} as {facts['weights']}, hash {facts['hash']}",
            f"a picture of {width}x{height}: {tokens:,} tokens, {format_bytes(beside)} beside the weights",
            *(f"{name}: {value}" for name, value in lora_facts(engine.loras).items()),
            f"memory: {format_bytes(free)} free for it on {model.patcher.load_device}; {fits}",
            pace,
        ]
    )


class NextStepModelInfo(Node):
    """A checkpoint's card."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepModelInfo",
            display_name="NextStep Model Info",
            category=CATEGORY,
            description="What a checkpoint is for, how its weights are stored, what it needs against what is free, and "
            "how long a picture of this size takes.",
            search_aliases=["nextstep", "info", "memory", "model card"],
            is_output_node=True,
            inputs=[ModelSocket.Input("model", tooltip="From Load NextStep Model."), *side_inputs()],
            outputs=[io.String.Output("text", display_name="text", tooltip="What the node shows.")],
        )

    @classmethod
    def validate_inputs(cls, width: int | None = None, height: int | None = None) -> bool | str:
        check_sides(width, height)
        return True

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> int:
        return time.time_ns()  # what is free changes all the time; not NaN, which is no JSON in saved pictures

    @classmethod
    def execute(cls, model: HostModel, width: int, height: int) -> io.NodeOutput:
        check_sockets(model=model)
        with torch.inference_mode():
            text = described(model, width, height)
        host.show_text(text)
        return io.NodeOutput(text, ui={"text": [text]})
