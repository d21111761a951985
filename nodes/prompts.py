"""Prompt nodes: text, and pictures to edit, to what the sampler's branches read."""

from __future__ import annotations

import re
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..nextstep_core.errors import NextStepError, check_choice, check_text
from ..nextstep_core.images.latents import LatentSpace
from ..nextstep_core.images.rgb import cover, to_rgb
from ..nextstep_core.request.layout import IMAGE_SLOT, Caption, EncodedImage
from ..nextstep_core.request.sizes import check_encodable, nearest_ratio, ratio_size_of_area
from . import host
from .language import Node
from .latents import empty_latent, encode_pictures
from .types import CATEGORY, HostModel, ModelSocket, PromptSocket, PromptValue, check_sockets
from .widgets import FIT, KEEP_SIZE, NEAREST, SIZES, size_inputs


def encode_prompt(model: HostModel, prompt: str, positive_suffix: str = "") -> PromptValue:
    """A prompt for the sampler; NextStepError when it has image slots, or is too long for the model by itself."""
    check_text("prompt", prompt)
    suffix = check_text("positive_suffix", positive_suffix)
    caption = Caption(f"{prompt} {suffix}" if suffix else prompt)
    model.engine.check_prompt(caption.text)
    return PromptValue((caption,))


def target_size(images: Tensor, size: str, width: int, height: int, latents: LatentSpace) -> tuple[int, int]:
    """(width, height) that an input batch (B, H, W, C) is brought to, by the node's choice."""
    check_choice("size", size, SIZES)
    old_height, old_width = images.shape[1:3]
    if size == KEEP_SIZE:
        return latents.size_inside(old_width, old_height)
    latents.grid(height, width)
    if size == FIT:
        return width, height
    return ratio_size_of_area(nearest_ratio(old_width, old_height), width * height)


def with_slot(instruction: str) -> str:
    """An instruction with the picture in front unless it says where the picture belongs, in whatever case."""
    instruction = re.sub(IMAGE_SLOT, IMAGE_SLOT, check_text("instruction", instruction), flags=re.IGNORECASE)
    return instruction if IMAGE_SLOT in instruction else IMAGE_SLOT + instruction


def encode_edit(
    model: HostModel,
    vae: Any,
    image: Tensor,
    instruction: str,
    size: str = NEAREST,
    width: int = 512,
    height: int = 512,
) -> tuple[PromptValue, dict[str, Any]]:
    """(prompt, empty latent of the edited picture's size) for a batch of pictures and an instruction.

    One `<image>` slot, or none, which is one in front: every picture of the batch is edited by itself. As many slots
    as pictures: they fill the slots in order, and one picture is made from all. NextStepError for anything else.
    """
    pixels = to_rgb(image)
    instruction = with_slot(instruction)
    slots, count = instruction.count(IMAGE_SLOT), len(pixels)
    if slots not in (1, count):
        raise NextStepError(
            "The instruction has {slots} {slot} slots for {count} input image(s). Write {slot} once, where "
            "the picture belongs in the text, or once for each picture of the batch.",
            slots=slots,
            slot=IMAGE_SLOT,
            count=count,
        )
    new_width, new_height = target_size(pixels, size, width, height, model.engine.latents)
    check_encodable(new_width, new_height)
    grid = model.engine.grid(new_height, new_width)
    model.engine.check_prompt(instruction, [grid] * slots)
    canvas = empty_latent(new_width, new_height, 1 if slots > 1 else count)
    latents = encode_pictures(vae, cover(pixels, new_width, new_height), model.engine.latents)
    encoded = [EncodedImage(picture, grid) for picture in model.engine.latents.to_tokens(latents.float())]
    captions = [Caption(instruction, tuple(encoded))] if slots > 1 else [Caption(instruction, (e,)) for e in encoded]
    return PromptValue(tuple(captions)), canvas


class NextStepTextEncode(Node):
    """Prompt text for the sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepTextEncode",
            display_name="NextStep Encode Prompt",
            category=CATEGORY,
            description="Prepares a prompt for NextStep Sampler. Use a second one for the negative prompt.",
            search_aliases=["nextstep", "prompt", "text encode"],
            inputs=[
                ModelSocket.Input("model", tooltip="The model whose tokenizer reads the prompt."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    tooltip="What to draw, in plain sentences. Weights such as (word:1.2) are not a feature of this "
                    "model and are read as plain text.",
                ),
                io.String.Input(
                    "positive_suffix",
                    default="",
                    optional=True,
                    tooltip="Added after the prompt with a space, such as: masterpiece, film grained, best quality.",
                ),
            ],
            outputs=[PromptSocket.Output("encoded", display_name="prompt", tooltip="Goes to positive or negative.")],
        )

    @classmethod
    def execute(cls, model: HostModel, prompt: str, positive_suffix: str = "") -> io.NodeOutput:
        check_sockets(model=model)
        return io.NodeOutput(encode_prompt(model, prompt, positive_suffix))


class NextStepPromptBatch(Node):
    """Several prompts in one run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepPromptBatch",
            display_name="NextStep Batch Prompts",
            category=CATEGORY,
            description="Puts two prompts into one batch, so that the sampler draws their pictures together. Chain "
            "it for more. Set the latent's batch_size to the number of prompts or a multiple of it.",
            search_aliases=["nextstep", "prompt", "batch"],
            inputs=[
                PromptSocket.Input("first", tooltip="One prompt, or a batch of them."),
                PromptSocket.Input("second", tooltip="What comes after it in the batch."),
            ],
            outputs=[PromptSocket.Output("batch", display_name="prompt", tooltip="Goes to positive.")],
        )

    @classmethod
    def execute(cls, first: PromptValue, second: PromptValue) -> io.NodeOutput:
        check_sockets(first=first, second=second)
        return io.NodeOutput(PromptValue(first.captions + second.captions))


class NextStepEditEncode(Node):
    """Picture and instruction for the sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepEditEncode",
            display_name="NextStep Encode Edit Instruction",
            category=CATEGORY,
            description="Prepares a picture and what to change in it for NextStep Sampler.",
            search_aliases=["nextstep", "edit", "instruction", "image to image"],
            inputs=[
                ModelSocket.Input("model", tooltip="The model that will edit (NextStep-1-Large-Edit)."),
                io.Vae.Input("vae", tooltip="The checkpoint's VAE."),
                io.Image.Input("image", tooltip="The picture. Each picture of a batch is edited separately."),
                io.String.Input(
                    "instruction",
                    multiline=True,
                    default=f"{IMAGE_SLOT}Make it snow.",
                    tooltip="What to change. <image> stands where the picture belongs, in front if it is left out. "
                    "Several take the pictures of the batch in order and make one picture from them.",
                ),
                *size_inputs(),
            ],
            outputs=[
                PromptSocket.Output("encoded", display_name="prompt", tooltip="Goes to positive."),
                io.Latent.Output("latent", display_name="latent", tooltip="Empty, in the size of the edited picture."),
            ],
        )

    @classmethod
    def execute(
        cls, model: HostModel, vae: Any, image: Tensor, instruction: str, size: str, width: int, height: int
    ) -> io.NodeOutput:
        check_sockets(model=model, vae=vae)
        return io.NodeOutput(*encode_edit(model, vae, image, instruction, size, width, height))
