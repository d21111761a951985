"""Processes that draw one picture together, on the CPU of this machine, started as torchrun would."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from nextstep_core import NextStepPipeline
from nextstep_core.loading import checkpoint
from nextstep_core.runtime.parallel import Ranks

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def together(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(ranks, *arguments)` gives in each of `count` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    given = [
        {"RANK": n, "LOCAL_RANK": n, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for n in range(count)
    ]
    processes = [context.Process(target=_one, args=(one, answers, work, arguments), daemon=True) for one in given]
    for process in processes:
        process.start()
    try:
        found = dict(answers.get(timeout=400) for _ in processes)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    return [found[n] for n in range(count)]


def _one(given: dict[str, Any], answers: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update({name: str(value) for name, value in given.items()})
    torch.set_num_threads(1)
    try:
        ranks = Ranks.join("cpu")
        answers.put((given["RANK"], work(ranks, *arguments)))
        ranks.leave()
    except Exception as error:
        answers.put((given["RANK"], error))
        raise


def draw(pipeline: NextStepPipeline, asked: dict[str, Any]) -> torch.Tensor:
    """The tokens of a picture; "edit" in what is asked is the color of the picture that is edited."""
    asked = dict(asked)
    color = asked.pop("edit", None)
    images = None if color is None else Image.new("RGB", (32, 48), color)
    prompt = "a red circle on a blue background" if images is None else "<image>Make it blue."
    return pipeline.generate(prompt, images=images, height=48, width=32, seed=7, **asked).tokens


def drawn(ranks: Ranks, source: str, asked: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Tokens of all that is asked, by dtype; bytes that were exchanged for them, and that were read."""
    tokens: dict[str, list[Any]] = {}
    exchanged: dict[str, list[int]] = {}
    read: list[tuple[Path, str, int]] = []
    plain = checkpoint._OpenFiles.read

    def counted(self: Any, source: checkpoint.Source) -> Any:
        found = plain(self, source)
        if isinstance(source, checkpoint.Slice):
            read.append((*source.place, found.nbytes))
        return found

    checkpoint._OpenFiles.read = counted  # type: ignore[method-assign]
    for name in asked:
        read.clear()
        pipeline = NextStepPipeline.from_pretrained(source, dtype=DTYPES[name], ranks=ranks)
        tokens[name], exchanged[name] = [], []
        for one in asked[name]:
            before = ranks.exchanged
            tokens[name].append(draw(pipeline, one).numpy())
            exchanged[name].append(ranks.exchanged - before)
    held = sum(weight.nbytes for weight in pipeline.engine.model.parameters())
    return {"tokens": tokens, "exchanged": exchanged, "read": read, "held": held}
