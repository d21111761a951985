"""Prompt nodes: text to what the sampler's branches read."""

from __future__ import annotations

from comfy_api.latest import io

from ..nextstep_core.prompt import Caption
from .host import schema
from .types import CATEGORY, HostModel, ModelSocket, PromptSocket, PromptValue


def encode_prompt(model: HostModel, prompt: str, positive_suffix: str = "") -> PromptValue:
    """A prompt for the sampler; NextStepError when it has image slots, or is too long for the model by itself."""
    text = f"{prompt} {positive_suffix}" if positive_suffix else prompt
    Caption(text)
    model.engine.check_prompt(text)
    return PromptValue(text)


class NextStepTextEncode(io.ComfyNode):
    """Prompt text for the sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
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
        return io.NodeOutput(encode_prompt(model, prompt, positive_suffix))
