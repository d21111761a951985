"""Several processes that train one model, each on its own share of every batch.

On a CPU, one process with one thread per core gets much more out of a small model than one process with many threads,
which would meet after every operation instead of once a step.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn


@dataclass(frozen=True)
class Team:
    """This process's place among the workers."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this worker prints, saves and evaluates."""
        return self.rank == 0

    def average(self, parameters: Iterable[nn.Parameter], value: float) -> float:
        """Average the gradients over all workers, and with them one number, which is returned."""
        if self.size == 1:
            return value
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([*(g.flatten() for g in gradients), torch.tensor([value])])
        distributed.all_reduce(flat)
        flat /= self.size
        for gradient, part in zip(gradients, flat[:-1].split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        return float(flat[-1])


def run_team(size: int, port: int, work: Callable[[Team, Any], None], arguments: Any) -> None:
    """Call work(team, arguments) in `size` processes of one thread each, or right here for one."""
    if size == 1:
        work(Team(), arguments)
        return
    torch.multiprocessing.spawn(_join, args=(size, port, work, arguments), nprocs=size)


def _join(rank: int, size: int, port: int, work: Callable[[Team, Any], None], arguments: Any) -> None:
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=size)
    work(Team(rank, size), arguments)
    distributed.destroy_process_group()


def _leave_with_the_parent() -> None:
    """Without it, workers would train on beside those of the next start when their parent is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
