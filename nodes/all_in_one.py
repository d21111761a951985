"""One box for those who want one: the same functions as the separate nodes, in a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..nextstep_core.sampling.settings import SEED, GenerationSettings
from ..nextstep_core.sentences import Sentence
from . import host
from .latents import check_channels, decode_latent, empty_latent
from .presets import OFF, applied, preset_input
from .prompts import encode_edit, encode_prompt
from .sampler import sample, settings_for
from .saving import INFO_OUTPUT, info_of
from .types import CATEGORY, HostModel, ModelSocket, PromptValue, check_sockets
from .widgets import (
    DrawingNode,
    canvas_inputs,
    cfg_img_input,
    lookahead_input,
    setting_inputs,
    size_inputs,
    steps_schedule_input,
)

EDIT_NEGATIVE = "Copy original image."


@dataclass(frozen=True)
class Drawing:
    """What such a box needs beside the prompt, checked before any picture is encoded or drawn."""

    model: HostModel
    vae: Any
    negative: PromptValue
    seed: int
    settings: GenerationSettings

    @classmethod
    def checked(
        cls, model: HostModel, vae: Any, negative_prompt: str, seed: int, editing: bool, settings: dict[str, Any]
    ) -> Drawing:
        """NextStepError for the first of a box's inputs that cannot be used."""
        check_sockets(model=model, vae=vae)
        check_channels(vae, model.engine.latents)
        negative, chosen = encode_prompt(model, negative_prompt), settings_for(model, editing, **settings)
        return cls(model, vae, negative, SEED.check(seed), chosen)

    def draw(self, positive: PromptValue, latent: dict[str, Any], preset: str) -> io.NodeOutput:
        """Sample and decode; (image, latent, info). `preset` says what one put in the place of widgets, which still
        show their own."""
        with torch.inference_mode(), host.memory_told(Sentence("Drawing")):
            samples = sample(self.model, positive, self.negative, latent, self.seed, self.settings, remark=preset)
        info = info_of(self.model, positive, self.negative, self.settings, self.seed, samples)
        return io.NodeOutput(decode_latent(self.vae, samples), samples, info)


def _outputs() -> list[io.Output]:
    return [
        io.Image.Output("picture", display_name="image", tooltip="The picture."),
        io.Latent.Output("samples", display_name="latent", tooltip="The picture before the VAE decoded it."),
        INFO_OUTPUT,
    ]


class NextStepTextToImage(DrawingNode):
    """Prompt to picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepTextToImage",
            display_name="NextStep Text to Image",
            category=CATEGORY,
            description="Prompt to picture in one node: encode, sample and decode.",
            search_aliases=["nextstep", "stepfun", "text to image", "generate", "autoregressive"],
            inputs=[
                ModelSocket.Input("model", tooltip="From Load NextStep Model."),
                io.Vae.Input("vae", tooltip="The checkpoint's VAE."),
                io.String.Input("prompt", multiline=True, default="", tooltip="What to draw, in plain sentences."),
                io.String.Input("negative_prompt", multiline=True, default="", tooltip="What to avoid."),
                *canvas_inputs(),
                *setting_inputs(steps=28, shift=1.0),
                preset_input(),
                lookahead_input(),
                steps_schedule_input(),
            ],
            outputs=_outputs(),
            hidden=[io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls,
        model: HostModel,
        vae: Any,
        prompt: str,
        negative_prompt: str,
        width: int,
        height: int,
        batch_size: int,
        seed: int,
        preset: str = OFF,
        **settings: Any,
    ) -> io.NodeOutput:
        check_sockets(model=model)
        width, height, negative_prompt, settings, told = applied(
            model, preset, width, height, negative_prompt, settings
        )
        drawing = Drawing.checked(model, vae, negative_prompt, seed, False, settings)
        host.note_in_picture(cls, model.facts)
        return drawing.draw(encode_prompt(model, prompt), empty_latent(width, height, batch_size), told)


class NextStepImageEdit(DrawingNode):
    """Picture and instruction to edited picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepImageEdit",
            display_name="NextStep Image Edit",
            category=CATEGORY,
            description="Picture and instruction to edited picture in one node: encode, sample and decode.",
            search_aliases=["nextstep", "stepfun", "edit", "image to image", "instruction", "autoregressive"],
            inputs=[
                ModelSocket.Input("model", tooltip="From Load NextStep Model (NextStep-1-Large-Edit)."),
                io.Vae.Input("vae", tooltip="The checkpoint's VAE."),
                io.Image.Input("image", tooltip="The picture. Each picture of a batch is edited separately."),
                io.String.Input(
                    "instruction",
                    multiline=True,
                    default="Make it snow.",
                    tooltip="What to change. The picture is put in front, unless <image> says where it belongs.",
                ),
                io.String.Input("negative_prompt", multiline=True, default=EDIT_NEGATIVE, tooltip="What to avoid."),
                *size_inputs(),
                *setting_inputs(steps=50, shift=3.2),
                cfg_img_input(),
                preset_input(),
                lookahead_input(),
                steps_schedule_input(),
            ],
            outputs=_outputs(),
            hidden=[io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls,
        model: HostModel,
        vae: Any,
        image: Tensor,
        instruction: str,
        negative_prompt: str,
        size: str,
        width: int,
        height: int,
        seed: int,
        preset: str = OFF,
        **settings: Any,
    ) -> io.NodeOutput:
        check_sockets(model=model)
        width, height, negative_prompt, settings, told = applied(
            model, preset, width, height, negative_prompt, settings
        )
        drawing = Drawing.checked(model, vae, negative_prompt, seed, True, settings)
        host.note_in_picture(cls, model.facts)
        return drawing.draw(*encode_edit(model, vae, image, instruction, size, width, height), told)
