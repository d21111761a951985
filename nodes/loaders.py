"""Loader nodes: a dropdown name to a model under the host's memory management, or to a native VAE."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from comfy_api.latest import io

from ..nextstep_core.decoding.engine import NextStepEngine
from ..nextstep_core.decoding.memory import fitting_recipe, with_fitting_recipe
from ..nextstep_core.errors import NextStepError, check_choice
from ..nextstep_core.images.latents import LatentSpace
from ..nextstep_core.loading import kept, offers
from ..nextstep_core.loading.build import load_vae_state, plan_model
from ..nextstep_core.loading.catalog import fingerprint
from ..nextstep_core.model.config import NextStepConfig
from ..nextstep_core.model.nextstep import NextStepModel
from ..nextstep_core.runtime.quantization import RECIPES
from ..nextstep_core.sentences import Sentence, all_of
from . import catalog, host
from .download import fetch
from .keeping import KEEP_AUTO, KEEP_OFF, KEEPING, Keeper
from .language import Node, in_users_language
from .types import CATEGORY, HostModel, ModelSocket
from .widgets import AUTO, known_to

log = logging.getLogger(__name__)

UNQUANTIZED = "none"
STORED = (UNQUANTIZED, *RECIPES, AUTO)
TO_FETCH = "to be fetched"
NO_VAE = Sentence("This checkpoint has no VAE of its own. Use a Load NextStep VAE node instead of this output.")


@dataclass(frozen=True)
class LoadOptions:
    """The loader's widgets below the model's name. A model is loaded anew when one of them changes."""

    dtype: str = "auto"
    quantization: str = UNQUANTIZED
    cuda_graphs: bool = True


# Two loader nodes with the same choice, or a loader whose cached output the host dropped, share one model.
_loaded: WeakValueDictionary[tuple[str, LoadOptions], HostModel] = WeakValueDictionary()


def load_model(name: str, options: LoadOptions, keeping: str = KEEP_OFF) -> HostModel:
    """The model behind a dropdown name; loads it unless an equal one is still in use.

    `keeping` is one of KEEPING: what becomes of weights that are quantized on the way.
    """
    check_choice("dtype", options.dtype, host.DTYPE_CHOICES)
    check_choice("quantization", options.quantization, (UNQUANTIZED, *RECIPES, AUTO))
    check_choice("cuda_graphs", options.cuda_graphs, (True, False))
    check_choice("keep_quantized", keeping, KEEPING)
    path = model_path(name)
    key = catalog.fingerprint(path), options
    model = _loaded.get(key)
    if model is None:
        with host.memory_told(Sentence("Loading {name}", name=name)):
            model = _loaded[key] = _load(path, options, keeping)
    return model


def model_path(name: str) -> Path:
    """Where the checkpoint of a saved name lies; fetches it where the name asks for it and it is not there."""
    return catalog.find_model(name) or fetch(offers.bare(name))


def _load(path: Path, options: LoadOptions, keeping: str) -> HostModel:
    device = host.compute_device()
    shelves = kept.shelves(catalog.name_of(path), path, host.model_roots())
    left = kept.by_recipe(shelves) if kept.lacks_weights(path) else {}
    if left:
        path = _left_of(path, left, options)
        plan = plan_model(path, None, device)
    else:
        plan = plan_model(path, None if options.quantization in (UNQUANTIZED, AUTO) else options.quantization, device)
    vae, latents = _load_vae(path, plan.config)
    storage, compute = host.pick_dtypes(options.dtype, plan.parameters)
    if options.quantization == AUTO:
        # The card's memory in all, not what is free at the moment, so that one machine draws one picture.
        plan = with_fitting_recipe(plan, storage, compute, host.card_memory())
    plan = plan.for_computing_on(device)
    keeper = Keeper.of(plan, storage, shelves, keeping, path)
    plan = keeper.plan
    adopted: list[Any] = []

    def load() -> NextStepModel:
        model = plan.empty_model(host.operations(storage, compute), host.HostQuantizedLinear)
        reporter = host.ProgressReporter(len(plan.model_names))
        read = plan.read_model("cpu", storage, lambda done, _: reporter.update(done), device, host.check_interrupt)
        adopted.append(host.adopt(model, keeper.passing(read), compute))
        return model

    engine = NextStepEngine.assemble(plan, latents, load, options.cuda_graphs and host.graphs_allowed())
    (patcher,) = adopted
    host.on_unload(patcher, engine.release)
    stored = plan.recipe.name if plan.recipe is not None else str(storage).removeprefix("torch.")
    log.info("NextStep model %s: stored as %s, computing in %s", plan.documents.name, stored, compute)
    said = [Sentence("weights stored as {format}", format=stored), *keeper.remarks()]
    host.show_text("\n".join(map(in_users_language, said)))
    facts = {"model": plan.documents.name, "weights": stored, "hash": kept.weights_hash(keeper.original)}
    return HostModel(engine, patcher, compute, vae, facts)


def _left_of(path: Path, left: dict[str, Path], options: LoadOptions) -> Path:
    """Of the quantized files that are left of a checkpoint without its weights, the one to load."""
    if options.quantization == AUTO:
        smallest = min(left.values(), key=lambda file: file.stat().st_size)
        room, plan = host.card_memory(), plan_model(smallest)
        storage, compute = host.pick_dtypes(options.dtype, plan.parameters)
        return left.get((room is not None and fitting_recipe(plan, storage, compute, room)) or UNQUANTIZED, smallest)
    if options.quantization not in left:
        raise NextStepError(
            "{path} no longer has its weights; they are kept only as {kept}. Choose one of these or auto as "
            "quantization, or get the checkpoint again with Download NextStep Model.",
            path=path,
            kept=all_of(left),
        )
    return left[options.quantization]


def _load_vae(path: Path, config: NextStepConfig) -> tuple[Any, LatentSpace]:
    """The VAE that goes with the checkpoint at `path`, or None, and the space of its latents."""
    vae_path = catalog.vae_of(path)
    if vae_path is None:
        return None, LatentSpace.from_configs(config, None)
    vae_config, state = load_vae_state(vae_path)
    latents = LatentSpace.from_configs(config, vae_config)
    log.info("NextStep VAE: %s", vae_path)
    return host.native_vae(vae_config, state), latents


class NextStepModelLoader(Node):
    """Checkpoint to model and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepModelLoader",
            display_name="Load NextStep Model",
            category=CATEGORY,
            description="Loads a NextStep-1 checkpoint, a folder or a single file, with its tokenizer and its VAE.",
            search_aliases=["nextstep", "autoregressive", "load checkpoint"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=catalog.model_options(),
                    tooltip="A checkpoint folder in models/nextstep, or a single NextStep file in models/nextstep or "
                    "models/diffusion_models. An entry that says it downloads is downloaded from Hugging Face "
                    "into models/nextstep when the node first runs.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(host.DTYPE_CHOICES),
                    default="auto",
                    tooltip="How weights are stored. auto picks what the device computes fastest (bf16 on most GPUs, "
                    "fp32 or bf16 on a CPU).",
                ),
                io.Combo.Input(
                    "quantization",
                    options=list(STORED),
                    default=AUTO,
                    optional=True,
                    tooltip="Store the weights in fewer bits while loading. auto takes none, int8 or int4, the first "
                    "that leaves room for a 512x512 picture in the card's memory. The 14B model takes 27 GB as it is, "
                    "14 GB as int8 or fp8, 8 GB as int4. none keeps what the file has.",
                ),
                io.Boolean.Input(
                    "cuda_graphs",
                    default=True,
                    optional=True,
                    tooltip="On an NVIDIA card, capture the work of a token once and replay it. Turn it off if your "
                    "driver has problems with it; the pictures are the same.",
                ),
                io.Combo.Input(
                    "keep_quantized",
                    options=list(KEEPING),
                    default=KEEP_AUTO,
                    optional=True,
                    tooltip="Weights that are quantized while loading are kept in models/nextstep/.quantized and "
                    "read from there the next time. auto: if the disk has room. keep originals: the same, and the "
                    "node says which files you may then delete; none is deleted for you. off: quantize again each "
                    "time.",
                ),
            ],
            outputs=[
                ModelSocket.Output("model", display_name="model", tooltip="The model with its tokenizer."),
                io.Vae.Output(
                    "vae",
                    display_name="vae",
                    tooltip="The checkpoint's own VAE, or the only other NextStep VAE found. Core VAE nodes accept it "
                    "too.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None = None) -> bool | str:
        if model_name is not None:
            catalog.find_model(model_name)
        return True

    @classmethod
    def fingerprint_inputs(cls, model_name: str, **_: Any) -> str:
        path = catalog.find_model(model_name)
        return TO_FETCH if path is None else catalog.fingerprint(path)

    @classmethod
    def execute(cls, model_name: str, keep_quantized: str = KEEP_AUTO, **options: Any) -> io.NodeOutput:
        model = load_model(model_name, LoadOptions(**known_to(LoadOptions, options)), keep_quantized)
        return io.NodeOutput(model, model.vae or host.NoOutput(in_users_language(NO_VAE)))


class NextStepVAELoader(Node):
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
                    options=catalog.vae_options(),
                    tooltip="A single NextStep VAE file in models/vae or models/nextstep, a folder with config.json "
                    "and checkpoint.pt in models/nextstep, or a file in models/vae with its config.json beside it. An "
                    "entry that says it downloads is downloaded when the node first runs.",
                ),
            ],
            outputs=[io.Vae.Output("vae", display_name="vae", tooltip="A native VAE; core VAE nodes accept it too.")],
        )

    @classmethod
    def validate_inputs(cls, vae_name: str | None = None) -> bool | str:
        if vae_name is not None:
            catalog.find_vae(vae_name)
        return True

    @classmethod
    def fingerprint_inputs(cls, vae_name: str) -> str:
        path = catalog.find_vae(vae_name)
        return TO_FETCH if path is None else fingerprint(path)

    @classmethod
    def execute(cls, vae_name: str) -> io.NodeOutput:
        path = catalog.find_vae(vae_name) or fetch(offers.bare(vae_name))
        with host.memory_told(Sentence("Loading {name}", name=vae_name)):
            return io.NodeOutput(host.native_vae(*load_vae_state(path)))
