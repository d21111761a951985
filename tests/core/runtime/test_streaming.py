"""Weights that do not lie on the device: the same tokens, and everything back in its place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from simulated_mps import MPS, SimulatedMPS
from torch import Tensor

from nextstep_core import NextStepPipeline
from nextstep_core.decoding.progress import Progress
from nextstep_core.loading.build import make_ready
from nextstep_core.request.layout import Caption
from nextstep_core.runtime.quantization import quantize_model
from nextstep_core.runtime.streaming import streamed_bytes

CPU = torch.device("cpu")
PLACEMENTS = {
    "nothing": lambda name: False,
    "every other layer": lambda name: name.startswith("layers.") and int(name.split(".")[1]) % 2 == 0,
    "all but one layer": lambda name: not name.startswith("layers.2."),
    "large matrices only": lambda name: "mlp.gate_up_proj" in name,
    "layers on the device, the rest on the host": lambda name: name.startswith("layers."),
    "everything": lambda name: True,
}


def load(recipe: str | None) -> NextStepPipeline:
    pipe = NextStepPipeline.from_pretrained("tiny", dtype=torch.float32)
    if recipe is not None:
        quantize_model(pipe.engine.model, recipe, CPU)
        make_ready(pipe.engine.model, CPU, torch.float32)
    return pipe


def draw(pipe: NextStepPipeline, device: torch.device, each: Callable[[Progress], None] = lambda _: None) -> Tensor:
    settings = pipe.engine.recommended().override(steps=3, cfg=2.0)
    job = pipe.engine.make_job([Caption("a red circle")], (2, 3), settings, seed=1)
    for progress in pipe.engine.decode(job, device, torch.float32):
        each(progress)
    return progress.tokens.cpu()


def place_weights(pipe: NextStepPipeline, on_device: Callable[[str], bool]) -> None:
    """Move the parameters whose name `on_device` accepts to the simulated device, and leave the rest on the host."""
    for name, parameter in list(pipe.engine.model.named_parameters()):
        if on_device(name):
            module, _, own = name.rpartition(".")
            pipe.engine.model.get_submodule(module)._parameters[own] = parameter.to(MPS)


def places(pipe: NextStepPipeline) -> dict[str, tuple[str, int]]:
    """Where every parameter lies, and which tensor it is; the projectors that are bare modules included."""
    modules = pipe.engine.model.named_modules()
    return {
        f"{n}.{own}": (str(p.device), id(p)) for n, m in modules for own, p in m._parameters.items() if p is not None
    }


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("placement", "recipe"),
    [
        ("every other layer", None),
        *(pytest.param(name, None, marks=pytest.mark.slow) for name in PLACEMENTS if name != "every other layer"),
        pytest.param("every other layer", "int8", marks=pytest.mark.slow),
    ],
)
@torch.inference_mode()
def test_streamed_weights_draw_the_same_tokens(placement: str, recipe: str | None) -> None:
    expected = draw(load(recipe), CPU)
    with SimulatedMPS() as mps:
        pipe = load(recipe)
        place_weights(pipe, PLACEMENTS[placement])
        before = places(pipe)
        drawn = draw(pipe, MPS)
        assert places(pipe) == before

        def stop(progress: Progress) -> None:
            if progress.done == 2:
                raise Stop

        with pytest.raises(Stop):
            draw(pipe, MPS, stop)
        assert places(pipe) == before, "also after an interrupt"
    assert not any("mixes" in problem for problem in mps.problems)
    assert (drawn - expected).abs().max() <= 1e-5


@torch.inference_mode()
def test_at_most_two_layers_are_guests_at_a_time() -> None:
    pipe, most = load(None), 0
    model = pipe.engine.model

    def on_device(module: torch.nn.Module) -> bool:
        return any(p.device == MPS for m in module.modules() for p in m._parameters.values() if p is not None)

    def count(*_: object) -> None:
        nonlocal most
        most = max(most, sum(map(on_device, model.layers)))
        assert all(map(on_device, (model.head, model.image_in_projector, model.norm))), "read at every token"

    with SimulatedMPS():
        for layer in model.layers:
            layer.self_attn.register_forward_pre_hook(count)
        draw(pipe, MPS)
    assert most == 1
    others = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("layers."))
    assert streamed_bytes(model) == others + 2 * sum(p.nbytes for p in model.layers[0].parameters())
