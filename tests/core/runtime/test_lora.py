"""LoRA beside the weights: as if it were in them, on every format, and gone without a trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lora_files import kohya, matrices, write
from simulated_mps import MPS, SimulatedMPS
from taped_graphs import CPU, FAST, FLOAT_NOISE, CPUGraphs, TapeRecorder
from torch import Tensor

from nextstep_core import NextStepError, NextStepPipeline
from nextstep_core.decoding.steps import StepCaches
from nextstep_core.loading.build import make_ready
from nextstep_core.loading.lora_file import find_lora, slots_of
from nextstep_core.model import kv_cache
from nextstep_core.request.layout import Caption
from nextstep_core.runtime.lora import Stack
from nextstep_core.runtime.memory import MemoryPlan, plan_memory
from nextstep_core.runtime.quantization import RECIPES, quantize_model

SIZE = {"height": 64, "width": 48}
PROMPT = "A red apple."


@pytest.fixture(scope="module")
def lora(pipeline, tmp_path_factory) -> Path:
    """One on every linear layer."""
    return write(tmp_path_factory.mktemp("lora") / "all.safetensors", matrices(pipeline.engine.config))


@pytest.fixture(scope="module")
def other(pipeline, tmp_path_factory) -> Path:
    """One on some, of another rank, in another layout."""
    layers = ("layers.0.self_attn.v_proj", "layers.2.mlp.down_proj", "image_head.net.res_blocks.1.mlp.0")
    pairs = matrices(pipeline.engine.config, rank=5, layers=layers, seed=1)
    return write(tmp_path_factory.mktemp("lora") / "some.safetensors", pairs, kohya, alpha=10.0)


def with_loras(pipeline: NextStepPipeline, *loras: tuple[Path, float], caches: StepCaches | None = None):
    """Another pipeline on the same model."""
    engine = pipeline.engine if caches is None else replace(pipeline.engine, caches=caches)
    pipe = NextStepPipeline(engine, pipeline.vae, CPU, torch.float32)
    for path, strength in loras:
        pipe.load_lora(path, strength)
    return pipe


def draw(pipe: NextStepPipeline, **options) -> Tensor:
    return pipe.generate(PROMPT, **SIZE, **{**FAST, "seed": 3} | options).tokens


def merged(folder: Path, *loras: tuple[Path, float], recipe: str | None = None) -> NextStepPipeline:
    """A pipeline whose weights hold what files add to them."""
    pipe = NextStepPipeline.from_pretrained(folder, dtype=torch.float32)
    state, slots = pipe.engine.model.state_dict(), slots_of(pipe.engine.config)
    for path, strength in loras:
        adapter = find_lora(path).fitted(pipe.engine.config).read()
        for layer, low in adapter.layers.items():
            state[f"{layer}.weight"] += strength * (low.up * low.scale) @ low.down
    assert len(slots) > len(state) / 9
    return pipe


def test_it_draws_what_merged_weights_draw(pipeline, golden: Path, lora: Path, other: Path) -> None:
    for loras in ([(lora, 0.7)], [(lora, -0.3), (other, 1.5)]):
        wanted = draw(merged(golden / "tiny-a", *loras))
        drawn = draw(with_loras(pipeline, *loras))
        assert (drawn - wanted).abs().max() <= 1e-5
        assert (drawn - draw(pipeline)).abs().max() > 0.1, "it changes what is drawn"


def test_edits_too(pipeline, golden: Path, lora: Path) -> None:
    """The projector of input pictures is a layer like the others."""
    options = {"images": torch.full((64, 48, 3), 0.3), **SIZE, **FAST, "cfg_img": 1.5, "seed": 3}
    wanted = merged(golden / "tiny-a", (lora, 0.7)).generate("<image>Add a hat.", **options).tokens
    drawn = with_loras(pipeline, (lora, 0.7)).generate("<image>Add a hat.", **options).tokens
    assert (drawn - wanted).abs().max() <= 1e-5


def test_nothing_is_left_of_it(pipeline, lora: Path, other: Path) -> None:
    """Strength 0, strengths that add up to 0, and one that is taken away: the plain model, to the last bit."""
    plain = draw(pipeline)
    pipe = with_loras(pipeline, (lora, 0.5))
    changed = draw(pipe)
    assert torch.equal(draw(pipeline), plain), "two on one model do not disturb each other"
    assert torch.equal(draw(pipe), changed)
    pipe.load_lora(lora, -0.5)
    assert torch.equal(draw(pipe), plain)
    assert torch.equal(draw(with_loras(pipeline, (lora, 0.0), (other, 0.0))), plain)
    pipe.load_lora(other)
    pipe.unload_loras()
    assert torch.equal(draw(pipe), plain)
    assert not any(module._forward_hooks for module in pipeline.engine.model.modules())


def test_an_interrupt_leaves_nothing_either(pipeline, lora: Path) -> None:
    plain, pipe = draw(pipeline), with_loras(pipeline, (lora, 0.5))

    class Stop(Exception):
        pass

    def stop(_: object) -> None:
        raise Stop

    with pytest.raises(Stop):
        draw(pipe, callback=stop)
    assert not any(module._forward_hooks for module in pipeline.engine.model.modules())
    assert torch.equal(draw(pipeline), plain)


def test_one_file_several_times_is_one_with_their_sum(pipeline, lora: Path, other: Path, tmp_path: Path) -> None:
    pipe = with_loras(pipeline, (lora, 0.25), (other, 1.0), (lora, 0.5))
    (first, strength), (second, _) = pipe.engine.loras.parts
    assert strength == 0.75 and first is not second
    assert torch.equal(draw(pipe), draw(with_loras(pipeline, (lora, 0.75), (other, 1.0))))
    again = with_loras(pipeline, (lora, 0.1))
    assert again.engine.loras.adapters[0] is first, "nothing is read twice while it is in use"
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(lora.read_bytes())
    again.load_lora(copy, 0.2)
    assert len(again.engine.loras.parts) == 1, "nor does it count as two under another name"


def test_prompts_that_were_read_are_read_again_with_another(pipeline, lora: Path) -> None:
    """The model keeps what it made of a prompt; with other additions it makes something else of it."""
    caches = StepCaches()
    pipe = with_loras(pipeline, caches=caches)
    keys = []
    for strength in (None, 0.5, 0.5, 0.25, -0.75):
        if strength is not None:
            pipe.load_lora(lora, strength)
        draw(pipe)
        keys.append(len(caches.prefilled._entries))
    assert keys == [1, 2, 3, 4, 4], "at 0.5 it was read already"
    pipe.unload_loras()
    draw(pipe)
    assert len(caches.prefilled._entries) == 4


@pytest.mark.parametrize("recipe", RECIPES)
def test_on_quantized_weights(golden: Path, lora: Path, recipe: str) -> None:
    """The stored weights stay as they are, and what is added is added in full."""
    pipe = NextStepPipeline.from_pretrained(golden / "tiny-a", dtype=torch.float32)
    quantize_model(pipe.engine.model, recipe, CPU)
    make_ready(pipe.engine.model, CPU, torch.float32)
    plain = draw(pipe)
    x = torch.randn(3, pipe.engine.config.hidden_size)
    layer = pipe.engine.model.layers[0].self_attn.qkv_proj
    before = layer(x)
    pipe.load_lora(lora, 0.5)
    (adapter,) = pipe.engine.loras.adapters
    low = adapter.layers["layers.0.self_attn.qkv_proj"]
    with pipe.engine.caches.adapters.applied(pipe.engine.model, pipe.engine.loras, CPU, torch.float32):
        assert torch.allclose(layer(x), before + 0.5 * x @ low.down.T @ low.up.T, atol=1e-5)
    assert (draw(pipe) - plain).abs().max() > 0.1
    pipe.unload_loras()
    assert torch.equal(draw(pipe), plain)


def test_on_a_gguf_file(golden: Path, checkpoint: Path, lora: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer, kind = gguf.GGUFWriter(checkpoint / "q8.gguf", "qwen2"), gguf.GGMLQuantizationType.Q8_0
    for name, tensor in (
        NextStepPipeline.from_pretrained(checkpoint, dtype=torch.float32).engine.model.state_dict().items()
    ):
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            writer.add_tensor(name, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    pipe = NextStepPipeline.from_pretrained(checkpoint / "q8.gguf", dtype=torch.float32, vae=checkpoint / "vae")
    plain = draw(pipe)
    pipe.load_lora(lora, 0.5)
    assert (draw(pipe) - plain).abs().max() > 0.1
    pipe.unload_loras()
    assert torch.equal(draw(pipe), plain)


def test_in_bfloat16(golden: Path, lora: Path) -> None:
    pipe = NextStepPipeline.from_pretrained(golden / "tiny-a", dtype=torch.bfloat16)
    plain = draw(pipe)
    pipe.load_lora(lora, 0.5)
    drawn = draw(pipe)
    assert drawn.isfinite().all() and (drawn - plain).abs().max() > 0.1


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "BUCKET", 8)


def test_a_captured_step_takes_another_strength_without_a_new_capture(
    pipeline, small_buckets, lora: Path, other: Path
) -> None:
    caches = StepCaches(CPUGraphs(pipeline.engine.model, TapeRecorder))
    first = with_loras(pipeline, (lora, 0.5), (other, 1.0), caches=caches)
    draw(first)
    before = TapeRecorder.recordings
    for strengths in ((0.25, 1.0), (-0.5, 3.0), (0.5, 1.0)):
        loras = [(lora, strengths[0]), (other, strengths[1])]
        drawn = draw(with_loras(pipeline, *loras, caches=caches))
        assert (drawn - draw(with_loras(pipeline, *loras))).abs().max() <= FLOAT_NOISE, strengths
    assert TapeRecorder.recordings == before
    for loras in ([(lora, 0.5)], []):
        drawn = draw(with_loras(pipeline, *loras, caches=caches))
        assert (drawn - draw(with_loras(pipeline, *loras))).abs().max() <= FLOAT_NOISE
        assert TapeRecorder.recordings > before, "other files are another capture"
        before = TapeRecorder.recordings


def test_what_was_released_is_captured_anew(pipeline, small_buckets, lora: Path) -> None:
    """A recording reads the matrices where they were."""
    caches = StepCaches(CPUGraphs(pipeline.engine.model, TapeRecorder))
    pipe = with_loras(pipeline, (lora, 0.5), caches=caches)
    wanted = draw(pipe)
    caches.adapters.clear()
    before = TapeRecorder.recordings
    assert (draw(pipe) - wanted).abs().max() <= FLOAT_NOISE
    assert TapeRecorder.recordings > before


@torch.inference_mode()
def test_with_streamed_weights(golden: Path, lora: Path) -> None:
    def tokens(device: torch.device) -> Tensor:
        pipe = NextStepPipeline.from_pretrained(golden / "tiny-a", dtype=torch.float32)
        pipe.load_lora(lora, 0.5)
        settings = pipe.engine.recommended().override(steps=3, cfg=2.0)
        job = pipe.engine.make_job([Caption(PROMPT)], (2, 3), settings, seed=1)
        for name, parameter in list(pipe.engine.model.named_parameters()):
            if device == MPS and name.startswith(("layers.0.", "norm")):
                module, _, own = name.rpartition(".")
                pipe.engine.model.get_submodule(module)._parameters[own] = parameter.to(MPS)
        *_, progress = pipe.engine.decode(job, device, torch.float32)
        return progress.tokens.cpu()

    expected = tokens(CPU)
    with SimulatedMPS() as mps:
        drawn = tokens(MPS)
    assert not any("mixes" in problem for problem in mps.problems)
    assert (drawn - expected).abs().max() <= 1e-5


def test_its_memory_by_hand(pipeline, other: Path) -> None:
    """tiny-a: v is 32 rows of a fused layer of 96 + 32 + 32, hidden 96, inner 192; a head 64 wide; rank 5."""
    numbers = 5 * (96 + 160) + 5 * (192 + 96) + 5 * (64 + 64)
    pipe = with_loras(pipeline, (other, 1.0))
    assert pipe.engine.lora_bytes(torch.bfloat16) == 2 * numbers + 4 * 15
    pipe.load_lora(other, -1.0)
    assert pipe.engine.lora_bytes(torch.bfloat16) == 0


def test_the_plan_leaves_room_for_it() -> None:
    assert plan_memory(60, 100, 4, each=10, streamed=5, beside=10) == MemoryPlan(60, 60, 40, 3)
    assert plan_memory(60, 68, 4, each=10, streamed=5, beside=10) == MemoryPlan(60, 43, 25, 1)
    with pytest.raises(NextStepError, match="One picture needs"):
        plan_memory(60, 20, 1, each=10, streamed=5, beside=6)


@pytest.mark.parametrize("strength", [101, -100.5, float("nan"), float("inf"), None, "1", True])
def test_strengths_that_are_none(pipeline, lora: Path, strength: object) -> None:
    pipe = with_loras(pipeline)
    with pytest.raises(NextStepError, match="strength is"):
        pipe.load_lora(lora, strength)
    assert pipe.engine.loras == Stack()


@pytest.mark.parametrize("path", [None, 3, "", "nothing", "\0", "~nobody/x.safetensors"])
def test_paths_that_are_none(pipeline, path: object) -> None:
    with pytest.raises(NextStepError):
        with_loras(pipeline).load_lora(path)


def test_a_wrong_one_is_refused_before_the_models_weights_are_read(checkpoint: Path, lora: Path) -> None:
    """Where both are wrong, it is the LoRA that is told of."""
    for shard in checkpoint.glob("model-*.safetensors"):
        data = bytearray(shard.read_bytes())
        data[-4000:] = b"\xff" * 4000
        shard.write_bytes(data)
    with pytest.raises(NextStepError, match="not a LoRA file"):
        NextStepPipeline.from_pretrained(
            checkpoint, dtype=torch.float32, loras=[(lora, 0.5), (checkpoint / "config.json", 1.0)]
        )


def test_it_may_be_given_when_the_model_is_loaded(pipeline, golden: Path, lora: Path) -> None:
    pipe = NextStepPipeline.from_pretrained(golden / "tiny-a", dtype=torch.float32, loras=[(lora, 0.5)])
    assert torch.equal(draw(pipe), draw(with_loras(pipeline, (lora, 0.5))))
