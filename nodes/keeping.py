"""What becomes of weights that a loader quantizes: kept as a file where that is possible, found again."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..nextstep_core.loading import kept
from ..nextstep_core.loading.build import ModelPlan, plan_model
from ..nextstep_core.loading.store import ASSETS, EMBEDDED
from ..nextstep_core.sentences import Sentence
from . import host

log = logging.getLogger(__name__)

KEEP_AUTO, KEEP_ORIGINALS, KEEP_OFF = "auto", "keep originals", "off"
KEEPING = (KEEP_AUTO, KEEP_ORIGINALS, KEEP_OFF)


@dataclass(frozen=True)
class Keeper:
    """How one model is loaded: `plan` reads what was kept or, where nothing was, the original, to be kept in `folder`.

    `original` is the plan for the original and `checkpoint` where that lies.
    """

    plan: ModelPlan
    original: ModelPlan
    dtype: torch.dtype
    checkpoint: Path
    shelves: list[Path]
    folder: Path | None
    wish: str

    @classmethod
    def of(cls, plan: ModelPlan, dtype: torch.dtype, shelves: list[Path], wish: str, checkpoint: Path) -> Keeper:
        """Look for what was kept of a plan or, where there is none, for a place to keep it in."""
        if wish == KEEP_OFF or plan.stored or plan.recipe is None or checkpoint == ASSETS / EMBEDDED:
            return cls(plan, plan, dtype, checkpoint, shelves, None, KEEP_OFF)
        found = kept.find(plan, dtype, shelves)
        if found is not None:
            log.info("NextStep: reading the weights that were quantized earlier, %s", found)
            return cls(plan_model(found, None, host.compute_device()), plan, dtype, checkpoint, shelves, None, wish)
        return cls(plan, plan, dtype, checkpoint, shelves, kept.place(plan, dtype, shelves), wish)

    def passing(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        """The tensors of `plan` as they are read, on their way kept where they are to be."""
        if self.folder is None:
            return tensors
        return kept.keep(self.plan, self.dtype, self.folder, tensors, host.check_interrupt)

    def remarks(self) -> list[Sentence]:
        """What the user is told once the model is loaded: what was kept, and what may be deleted."""
        if self.wish == KEEP_OFF:
            return []
        found = kept.find(self.original, self.dtype, self.shelves)
        if found is None:
            return [Sentence("not kept: the console says why")] if self.wish == KEEP_ORIGINALS else []
        if self.folder is not None:
            log.info("NextStep: kept as %s, which is read from now on (%s)", found, _size([found]))
        if self.wish != KEEP_ORIGINALS:
            return []
        files = kept.source_files(self.original)
        where = self._original_place() if self.checkpoint.is_dir() else ", ".join(map(str, files))
        remark = Sentence(
            "{file} replaces the original: you may delete {where}, {size}",
            file=found.name,
            where=where,
            size=_size(files),
        )
        log.info("NextStep: %s", remark)
        return [remark]

    def _original_place(self) -> Path:
        """The checkpoint's folder; in the Hugging Face cache that of all its versions, where the bytes lie."""
        parent = self.checkpoint.parent
        return parent.parent if parent.name == "snapshots" else self.checkpoint


def _size(files: list[Path]) -> str:
    return f"{sum(file.stat().st_size for file in files) / 1e9:.1f} GB"
