"""The one place that touches ComfyUI's internals: folders, devices, memory, progress and its VAE class."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args
from comfy.patcher_extension import CallbacksMP
from comfy_api.latest import io
from comfy_execution.graph import ExecutionBlocker
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor, nn

from ..nextstep_core.errors import NextStepError, OutOfMemory, check_choice, check_text, is_out_of_memory, shown
from ..nextstep_core.loading.build import fill, make_ready
from ..nextstep_core.loading.checkpoint import DTYPES
from ..nextstep_core.loading.files import can_be_shown, read_all
from ..nextstep_core.loading.lora_file import SUFFIXES
from ..nextstep_core.model.config import VAEConfig
from ..nextstep_core.model.vae import channel_norm
from ..nextstep_core.runtime import memory as runtime_memory
from ..nextstep_core.runtime.cpu import cpu_dtype
from ..nextstep_core.runtime.interrupt import leaves
from ..nextstep_core.runtime.memory import MemoryPlan, format_bytes, plan_host_memory
from ..nextstep_core.runtime.quantization import QuantizedLinear
from ..nextstep_core.runtime.shortage import LOADING_ADVICE, reason_of, told
from ..nextstep_core.sentences import Sentence

Interrupted = mm.InterruptProcessingException

MODEL_FOLDER, LORA_FOLDER = "nextstep", "loras"
SETTINGS = Path("default", "comfy.settings.json")  # below the folder of users
LONGEST_SETTINGS = 1 << 24  # bytes
DTYPE_CHOICES = ("auto", *DTYPES)
# float16 overflows in this model's residual stream on some prompts, so it is never chosen, only obeyed.
PREFERRED_DTYPES = [torch.bfloat16, torch.float32]
TEXT_SECONDS = 0.5
TOLERATED = 0.05  # share of the weights that may be away where all fit: hosts round
DRAWING_ADVICE = Sentence("Choose a smaller size or fewer pictures, or close other programs.")
log = logging.getLogger(__name__)
NATIVE_SHAPE = (128, (1, 2, 4, 4), 2)  # the one width, multiplier list and depth that the host infers from keys


def schema(**arguments: Any) -> io.Schema:
    """An `io.Schema`, less the arguments that this version of the host does not know yet."""
    return io.Schema(**{k: v for k, v in arguments.items() if k in io.Schema.__dataclass_fields__})


def register_model_folder() -> None:
    """Make `models/nextstep` (or wherever extra_model_paths.yaml points that name) known to the host."""
    folder_paths.add_model_folder_path(MODEL_FOLDER, os.path.join(folder_paths.models_dir, MODEL_FOLDER))


def user_folder() -> Path:
    """Where the host keeps what belongs to its users."""
    return Path(folder_paths.get_user_directory())


def user_language() -> str:
    """The language that the user reads, as the frontend names it, such as "ko"; empty where nobody can tell.

    It is a setting of the user's. Where it was never set, the frontend goes by the browser, and so does this, if all
    that are connected agree. Which of several users has queued a workflow, the host does not tell its nodes.
    """
    if args.multi_user:
        return ""
    try:
        settings = json.loads(read_all(user_folder() / SETTINGS, LONGEST_SETTINGS))
    except (OSError, ValueError, RecursionError):  # not there yet, or half written
        settings = None
    chosen = settings.get("Comfy.Locale") if isinstance(settings, dict) else None
    return chosen if isinstance(chosen, str) and chosen else _language_of_browsers()


def _language_of_browsers() -> str:
    sockets = list(getattr(_server(), "sockets", {}).values())
    headers = [getattr(getattr(socket, "_req", None), "headers", {}) for socket in sockets]
    told = {str(header.get("Accept-Language", "")).split(",")[0].split(";")[0].strip() for header in headers}
    return told.pop() if len(told) == 1 else ""


def _server() -> Any:
    """The host's server; None where it runs as a library."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def model_roots() -> list[Path]:
    """The folders in which NextStep checkpoints are looked for."""
    return [Path(root) for root in folder_paths.get_folder_paths(MODEL_FOLDER)]


def single_file_roots() -> list[Path]:
    """The folders in which single files are looked for beside the NextStep folders."""
    return [Path(root) for root in folder_paths.get_folder_paths("diffusion_models")]


def vae_roots() -> list[Path]:
    """The folders in which VAE files are looked for."""
    return [Path(root) for root in folder_paths.get_folder_paths("vae")]


def lora_names() -> list[str]:
    """The host's LoRA files of the kinds that are read here, as its own loader lists them."""
    return [n for n in folder_paths.get_filename_list(LORA_FOLDER) if n.endswith(SUFFIXES) and can_be_shown(n)]


def lora_file(name: str) -> Path | None:
    """Where a file of this list lies; None for any other name."""
    path = folder_paths.get_full_path(LORA_FOLDER, name) if name in lora_names() else None
    return None if path is None else Path(path)


def last_saved_latent(filename_prefix: str) -> Path | None:
    """The file that the host's Save Latent wrote last under this name; NextStepError for a name that cannot be one."""
    folder, name, *_ = _place_to_save(filename_prefix)
    files = Path(folder).glob(f"{escape(name)}_*_.latent")
    return max(files, key=lambda file: file.name, default=None)


def check_name(filename_prefix: str) -> None:
    """NextStepError for a name of files to save that leads out of the host's output folder."""
    root = os.path.abspath(folder_paths.get_output_directory())
    folder = os.path.abspath(os.path.join(root, os.path.dirname(os.path.normpath(filename_prefix))))
    try:
        inside = "\0" not in filename_prefix and os.path.commonpath([root, folder]) == root
    except ValueError:  # another drive
        inside = False
    if not inside:
        raise _not_inside(filename_prefix)


def _not_inside(filename_prefix: str) -> NextStepError:
    return NextStepError(
        "filename_prefix {value} is not a name inside ComfyUI's output folder.", value=shown(filename_prefix)
    )


def _place_to_save(filename_prefix: str, width: int = 0, height: int = 0) -> tuple[str, str, int, str, str]:
    """(folder, name, count, folder below the output folder, prefix) as the host's savers have it; NextStepError for a
    prefix that leads out of the output folder."""
    try:
        root = folder_paths.get_output_directory()
        place: tuple[str, str, int, str, str] = folder_paths.get_save_image_path(filename_prefix, root, width, height)
    except OSError as error:
        raise NextStepError("ComfyUI's output folder cannot be written to ({reason}).", reason=error) from None
    except Exception:  # the host has no kind of its own for a name outside its folder
        raise _not_inside(filename_prefix) from None
    return place


def output_folder(name: str) -> Path:
    """A folder below the host's output folder; NextStepError for a name that leads out of it."""
    check_text("folder", name)
    try:
        root = Path(folder_paths.get_output_directory()).resolve()
        folder = (root / name).resolve()
        inside = folder.is_relative_to(root) and folder != root
    except (OSError, RuntimeError, ValueError):  # what can be no name, or a circle of links
        inside = False
    if not inside:
        raise NextStepError(
            "folder is {name}; write a name for a folder inside ComfyUI's output folder.", name=shown(name)
        )
    return folder


def shown_output(path: Path) -> dict[str, str]:
    """How the frontend is told of a file below the output folder."""
    below = path.relative_to(Path(folder_paths.get_output_directory()).resolve())
    return {"filename": below.name, "subfolder": below.parent.as_posix().removeprefix("."), "type": "output"}


def input_files(*endings: str) -> list[str]:
    """Names of the files with these endings that lie in the host's input folder itself."""
    try:
        found = sorted(os.listdir(folder_paths.get_input_directory()))
    except OSError:
        return []
    return [name for name in found if name.lower().endswith(endings) and can_be_shown(name)]


def input_file(name: str) -> Path:
    """The path of such a file; NextStepError for a name that is none of the input folder's."""
    check_text("file", name)
    if Path(name).name != name or name in ("", ".."):
        raise NextStepError("{name} is not the name of a file in ComfyUI's input folder.", name=shown(name))
    return input_folder() / name


def input_folder() -> Path:
    """Where the host keeps what its users bring."""
    return Path(folder_paths.get_input_directory())


def serve(address: str, answer: Callable[[Mapping[str, str]], tuple[int, str]]) -> None:
    """Answer GET requests at an address: `answer` takes the query and returns a status and a page of HTML."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is None:  # the host runs as a library
        return
    from aiohttp import web

    async def handle(request: web.Request) -> web.Response:
        status, page = await asyncio.to_thread(answer, request.query)
        return web.Response(status=status, text=page, content_type="text/html", headers={"X-Frame-Options": "DENY"})

    server.routes.get(address)(handle)


@dataclass(frozen=True)
class OutputFile:
    """A new file in the host's output folder, and how its frontend is told of it."""

    path: Path
    shown: dict[str, str]


def new_files(filename_prefix: str, width: int, height: int, count: int, suffix: str) -> list[OutputFile]:
    """The next free names under a prefix, as the host's Save Image counts; NextStepError for any outside its folder."""
    folder, name, first, subfolder, _ = _place_to_save(filename_prefix, width, height)
    names = [f"{name.replace('%batch_num%', str(n))}_{first + n:05}_{suffix}" for n in range(count)]
    return [OutputFile(Path(folder) / n, {"filename": n, "subfolder": subfolder, "type": "output"}) for n in names]


def notes_for_picture(node: type[io.ComfyNode]) -> dict[str, str] | None:
    """Prompt and workflow, as JSON under the names that the host reads them by; None where it is told to save none."""
    if args.disable_metadata:
        return None
    hidden = getattr(node, "hidden", None)
    notes = {"prompt": getattr(hidden, "prompt", None), **(getattr(hidden, "extra_pnginfo", None) or {})}
    return {name: json.dumps(value) for name, value in notes.items() if value is not None}


def offer_pictures(folder: Path) -> None:
    """Put the pictures of a folder where the host's Load Image finds them. What is there already stays as it is.

    A disk that fails leaves no half a picture, and none of this keeps the pack from loading.
    """
    for picture in folder.glob("*"):
        target = Path(folder_paths.get_input_directory()) / picture.name
        ours = False
        try:
            with target.open("xb") as file:
                ours = True
                file.write(picture.read_bytes())
        except OSError as error:  # there already, a folder that one can only read, or a full disk
            log.debug("%s was not written: %s", target, error)
            if ours:
                target.unlink(missing_ok=True)


def check_interrupt() -> None:
    """Raise the host's own exception when the user pressed Interrupt."""
    mm.throw_exception_if_processing_interrupted()


class ProgressReporter:
    """The bar, a line of text and the live preview on the running node. Every call also stops the run on Interrupt."""

    def __init__(self, total: int) -> None:
        self._bar = comfy.utils.ProgressBar(total)
        self._said_at = 0.0

    def update(
        self, done: int, preview: Tensor | None = None, size: tuple[int, int] = (0, 0), text: str | None = None
    ) -> None:
        """Show `done` items; preview (h, w, 3) uint8 is enlarged to size (width, height)."""
        check_interrupt()
        if text is not None and time.monotonic() - self._said_at >= TEXT_SECONDS:
            self._said_at = time.monotonic()
            show_text(text)
        image = None
        if preview is not None:
            image = ("JPEG", Image.fromarray(preview.numpy()).resize(size, Image.Resampling.BILINEAR), None)
        self._bar.update_absolute(done, preview=image)


def show_text(text: str) -> None:
    """Put a line of text on the running node, where the host has a server (it has none when it runs as a library)."""
    server, context = _server(), get_executing_context()
    if server is not None and context is not None:
        server.send_progress_text(text, context.node_id)


def note_in_picture(node: type[io.ComfyNode], facts: dict[str, Any]) -> None:
    """Put facts of a run into what the host writes into its pictures, beside the workflow, where it writes anything."""
    notes = getattr(getattr(node, "hidden", None), "extra_pnginfo", None)
    if isinstance(notes, dict):
        notes["nextstep"] = facts


def card_memory() -> int | None:
    """Bytes of memory that the host's device has in all, less what it is told to leave alone; None for a CPU."""
    device = mm.get_torch_device()
    if mm.is_device_cpu(device):
        return None
    return int(mm.get_total_memory(device) - mm.extra_reserved_memory())


def pick_dtypes(choice: str, parameters: int) -> tuple[torch.dtype, torch.dtype]:
    """(storage, compute) dtypes for a model of so many parameters on the host's device; choice "auto" or a name."""
    check_choice("dtype", choice, DTYPE_CHOICES)
    device = mm.get_torch_device()
    if choice in DTYPES:
        storage = DTYPES[choice]
    elif mm.is_device_cpu(device):
        storage = cpu_dtype(parameters, mm.get_free_memory(device))
        return storage, storage
    else:
        storage = mm.unet_dtype(device=device, model_params=parameters, supported_dtypes=PREFERRED_DTYPES)
    compute = mm.unet_manual_cast(storage, device, supported_dtypes=PREFERRED_DTYPES)
    return storage, compute or storage


def operations(storage: torch.dtype, compute: torch.dtype) -> Any:
    """The host's layer classes, which cast their weights as its memory management wants.

    Newer hosts make linear layers that have no parameters, not even empty ones, until a file is read; but not of
    classes that load by a function of their own, as these do, if only by PyTorch's.
    """
    picked = comfy.ops.pick_operations(storage, compute, load_device=mm.get_torch_device())
    linear = type("Linear", (picked.Linear,), {"_load_from_state_dict": _load_from_state_dict})
    return type("Operations", (picked,), {"Linear": linear})


def _load_from_state_dict(module: nn.Module, *arguments: Any) -> None:
    nn.Module._load_from_state_dict(module, *arguments)


class HostQuantizedLinear(QuantizedLinear):
    """A quantized layer that the host may leave behind and still use; it tells by these attributes."""

    comfy_cast_weights = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.weight_function: list[Any] = []
        self.bias_function: list[Any] = []


def adopt(model: nn.Module, tensors: Iterable[tuple[str, Tensor]], compute: torch.dtype) -> Any:
    """Put a meta-device module under the host's memory management and give it its weights; returns the patcher.

    `tensors` is read up here, so that nothing else holds a tensor while its layer lays it out anew.

    The patcher is the plain one. Newer hosts have another, which leaves weights with the host and has its layers fetch
    them at each use; but every token uses all weights, our quantized layers know nothing of it, and what is captured
    needs weights that stay where they are. In return, memory that others need comes back in layers, not in pages.
    """
    state = dict(tensors)
    size = sum(tensor.nbytes for tensor in state.values())
    patcher = comfy.model_patcher.ModelPatcher(
        model, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device(), size=size
    )
    fill(model, state)
    del state
    make_ready(model, patcher.load_device, compute, check_interrupt)
    return patcher


def on_unload(patcher: Any, forget: Callable[[], None]) -> None:
    """Call `forget` whenever the host takes a model off its device (and not when it merely looks at it again)."""
    patcher.add_callback(CallbacksMP.ON_DETACH, lambda _, unpatch_all: unpatch_all and forget())


def free_memory(patcher: Any) -> int:
    """Bytes that a model and a run can have of its device: what is free, and what the host would free for it."""
    return int(mm.get_free_memory(patcher.load_device)) if mm.is_device_cpu(patcher.load_device) else _room(patcher)


def plan_memory(
    patcher: Any, pictures: int, each: int, streamed: int, forget: Callable[[], None] = lambda: None, beside: int = 0
) -> MemoryPlan:
    """The plan for drawing `pictures` with a model on its device; see `runtime.memory.plan_memory`.

    `forget` frees what earlier runs have left there, and is called where otherwise not all would fit.
    """
    device, weights = patcher.load_device, patcher.model_size()
    if mm.is_device_cpu(device):
        return plan_host_memory(weights, int(mm.get_free_memory(device)) - beside, pictures, each)
    if weights + beside + pictures * each > _room(patcher):
        forget()
    return runtime_memory.plan_memory(
        weights,
        _room(patcher),
        pictures,
        each,
        streamed,
        spare=int(mm.minimum_inference_memory() - mm.extra_reserved_memory()),  # the host leaves as much in any case
        stay=mm.vram_state != mm.VRAMState.NO_VRAM,
        beside=beside,
    )


def _room(patcher: Any) -> int:
    """What a model can have of its device: what is free, and what the host would free for it or lies there for it.

    Not what others hold there: the desktop, other programs, and in this one all that is no model of the host.
    """
    device = patcher.load_device
    models = [loaded for loaded in mm.current_loaded_models if loaded.device == device and loaded.model is not None]
    room = mm.get_free_memory(device) + sum(loaded.model_loaded_memory() for loaded in models)
    if mm.vram_state == mm.VRAMState.SHARED:  # what lies with the host lies in the same memory
        room += patcher.model_size() - patcher.loaded_size()
    return int(min(room, mm.get_total_memory(device)) - mm.extra_reserved_memory()) - _headroom()


def _headroom() -> int:
    """What `--vram-headroom` keeps free. Hosts that have it look after it only in models of their own kind."""
    return int(getattr(args, "vram_headroom", 0) * 2**30)


def graphs_allowed() -> bool:
    """Whether CUDA graphs are not turned off for the whole host."""
    return not getattr(args, "disable_cuda_graphs", False)


def bring_to_device(patcher: Any, plan: MemoryPlan) -> torch.device:
    """Load a model's weights (in part, where memory is short), leaving the plan's working memory free; the device."""
    mm.load_models_gpu([patcher], memory_required=plan.working + _headroom())
    device = torch.empty(0, device=patcher.load_device).device  # as its tensors call it
    away = sum(weight.nbytes for weight in patcher.model.parameters() if weight.device != device)
    if plan.resident == plan.weights and away > TOLERATED * plan.weights:
        log.warning(
            "%s of %s of weights are streamed for every token although all of them fit: ComfyUI kept them off the "
            "device. This makes it much slower; please report it.",
            format_bytes(away),
            format_bytes(plan.weights),
        )
    return device


def send_away(patcher: Any) -> bool:
    """Send half of a model's weights on its device to the host, from where they are streamed; whether any went."""
    if mm.is_device_cpu(patcher.load_device):
        return False
    sent = patcher.partially_unload(patcher.offload_device, patcher.loaded_size() // 2)
    mm.soft_empty_cache()
    return bool(sent)


@contextmanager
def memory_told(work: Sentence, needed: int | None = None, advice: Sentence = LOADING_ADVICE) -> Iterator[None]:
    """Inside, memory that runs out is one sentence; every model has left the device then, so that the next run can go
    on, as the host does it for errors of the device's own kind."""
    try:
        with told(work, mm.get_torch_device(), needed, advice):
            yield
    except OutOfMemory:
        mm.unload_all_models()
        raise


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pictures (B, H, W, 3) in [0, 1] by any VAE of the host; in ever smaller tiles where memory runs out."""
    return _in_tiles(vae.decode, getattr(vae, "decode_tiled", None), latents, [64, 32, 16])


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Latents (B, C, h, w) of pictures (B, H, W, 3) by any VAE of the host; in tiles as above."""
    return _in_tiles(vae.encode, getattr(vae, "encode_tiled", None), pixels, [512, 256, 128])


def _in_tiles(
    whole: Callable[[Tensor], Tensor], tiled: Callable[..., Tensor] | None, x: Tensor, sides: list[int]
) -> Any:
    """The host tries tiles by itself, but only after its device's own kind of error, and only of one size."""
    with memory_told(Sentence("The VAE"), advice=DRAWING_ADVICE):
        for side in [None, *sides[:-1]] if tiled is not None else []:
            try:
                return whole(x) if side is None else tiled(x, tile_x=side, tile_y=side, overlap=side // 4)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                log.warning("The VAE continues in smaller tiles: out of memory (%s)", reason_of(error))
            mm.soft_empty_cache()
        return whole(x) if tiled is None else tiled(x, tile_x=sides[-1], tile_y=sides[-1], overlap=sides[-1] // 4)


def compute_device() -> torch.device:
    """Where models compute."""
    return mm.get_torch_device()


def vae_bytes(vae: Any, latents: tuple[int, ...]) -> int:
    """What decoding latents of this shape (B, C, h, w) with a native VAE will take at once, by the host's own rule."""
    return int(vae.memory_used_decode(latents, vae.vae_dtype)) if vae is not None else 0


def intermediate_device() -> torch.device:
    """Where values that travel between nodes are kept."""
    return mm.intermediate_device()


class NoOutput(ExecutionBlocker):
    """An output that is not there: what needs it is not run, and its message is shown."""

    def is_dynamic(self) -> bool:
        """See `stays_cached`."""
        return stays_cached()


class ChannelNorm(nn.Module):
    """Stands in for the host VAE's regularizer: the normalized mean of the posterior instead of a sample."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, moments: Tensor) -> tuple[Tensor, None]:
        mean = moments.chunk(2, dim=1)[0]
        return (channel_norm(mean, self.config.psz) if self.config.encoder_norm else mean), None


def native_vae(config: VAEConfig, state: dict[str, Tensor]) -> Any:
    """ComfyUI's own VAE object for a NextStep tokenizer, so that every core VAE node works on it.

    The host recognizes the published shape from its keys. For any other width it is told the shape, in the form that
    has quant convolutions; those are given identity weights.
    """
    stated = None
    if (config.ch, config.ch_mult, config.num_res_blocks) != NATIVE_SHAPE:
        z = config.z_channels
        shape = {
            "double_z": True, "z_channels": z, "resolution": 256, "in_channels": config.in_channels,
            "out_ch": config.out_ch, "ch": config.ch, "ch_mult": list(config.ch_mult),
            "num_res_blocks": config.num_res_blocks, "attn_resolutions": [], "dropout": 0.0,
        }  # fmt: skip
        stated = {"params": {"ddconfig": shape, "embed_dim": z}}
        for name, channels in (("quant_conv", 2 * z), ("post_quant_conv", z)):
            state = state | {
                f"{name}.weight": torch.eye(channels)[:, :, None, None],
                f"{name}.bias": torch.zeros(channels),
            }
    vae = comfy.sd.VAE(sd=dict(state), config=stated)
    vae.latent_channels = config.z_channels
    vae.downscale_ratio = vae.upscale_ratio = config.downscale
    vae.first_stage_model.regularization = ChannelNorm(config)
    for layer in leaves(vae.first_stage_model):  # older hosts look for an interrupt between nodes only
        layer.register_forward_pre_hook(lambda *_: check_interrupt())
    vae.is_dynamic = stays_cached
    return vae


def stays_cached() -> bool:
    """For `is_dynamic` of values that the host's cache is to keep while the workflow that made them is in use.

    Newer hosts drop cached outputs where RAM is short, and our model would be read again, all 27 GB, for the next
    picture. Outputs of the current workflow that say yes to this are spared; those of earlier ones go first, and
    `/free` drops all. A cache of our own could do no better: it would not know which workflow is current, nor of
    `/free`.
    """
    return True
