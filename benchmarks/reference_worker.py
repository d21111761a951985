"""Runs a checkout of the public 1.0 inference code, in an interpreter that has what it needs.

Told by a JSON file what to load; then draws a picture's tokens for every line "seed" on stdin, writes them to a file
and answers with a JSON line. Nothing of this project is imported: the checkout's interpreter may know none of it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

os.environ.setdefault("ENABLE_TORCH_COMPILE", "false")  # the checkout's own switch; set it to time it compiled

import numpy as np  # noqa: E402
import torch  # noqa: E402

# What the checkout imports for training, files and pictures; drawing tokens calls none of it.
UNUSED = ("torchvision", "torchvision.transforms", "webdataset", "megfile", "omegaconf", "pendulum")


class TokensDrawn(Exception):
    """Ends a run where the VAE would begin."""


class FixedPrompt:
    """In the tokenizer's place: the same ids whatever is asked."""

    bos_token = None

    def __init__(self, ids: list[list[int]]) -> None:
        self.ids = torch.tensor(ids)

    def __call__(self, text: str | list[str], **_: Any) -> SimpleNamespace:
        if isinstance(text, str):  # the size prefix, whose ids are among ours
            ids = torch.zeros(1, 0, dtype=torch.long)
        else:
            ids = self.ids.repeat_interleave(len(text) // len(self.ids), dim=0)
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))


class NoVAE:
    """In the VAE's place: an f8 autoencoder that nothing goes through."""

    config = SimpleNamespace(block_out_channels=(1, 1, 1, 1), shift_factor=0.0, scaling_factor=1.0)
    dtype = torch.float32

    def eval(self) -> NoVAE:
        return self

    def to(self, *_: Any, **__: Any) -> NoVAE:
        return self


def stub_unused() -> None:
    """Let imports of what is absent and not needed succeed."""
    for name in UNUSED:
        try:
            import_module(name)
        except ImportError:
            sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None), __path__=[])


def load(told: dict[str, Any]) -> Any:
    """The checkout's own pipeline on our weights."""
    stub_unused()
    sys.path.insert(0, told["checkout"])
    from nextstep.models.modeling_nextstep import NextStep
    from nextstep.models.pipeline_nextstep import NextStepPipeline

    dtype = getattr(torch, told["dtype"])
    model = NextStep.from_pretrained(told["checkpoint"], local_files_only=True, torch_dtype=dtype)
    pipeline = NextStepPipeline(tokenizer=FixedPrompt(told["prompt_ids"]), model=model, vae=NoVAE())
    pipeline.to(torch.device(told["device"]), dtype)
    return pipeline


def draw(pipeline: Any, options: dict[str, Any], seed: int) -> tuple[float, torch.Tensor]:
    """Seconds of prefill and decode loop, and the tokens."""
    found = []

    def stop(tokens: torch.Tensor) -> None:
        found.append(tokens.float().cpu())  # waits for the device
        raise TokensDrawn

    pipeline.model.unpatchify = stop
    torch.manual_seed(seed)
    started = time.perf_counter()
    with suppress(TokensDrawn):
        pipeline.generate_image(".", seed=None, progress=False, **options)
    return time.perf_counter() - started, found[0]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the checkout prints goes to stderr
    told = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(told["threads"])
    pipeline = load(told)
    print(json.dumps({"torch": torch.__version__, "python": sys.version.split()[0]}), file=answers, flush=True)
    for line in sys.stdin:
        seconds, tokens = draw(pipeline, told["options"], int(line))
        np.save(told["tokens"], tokens.numpy())
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main()
