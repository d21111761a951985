"""The shipped workflows, and API prompts made from them as the frontend would."""

from __future__ import annotations

import json
from pathlib import Path

from comfy_cli.workflow_to_api import convert_ui_to_api

FOLDER = Path(__file__).resolve().parent.parent / "example_workflows"
ALL = sorted(FOLDER.glob("*.json"))
FIRST_RUN = FOLDER / "NextStep First Run.json"
TEXT_TO_IMAGE = FOLDER / "NextStep Text to Image.json"
WITH_EMBEDDED = (FIRST_RUN, FOLDER / "NextStep LoRA.json")  # what their loader names
EMBEDDED = "tiny (embedded)"  # in the loader's dropdown
ON_EMBEDDED = {"model_name": EMBEDDED}


def read_workflow(path: Path) -> dict:
    return json.loads(path.read_text())


def short_job(path: Path) -> dict[str, str]:
    """Widgets that make a template of a whole job a short one; none for the others, whose `size` is another choice."""
    return {"size": "64", "preset": "draft", "seeds": "1"} if "NextStepBatchStudio" in path.read_text() else {}


def to_prompt(workflow: dict, object_info: dict, **widgets: object) -> dict:
    """The API prompt of a UI workflow; `widgets` replaces every input of that name that is not a link."""
    prompt = convert_ui_to_api(workflow, object_info)
    for node in prompt.values():
        for name, value in widgets.items():
            if name in node["inputs"] and not isinstance(node["inputs"][name], list):
                node["inputs"][name] = value
    return prompt
