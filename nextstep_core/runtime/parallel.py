"""One picture by several processes, each with a device of its own and its share of every layer (tensor parallelism).

Method: Shoeybi et al., "Megatron-LM" (2019). Of a layer a process has some of the attention heads and some of the
MLP's columns, with all that only they need: rows of the matrices that go in, and columns of the one that comes out.
What that gives is a part of a sum, and adding the parts up is all that is exchanged, twice a layer. So the share of a
model is a model with fewer heads and a narrower MLP, and the networks need not know.

The flow head is the same everywhere: a picture reads it for every step, with so little work that waiting for others
would take longer. Each process draws every token, from the same noise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NextStepError, check_choice
from ..model.config import NextStepConfig
from ..model.nextstep import NextStepModel
from .devices import best_device
from .graphs import RUNS_PLAIN

ROWS, COLUMNS = 0, 1  # the axes of a matrix
GIVEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells a process
SUMMED = ("self_attn.o_proj", "mlp.down_proj")  # the layers whose outputs are parts of a sum
DEVICES = ("auto", "cuda", "cpu")
SPOKEN = "nextstep/spoken"  # under which the first process that fails puts its number
START = "torchrun --nproc-per-node 2 -m nextstep_core generate ... --tensor-parallel"


@dataclass(frozen=True)
class Cut:
    """What a process has of a matrix: along `axis`, from `start` to `stop`."""

    axis: int
    start: int
    stop: int


@dataclass(frozen=True)
class Share:
    """What process `rank` of `count` has of a model."""

    rank: int
    count: int

    def of(self, config: NextStepConfig) -> NextStepConfig:
        """The config of the share; NextStepError where the layers cannot be cut into so many."""
        heads, kv_heads, inner = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
        if not _can_be_cut(config, self.count):
            raise NextStepError(
                "{count} processes cannot share this model: it has {heads} attention heads in {groups} groups, and "
                "{inner} columns in its MLP. Start {possible} instead.",
                count=self.count,
                heads=heads,
                groups=kv_heads,
                inner=inner,
                possible=", ".join(map(str, counts(config))),
            )
        return replace(
            config,
            num_attention_heads=heads // self.count,
            num_key_value_heads=max(1, kv_heads // self.count),
            intermediate_size=inner // self.count,
        )

    def cuts(self, config: NextStepConfig) -> dict[str, Cut]:
        """What is cut of a layer of the whole model, by the name that a matrix has in checkpoints."""
        own, dim = self.of(config), config.head_dim
        queries = self._part(own.num_attention_heads * dim)
        # Where there are more processes than heads with keys, neighbours have the same.
        first = self.rank * config.num_key_value_heads // self.count
        keys = first * dim, (first + own.num_key_value_heads) * dim
        inner = self._part(own.intermediate_size)
        return {
            "q_proj": Cut(ROWS, *queries),
            "k_proj": Cut(ROWS, *keys),
            "v_proj": Cut(ROWS, *keys),
            "o_proj": Cut(COLUMNS, *queries),
            "gate_proj": Cut(ROWS, *inner),
            "up_proj": Cut(ROWS, *inner),
            "down_proj": Cut(COLUMNS, *inner),
        }

    def _part(self, size: int) -> tuple[int, int]:
        return self.rank * size, (self.rank + 1) * size


def counts(config: NextStepConfig) -> Iterator[int]:
    """How many processes can share a model, from 2 on."""
    return (count for count in range(2, config.num_attention_heads + 1) if _can_be_cut(config, count))


def _can_be_cut(config: NextStepConfig, count: int) -> bool:
    kv_heads = config.num_key_value_heads
    of_keys = kv_heads % count == 0 or count % kv_heads == 0  # a part of them each, or each by several
    return of_keys and config.num_attention_heads % count == 0 and config.intermediate_size % count == 0


def exchanged_bytes(config: NextStepConfig, rows: int, dtype: torch.dtype) -> int:
    """Bytes of the sums that every process takes part in for one position of so many rows of the batch."""
    return 2 * config.num_hidden_layers * rows * config.hidden_size * dtype.itemsize


class Ranks:
    """The processes that draw one picture together, as one of them sees it. `exchanged` counts the bytes of the sums
    that it took part in."""

    def __init__(self, share: Share, device: torch.device, store: Any) -> None:
        self.share, self.device, self._store = share, device, store
        self.exchanged = 0

    @classmethod
    def join(cls, device: str = "auto") -> Ranks:
        """Meet the others, as torchrun says; NextStepError where it did not start this process.

        `device` is cuda (the one of this process's number), cpu, or auto.
        """
        if not all(name in os.environ for name in GIVEN):
            raise NextStepError(
                "Several processes draw one picture. Start them with torchrun: {command}", command=START
            )
        check_choice("--device", device, DEVICES)
        kind = best_device().type if device == "auto" else device
        local = int(os.environ["LOCAL_RANK"])
        there = torch.cuda.device_count() if kind == "cuda" else None
        if there is not None and local >= there:
            raise NextStepError(
                "There are {there} GPUs, and this is process {number}. Start one for each at most.",
                there=there,
                number=local + 1,
            )
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        at = torch.device("cpu") if there is None else torch.device("cuda", local)
        backend = "nccl" if there is not None and dist.is_nccl_available() else "gloo"
        if there is not None:
            torch.cuda.set_device(at)
        store, rank, count = next(iter(rendezvous("env://")))
        dist.init_process_group(backend, store=store, rank=rank, world_size=count)
        return cls(Share(rank, count), at, store)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.share.rank == 0

    def exchange(self, model: NextStepModel) -> None:
        """Have the layers of a share add up what the processes come to."""
        for number in range(len(model.layers)):
            for name in SUMMED:
                model.get_submodule(f"layers.{number}.{name}").register_forward_hook(self._summed)
        setattr(model.layers, RUNS_PLAIN, True)

    def _summed(self, _module: nn.Module, _inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        import torch.distributed as dist

        dist.all_reduce(out)
        self.exchanged += out.nbytes
        return out

    def agree(self, number: int) -> int:
        """The least number that any process has; all must ask."""
        import torch.distributed as dist

        least = torch.tensor(number, device=self.device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least)

    def speaks(self) -> bool:
        """Whether this process is the first that failed, which says why. What the others see is that it is gone."""
        key, mine = f"{SPOKEN}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", str(self.share.rank)
        try:
            return bool(self._store.compare_set(key, "", mine) == mine.encode())
        except RuntimeError:  # whoever kept the store is gone
            return True

    def leave(self) -> None:
        """Part from the others, when all are done."""
        import torch.distributed as dist

        dist.barrier()
        dist.destroy_process_group()


def not_shared(what: str) -> NextStepError:
    """The error for an option that several processes cannot have for one picture."""
    return NextStepError(
        "{what} does not go with several GPUs for one picture. Leave it out, or draw on one.", what=what
    )
