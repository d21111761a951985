"""Many prompts: from lines or a file, and from templates."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..nextstep_core.errors import NextStepError, check_choice, check_text
from ..nextstep_core.studio.prompts import COMBINE, KINDS, Prompt, expand, parse_lines, parse_lists, read_prompts
from . import host
from .language import Node
from .types import CATEGORY

BELOW = "the text below"


class NextStepPromptList(Node):
    """Lines or a file to a list of prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepPromptList",
            display_name="NextStep Prompt List",
            category=CATEGORY,
            description="Many prompts: what it is linked to runs once for each, in their order.",
            search_aliases=["nextstep", "prompt list", "prompts from file", "csv", "lines"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[BELOW, *host.input_files(*KINDS)],
                    default=BELOW,
                    tooltip="The text below, or a file in ComfyUI's input folder: .txt with one prompt per line, "
                    '.csv with a column prompt, or .json with {"prompts": [...]}.',
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="a red circle on a white background\na blue square on a yellow background",
                    tooltip="One prompt per line. Lines that begin with # are left out.",
                ),
            ],
            outputs=[
                io.String.Output("prompt", display_name="prompt", is_output_list=True, tooltip="One after another."),
                io.String.Output(
                    "negative_prompt",
                    display_name="negative prompt",
                    is_output_list=True,
                    tooltip="What the file says to avoid, for each prompt; empty where it says nothing.",
                ),
                io.Int.Output("count", display_name="count", tooltip="How many there are."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str = BELOW, **texts: Any) -> Any:
        return _changed(file)

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        """True; a file that is gone is told when the node runs, by a sentence of ours."""
        return True

    @classmethod
    def execute(cls, prompts: str, file: str) -> io.NodeOutput:
        found = prompts_of(prompts, file)
        host.show_text(f"{len(found)} prompts")
        return io.NodeOutput([p.text for p in found], [p.negative_prompt or "" for p in found], len(found))


def prompts_of(text: str, file: str) -> list[Prompt]:
    """The prompts of a node's file, or of its text."""
    if file != BELOW:
        return read_prompts(host.input_file(file))
    return parse_lines(check_text("prompts", text), "prompts")


def _changed(file: str) -> float:
    """When a file of the input folder was changed; 0 for none."""
    try:
        return 0.0 if file == BELOW else host.input_file(file).stat().st_mtime
    except (OSError, NextStepError):
        return 0.0


class NextStepPromptTemplate(Node):
    """A template and lists to prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepPromptTemplate",
            display_name="NextStep Prompt Template",
            category=CATEGORY,
            description="Prompts from a template: every {name} in it stands for the values of the list of that name.",
            search_aliases=["nextstep", "template", "wildcards", "combinations", "prompt matrix"],
            inputs=[
                io.String.Input(
                    "template",
                    multiline=True,
                    default="a {color} {shape} on a white background",
                    tooltip="One template per line, with names in braces.",
                ),
                io.String.Input(
                    "lists",
                    multiline=True,
                    default="color: red | blue\nshape: circle | square",
                    tooltip="One list per line: its name, a colon, and its values with | between them.",
                ),
                io.Combo.Input(
                    "combine",
                    options=list(COMBINE),
                    default=COMBINE[0],
                    tooltip="grid: every value with every other. zip: the first of each list, then the second.",
                ),
            ],
            outputs=[
                io.String.Output("prompt", display_name="prompt", is_output_list=True, tooltip="One after another."),
                io.Int.Output("count", display_name="count", tooltip="How many there are."),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, template: str | None = None, lists: str | None = None, combine: str | None = None
    ) -> bool | str:
        """True; NextStepError for what is wrong. What is linked is not known yet."""
        if template is not None and lists is not None and combine is not None:
            expanded(template, lists, combine)
        return True

    @classmethod
    def execute(cls, template: str, lists: str, combine: str) -> io.NodeOutput:
        found = expanded(template, lists, combine)
        host.show_text(f"{len(found)} prompts")
        return io.NodeOutput(found, len(found))


def expanded(template: str, lists: str, combine: str) -> list[str]:
    """The prompts of a template's lines; NextStepError for what does not fit."""
    check_choice("combine", combine, COMBINE)
    lines = [prompt.text for prompt in parse_lines(check_text("template", template), "template")]
    return expand(lines, parse_lists(check_text("lists", lists), combine), "template")
