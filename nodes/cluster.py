"""A graph's prompts, drawn by many workers: the GPUs of this machine, or of a Ray cluster."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..nextstep_core.errors import NextStepError, check_choice, check_text
from ..nextstep_core.loading import offers, store
from ..nextstep_core.loading.checkpoint import DTYPES
from ..nextstep_core.ranges import Range
from ..nextstep_core.runtime.quantization import RECIPES
from ..nextstep_core.studio.batch import TOGETHER, BatchProgress, BatchRun
from ..nextstep_core.studio.cluster import WORKERS, Cluster, Where
from ..nextstep_core.studio.job_file import job_of_prompts
from ..nextstep_core.studio.jobs import BatchJob
from ..nextstep_core.studio.model_choice import PLAIN, ModelChoice
from ..nextstep_core.studio.prompts import Prompt, parse_lines
from ..nextstep_core.studio.report import write_report, write_sheet
from . import catalog, host
from .language import Node
from .presets import OFF, preset_file, preset_input
from .studio import BAR, wishes_of
from .types import CATEGORY
from .widgets import ends

HERE = "this machine"
ADDRESSES = "NEXTSTEP_CLUSTERS"  # Ray runs what a cluster sends back, so no workflow may name one: the user does
ON_GPUS = 0
COUNT = Range("workers", ON_GPUS, WORKERS.maximum)


class NextStepCluster(Node):
    """Prompts to pictures, elsewhere."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepCluster",
            display_name="NextStep Cluster",
            category=CATEGORY,
            description="Draws prompts on all GPUs of this machine or of a Ray cluster, and hands the pictures back. "
            "Interrupt keeps what is done; the next Run draws what is missing.",
            search_aliases=["nextstep", "cluster", "ray", "multi gpu", "distributed", "farm"],
            is_input_list=True,
            inputs=[
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="a red circle on a white background\na blue square on a yellow background",
                    tooltip="One prompt per line, or a list from NextStep Prompt List.",
                ),
                io.Combo.Input(
                    "model_name",
                    options=list(catalog.models()) or [catalog.NOTHING_FOUND],
                    tooltip="The checkpoint. Every worker needs it under the same path, or in its Hugging Face cache.",
                ),
                io.Combo.Input(
                    "cluster",
                    options=[HERE, *addresses()],
                    default=HERE,
                    tooltip=f"This machine, or an address of a Ray cluster that the variable {ADDRESSES} names.",
                ),
                io.Int.Input(
                    COUNT.name,
                    default=ON_GPUS,
                    **ends(COUNT),
                    tooltip="0: one worker on each GPU. Otherwise so many on CPUs.",
                ),
                io.String.Input("size", default="", tooltip="Such as 768 or 768x512. Empty: the preset's, else 512."),
                io.String.Input("seeds", default="0", tooltip="Every prompt is drawn with each, such as 1, 2, 3."),
                io.String.Input(
                    "folder",
                    default="NextStep/cluster",
                    tooltip="Inside ComfyUI's output folder. Pictures of these prompts that are there are kept.",
                ),
                io.Int.Input(
                    TOGETHER.name,
                    default=4,
                    **ends(TOGETHER),
                    tooltip="Pictures that a worker draws at once, at most.",
                ),
                io.Combo.Input(
                    "quantization",
                    options=[PLAIN, *RECIPES],
                    default=PLAIN,
                    tooltip="How the weights are stored on the workers.",
                ),
                io.Combo.Input(
                    "dtype", options=["auto", *DTYPES], default="auto", tooltip="What the workers compute in."
                ),
                preset_input(),
                io.String.Input(
                    "negative_prompt",
                    default="",
                    optional=True,
                    tooltip="What to avoid: one for all, or a list with one for each prompt.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "image", display_name="image", is_output_list=True, tooltip="The pictures, one after another."
                ),
                io.String.Output("report", display_name="report", tooltip="Where the report is."),
                io.Int.Output("count", display_name="count", tooltip="How many pictures there are."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: object) -> float:
        return float("nan")  # what is missing in the folder is drawn by each Run

    @classmethod
    def validate_inputs(cls, model_name: object = None, cluster: object = None) -> bool | str:
        """True; what is not on this machine is told when the node runs, by a sentence of ours."""
        return True

    @classmethod
    def execute(
        cls,
        prompts: list[str],
        model_name: list[str],
        cluster: list[str],
        workers: list[int],
        size: list[str],
        seeds: list[str],
        folder: list[str],
        together: list[int],
        quantization: list[str],
        dtype: list[str],
        preset: list[str] | None = None,
        negative_prompt: list[str] | None = None,
    ) -> io.NodeOutput:
        check_choice("cluster", cluster[0], [HERE, *addresses()])
        check_choice("quantization", quantization[0], [PLAIN, *RECIPES])
        check_choice("dtype", dtype[0], ["auto", *DTYPES])
        place, at_once, count = host.output_folder(folder[0]), TOGETHER.check(together[0]), COUNT.check(workers[0])
        job = job_of(prompts, negative_prompt or [""], size[0], seeds[0], (preset or [OFF])[0])
        address = None if cluster[0] == HERE else cluster[0]
        where = Where(address, workers=None if count == ON_GPUS else count)
        choice = ModelChoice(for_workers(model_name[0]), None, quantization[0], dtype=dtype[0])
        reporter = host.ProgressReporter(BAR)
        host.show_text("Starting workers")

        def report(state: BatchProgress) -> None:
            reporter.update(round(BAR * state.share), text=state.in_words)

        with Cluster(where, choice.as_data(), host.check_interrupt) as hands:
            run = BatchRun(job, hands, place)
            try:
                run.run(at_once, report, host.check_interrupt)
            finally:
                page = write_report(place, job.title, run.records)
                write_sheet(place, run.records)
        failed = [record.error for record in run.records if record.error]
        there = [record for record in run.records if not record.error]
        if not there:
            raise NextStepError("No picture could be drawn. {reason}", reason=failed[0])
        host.show_text(
            f"{len(there)} pictures, {len(failed)} failed: {failed[0]}" if failed else f"{len(there)} pictures"
        )
        return io.NodeOutput([picture_of(place / record.file) for record in there], str(page), len(there))


def addresses() -> list[str]:
    """The clusters that the user has named, with commas between them."""
    return [part.strip() for part in os.environ.get(ADDRESSES, "").split(",") if part.strip()]


def for_workers(name: str) -> str:
    """What workers find a checkpoint by: its hub id, "tiny", or its path. NextStepError for one that is not here."""
    path = catalog.find_model(name)
    if path is None:
        raise NextStepError("{name} is not there yet. Fetch it first, with Download NextStep Model.", name=name)
    label = next((label for label, own in catalog.models().items() if own == path), "")
    if label == offers.remark(offers.bare(label), offers.CACHED):
        return offers.bare(label)
    return store.EMBEDDED if label == catalog.EMBEDDED_LABEL else str(path)


def job_of(prompts: list[str], avoided: list[str], size: str, seeds: str, preset: str) -> BatchJob:
    """The job of a node's prompts: lines, or a list whose every text is one; NextStepError for what is wrong."""
    for text in prompts:
        check_text("prompts", text)
    for text in avoided:
        check_text("negative_prompt", text)
    texts = [prompt.text for prompt in parse_lines(prompts[0], "prompts")] if len(prompts) == 1 else prompts
    if len(avoided) not in (1, len(texts)):
        raise NextStepError(
            "There are {avoided} negative prompts for {prompts} prompts. Give one for all, or one for each.",
            avoided=len(avoided),
            prompts=len(texts),
        )
    each = avoided * len(texts) if len(avoided) == 1 else avoided
    found = [Prompt(text, negative or None) for text, negative in zip(texts, each)]
    return job_of_prompts(found, "Cluster", wishes_of("", size, seeds, preset), preset_file())


def picture_of(path: Path) -> Tensor:
    """A picture file as (1, H, W, 3) in [0, 1]."""
    with Image.open(path) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)[None]
