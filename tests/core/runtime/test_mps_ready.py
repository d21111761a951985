"""Nothing that the engine does needs more than PyTorch has for Apple GPUs, shown without one.

Whole runs on a simulated device: their operators, dtypes and devices are checked, and they draw the CPU's pictures.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch._dynamo  # noqa: F401  PyTorch loads it for every dispatch mode, and looks at CUDA while it does
from simulated_mps import MPS, SimulatedMPS, names_with_mps_kernel
from torch import Tensor

from nextstep_core import NextStepPipeline
from nextstep_core.decoding.job import KnownTokens
from nextstep_core.images.preview import fit_latent_to_rgb, latents_to_rgb
from nextstep_core.images.tiling import run_in_tiles
from nextstep_core.request.layout import Caption
from nextstep_core.request.masks import kept_tokens
from nextstep_core.runtime.quantization import products
from nextstep_core.runtime.quantization.formats import INT4
from nextstep_core.runtime.quantization.layouts import Swapped
from nextstep_core.sampling.solvers import SAMPLERS

Load = Callable[..., NextStepPipeline]

REFERENCE = Path(__file__).resolve().parents[2] / "data" / "golden" / "tiny-a"
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # the two lay some tensors out differently in memory
SMALL = {"height": 32, "width": 48, "steps": 3, "cfg": 2.0, "seed": 1}
# What the model was trained on: a rounding does not make another picture of it.
KNOWN = SMALL | {"height": 64, "width": 64, "steps": 6, "seed": 2}
KNOWN_PROMPTS = ["a red circle on a blue background", "a small blue square on a white background"]
WIDE = torch.rand(32, 160, 3, generator=torch.Generator().manual_seed(0))
PICTURE = torch.rand(32, 48, 3, generator=torch.Generator().manual_seed(0))


def text_to_image(
    pipe: NextStepPipeline,
    size: dict[str, Any] = SMALL,
    prompts: Sequence[str] = ("a red circle", "a small blue square on the left"),
) -> list[Tensor]:
    """Two captions of different lengths with every sampler; all but the first find their prompt in the cache."""
    return [pipe.generate(list(prompts), **size, sampler=name, use_norm=True).images for name in SAMPLERS]


def edit(pipe: NextStepPipeline) -> list[Tensor]:
    return [pipe.generate("<image>make it green", images=PICTURE, **SMALL, cfg_img=1.5).images]


@torch.inference_mode()
def masked(pipe: NextStepPipeline) -> list[Tensor]:
    grid, mask = (2, 3), torch.zeros(32, 48)
    mask[:16, 16:] = 1
    known = KnownTokens(pipe.encode_image(PICTURE).tokens[None], kept_tokens(mask, grid))
    settings = pipe.engine.recommended().override(steps=3)
    job = pipe.engine.make_job([Caption("a red circle")], grid, settings, seed=2, known=known)
    *_, progress = pipe.engine.decode(job, pipe.device, pipe.dtype)
    return [progress.tokens.cpu()]


@torch.inference_mode()
def vae(pipe: NextStepPipeline, tile: int | None = None) -> list[Tensor]:
    run = partial(run_in_tiles, tile=tile)

    def encode(images: Tensor) -> Tensor:
        pixels = images.movedim(-1, 1).to(pipe.device, pipe.dtype) * 2 - 1
        mean, logvar = pipe.vae.encode_moments(pixels, run)
        pipe.vae.posterior_std(logvar)
        return mean

    latents = encode(WIDE[None])
    # The colors that a preview shows, not the map to them: of a VAE with random weights it is hardly determined.
    colors = latents_to_rgb(latents, fit_latent_to_rgb(encode), [latents.shape[-2]] * len(latents))
    return [pipe.vae.decode(latents, run).cpu(), colors.float() / 255]


def like_published(load: Load) -> NextStepPipeline:
    """The reference checkpoint, told to add generation codes and to sample the posterior, as published ones do."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        copy = Path(shutil.copytree(REFERENCE, Path(folder) / "tiny-a"))
        for path, change in ((copy, {"use_gen_pos_embed": True}), (copy / "vae", {"deterministic": False})):
            config = json.loads((path / "config.json").read_text()) | change
            (path / "config.json").write_text(json.dumps(config))
        return load(copy)


# `load` is `from_pretrained`, with device and dtype given.
RUNS: dict[str, Callable[[Load], list[Tensor]]] = {
    "text to image": lambda load: text_to_image(load("tiny")),
    "edit": lambda load: edit(load("tiny")),
    "edit like a published checkpoint": lambda load: edit(like_published(load)),
    "masked": lambda load: masked(load("tiny")),
    "vae": lambda load: vae(load("tiny")),
    "vae in tiles": lambda load: vae(load("tiny"), tile=128),
    "int8": lambda load: text_to_image(load("tiny", quantization="int8")),
    "int4": lambda load: text_to_image(load("tiny", quantization="int4"), KNOWN, KNOWN_PROMPTS),
}


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever asks CUDA for more than whether it is there fails, also on a machine that has it."""

    def absent(*_args, **_kwargs):
        raise AssertionError("CUDA was called for a tensor that is not on it")

    for name, value in vars(torch.cuda).items():
        runs = inspect.isfunction(value) or (inspect.isclass(value) and not issubclass(value, Exception))
        if runs and not name.startswith("_"):
            monkeypatch.setattr(torch.cuda, name, absent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # much faster on models this small


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", RUNS)
def test_every_operator_has_an_mps_kernel_for_its_tensors(name: str, dtype: torch.dtype, no_cuda) -> None:
    run = RUNS[name]
    rounding = ROUNDING[torch.bfloat16 if name == "int4" else dtype]  # the CPU's packed product rounds its input
    load = partial(NextStepPipeline.from_pretrained, dtype=dtype)
    expected = run(load)
    with SimulatedMPS() as mps:
        results = run(partial(load, device=MPS))
    assert not mps.problems, "\n".join(sorted(mps.problems))
    assert {"linear", "_mps_convolution", "_fused_rms_norm"} & mps.used.keys(), "the model ran on the device"
    assert not {"normal_", "randn", "embedding"} & mps.used.keys(), "noise and text stay on the host"
    for ours, theirs in zip(results, expected, strict=True):
        assert type(ours) is Tensor and ours.device.type == "cpu"
        assert (ours.float() - theirs.float()).abs().mean() <= rounding, "the same picture as on the CPU"


def test_the_packed_products_are_there_for_mps() -> None:
    """int4 packs with operators that a CPU lacks, so that the run above multiplies by dequantized weights instead."""
    assert {"_convert_weight_to_int4pack", "_weight_int4pack_mm", "_weight_int8pack_mm"} <= names_with_mps_kernel()


@torch.inference_mode()
def test_many_rows_undo_the_packed_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its product goes through the weights once for each row. The layout is recognized from what PyTorch packs, for
    which the one of its kernel for Apple GPUs stands here."""
    weight, scale = INT4.quantize(torch.randn(32, 256, generator=torch.Generator().manual_seed(0)))
    monkeypatch.setattr(products, "_pack_for_gpu", Swapped("as PyTorch packs", 256, tiled=True).pack)
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(1))
    with SimulatedMPS() as mps:
        base = products.usual(INT4, "mps")[0]
        many = {kernel.name: kernel for kernel in products.racing(INT4, base, weight.to(MPS))}["torch-int4-unpacked"]
        found = many.run(x.to(MPS), many.packed(weight.to(MPS)), scale.to(MPS)).cpu()
    assert many.lies == base.lies and not mps.problems, mps.problems
    assert (found - x @ INT4.dequantize(weight, scale, x.dtype).T).abs().max() <= 1e-4


REFUSED = {
    "zero_ works on torch.float64": lambda: torch.zeros(2, device=MPS, dtype=torch.float64),
    "_copy_from works on torch.float64": lambda: torch.ones(2, dtype=torch.float64).to(MPS),
    "_copy_from works on torch.complex64": lambda: torch.ones(2, dtype=torch.complex64).to(MPS),
    "linalg_ldl_factor_ex has no MPS kernel": lambda: torch.linalg.ldl_factor_ex(torch.eye(2, device=MPS)),
    "add.Tensor mixes tensors of the host and of the device": lambda: torch.ones(2, device=MPS) + torch.ones(2),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_the_simulation_refuses_what_a_mac_refuses(problem: str) -> None:
    with torch.inference_mode(), SimulatedMPS() as mps:
        REFUSED[problem]()
    assert problem in mps.problems


def test_host_work_is_not_held_against_the_device() -> None:
    with torch.inference_mode(), SimulatedMPS() as mps:
        total = torch.linalg.lstsq(torch.eye(3).double(), torch.ones(3, 1).double()).solution.sum().item()
    assert (total, mps.used, mps.problems) == (3.0, {}, set())
