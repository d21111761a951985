"""What is said to the user, in the language that ComfyUI shows: here errors leave the nodes.

`locales/LANGUAGE/sentences.json` has the sentences by their English, and `nodeDefs.json` beside it, which ComfyUI reads
too, the labels of inputs.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..nextstep_core.errors import NextStepError, OutOfMemory
from ..nextstep_core.sentences import Sentence
from . import host

LOCALES = Path(__file__).resolve().parent.parent / "locales"
SENTENCES, NODES = "sentences.json", "nodeDefs.json"


@cache
def catalogue(language: str) -> dict[str, str]:
    """Sentences and names of inputs in a language, by their English; empty for one that this pack does not speak.

    A language of a region, such as zh-TW, is taken for the language itself, as the frontend does it for labels.
    """
    own = {path.parent.name: path for path in LOCALES.glob(f"*/{SENTENCES}")}
    found = own.get(language, own.get(language.split("-")[0]))
    if found is None:
        return {}
    nodes = _read(found.with_name(NODES)).values()
    labels = {name: told["name"] for node in nodes for name, told in node["inputs"].items()}
    return labels | _read(found)


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # half an update; what went wrong before is told all the same, in English
        return {}


def in_users_language(sentence: Sentence) -> str:
    """A sentence as the user reads it; in English where the language is not known, or not ours."""
    known = catalogue(host.user_language())
    return sentence.said(lambda template: known.get(template, template))


class Node(io.ComfyNode):
    """What all nodes of this pack are: their NextStepErrors reach the host in the user's language.

    `execute` raises them. `validate_inputs` may raise them too, and answers the host with what they say.
    """

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        for name, spoken in (("execute", _raising), ("validate_inputs", _answering)):
            own = cls.__dict__.get(name)
            if isinstance(own, classmethod) and not hasattr(own.__func__, "__wrapped__"):  # the host copies classes
                setattr(cls, name, classmethod(spoken(own.__func__)))


def _raising(call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **inputs: Any) -> Any:
        try:
            return call(*arguments, **inputs)
        except NextStepError as error:
            said = in_users_language(error.sentence)
            # What kinds there are inside means nothing to who reads the host's message.
            kind = OutOfMemory if isinstance(error, OutOfMemory) else NextStepError
            if said == str(error) and type(error) is kind:
                raise
            raise kind.of(Sentence("{said}", said=said)) from error  # the log has both

    return _like(call, run)


def _answering(call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **inputs: Any) -> Any:
        try:
            return call(*arguments, **inputs)
        except NextStepError as error:
            return in_users_language(error.sentence)

    return _like(call, run)


def _like(call: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` under the name of `call` and with its arguments, which the host looks at, without looking into it."""
    run = wraps(call)(run)
    setattr(run, "__signature__", inspect.signature(call))  # noqa: B010
    return run
