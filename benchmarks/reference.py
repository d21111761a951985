"""Side by side with the public 1.0 inference code: the same weights, prompt, settings, noise and threads, in turns.

The code itself is not here: it runs from a checkout of yours, in an interpreter that has its requirements
(transformers 4.49, diffusers 0.32), as `reference_worker.py` tells.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from nextstep_core.errors import NextStepError
from nextstep_core.loading.fusion import split
from nextstep_core.runtime.quantization import quantized_linears
from nextstep_core.sampling.settings import GenerationSettings

from .subjects import Subject
from .timing import Case, summary, time_picture

WORKER = Path(__file__).with_name("reference_worker.py")
SAMPLER = "score-sde-1.0"
TOLERANCE = 1e-4
# Every token feeds the next, so on some weights a rounding error of 1e-6 becomes 1e-2 along a picture. The first two
# tokens tell: they take the prompt, the head, and a step over the cache.
FIRST = 2


def save_published(subject: Subject, folder: Path) -> None:
    """Write the config and weights, in the layout of published checkpoints, of a subject that is not `ready` yet."""
    state = split(subject.model.state_dict(), subject.config) | subject.engine.text_embedding.state_dict()
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(subject.description))


class Reference:
    """The reference in a process of its own, loaded when the block is entered and ended when it is left.

    `weights` is the folder of the checkpoint that `save_published` wrote.
    """

    def __init__(self, case: Case, weights: Path, checkout: Path, python: str) -> None:
        self._case, self._weights, self._checkout, self._python = case, weights, checkout, python
        self._stack = ExitStack()

    def __enter__(self) -> Reference:
        folder = self._weights
        self._tokens, self._log = folder / "tokens.npy", folder / "log.txt"
        told = folder / "told.json"
        told.write_text(json.dumps(self._told()))
        log = self._stack.enter_context(self._log.open("w"))
        self._process = subprocess.Popen(
            [self._python, str(WORKER), str(told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=folder,
        )
        self._stack.callback(self._end)
        try:
            self.versions = self._answer()
        except NextStepError:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def run(self, seed: int) -> tuple[float, Tensor]:
        """Seconds of its prefill and decode loop, and the tokens (batch, tokens, token_dim)."""
        with suppress(BrokenPipeError):  # the answer tells why
            print(seed, file=self._process.stdin, flush=True)
        return self._answer()["seconds"], torch.from_numpy(np.load(self._tokens))

    def _told(self) -> dict[str, Any]:
        case = self._case
        return {
            "checkout": str(self._checkout.resolve()),
            "checkpoint": str(self._weights),
            "tokens": str(self._tokens),
            "dtype": str(case.dtype).removeprefix("torch."),
            "device": str(case.device),
            "threads": torch.get_num_threads(),
            "prompt_ids": case.prompt_ids()[:, :-1].tolist(),  # begin-of-image is what it adds itself
            "options": {
                "hw": (case.height, case.width),
                "num_images_per_caption": case.batch,
                "num_sampling_steps": case.settings.steps,
                "cfg": case.settings.cfg,
                "cfg_schedule": case.settings.cfg_schedule,
                "timesteps_shift": case.settings.shift,
                "use_norm": case.settings.use_norm,
            },
        }

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            last = "\n".join(self._log.read_text().strip().splitlines()[-5:])
            raise NextStepError(
                f"The reference in {self._checkout} stopped under {self._python}. It needs transformers 4.49 and "
                f"diffusers 0.32. It said:\n{last}"
            )
        return json.loads(line)

    def _end(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def find_reference(checkout: Path, python: str) -> None:
    """NextStepError, before any long work, where the checkout or its interpreter is not there."""
    if not (checkout / "nextstep").is_dir():
        raise NextStepError(f"{checkout} is not a checkout of the public inference code: it has no folder `nextstep`.")
    if shutil.which(python) is None:
        raise NextStepError(f"--reference-python is {python}, which is not a program.")


def check_comparable(settings: GenerationSettings, only: int | None) -> None:
    """NextStepError for settings that the reference does not have."""
    reasons = {
        f"the sampler {settings.sampler} (only {SAMPLER})": settings.sampler != SAMPLER,
        f"the cfg_schedule {settings.cfg_schedule}": settings.cfg_schedule == "linear-rise",
        "--tokens: its cost per token is that of a whole picture": only is not None,
    }
    for reason, applies in reasons.items():
        if applies:
            raise NextStepError(f"The reference cannot be compared with {reason}. Leave that away.")


def compare(case: Case, weights: Path, checkout: Path, python: str, repeat: int) -> dict[str, Any]:
    """Time both in turns, prefill and decode loop, after one run each that does not count, and compare the tokens.

    The reference computes with the plain weights, in the case's dtype. Tokens can be compared for plain float32 on a
    CPU alone: elsewhere the reference draws its noise on the device.
    """
    ours, theirs, differences = [], [], torch.zeros(case.tokens)
    with Reference(case, weights, checkout, python) as reference:
        for seed in range(repeat + 1):
            seconds, tokens = time_picture(case, seed)
            their_seconds, their_tokens = reference.run(seed)
            ours.append(seconds / case.batch)
            theirs.append(their_seconds / case.batch)
            differences = differences.maximum((tokens.float().cpu() - their_tokens).abs().amax((0, 2)))
    exact = case.dtype == torch.float32 and not any(quantized_linears(case.subject.model))
    comparable = exact and case.device.type == "cpu"
    return {
        "ours": summary(ours[1:]),
        "reference": summary(theirs[1:]),
        "times_as_fast": summary([b / a for a, b in zip(ours[1:], theirs[1:])]),
        "first_tokens_difference": float(differences[:FIRST].max()) if comparable else None,
        "token_difference": float(differences.max()) if comparable else None,
        "tokens_agree": bool(differences[:FIRST].max() <= TOLERANCE) if comparable else None,
        "versions": reference.versions,
    }


def show_comparison(result: dict[str, Any]) -> None:
    """Print a `compare` result."""
    versions = result["versions"]
    print(f"beside the reference (Python {versions['python']}, torch {versions['torch']}), without the VAE:")
    for title, name, unit in (
        ("ours, a picture", "ours", " s"),
        ("reference, a picture", "reference", " s"),
        ("times as fast", "times_as_fast", ""),
    ):
        numbers = result[name]
        print(f"{title:22}{numbers['median']:12.4f}{unit}  (from {numbers['low']:.4f} to {numbers['high']:.4f})")
    if result["token_difference"] is not None:
        verdict = "they agree" if result["tokens_agree"] else "THEY DO NOT AGREE"
        print(
            f"the first {FIRST} tokens differ by {result['first_tokens_difference']:.1e} at most: {verdict} (to "
            f"{TOLERANCE:g}); all of the picture by {result['token_difference']:.1e}"
        )
