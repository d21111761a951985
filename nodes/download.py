"""Fetching what the user chose: a node of its own, and what the loaders do for an entry that says it downloads."""

from __future__ import annotations

import logging
from pathlib import Path

from comfy_api.latest import io, ui

from ..nextstep_core.loading.download import NEWEST, PUBLISHED_CHECKPOINTS, already_there, download, plan_download
from ..nextstep_core.loading.hub import NotReached
from ..nextstep_core.loading.meter import Meter
from ..nextstep_core.sentences import Sentence
from . import host
from .language import Node, in_users_language
from .types import CATEGORY

log = logging.getLogger(__name__)


def fetch(checkpoint: str, revision: str = NEWEST) -> Path:
    """Fetch a published checkpoint into the first model folder, with progress on the running node; where it lies.

    An interrupt ends it and keeps what is there. NextStepError when it cannot be had.
    """
    plan = plan_download(checkpoint, host.model_roots()[0], revision, host.check_interrupt)
    log.info("Downloading %s", plan.describe())
    reporter, meter, last = host.ProgressReporter(max(1, plan.size)), Meter(), -1

    def report(done: int, size: int) -> None:
        nonlocal last
        text = meter.text(done, size)
        reporter.update(done, text=f"{text}\n{plan.describe()}")
        if (percent := 100 * done // max(1, size)) != last:
            last = percent
            log.info("%s: %s", checkpoint, text)

    return download(plan, report)


class NextStepDownload(Node):
    """Fetch a published checkpoint into the model folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepDownload",
            display_name="Download NextStep Model",
            category=CATEGORY,
            description="Downloads a published checkpoint from Hugging Face into models/nextstep, about 29 GB each. "
            "Run it again to resume an interrupted download. Only the files that are needed are downloaded, and "
            "no code.",
            search_aliases=["nextstep", "stepfun", "download", "hugging face"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=list(PUBLISHED_CHECKPOINTS),
                    tooltip="NextStep-1.1 gives the best pictures; NextStep-1-Large-Edit edits; "
                    "the tokenizer is a VAE.",
                ),
                io.String.Input(
                    "revision",
                    default=NEWEST,
                    optional=True,
                    tooltip="Branch, tag or commit. A commit always gives the same files.",
                ),
            ],
            outputs=[io.String.Output("folder", display_name="folder", tooltip="The folder of the checkpoint.")],
        )

    @classmethod
    def execute(cls, checkpoint: str, revision: str = NEWEST) -> io.NodeOutput:
        said = []
        try:
            folder = fetch(checkpoint, revision)
        except NotReached as error:
            there = already_there(checkpoint, host.model_roots()[0]) if revision == NEWEST else None
            if there is None:
                raise
            folder = there
            said = [Sentence("It was not looked for a newer version: {reason}.", reason=error.reason)]
            log.warning("%s is in %s. %s", checkpoint, folder, said[0])
        found = Sentence(
            "{checkpoint} is in {folder}. Press R and choose it in Load NextStep Model.",
            checkpoint=checkpoint,
            folder=folder,
        )
        text = " ".join(in_users_language(sentence) for sentence in (found, *said))
        return io.NodeOutput(str(folder), ui=ui.PreviewText(text))
