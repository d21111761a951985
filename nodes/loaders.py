"""Loader nodes: a dropdown name to a model under the host's memory management, or to a native VAE."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from comfy_api.latest import io
from comfy_execution.graph import ExecutionBlocker

from ..nextstep_core.config import NextStepConfig
from ..nextstep_core.engine import NextStepEngine
from ..nextstep_core.errors import NextStepError
from ..nextstep_core.loading.build import load_vae_state, plan_model
from ..nextstep_core.loading.sources import vae_beside
from ..nextstep_core.model.nextstep import NextStepModel
from ..nextstep_core.pipeline import check_vae_fits
from ..nextstep_core.tokenizer import NextStepTokenizer
from . import catalog, host
from .types import CATEGORY, PUBLISHED_VAE, HostModel, ModelSocket

log = logging.getLogger(__name__)

# Two loader nodes with the same choice, or a loader whose cached output the host dropped, share one model.
_loaded: WeakValueDictionary[tuple[str, str], HostModel] = WeakValueDictionary()


def load_model(name: str, dtype_choice: str) -> HostModel:
    """The model behind a dropdown name; loads it unless an equal one is still in use."""
    path = catalog.find_model(name)
    key = (catalog.fingerprint(path), dtype_choice)
    model = _loaded.get(key)
    if model is None:
        model = _loaded[key] = _load(path, dtype_choice)
    return model


def _load(path: Path, dtype_choice: str) -> HostModel:
    plan = plan_model(path)
    config, folder = plan.config, plan.folder
    tokenizer = NextStepTokenizer.from_folder(folder, config)
    vae, vae_config = _load_own_vae(path, config)
    storage, compute = host.pick_dtypes(dtype_choice, plan.parameters)
    model = NextStepModel(config, device="meta", operations=host.operations(storage, compute)).eval()
    state = plan.read_model("cpu", storage, on_shard=lambda _: host.check_interrupt())
    patcher = host.adopt(model, state)
    log.info("NextStep model %s: stored as %s, computing in %s", folder.name, storage, compute)
    engine = NextStepEngine(config, model, plan.load_text_embedding(), tokenizer, folder, folder.name)
    return HostModel(engine, patcher, compute, vae, vae_config)


def _load_own_vae(path: Path, config: NextStepConfig) -> tuple[Any, Any]:
    try:
        vae_path = vae_beside(path, config.vae_name_or_path)
    except NextStepError:
        return None, PUBLISHED_VAE
    vae_config, state = load_vae_state(vae_path)
    check_vae_fits(config, vae_config.z_channels, vae_config.downscale)
    return host.native_vae(vae_config, state), vae_config


class NextStepModelLoader(io.ComfyNode):
    """Checkpoint to model and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepModelLoader",
            display_name="Load NextStep Model",
            category=CATEGORY,
            description="Loads a NextStep-1 checkpoint from models/nextstep, with its tokenizer and its own VAE.",
            search_aliases=["nextstep", "autoregressive", "load checkpoint"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=list(catalog.models()) or [catalog.NOTHING_FOUND],
                    tooltip="A checkpoint folder (or single .safetensors with its config.json) in models/nextstep.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(host.DTYPE_CHOICES),
                    default="auto",
                    tooltip="How weights are stored. auto picks what the device computes fastest (bf16 on most GPUs, "
                    "fp32 on a CPU as long as it fits in memory).",
                ),
            ],
            outputs=[
                ModelSocket.Output("model", display_name="model", tooltip="The model with its tokenizer."),
                io.Vae.Output(
                    "vae", display_name="vae", tooltip="The checkpoint's own VAE; core VAE nodes take it too."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None = None) -> bool | str:
        try:
            if model_name is not None:
                catalog.find_model(model_name)
        except NextStepError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, model_name: str, dtype: str) -> str:
        return catalog.fingerprint(catalog.find_model(model_name))

    @classmethod
    def execute(cls, model_name: str, dtype: str) -> io.NodeOutput:
        model = load_model(model_name, dtype)
        missing = "This checkpoint has no VAE of its own. Use a Load NextStep VAE node instead of this output."
        return io.NodeOutput(model, model.vae or ExecutionBlocker(missing))


class NextStepVAELoader(io.ComfyNode):
    """A NextStep tokenizer as a native VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepVAELoader",
            display_name="Load NextStep VAE",
            category=CATEGORY,
            description="Loads the f8, 16-channel VAE of NextStep-1 with the normalization that its config states.",
            search_aliases=["nextstep", "tokenizer", "vae"],
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=list(catalog.vaes()) or [catalog.NOTHING_FOUND],
                    tooltip="A folder with config.json and checkpoint.pt in models/nextstep, or a file in models/vae "
                    "with its config.json beside it.",
                ),
            ],
            outputs=[io.Vae.Output("vae", display_name="vae", tooltip="A native VAE; core VAE nodes take it too.")],
        )

    @classmethod
    def validate_inputs(cls, vae_name: str | None = None) -> bool | str:
        try:
            if vae_name is not None:
                catalog.find_vae(vae_name)
        except NextStepError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, vae_name: str) -> str:
        return catalog.fingerprint(catalog.find_vae(vae_name))

    @classmethod
    def execute(cls, vae_name: str) -> io.NodeOutput:
        config, state = load_vae_state(catalog.find_vae(vae_name))
        return io.NodeOutput(host.native_vae(config, state))
