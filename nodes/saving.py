"""What a run was made with, and the node that writes it into the picture."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..nextstep_core import __version__
from ..nextstep_core.errors import NextStepError, check_choice, check_text
from ..nextstep_core.images.rgb import to_rgb
from ..nextstep_core.images.saving import FORMATS, QUALITY, save_picture
from ..nextstep_core.request.parameters import PRODUCT, lora_facts, parameters_text
from ..nextstep_core.sampling.settings import GenerationSettings
from . import host
from .language import Node
from .types import CATEGORY, HostModel, Info, InfoSocket, PromptValue, check_sockets
from .widgets import ends

INFO_OUTPUT = InfoSocket.Output("info", display_name="info", tooltip="What it was made with, for NextStep Save Image.")


def info_of(
    model: HostModel,
    positive: PromptValue,
    negative: PromptValue | None,
    settings: GenerationSettings,
    seed: int,
    latent: dict[str, Any],
    unfinished: str = "",
) -> Info:
    """What the pictures of a drawn LATENT were made with."""
    facts = {
        "Model": model.facts["model"],
        "Model hash": model.facts["hash"],
        "Weights": model.facts["weights"],
        **lora_facts(model.engine.loras),
        "Unfinished": unfinished,
        "Version": f"{PRODUCT} {__version__}",
    }
    latents = model.engine.latents
    size = latents.size(latents.grid_of(latent["samples"]))
    avoided = negative.captions[0].text if negative is not None else ""
    each = len(latent["samples"]) // len(positive.captions)
    texts = [parameters_text(c.text, avoided, settings, seed=seed, size=size, facts=facts) for c in positive.captions]
    return Info(tuple(text for text in texts for _ in range(each)))


class NextStepSaveImage(Node):
    """Pictures to files, with what they were made with."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepSaveImage",
            display_name="NextStep Save Image",
            category=CATEGORY,
            description="Saves pictures with the prompt and the settings in a form that image browsers and model sites "
            "read, beside the workflow that ComfyUI reads when the file is dropped on it.",
            search_aliases=["nextstep", "save image", "metadata", "parameters", "jpeg", "webp"],
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="The pictures."),
                io.String.Input(
                    "filename_prefix",
                    default="NextStep/picture",
                    tooltip="Name of the files in ComfyUI's output folder, as in Save Image: may hold folders, "
                    "%year%, %month%, %day%, %width% and %height%.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default="png",
                    tooltip="png: without loss. jpeg: small, but ComfyUI reads no workflow from it. webp: small, with "
                    "the workflow.",
                ),
                io.Int.Input(
                    QUALITY.name,
                    default=90,
                    **ends(QUALITY),
                    tooltip="Of jpeg and webp. A webp of 100 is without loss.",
                ),
                InfoSocket.Input("info", optional=True, tooltip="From NextStep Sampler: what the pictures tell of it."),
            ],
            outputs=[
                io.String.Output(
                    "parameters",
                    display_name="parameters",
                    is_output_list=True,
                    tooltip="The text that was saved, one for each picture; empty without info.",
                )
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        """True, or what is wrong; a widget that is linked is not known yet."""
        try:
            if filename_prefix is not None:
                check_text("filename_prefix", filename_prefix)
                host.check_name(filename_prefix)
        except NextStepError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, image: Tensor, filename_prefix: str, format: str, quality: int, info: Info | None = None
    ) -> io.NodeOutput:
        if info is not None:
            check_sockets(info=info)
        check_text("filename_prefix", filename_prefix)
        check_choice("format", format, FORMATS)
        QUALITY.check(quality)
        pictures = to_rgb(image)
        texts = [""] * len(pictures) if info is None else _texts(info, len(pictures))
        notes = host.notes_for_picture(cls)
        height, width = pictures.shape[1:3]
        files = host.new_files(filename_prefix, width, height, len(pictures), FORMATS[format])
        for file, picture, text in zip(files, pictures, texts, strict=True):
            save_picture(file.path, picture, format, quality, "" if notes is None else text, notes)
        return io.NodeOutput(texts, ui={"images": [file.shown for file in files]})


def _texts(info: Info, pictures: int) -> tuple[str, ...]:
    if len(info.texts) == 1:
        return info.texts * pictures
    if len(info.texts) != pictures:
        raise NextStepError(
            "info tells of {told} pictures, and {pictures} are to be saved. Connect the info of the sampler "
            "that drew these pictures.",
            told=len(info.texts),
            pictures=pictures,
        )
    return info.texts
