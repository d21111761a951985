"""A whole job in one node: every picture of it into a folder, with a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from html import escape
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..nextstep_core.decoding.progress import Progress
from ..nextstep_core.errors import NextStepError, check_text
from ..nextstep_core.request.layout import IMAGE_SLOT, Caption
from ..nextstep_core.request.parameters import lora_facts
from ..nextstep_core.runtime.interrupt import Check
from ..nextstep_core.studio.batch import TOGETHER, BatchProgress, BatchRun
from ..nextstep_core.studio.drawing import Settled, identity_of, read_picture, settle, with_version
from ..nextstep_core.studio.hands import Alone
from ..nextstep_core.studio.job_file import Wishes, job_of_prompts, parse_job, read_job
from ..nextstep_core.studio.jobs import BatchJob, Order
from ..nextstep_core.studio.manifest import Manifest
from ..nextstep_core.studio.prompts import KINDS, parse_lines, parse_lists
from ..nextstep_core.studio.quality import scores_of
from ..nextstep_core.studio.report import report_page, write_report, write_sheet
from ..nextstep_core.studio.sets import SETS, set_path
from . import host
from .language import Node
from .latents import check_channels, decode_latent
from .presets import OFF, preset_file, preset_input
from .prompt_sets import BELOW
from .prompts import encode_edit
from .sampler import Shown, steps_of, to_latents
from .types import CATEGORY, HostModel, ModelSocket, check_sockets
from .widgets import ends

SHOWN_PICTURES = 64  # on the node
BAR = 1000  # steps of the progress bar
ADDRESS = "/nextstep/report"
TEXT = "\n".join(("a red circle on a white background", "a blue square on a yellow background"))


class HostArtist:
    """Draws orders with a model and a VAE that the host manages; `shown` is the last preview."""

    def __init__(self, model: HostModel, vae: Any) -> None:
        self.model, self.vae = model, vae
        names = {"Model": "model", "Model hash": "hash", "Weights": "weights"}
        loras = model.engine.loras
        self.facts = with_version({name: model.facts[key] for name, key in names.items()} | lora_facts(loras))
        self.identity = identity_of(model.facts["hash"], model.facts["weights"], model.dtype, loras)
        self.shown: Shown = (None, (0, 0))

    def settle(self, order: Order) -> Settled:
        return settle(self.model.engine, order)

    def draw(self, orders: Sequence[Settled], report: Callable[[Progress], None], check: Check) -> Tensor:
        first, engine = orders[0], self.model.engine
        with torch.inference_mode(), host.memory_told("Drawing"):
            job = engine.make_job(
                [self._caption(one) for one in orders],
                engine.grid(first.height, first.width),
                first.settings,
                seed=[one.order.seed for one in orders],
                negative_prompt=first.order.negative_prompt,
                check=check,
            )
            with closing(steps_of(self.model, job)) as run:
                for progress, self.shown in run:
                    report(progress)
            return decode_latent(self.vae, {"samples": to_latents(self.model, job, progress.tokens)}).cpu()

    def _caption(self, one: Settled) -> Caption:
        if not one.order.images:
            return Caption(one.prompt)
        pictures = torch.stack([read_picture(path, one.width, one.height) for path in one.order.images])
        if len(pictures) > 1 and one.prompt.count(IMAGE_SLOT) != len(pictures):
            raise NextStepError("The prompt needs a slot for each picture.")
        value, _ = encode_edit(self.model, self.vae, pictures, one.prompt, "width and height", one.width, one.height)
        return value.captions[0]


class NextStepBatchStudio(Node):
    """A job to pictures in a folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepBatchStudio",
            display_name="NextStep Batch Studio",
            category=CATEGORY,
            description="Draws every picture of a job into a folder, with a report to compare them. Interrupt keeps "
            "what is done; the next Run draws what is missing.",
            search_aliases=["nextstep", "batch", "job", "prompts", "campaign", "report", "a/b test"],
            is_output_node=True,
            inputs=[
                ModelSocket.Input("model", tooltip="From Load NextStep Model."),
                io.Vae.Input("vae", tooltip="The checkpoint's VAE."),
                io.Combo.Input(
                    "job",
                    options=[BELOW, *SETS, *host.input_files(*KINDS)],
                    default=BELOW,
                    tooltip="The text below, a set of prompts that comes with the pack, or a job file in ComfyUI's "
                    "input folder.",
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    default=TEXT,
                    tooltip="One prompt per line, or a job as JSON. Not used with a file or a set.",
                ),
                io.String.Input(
                    "lists",
                    multiline=True,
                    default="",
                    tooltip="Other values for the lists of a job, one list per line, such as brand: Harbor Tea.",
                ),
                io.String.Input(
                    "size", default="", tooltip="In place of the job's sizes, such as 512 or 768x512. Empty: the job's."
                ),
                io.String.Input("seeds", default="", tooltip="In place of the job's seeds, such as 1, 2, 3."),
                io.String.Input(
                    "folder",
                    default="NextStep/batch",
                    tooltip="Inside ComfyUI's output folder. A run that finds pictures of the job there adds the rest.",
                ),
                io.Int.Input(
                    TOGETHER.name,
                    default=4,
                    **ends(TOGETHER),
                    tooltip="Pictures to draw at once, at most; fewer where memory is short.",
                ),
                preset_input(),
            ],
            outputs=[
                io.Image.Output("sheet", display_name="contact sheet", tooltip="The pictures as one, small."),
                io.String.Output("report", display_name="report", tooltip="Where the report is."),
                io.Int.Output("count", display_name="count", tooltip="Pictures that are there."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> float:
        return float("nan")  # what is missing in the folder is drawn by each Run

    @classmethod
    def validate_inputs(cls, job: str | None = None) -> bool | str:
        """True; a file that is gone is told when the node runs, by a sentence of ours."""
        return True

    @classmethod
    def execute(
        cls,
        model: HostModel,
        vae: Any,
        job: str,
        text: str,
        lists: str,
        size: str,
        seeds: str,
        folder: str,
        together: int,
        preset: str = OFF,
    ) -> io.NodeOutput:
        check_sockets(model=model, vae=vae)
        check_channels(vae, model.engine.latents)
        place, together = host.output_folder(folder), TOGETHER.check(together)
        plan = job_of(job, text, wishes_of(lists, size, seeds, preset))
        artist = HostArtist(model, vae)
        run = BatchRun(plan, Alone(artist, scores_of), place)
        reporter = host.ProgressReporter(BAR)

        def report(state: BatchProgress) -> None:
            reporter.update(round(BAR * state.share), *artist.shown, in_words(state))

        try:
            summary = run.run(together, report, host.check_interrupt)
        finally:
            page = write_report(place, plan.title, run.records)
            sheet = write_sheet(place, run.records)
        failed = [record.error for record in summary.records if record.error]
        if sheet is None:
            raise NextStepError("No picture could be drawn. {reason}", reason=failed[0])
        there = [record for record in summary.records if not record.error]
        told = f"{summary.drawn} drawn, {summary.kept} were there"
        host.show_text(f"{told}, {len(failed)} failed: {failed[0]}" if failed else told)
        files = [host.shown_output(place / record.file) for record in there[:SHOWN_PICTURES]]
        with Image.open(sheet) as image:
            pixels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)[None]
        return io.NodeOutput(pixels, str(page), len(there), ui={"images": files})


def wishes_of(lists: str, size: str, seeds: str, preset: str) -> Wishes:
    """What the widgets ask beside the job."""
    for name, value in {"lists": lists, "size": size, "seeds": seeds, "preset": preset}.items():
        check_text(name, value)
    settings = {"size": size.strip()} if size.strip() else {}
    if preset != OFF:
        settings["preset"] = preset
    parts = [part.strip() for part in seeds.split(",") if part.strip()]
    for part in parts:
        if not part.isdecimal() or len(part) > 20:
            raise NextStepError(
                "seeds is {seeds}; write whole numbers with commas between them.", seeds=repr(seeds[:80])
            )
    return Wishes(settings, tuple(map(int, parts)), parse_lists(lists, "grid").values)


def job_of(job: str, text: str, wishes: Wishes) -> BatchJob:
    """The job that is chosen; NextStepError, with the line, for what is wrong in it."""
    check_text("job", job)
    if job in SETS:
        return read_job(set_path(job), wishes, preset_file())
    if job != BELOW:
        return read_job(host.input_file(job), wishes, preset_file())
    if check_text("text", text).lstrip().startswith("{"):
        return parse_job(text, "text", wishes, preset_file(), host.input_folder())
    return job_of_prompts(parse_lines(text, "text"), "Batch", wishes, preset_file())


def in_words(state: BatchProgress) -> str:
    """What the node shows while it draws."""
    there, left = state.done + state.failed, state.seconds_left
    if left is None:
        return f"{there} of {state.total} pictures"
    minutes, seconds = divmod(round(left), 60)
    return f"{there} of {state.total} pictures, {minutes}:{seconds:02d} left"


def report_of(query: Mapping[str, str]) -> tuple[int, str]:
    """The report of a folder, made anew from what is written down there: a file that lies there is not served."""
    name = query.get("folder", "")
    try:
        records = Manifest(host.output_folder(name)).records.values()
    except NextStepError as error:
        return 404, f"<!doctype html><title>NextStep</title><p>{escape(str(error))}</p>"
    if not records:
        return 404, "<!doctype html><title>NextStep</title><p>There is no report yet. Press Run first.</p>"
    return 200, report_page(name, list(records), served_from=name)


def offer_reports() -> None:
    """Let the frontend open reports."""
    host.serve(ADDRESS, report_of)
