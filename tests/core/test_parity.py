"""The public pipeline and the samplers against tensors recorded from the reference, float32 on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nextstep_core import NextStepPipeline
from nextstep_core.model.transformer import whole_span
from nextstep_core.request.layout import Caption
from nextstep_core.sampling.guidance import guide
from nextstep_core.sampling.noise import NoiseStream
from nextstep_core.sampling.solvers import ETA, SAMPLERS

GOLDEN = Path(__file__).resolve().parent.parent / "data" / "golden"
RECORDS = json.loads((GOLDEN / "cases.json").read_text())
LIMITS = RECORDS["default_tolerance_max_abs"]
UNIT_SAMPLERS = {"ode": "flow-ode", "score_sde": "score-sde-1.1", "score_sde_laststep": "score-sde-1.0"}


def off_by(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours.double() - theirs.double()).abs().max().item()


def arguments(params: dict) -> dict:
    """A recorded case's parameters as arguments of the public `generate`."""
    return {
        "negative_prompt": params["negative_prompt"] or "",
        "positive_prompt": params["positive_prompt"] or "",
        "images": [Image.open(GOLDEN / path) for path in params["images"]] if params["images"] else None,
        "height": params["hw"][0],
        "width": params["hw"][1],
        "num_images_per_prompt": params["num_images_per_caption"],
        "cfg": params["cfg"],
        "cfg_img": params["cfg_img"],
        "cfg_schedule": params["cfg_schedule"],
        "steps": params["num_sampling_steps"],
        "shift": params["timesteps_shift"],
        "sampler": "score-sde-1.0",
        "use_norm": params["use_norm"],
        "seed": params["seed"],
    }


@pytest.mark.parametrize("case", RECORDS["cases"], ids=lambda case: case["name"])
def test_generate_gives_the_reference_picture(pipeline, case: dict) -> None:
    recorded = load_file(GOLDEN / case["file"])
    out = pipeline.generate(case["params"]["captions"], **arguments(case["params"]))
    assert off_by(out.tokens[:, :3], recorded["tokens"][:, :3]) <= LIMITS["flow_samples_first3"]
    assert off_by(out.tokens, recorded["tokens"]) <= LIMITS["tokens"]
    assert off_by(out.latents, recorded["latents_vae_in"]) <= LIMITS["latents"]
    assert off_by(out.images, recorded["image"].permute(0, 2, 3, 1) / 2 + 0.5) <= LIMITS["image"]
    ours_u8 = (out.images * 255).round().int()
    assert (ours_u8 - recorded["image_u8"].int()).abs().max() <= LIMITS["image_u8"]


@pytest.mark.parametrize("case", RECORDS["cases"], ids=lambda case: case["name"])
@torch.inference_mode()
def test_prefill_follows_the_reference(pipeline, case: dict) -> None:
    """Ids, embeddings, hidden state and condition, so that a failure above can be told from one down here."""
    recorded, params, engine = load_file(GOLDEN / case["file"]), case["params"], pipeline.engine
    args = arguments(params)
    images = tuple(pipeline.encode_image(image) for image in args["images"] or ())
    settings = engine.recommended().override(cfg=params["cfg"], cfg_img=params["cfg_img"], sampler="score-sde-1.0")
    job = engine.make_job(
        [Caption(params["captions"], images)],
        engine.grid(*params["hw"]),
        settings,
        seed=params["seed"],
        negative_prompt=args["negative_prompt"],
        positive_prompt=args["positive_prompt"],
        images_per_caption=params["num_images_per_caption"],
    )
    assert torch.equal(job.rows.ids, recorded["input_ids"])
    assert torch.equal(job.rows.valid.long(), recorded["attention_mask"])
    embeds = engine.embed(job.rows, torch.device("cpu"), torch.float32)
    real = job.rows.valid  # the reference leaves rubbish at padded placeholders, which nothing reads
    assert off_by(embeds[real], recorded["prefill_inputs_embeds"][real]) <= LIMITS["prefill_inputs_embeds"]
    hidden = engine.model(embeds, whole_span(engine.config, real, embeds.dtype))[:, -1]
    assert off_by(hidden, recorded["hidden_prefill"]) <= LIMITS["hidden_prefill"]
    assert off_by(engine.model.image_out_projector(hidden), recorded["head_cond_all"][0]) <= LIMITS["hidden_prefill"]
    if images:
        latents = torch.cat([engine.latents.join(i.tokens[None], i.grid) for row in job.rows.images for i in row])
        assert off_by(latents, recorded["edit_latents"]) <= LIMITS["edit_latents"]


@pytest.mark.parametrize("case", RECORDS["cases"], ids=lambda case: case["name"])
def test_noise_is_the_recorded_stream(case: dict) -> None:
    recorded, params = load_file(GOLDEN / case["file"]), case["params"]
    stream = NoiseStream(params["seed"], 1, params["num_images_per_caption"], 64)
    if "rng_vae" in recorded:
        count, *shape = recorded["rng_vae"].shape
        drawn = torch.cat([stream.for_posterior(0, *shape) for _ in range(count)])
        assert off_by(drawn, recorded["rng_vae"]) <= LIMITS["rng_vae"]
    noise_count = SAMPLERS["score-sde-1.0"].noise_count(params["num_sampling_steps"])
    ours = torch.stack([stream.for_token(noise_count) for _ in range(case["n_tokens"])])
    assert off_by(ours, recorded["rng_flow"]) <= LIMITS["rng_flow"]


@pytest.mark.parametrize("unit", RECORDS["units"], ids=lambda unit: unit["name"])
@torch.inference_mode()
def test_sampler_units(pipeline, unit: dict) -> None:
    recorded, params = load_file(GOLDEN / unit["file"]), unit["params"]
    head, sampler = pipeline.engine.model.head, SAMPLERS[UNIT_SAMPLERS[params["sampler"]]]
    times = sampler.grid(params["num_steps"], params["timesteps_shift"])
    assert off_by(torch.tensor(times), recorded["timesteps"]) <= 1e-6
    codes = head.time_embed(torch.tensor(times), torch.float32)[:, None]
    modulations = head.modulations(codes, recorded["c"])
    seen = []

    def velocity(x: torch.Tensor, i: int) -> torch.Tensor:
        v = guide(head.velocity(x.repeat(2, 1), [m[i] for m in modulations]), 2, params["cfg"], 1.0)
        seen.append((x, v))
        return v

    stream = NoiseStream(params["seed"], 1, 1, 64)
    noise = stream.for_token(sampler.noise_count(params["num_steps"]))
    assert off_by(noise[0], recorded["init_noise"]) <= LIMITS["rng_flow"]
    out = sampler.integrate(velocity, times, noise, ETA)
    assert off_by(out, recorded["x_final"]) <= unit["tolerance_max_abs"]
    if "x_steps" in recorded:
        states = torch.stack([x for x, _ in seen] + [out])
        assert off_by(states, recorded["x_steps"]) <= unit["tolerance_max_abs"]
        assert off_by(torch.stack([v for _, v in seen]), recorded["v_cfg"]) <= 1e-4


# Modes that the recorded cases leave out, taken from the same reference code on the same checkpoint.
TWO, EDITS = ["A red apple.", "Two birds sit on a thin branch."], ["<image>Add a hat.", "<image>Remove the dog."]
MORE = {
    "linear": (TWO[0], {"cfg": 5.0, "cfg_schedule": "linear"}),
    "multi": (TWO, {"cfg": 3.0, "use_norm": True, "negative_prompt": "blurry", "num_images_per_prompt": 2}),
    "codes": (TWO[0], {"cfg": 3.0}),
    "edit2": (EDITS, {"cfg": 3.0, "cfg_img": 1.5, "cfg_schedule": "linear", "shift": 3.2, "num_images_per_prompt": 2}),
}


@pytest.mark.parametrize("name", MORE)
def test_more_modes_of_the_reference(checkpoint: Path, name: str) -> None:
    """Guidance schedule, several captions times several images, generation codes, and a batch of edits."""
    prompt, options = MORE[name]
    if name == "codes":
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps(config | {"use_gen_pos_embed": True}))
    if name == "edit2":
        options = options | {"images": [Image.open(GOLDEN / "inputs" / "gradient_64x64.png")] * 2}
    shared = {
        "height": 64,
        "width": 64,
        "steps": 6,
        "seed": 5,
        "sampler": "score-sde-1.0",
        "shift": 1.0,
        "use_norm": False,
    }
    out = NextStepPipeline.from_pretrained(checkpoint, dtype=torch.float32).generate(prompt, **(shared | options))
    recorded = load_file(GOLDEN.parent / "more_tokens.safetensors")[name]
    assert off_by(out.tokens, recorded) <= LIMITS["tokens"]
