"""Widgets that several nodes share, and what their values mean."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from comfy_api.latest import io

from ..nextstep_core.decoding.job import BATCH_SIZE
from ..nextstep_core.errors import check_choice
from ..nextstep_core.images.latents import HEIGHT, PUBLISHED_LATENTS, WIDTH
from ..nextstep_core.ranges import Range
from ..nextstep_core.request.sizes import BASES
from ..nextstep_core.sampling.falling import STEPS_SCHEDULES
from ..nextstep_core.sampling.guidance import SCHEDULES
from ..nextstep_core.sampling.settings import CFG, CFG_IMG, LOOKAHEAD, OFF, SEED, SHIFT, STEPS, GenerationSettings
from ..nextstep_core.sampling.solvers import SAMPLERS
from .language import Node

AUTO = "auto"
USE_NORM = {AUTO: None, "on": True, "off": False}
FIT, NEAREST, KEEP_SIZE = "width and height", "nearest aspect ratio", "keep"
SIZES = (NEAREST, FIT, KEEP_SIZE)


def known_to(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Those of `values` that a dataclass has fields for. The host checks no link to an input that a node has not, and
    hands its value over as it does the others."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def with_widgets(settings: GenerationSettings, *, use_norm: str = AUTO, **widgets: Any) -> GenerationSettings:
    """Settings under a node's widgets; "auto" and None leave what is there. NextStepError when they make no sense."""
    check_choice("use_norm", use_norm, USE_NORM)
    left = {name: None for name in ("sampler", "steps_schedule") if widgets.get(name) == AUTO}
    return settings.override(use_norm=USE_NORM[use_norm], **widgets | left)


class DrawingNode(Node):
    """What all nodes that draw share: their sampling widgets are checked when the graph is queued."""

    @classmethod
    def validate_inputs(
        cls,
        steps: int | None = None,
        cfg: float | None = None,
        shift: float | None = None,
        cfg_schedule: str | None = None,
        sampler: str | None = None,
        cfg_img: float | None = None,
        lookahead: str | None = None,
        steps_schedule: str | None = None,
    ) -> bool | str:
        """NextStepError for what is wrong. None is a widget that is linked and so not known yet, or one the node
        lacks."""
        base = GenerationSettings(sampler="flow-ode")  # the one that can take any number of steps
        with_widgets(
            base,
            steps=steps,
            cfg=cfg,
            cfg_img=cfg_img,
            shift=shift,
            cfg_schedule=cfg_schedule,
            sampler=sampler,
            lookahead=lookahead,
            steps_schedule=steps_schedule,
        )
        return True


def base_of(choice: object) -> int:
    """The number of pixels that a base's name stands for; NextStepError when it is none."""
    check_choice("base", choice, map(str, BASES))
    return int(str(choice))


def ends(number: Range[Any]) -> dict[str, Any]:
    """A range as a widget takes it."""
    return {"min": number.minimum, "max": number.maximum}


def setting_inputs(steps: int, shift: float) -> list[io.Input]:
    """The sampling widgets that all nodes that draw share."""
    return [
        io.Int.Input(
            SEED.name,
            default=0,
            **ends(SEED),
            control_after_generate=True,
            tooltip="One seed gives one picture on every device, as long as the weights are stored in one format.",
        ),
        io.Int.Input(
            STEPS.name,
            default=steps,
            **ends(STEPS),
            tooltip="Flow steps per token. Published: 28 for NextStep-1.1 and the Pretrain checkpoints, 50 for "
            "NextStep-1-Large and -Edit.",
        ),
        io.Float.Input(
            CFG.name,
            default=7.5,
            **ends(CFG),
            step=0.1,
            round=0.01,
            tooltip="Guidance: how closely the prompt is followed. 1 turns it off and halves the work; 7.5 is the "
            "published setting.",
        ),
        io.Combo.Input(
            "cfg_schedule",
            options=list(SCHEDULES),
            default="constant",
            tooltip="Guidance from the top of the picture to its bottom: the same everywhere, falling to 1 (linear), "
            "or rising from half (linear-rise).",
        ),
        io.Float.Input(
            SHIFT.name,
            default=shift,
            **ends(SHIFT),
            step=0.1,
            round=0.01,
            tooltip="Timestep shift: above 1 spends more steps on coarse structure. Published: 1.0; 3.2 for editing.",
        ),
        io.Combo.Input(
            "sampler",
            options=[AUTO, *SAMPLERS],
            default=AUTO,
            tooltip="How a token is sampled from noise. auto takes what the checkpoint was published with. "
            + " ".join(f"{name}: {sampler.about}." for name, sampler in SAMPLERS.items()),
        ),
        io.Combo.Input(
            "use_norm",
            options=list(USE_NORM),
            default=AUTO,
            tooltip="Normalize every token after sampling. auto takes what the checkpoint was published with.",
        ),
    ]


def cfg_img_input() -> io.Input:
    """The widget for guidance by the input picture."""
    return io.Float.Input(
        CFG_IMG.name,
        default=2.0,
        **ends(CFG_IMG),
        step=0.1,
        round=0.01,
        optional=True,
        tooltip="Editing only: how closely the input picture is followed. 1 turns it off; published: 1.5 to 2.0.",
    )


def lookahead_input() -> io.Input:
    """The widget for drawing several squares at a time."""
    return io.Combo.Input(
        "lookahead",
        options=list(LOOKAHEAD),
        default=OFF,
        optional=True,
        tooltip="Draw several squares each time the weights are read. exact: the picture stays the same but for "
        "rounding. fast: fewer reads, and the picture may differ. How many at a time is found by timing your device; "
        "on a CPU it gains little.",
    )


def steps_schedule_input() -> io.Input:
    """The widget for fewer flow steps where they change little."""
    return io.Combo.Input(
        "steps_schedule",
        options=[AUTO, *STEPS_SCHEDULES],
        default=AUTO,
        optional=True,
        tooltip="Fewer flow steps where they change little. checked: a square is finished as soon as little of it is "
        "undecided. linear, square: later squares take fewer, down to two fifths, falling evenly or early. auto takes "
        "what the checkpoint was published with.",
    )


def side_inputs() -> list[io.Input]:
    """Width and height in pixels."""
    unit = PUBLISHED_LATENTS.unit
    return [
        io.Int.Input(side.name, default=512, **ends(side), step=unit, tooltip=f"In pixels, a multiple of {unit}.")
        for side in (WIDTH, HEIGHT)
    ]


def check_sides(width: int | None, height: int | None) -> None:
    """NextStepError for a size that cannot be; None is a side that is linked and so not known yet."""
    if width is not None and height is not None:
        PUBLISHED_LATENTS.grid(height, width)
    elif width is not None:
        PUBLISHED_LATENTS.check_side(WIDTH, width)
    elif height is not None:
        PUBLISHED_LATENTS.check_side(HEIGHT, height)


def canvas_inputs() -> list[io.Input]:
    """Width, height and batch size of an empty canvas."""
    batch = io.Int.Input(
        BATCH_SIZE.name, default=1, **ends(BATCH_SIZE), tooltip="Pictures per run, each with its own noise."
    )
    return [*side_inputs(), batch]


def size_inputs() -> list[io.Input]:
    """The widgets that say to which size a picture is brought before it is edited."""
    return [
        io.Combo.Input(
            "size",
            options=list(SIZES),
            default=NEAREST,
            tooltip="How the picture is resized. nearest aspect ratio: the closest of the 17 trained ratios, about as "
            "large as width x height. width and height: exactly those. keep: its own size, cropped to multiples of 16. "
            "What does not fit is cropped evenly on both sides.",
        ),
        *side_inputs(),
    ]
