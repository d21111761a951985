"""Settings against each other: several values in one widget, one picture of each, and one sheet of all."""

from __future__ import annotations

from itertools import product
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..nextstep_core.errors import NextStepError, check_choice, check_text, shown
from ..nextstep_core.images.contact_sheet import contact_sheet
from ..nextstep_core.images.rgb import to_rgb
from ..nextstep_core.ranges import Range
from ..nextstep_core.runtime.lora import STRENGTH
from ..nextstep_core.sampling.settings import GenerationSettings
from ..nextstep_core.sampling.solvers import SAMPLERS
from ..nextstep_core.sentences import Sentence, named
from . import host
from .language import Node
from .loaders import STORED
from .types import CATEGORY
from .widgets import AUTO, ends, with_widgets

MOST_PICTURES = 64
COLUMNS = Range("columns", 1, MOST_PICTURES)
MOST_LETTERS = 200  # of a label; so many do not fit under a picture, and are seen as an oversight
ChoiceSocket = io.Custom("COMBO")  # the host's own names its choices as its type in some versions
# What a value is, from the setting that changes from column to column to the one that changes least.
KINDS: dict[str, type] = {
    "cfg": float,
    "steps": int,
    "shift": float,
    "sampler": str,
    "quantization": str,
    "strength": float,
}
LOADED = ("quantization", STRENGTH.name)  # are no settings of the sampler
WORDS = {int: Sentence("whole numbers"), float: Sentence("numbers"), str: Sentence("names")}
DEFAULTS = {"cfg": "5, 7.5", "steps": "28", "shift": "1", "sampler": AUTO, "quantization": AUTO, "strength": "1"}


def values_of(name: str, text: str) -> list[Any]:
    """The values that a widget lists, with commas between them; NextStepError for what is none."""
    kind, values = KINDS[name], []
    for word in (part.strip() for part in check_text(name, text).split(",")):
        try:
            values.append(kind(word) if word else None)
        except ValueError:
            values.append(None)
        if values[-1] is None:
            what = WORDS[kind]
            raise NextStepError(
                "{name} lists {word}; write {what}, separated by commas.", name=named(name), word=shown(word), what=what
            )
    return values


def combinations(texts: dict[str, str]) -> list[dict[str, Any]]:
    """Every combination of the listed values, in the order of reading; NextStepError for one that cannot be drawn."""
    lists = {name: values_of(name, texts[name]) for name in KINDS}
    most = 1
    for values in lists.values():
        most *= len(values)
    if most > MOST_PICTURES:
        raise NextStepError(
            "These values make {count:,} pictures; at most {most} are compared at once.", count=most, most=MOST_PICTURES
        )
    rows = product(*(lists[name] for name in reversed(KINDS)))
    found = [dict(zip(reversed(KINDS), row)) for row in rows]
    for settings in found:
        check_choice("quantization", settings["quantization"], STORED)
        check_choice("sampler", settings["sampler"], (AUTO, *SAMPLERS))
        STRENGTH.check(settings["strength"])
        with_widgets(GenerationSettings(sampler="flow-ode"), **{k: v for k, v in settings.items() if k not in LOADED})
    return found


def in_short(value: Any) -> str:
    """A value as a label shows it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


class NextStepCompare(Node):
    """Lists of settings, for a sampler that runs once for each."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepCompare",
            display_name="NextStep Compare",
            category=CATEGORY,
            description="Settings to compare: several values, separated by commas, in one widget or in several. "
            "The sampler draws a picture of every combination; NextStep Labelled Grid puts them side by side.",
            search_aliases=["nextstep", "compare", "xy plot", "grid", "sweep"],
            inputs=[
                io.String.Input("cfg", default=DEFAULTS["cfg"], tooltip="Guidance, such as: 5, 7.5, 10."),
                io.String.Input("steps", default=DEFAULTS["steps"], tooltip="Flow steps per token, such as: 12, 28."),
                io.String.Input("shift", default=DEFAULTS["shift"], tooltip="Timestep shift, such as: 1, 3.2."),
                io.String.Input(
                    "sampler", default=DEFAULTS["sampler"], tooltip="Names of samplers, such as: auto, flow-ode."
                ),
                io.String.Input(
                    "quantization",
                    default=DEFAULTS["quantization"],
                    tooltip="Weight formats, such as: int8, int4. Every one is loaded, and all of them are "
                    "kept in memory.",
                ),
                io.String.Input(
                    "strength",
                    default=DEFAULTS["strength"],
                    optional=True,
                    tooltip="Strengths of a LoRA, such as: 0, 0.5, 1.",
                ),
            ],
            outputs=[
                io.Float.Output("each_cfg", display_name="cfg", is_output_list=True, tooltip="For the sampler."),
                io.Int.Output("each_steps", display_name="steps", is_output_list=True, tooltip="For the sampler."),
                io.Float.Output("each_shift", display_name="shift", is_output_list=True, tooltip="For the sampler."),
                ChoiceSocket.Output(
                    "each_sampler", display_name="sampler", is_output_list=True, tooltip="For the sampler."
                ),
                ChoiceSocket.Output(
                    "each_quantization",
                    display_name="quantization",
                    is_output_list=True,
                    tooltip="For Load NextStep Model; may stay unconnected if there is only one.",
                ),
                io.String.Output("labels", display_name="labels", is_output_list=True, tooltip="What differs."),
                io.Int.Output("columns", display_name="columns", tooltip="Pictures in a row of the grid."),
                io.Float.Output(
                    "each_strength", display_name="strength", is_output_list=True, tooltip="For NextStep Load LoRA."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, **texts: str | None) -> bool | str:
        """NextStepError for what is wrong; a widget that is linked is not known yet."""
        combinations(DEFAULTS | {name: text for name, text in texts.items() if text is not None})
        return True

    @classmethod
    def execute(cls, **texts: str) -> io.NodeOutput:
        found = combinations(DEFAULTS | texts)
        differ = [name for name in KINDS if len({settings[name] for settings in found}) > 1]
        labels = [", ".join(f"{name} {in_short(settings[name])}" for name in differ) for settings in found]
        columns = len({settings[differ[0]] for settings in found}) if differ else 1
        *each, strengths = ([settings[name] for settings in found] for name in KINDS)
        return io.NodeOutput(*each, labels, columns, strengths)


class NextStepLabelledGrid(Node):
    """Pictures in rows, with what they are written under them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepLabelledGrid",
            display_name="NextStep Labelled Grid",
            category=CATEGORY,
            description="Puts all pictures of a list or a batch into one grid, each with its label below.",
            search_aliases=["nextstep", "grid", "contact sheet", "compare", "label"],
            is_input_list=True,
            inputs=[
                io.Image.Input("image", tooltip="The pictures: a list, a batch, or both."),
                io.Int.Input("columns", default=2, **ends(COLUMNS), tooltip="Pictures in a row."),
                io.String.Input(
                    "labels",
                    force_input=True,
                    optional=True,
                    tooltip="One for each picture of the list, in the same order.",
                ),
            ],
            outputs=[io.Image.Output("grid", display_name="image", tooltip="The grid, as one picture.")],
        )

    @classmethod
    def execute(cls, image: list[Tensor], columns: list[int], labels: list[str] | None = None) -> io.NodeOutput:
        batches = [to_rgb(batch) for batch in image]
        texts = [check_text(Sentence("A label"), label)[:MOST_LETTERS] for label in labels or []] + [""] * len(batches)
        named = [(picture, text) for batch, text in zip(batches, texts) for picture in batch]
        with host.memory_told(
            Sentence("The grid"), advice=Sentence("Choose smaller or fewer pictures, or close other programs.")
        ):
            return io.NodeOutput(contact_sheet(*zip(*named), COLUMNS.check(columns[0])))
