"""Settings, sizes, counts and input pictures of a request, on the embedded model: at the ends, beyond them, none."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextstep_core import NextStepPipeline
from nextstep_core.decoding.pruning import Pruning
from nextstep_core.loading.store import EMBEDDED
from nextstep_core.sampling.falling import STEPS_SCHEDULES
from nextstep_core.sampling.guidance import SCHEDULES
from nextstep_core.sampling.settings import LOOKAHEAD
from nextstep_core.sampling.solvers import SAMPLERS

from .case import Attempt, Case

NONE: tuple[Any, ...] = (
    None, True, False, "", "4", "\ud800", "x" * 5000, b"4", (), [], [4], {}, {"a": 4}, 4j, object(), type, float("nan"),
    float("inf"), -float("inf"), 10**5000, -(10**400), 2**63, 2**64, -1, 0, 0.0, -0.0, 1e-30, 1e30, 5e-324, 1e308,
    np.int64(4), np.float32(2.5), np.float64("nan"), np.array(4), np.array([4]), torch.tensor(4), torch.tensor([1, 2]),
    range(4), Ellipsis, lambda: 4,
)  # fmt: skip
CHEAP = {"steps": 2, "width": 32, "height": 32, "cfg": 2.0, "seed": 1, "sampler": "flow-ode"}
# Values that make sense, with the ends of their ranges.
GOOD: dict[str, tuple[Any, ...]] = {
    "steps": (1, 2, 3, 5, 60),
    "cfg": (1, 1.0, 1.01, 7.5, 100, 100.0),
    "cfg_img": (1.0, 1.5, 100.0),
    "shift": (0.01, 0.5, 1, 3.2, 100.0),
    "sampler": tuple(SAMPLERS),
    "cfg_schedule": tuple(SCHEDULES),
    "use_norm": (True, False),
    "lookahead": tuple(LOOKAHEAD),
    "steps_schedule": tuple(STEPS_SCHEDULES),
    "seed": (0, 1, 2**31, 2**64 - 1),
    "width": (16, 32, 48, 80, 128),
    "height": (16, 32, 48, 80, 128),
    "num_images_per_prompt": (1, 2, 3),
    "vae_tile": (None, 128, 4096),
}
# And such that nearly do: just beyond an end, or far beyond it.
NEARLY: dict[str, tuple[Any, ...]] = {
    "steps": (0, 1001, 10**6, 2.0, 2.5),
    "cfg": (0.99, 100.1, 1e30),
    "cfg_img": (0.5, 101),
    "shift": (0.0099, 101, 1e-30),
    "sampler": ("auto", "Flow-ODE", "euler"),
    "cfg_schedule": ("cosine", "Linear"),
    "use_norm": ("on", 1),
    "lookahead": ("on", True, "Exact"),
    "steps_schedule": ("auto", "Linear", True),
    "seed": (-1, 2**64, 1.0, [1], [1, 2], (3, 4, 5), range(2), [1, 2.0], [[1]]),
    "width": (15, 17, 40, 4112, 10**9, 32.0),
    "height": (8, 24, 4097, 2**40),
    "num_images_per_prompt": (0, 4097, 10**9),
    "vae_tile": (0, 64, 130, 10**6),
}
pipelines: dict[str, NextStepPipeline] = {}


def pipeline() -> NextStepPipeline:
    """The embedded model, loaded once in a process."""
    if EMBEDDED not in pipelines:
        pipelines[EMBEDDED] = NextStepPipeline.from_pretrained(EMBEDDED, dtype=torch.float32)
    return pipelines[EMBEDDED]


def warm_up() -> None:
    pipeline().generate("<image>x", images=torch.rand(32, 32, 3), **CHEAP)


def case(rng: Random) -> Case:
    request: dict[str, Any] = dict(CHEAP)
    for name in rng.sample(sorted(GOOD), rng.choice((1, 2, 3, 4, 12))):
        request[name] = rng.choice(GOOD[name])
    for name in rng.sample(sorted(GOOD), rng.choice((0, 1, 1, 2))):
        request[name] = rng.choice((*NEARLY[name], *NONE))
    if rng.random() < 0.25:
        request |= _pictures(rng)
    if rng.random() < 0.1:
        request["callback"] = lambda progress: None
    if rng.random() < 0.15:
        shares, choices = (1 / 3, 0.01, 1, 1.0, *NONE), ([0], [0], [0, 1], [1, 0], [2, -1], [0, 0], *NONE)
        request["prune"] = rng.choice(shares), rng.choice(choices)
    # As large as the model can hold, and with ever so many steps, is right, but no case waits for it.
    if isinstance(request.get("steps"), int) and 60 < request["steps"] <= 1000:
        request["steps"] = 60
    what = ", ".join(f"{name}: {_shown(value)}" for name, value in request.items() if CHEAP.get(name) is not value)
    return Case(what, _attempt(request), None)


def _attempt(request: dict[str, Any]) -> Attempt:
    prompt, prune = request.pop("prompt", "a red circle"), request.pop("prune", None)

    def attempt(_: object) -> Tensor:
        pruning = None if prune is None else Pruning(prune[0], lambda pictures: prune[1])
        return pipeline().generate(prompt, prune=pruning, **request).images

    return attempt


def _pictures(rng: Random) -> dict[str, Any]:
    """Slots and what is to fill them, which may be as many."""
    slots = rng.choice((0, 1, 1, 1, 2, 3))
    images = [any_picture(rng) for _ in range(rng.choice((slots, slots, slots, slots + 1)))]
    given: Any = rng.choice((images, images, tuple(images), images[0] if len(images) == 1 else images))
    words = rng.choice(("x", "x", "x<|image_placeholder|>", "<|image_area|>2*2"))
    return {"prompt": "<image>" * slots + words, "images": rng.choice((given, given, given, given, rng.choice(NONE)))}


def any_picture(rng: Random) -> Any:
    shape = [
        rng.choice((16, 32, 48, 32, 32, 0, 1, 17, 4112)),
        rng.choice((16, 32, 48, 1)),
        rng.choice((3, 3, 4, 1, 2, 5, 0)),
    ]
    if rng.random() < 0.1:
        shape = rng.choice(([], [3], [32, 32], [1, 32, 32, 3], [0, 32, 32, 3], [1, 1, 32, 32, 3]))
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    picture: Tensor = torch.rand(shape, generator=generator)
    changes = (
        lambda p: p, lambda p: p, lambda p: p, lambda p: p.double(), lambda p: p.half(), lambda p: p.bfloat16(),
        lambda p: (p * 255).byte(), lambda p: p * float("nan"), lambda p: p / 0, lambda p: p * 1e30, lambda p: -p,
        lambda p: p.numpy(), lambda p: p.numpy().astype(object), lambda p: p.to_sparse(), lambda p: p.to("meta"),
        lambda p: p.to(torch.complex64), lambda p: p.requires_grad_(), lambda p: p.tolist(), lambda p: rng.choice(NONE),
        lambda p: p.numpy().astype(">f4"), lambda p: np.ma.masked_array(p.numpy()), lambda p: p.transpose(0, -1),
    )  # fmt: skip
    return rng.choice(changes)(picture)


def _shown(value: Any) -> str:
    try:
        return repr(value)[:60]
    except ValueError:  # a number of so many digits that Python prints none of them
        return "a long number"
