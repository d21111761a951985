"""A case of every outcome, in turn: what the runner is tested with."""

from __future__ import annotations

import os
import signal
import time
from random import Random

import torch
from torch import Tensor

from nextstep_core import NextStepError

from .case import Case
from .outcome import BAD, BLACK, DEATH, FINE, GOOD, HANG, MEMORY, OWN, PICTURE

WAYS = (*GOOD, *BAD)
SHAPE = (2, 4, 4, 3)


def case(rng: Random) -> Case:
    way = rng.choice(WAYS)
    return Case(way, lambda _: attempt(way), SHAPE)


def attempt(way: str) -> Tensor | None:
    if way == OWN:
        raise NextStepError("The sample is wrong. Take another.")
    if way == FINE:
        return None
    if way == HANG:
        time.sleep(1000)
    if way == DEATH:
        os.kill(os.getpid(), signal.SIGKILL)
    if way == MEMORY:
        bytearray(300 << 20)
        return None
    pictures = torch.rand(SHAPE)
    if way == BLACK:
        pictures[1] = 0
    return pictures if way in (PICTURE, BLACK) else pictures[:, :2]
