"""The LoRA node: a model and a file to the same model with the file's changes beside its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..nextstep_core.errors import NextStepError, check_text, shown
from ..nextstep_core.loading.lora_file import EMBEDDED_LORAS, find_lora, fingerprint, unused_in_words
from ..nextstep_core.request.parameters import lora_facts
from ..nextstep_core.runtime.lora import STRENGTH
from ..nextstep_core.sentences import Sentence
from . import host
from .language import Node, in_users_language
from .types import CATEGORY, HostModel, ModelSocket, check_sockets
from .widgets import ends

EMBEDDED = {f"{name} (embedded)": path for name, path in EMBEDDED_LORAS.items()}


def lora_file(name: str) -> Path | None:
    """The file of a name in the dropdown, which has the host's and then those that come with the pack; None where there
    is none."""
    return EMBEDDED.get(name) or host.lora_file(name)


def find_file(name: object) -> Path:
    """The file that a saved name means; NextStepError where there is none."""
    path = lora_file(check_text("lora_name", name))
    if path is None:
        raise NextStepError(
            "There is no LoRA {name}. Put the .safetensors file into {folder} and press R to refresh the node, or "
            "choose another one in it.",
            name=shown(name),
            folder="models/loras",
        )
    return path


def with_lora(model: HostModel, path: Path, strength: float) -> HostModel:
    """The model with a LoRA on top of those that it has; the one that was given stays as it was."""
    STRENGTH.check(strength)
    lora = find_lora(path).fitted(model.engine.config)
    if strength == 0:
        return model
    with host.memory_told(Sentence("Loading {name}", name=lora.file.name)):
        engine = model.engine.with_lora(lora, strength, host.check_interrupt)
    if lora.unused:
        host.show_text(in_users_language(unused_in_words(lora.file.name, lora.unused)))
    facts = {name: value for name, value in model.facts.items() if name in (model.plain or model).facts}
    return replace(model, engine=engine, facts=facts | lora_facts(engine.loras), plain=model.plain or model)


class NextStepLoadLora(Node):
    """A model, changed by a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepLoadLora",
            display_name="NextStep Load LoRA",
            category=CATEGORY,
            description="Changes what a model draws by a LoRA: a small file that was trained on NextStep-1. Several of "
            "these nodes in a row combine theirs. The model's weights stay as they are, in any format.",
            search_aliases=["nextstep", "lora", "style", "adapter", "peft"],
            inputs=[
                ModelSocket.Input("model", tooltip="From Load NextStep Model, or from another NextStep Load LoRA."),
                io.Combo.Input(
                    "lora_name",
                    options=[*host.lora_names(), *EMBEDDED],
                    tooltip="A .safetensors file in models/loras, as peft, diffusers or kohya's scripts write it.",
                ),
                io.Float.Input(
                    STRENGTH.name,
                    default=1.0,
                    **ends(STRENGTH),
                    step=0.01,
                    round=0.01,
                    tooltip="How strongly it changes the model. 0 is the plain model; it may be negative.",
                ),
            ],
            outputs=[ModelSocket.Output("changed", display_name="model", tooltip="The model with the LoRA.")],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None, strength: float | None = None) -> bool | str:
        """NextStepError for what is wrong, before the model is loaded; a widget that is linked is not known yet."""
        if lora_name is not None:
            find_lora(find_file(lora_name))
        if strength is not None:
            STRENGTH.check(strength)
        return True

    @classmethod
    def fingerprint_inputs(cls, lora_name: object = None, **_: Any) -> str:
        path = lora_file(lora_name) if isinstance(lora_name, str) else None
        return "" if path is None else fingerprint(path)

    @classmethod
    def execute(cls, model: HostModel, lora_name: str, strength: float) -> io.NodeOutput:
        check_sockets(model=model)
        return io.NodeOutput(with_lora(model, find_file(lora_name), strength))
