"""Pictures that are good enough: their scores, drawing until one is, and choosing among several."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..nextstep_core.decoding.job import Job
from ..nextstep_core.decoding.pruning import Pruning
from ..nextstep_core.errors import NextStepError, check_choice
from ..nextstep_core.images.latents import Grid
from ..nextstep_core.images.rgb import to_rgb
from ..nextstep_core.sampling.settings import SEED, GenerationSettings
from ..nextstep_core.sentences import Sentence
from ..nextstep_core.studio.quality import WEIGHTS, measure_quality
from ..nextstep_core.studio.selection import (
    ATTEMPTS,
    CANDIDATES,
    THRESHOLD,
    Candidate,
    Score,
    Selection,
    agreement,
    best_of,
    quality_gate,
)
from . import host
from .language import Node
from .latents import check_channels, decode_latent
from .sampler import grid_of, rate_text, settings_for, steps_of
from .saving import INFO_OUTPUT, info_of
from .types import CATEGORY, HostModel, ModelSocket, PromptSocket, PromptValue, check_sockets
from .widgets import DrawingNode, cfg_img_input, ends, setting_inputs

TOTAL = "total"
SCORES = (TOTAL, *WEIGHTS)
AGREEMENT = "agreement"  # of several alone
SCORED_BY = (
    "total weighs all: sharpness 0.3, color diversity 0.2, composition balance 0.3, artifacts 0.2. None of them knows "
    "what was asked for."
)


def score_by(name: str, among: Sequence[str] = SCORES) -> Score:
    """The score of this name, for pictures (B, H, W, 3); NextStepError for one that is none."""
    check_choice("score", name, among)
    if name == AGREEMENT:
        return agreement
    return lambda pictures: [measure_quality(picture).named()[name] for picture in pictures]


@dataclass(frozen=True)
class Drawer:
    """One prompt at one size and in one setting, drawn with any seeds."""

    model: HostModel
    vae: Any
    positive: PromptValue
    negative: PromptValue | None
    grid: Grid
    settings: GenerationSettings

    @classmethod
    def checked(
        cls,
        model: HostModel,
        vae: Any,
        positive: PromptValue,
        negative: PromptValue | None,
        latent: dict[str, Any],
        settings: dict[str, Any],
    ) -> Drawer:
        """NextStepError for the first input that cannot be used."""
        check_sockets(model=model, vae=vae, positive=positive, latent=latent)
        if negative is not None:
            check_sockets(negative=negative)
            if negative.editing or len(negative.captions) > 1:
                raise NextStepError("The negative prompt must be a single text. Use NextStep Encode Prompt for it.")
        check_channels(vae, model.engine.latents)
        if len(positive.captions) > 1:
            raise NextStepError(
                "There are {count} prompts; this node draws one, several times. Use NextStep Batch Studio for many.",
                count=len(positive.captions),
            )
        if latent.get("noise_mask") is not None:
            raise NextStepError("This node draws whole pictures. Use NextStep Sampler for a latent with a mask.")
        chosen = settings_for(model, positive.editing, **settings)
        return cls(model, vae, positive, negative, grid_of(model, latent), chosen)

    @torch.inference_mode()
    def draw(self, seeds: list[int], prune: Pruning | None = None, remark: str = "") -> Tensor:
        """The pictures (B, H, W, 3) of these seeds, those that `prune` lets through; `remark` is shown meanwhile."""
        negative = self.negative.captions[0].text if self.negative is not None else ""
        captions = self.positive.captions * len(seeds)
        with host.memory_told(Sentence("Drawing")):
            job = self.model.engine.make_job(
                captions, self.grid, self.settings, seed=seeds, negative_prompt=negative, check=host.check_interrupt
            )
            if prune is not None:
                job = prune.rest(job, partial(self._tokens, remark=remark), self._decoded)
            return self._decoded(self._tokens(job, remark), self.grid)

    def _tokens(self, job: Job, remark: str) -> Tensor:
        reporter = host.ProgressReporter(job.total)
        with closing(steps_of(self.model, job)) as run:
            for progress, shown in run:
                reporter.update(progress.done, *shown, f"{remark}{rate_text(progress)}")
        return progress.tokens

    def _decoded(self, tokens: Tensor, grid: Grid) -> Tensor:
        latents = self.model.engine.latents.to_latents(tokens.float(), grid).to(host.intermediate_device())
        return decode_latent(self.vae, {"samples": latents}).cpu()

    def output(self, selection: Selection, told: str) -> io.NodeOutput:
        """What such a node gives."""
        seed, picture = selection.kept.seed, selection.picture[None]
        blank = {"samples": torch.zeros(1, *self.model.engine.latents.shape(self.grid))}
        info = info_of(self.model, self.positive, self.negative, self.settings, seed, blank)
        host.show_text(told)
        return io.NodeOutput(picture, selection.kept.score, seed, told, info)


def in_words(one: Candidate) -> str:
    """A candidate as the node tells of it."""
    if one.score is None:
        return f"seed {one.seed}: dropped at {one.preview_score:.2f}"
    return f"seed {one.seed}: {one.score:.2f}"


def told_of(selection: Selection, kept: str) -> str:
    """What was kept, and what was not."""
    others = "; ".join(map(in_words, selection.rejected))
    return f"{kept} {in_words(selection.kept)}" + (f". Rejected {others}" if others else "")


def _inputs() -> list[io.Input]:
    return [
        ModelSocket.Input("model", tooltip="From Load NextStep Model."),
        io.Vae.Input("vae", tooltip="The checkpoint's VAE."),
        PromptSocket.Input("positive", tooltip="What to draw, or a picture and what to change in it."),
        io.Latent.Input("latent", tooltip="The size, from NextStep Empty Latent or the edit node."),
        PromptSocket.Input("negative", optional=True, tooltip="What to avoid, with cfg above 1. Optional."),
        *setting_inputs(steps=28, shift=1.0),
        cfg_img_input(),
    ]


def _outputs() -> list[io.Output]:
    return [
        io.Image.Output("picture", display_name="image", tooltip="The picture that was kept."),
        io.Float.Output("kept_score", display_name="score", tooltip="Its score."),
        io.Int.Output("kept_seed", display_name="seed", tooltip="Its seed, which draws it again."),
        io.String.Output("told", display_name="report", tooltip="What was kept and what was not, with all scores."),
        INFO_OUTPUT,
    ]


class NextStepQualityScore(Node):
    """Pictures to numbers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepQualityScore",
            display_name="NextStep Quality Score",
            category=CATEGORY,
            description="How good a picture is as a picture, from 0 to 1: sharpness, colors, composition, artifacts. "
            "It does not know what was asked for.",
            search_aliases=["nextstep", "quality", "score", "sharpness", "artifacts", "aesthetic"],
            inputs=[io.Image.Input("image", tooltip="The pictures.")],
            outputs=[
                io.Float.Output("totals", display_name="total", is_output_list=True, tooltip="One for each picture."),
                io.String.Output("told", display_name="report", tooltip="All scores of all pictures."),
            ],
        )

    @classmethod
    def execute(cls, image: Tensor) -> io.NodeOutput:
        found = [measure_quality(picture).named() for picture in to_rgb(image)]
        lines = [", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in one.items()) for one in found]
        told = "\n".join(lines)
        host.show_text(told)
        return io.NodeOutput([one[TOTAL] for one in found], told)


class NextStepQualityGate(DrawingNode):
    """Drawing until a picture is good enough."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepQualityGate",
            display_name="NextStep Quality Gate",
            category=CATEGORY,
            description="Draws with one seed after another until a picture's score reaches the threshold. After the "
            "last attempt it keeps the best.",
            search_aliases=["nextstep", "quality gate", "retry", "threshold", "sampler"],
            inputs=[
                *_inputs(),
                io.Float.Input(
                    THRESHOLD.name,
                    default=0.5,
                    **ends(THRESHOLD),
                    step=0.01,
                    round=0.001,
                    tooltip="The score that is good enough. NextStep Quality Score shows what pictures reach.",
                ),
                io.Int.Input(ATTEMPTS.name, default=4, **ends(ATTEMPTS), tooltip="Pictures to draw, at most."),
                io.Combo.Input("score", options=list(SCORES), default=TOTAL, tooltip=SCORED_BY),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls,
        model: HostModel,
        vae: Any,
        positive: PromptValue,
        latent: dict[str, Any],
        seed: int,
        threshold: float,
        attempts: int,
        score: str,
        negative: PromptValue | None = None,
        **settings: Any,
    ) -> io.NodeOutput:
        drawer = Drawer.checked(model, vae, positive, negative, latent, settings)
        drawn = 0

        def draw(one: int) -> Tensor:
            nonlocal drawn
            drawn += 1
            return drawer.draw([one], remark=f"attempt {drawn} of {attempts}, ")[0]

        found = quality_gate(
            draw, SEED.check(seed), threshold=threshold, attempts=ATTEMPTS.check(attempts), score=score_by(score)
        )
        return drawer.output(found, told_of(found, "kept" if found.passed else "none passed; kept"))


class NextStepBestOfN(DrawingNode):
    """Several pictures, of which the best is kept."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepBestOfN",
            display_name="NextStep Best of N",
            category=CATEGORY,
            description="Draws several pictures together and keeps the one with the best score. The worse half can be "
            "dropped after a third of the picture.",
            search_aliases=["nextstep", "best of n", "candidates", "pick", "sampler"],
            inputs=[
                *_inputs(),
                io.Int.Input(CANDIDATES.name, default=4, **ends(CANDIDATES), tooltip="Pictures to begin."),
                io.Boolean.Input(
                    "drop_early", default=True, tooltip="Drop the worse half when a third of the picture is there."
                ),
                io.Combo.Input(
                    "score",
                    options=[AGREEMENT, *SCORES],
                    default=AGREEMENT,
                    tooltip="agreement: the picture that is most like the others, for three or more. " + SCORED_BY,
                ),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls,
        model: HostModel,
        vae: Any,
        positive: PromptValue,
        latent: dict[str, Any],
        seed: int,
        candidates: int,
        drop_early: bool,
        score: str,
        negative: PromptValue | None = None,
        **settings: Any,
    ) -> io.NodeOutput:
        drawer = Drawer.checked(model, vae, positive, negative, latent, settings)
        check_choice("drop_early", drop_early, (True, False))
        found = best_of(
            drawer.draw,
            SEED.check(seed),
            candidates=candidates,
            score=score_by(score, (AGREEMENT, *SCORES)),
            kept=0.5 if drop_early else 1.0,
        )
        return drawer.output(found, told_of(found, "kept"))
