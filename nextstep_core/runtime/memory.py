"""The memory of a run as arithmetic: how many pictures at once, and which share of the weights stays on the device."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from ..errors import NextStepError
from ..ranges import Range
from ..sentences import Sentence

# What a pipeline may take of its device. Nothing can be drawn in less, and a number of gigabytes is told from bytes.
MAX_MEMORY = Range("max_memory", 1_000_000, 1 << 50, Sentence("in bytes"))
DEVICE_HAS = Sentence("the device has")


@dataclass(frozen=True)
class MemoryPlan:
    """What a run will take, in bytes: weights in all and on the device, and working memory for so many pictures."""

    weights: int
    resident: int
    working: int
    at_once: int

    def __str__(self) -> str:
        where, streamed = "", self.weights - self.resident
        if streamed:
            where = f" ({format_bytes(self.resident)} on the device, {format_bytes(streamed)} streamed from the host)"
        return f"weights {format_bytes(self.weights)}{where}, KV cache and activations {format_bytes(self.working)}"


def format_bytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def plan_memory(
    weights: int,
    room: int,
    pictures: int,
    each: int,
    streamed: int,
    *,
    spare: int = 0,
    stay: bool = True,
    whose: Sentence = DEVICE_HAS,
    beside: int = 0,
) -> MemoryPlan:
    """How many of `pictures` to draw together, each needing `each` bytes beside the weights, and what stays where.

    All sizes are in bytes: `weights` of the model, `room` that the device has for it, `streamed`, the room that weights
    pass through when not all of them stay on the device, `spare`, what has to be left beside those that stay, and
    `beside`, what a run takes however many pictures it draws. Without `stay` all are streamed. NextStepError when not
    even one picture fits; `whose` says there whose room it is.
    """
    room -= beside
    if each + min(streamed, weights) > room:
        raise NextStepError(
            "One picture needs {each} of working memory and {streamed} for streaming weights; {whose} "
            "{room}. Choose a smaller size, or load the model with quantization int4.",
            each=format_bytes(each),
            streamed=format_bytes(streamed),
            whose=whose,
            room=format_bytes(max(0, room)),
        )
    held = weights if stay else streamed
    at_once = max(1, min(pictures, (room - held) // max(1, each)))
    working = at_once * each
    if stay and weights + max(working, spare) <= room:
        return MemoryPlan(weights, weights, working + beside, at_once)
    working += streamed
    return MemoryPlan(weights, max(0, room - max(working, spare)) if stay else 0, working + beside, at_once)


def spare_bytes(swapping: bool = False) -> int:
    """What the computer can give without swapping, or in all. Linux alone has to be asked: it kills where others
    refuse."""
    table = Path("/proc/meminfo")
    if not table.exists():
        return sys.maxsize
    entries = dict(line.split(":") for line in table.read_text().splitlines())
    asked = ("MemAvailable", "SwapFree") if swapping else ("MemAvailable",)
    return sum(int(entries[name].split()[0]) * 1024 for name in asked)


def check_room(needed: int, what: Sentence) -> None:
    """NextStepError when `what` takes more of the computer's memory than it can give."""
    if needed > (room := spare_bytes(swapping=True)):
        raise NextStepError(
            "{what} would take {needed} of memory; the computer has {room} left. Choose a smaller size or "
            "fewer pictures.",
            what=what,
            needed=format_bytes(needed),
            room=format_bytes(room),
        )


def plan_host_memory(weights: int, free: int, pictures: int, each: int) -> MemoryPlan:
    """The plan for a CPU, where all weights lie already and `free` bytes are left. One picture may swap; NextStepError
    when it does not even fit with that."""
    check_room(each, Sentence("One picture"))
    at_once = max(1, min(pictures, free // max(1, each)))
    return MemoryPlan(weights, weights, at_once * each, at_once)


def plan_within(limit: int, weights: int, pictures: int, each: int) -> MemoryPlan:
    """The plan for a CPU that is to take no more than `limit` bytes in all. NextStepError when one picture takes more:
    weights lie in that memory already, so there is nothing to stream."""
    if weights + each > limit:
        raise NextStepError(
            "On a CPU a picture takes {weights} for the weights, which cannot be streamed there, and {each} of working "
            "memory; max_memory leaves {room}. Choose quantization int8 or int4, a smaller size, or more memory.",
            weights=format_bytes(weights),
            each=format_bytes(each),
            room=format_bytes(max(0, limit)),
        )
    return plan_host_memory(weights, limit - weights, pictures, each)
