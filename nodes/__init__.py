"""The nodes that ComfyUI shows: a table of contents."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import ComfyExtension, io

from .all_in_one import NextStepImageEdit, NextStepTextToImage
from .cluster import NextStepCluster
from .compare import NextStepCompare, NextStepLabelledGrid
from .download import NextStepDownload
from .frames import NextStepDrawingFrames
from .host import offer_pictures, register_model_folder
from .information import NextStepModelInfo
from .latents import NextStepAspectRatio, NextStepEmptyLatent, NextStepVAEDecode
from .loaders import NextStepModelLoader, NextStepVAELoader
from .lora import NextStepLoadLora
from .pictures import NextStepPasteBack, NextStepPreparePicture
from .presets import NextStepPreset
from .prompt_sets import NextStepPromptList, NextStepPromptTemplate
from .prompts import NextStepEditEncode, NextStepPromptBatch, NextStepTextEncode
from .resume import NextStepResume
from .sampler import NextStepSampler
from .saving import NextStepSaveImage
from .selection import NextStepBestOfN, NextStepQualityGate, NextStepQualityScore
from .studio import NextStepBatchStudio, offer_reports

NODES: list[type[io.ComfyNode]] = [
    NextStepModelLoader,
    NextStepVAELoader,
    NextStepTextEncode,
    NextStepEditEncode,
    NextStepPromptBatch,
    NextStepAspectRatio,
    NextStepEmptyLatent,
    NextStepSampler,
    NextStepVAEDecode,
    NextStepTextToImage,
    NextStepImageEdit,
    NextStepDownload,
    NextStepPreparePicture,
    NextStepPasteBack,
    NextStepCompare,
    NextStepLabelledGrid,
    NextStepResume,
    NextStepSaveImage,
    NextStepPreset,
    NextStepModelInfo,
    NextStepDrawingFrames,
    NextStepPromptList,
    NextStepPromptTemplate,
    NextStepBatchStudio,
    NextStepQualityScore,
    NextStepQualityGate,
    NextStepBestOfN,
    NextStepCluster,
    NextStepLoadLora,
]
PICTURES = Path(__file__).resolve().parent.parent / "example_pictures"  # that the templates load


class NextStepExtension(ComfyExtension):
    """Hands the nodes to the host."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> NextStepExtension:
    """Called once by the host when it loads the pack."""
    register_model_folder()
    offer_pictures(PICTURES)
    offer_reports()
    return NextStepExtension()
