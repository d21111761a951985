"""The one node that uses the network, and only when it is run."""

from __future__ import annotations

import logging

from comfy_api.latest import io, ui

from ..nextstep_core.loading.download import PUBLISHED_CHECKPOINTS, download, plan_download
from . import host
from .types import CATEGORY

log = logging.getLogger(__name__)


class NextStepDownload(io.ComfyNode):
    """Fetch a published checkpoint into the model folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepDownload",
            display_name="Download NextStep Model",
            category=CATEGORY,
            description="Fetches a published checkpoint from Hugging Face into models/nextstep, about 29 GB each. Goes "
            "on where it stopped when it is run again. Fetches only what is read, and nothing that could be executed.",
            search_aliases=["nextstep", "download", "hugging face"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=list(PUBLISHED_CHECKPOINTS),
                    tooltip="NextStep-1.1 draws best; NextStep-1-Large-Edit edits; the tokenizer is the VAE alone.",
                ),
                io.String.Input(
                    "revision",
                    default="main",
                    optional=True,
                    tooltip="Branch, tag or commit. A commit gives the same files for ever.",
                ),
            ],
            outputs=[io.String.Output("folder", display_name="folder", tooltip="Where the checkpoint lies now.")],
        )

    @classmethod
    def execute(cls, checkpoint: str, revision: str = "main") -> io.NodeOutput:
        plan = plan_download(checkpoint, host.model_roots()[0], revision, host.check_interrupt)
        log.info("Downloading %s", plan.describe())
        reporter = host.ProgressReporter(max(1, plan.size))
        last = -1

        def report(done: int, size: int) -> None:
            nonlocal last
            reporter.update(done, text=f"{done / 1e9:.2f} of {size / 1e9:.2f} GB\n{plan.describe()}")
            if (percent := 100 * done // max(1, size)) != last:
                last = percent
                log.info("%s: %d%% of %.2f GB", checkpoint, percent, size / 1e9)

        folder = download(plan, report)
        text = f"{checkpoint} is in {folder}. Press R and choose it in Load NextStep Model."
        return io.NodeOutput(str(folder), ui=ui.PreviewText(text))
