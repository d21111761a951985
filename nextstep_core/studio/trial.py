"""Does it work? The set-up is looked at, and the embedded model draws one picture that is written and read back."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import NextStepError, not_written
from ..images.saving import save_picture
from ..loading.store import EMBEDDED
from ..pipeline import NextStepPipeline
from ..runtime.devices import best_device
from .doctor import doctor
from .finding import OK, PROBLEM, Finding

PROMPT, SIDE, SEED = "a red circle on a blue background", 64, 7
FLAT = 0.02  # standard deviation of a picture's values, below which it shows nothing
READ_BACK = 0.51 / 255  # what eight bits can be off


@dataclass(frozen=True)
class Trial:
    """What was found; the seconds of loading and of drawing, None where it did not come to that."""

    findings: tuple[Finding, ...]
    load: float | None
    picture: float | None

    @property
    def works(self) -> bool:
        """Whether there is no problem."""
        return all(finding.verdict != PROBLEM for finding in self.findings)


def trial(
    roots: Sequence[Path],
    file_roots: Sequence[Path] = (),
    *,
    output: Path | None = None,
    device: torch.device | None = None,
) -> Trial:
    """The doctor's findings and the picture's. It is written below `output`, if given, and removed again."""
    device = best_device() if device is None else device
    findings = doctor(roots, file_roots, output=output, device=device)
    load = drawn = None
    try:
        started = time.perf_counter()
        pipeline = NextStepPipeline.from_pretrained(EMBEDDED, device=device, dtype=torch.float32)
        load = time.perf_counter() - started
        started = time.perf_counter()
        picture = pipeline.generate(PROMPT, width=SIDE, height=SIDE, seed=SEED).images[0]
        drawn = time.perf_counter() - started
        check_picture(picture, output)
    except NextStepError as error:
        findings.append(Finding(PROBLEM, str(error), "Do what it says; nextstep doctor looks at the set-up."))
    else:
        findings.append(Finding(OK, f"The embedded model drew {SIDE}x{SIDE} pixels in {drawn:.1f} s"))
    return Trial(tuple(findings), load, drawn)


def check_picture(picture: Tensor, output: Path | None) -> None:
    """NextStepError for a picture (H, W, 3) that is none, or that a file does not give back."""
    if not picture.isfinite().all() or picture.std() < FLAT:
        raise NextStepError("The picture of the embedded model shows nothing. Install PyTorch again; if that changes "
                            "nothing, the installation of NextStep is damaged.")  # fmt: skip
    there = output if output is not None and output.is_dir() else None
    try:
        with tempfile.TemporaryDirectory(dir=there) as folder:
            path = Path(folder) / "trial.png"
            save_picture(path, picture, "png")
            if same_in_file(path, picture):
                return
    except OSError as error:
        raise not_written(Path(tempfile.gettempdir()) if there is None else there, error) from None
    raise NextStepError("A file does not hold the picture that was written to it. Check the disk, and pillow.")


def same_in_file(path: Path, picture: Tensor) -> bool:
    """Whether a file holds a picture (H, W, 3), as exactly as eight bits can."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        read = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).float() / 255
    return read.shape == picture.shape and bool((read - picture.cpu()).abs().max() <= READ_BACK)
