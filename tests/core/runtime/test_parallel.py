"""One picture by several processes: the same tokens as by one, with what is read and exchanged counted."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import edit_json, make_wide
from ranks import DTYPES, draw, drawn, together

from nextstep_core import NextStepError, NextStepPipeline
from nextstep_core.loading.build import ModelPlan, fill, plan_model
from nextstep_core.loading.checkpoint import read_tensors
from nextstep_core.loading.fusion import parts_of
from nextstep_core.loading.shares import shared
from nextstep_core.loading.single_file import save_model
from nextstep_core.loading.store import ASSETS
from nextstep_core.model.config import NextStepConfig
from nextstep_core.model.transformer import whole_span
from nextstep_core.runtime.graphs import RUNS_PLAIN, StepGraphs
from nextstep_core.runtime.parallel import Cut, Ranks, Share, counts, exchanged_bytes
from nextstep_core.runtime.quantization import quantized_linears
from nextstep_core.sampling.solvers import SAMPLERS

TINY = ASSETS / "tiny"
ROOT = Path(__file__).resolve().parents[3]
ASKED: list[dict[str, Any]] = [
    {"sampler": name, "steps": 6, **more}
    for name in SAMPLERS
    for more in ({"cfg": 3.0}, {"cfg": 3.0, "cfg_img": 1.5, "edit": "red"})
]
PLACES = 6  # of a picture of 48x32 pixels; the last token is never fed


@lru_cache
def config() -> NextStepConfig:
    return plan_model(TINY).config


@pytest.fixture(scope="module", params=[2, 4])
def many(request: pytest.FixtureRequest) -> tuple[int, list[dict[str, Any]]]:
    """What each of so many processes has to tell. With 4, the embedded model's two heads with keys are had twice."""
    return request.param, together(request.param, drawn, "tiny", {dtype: asked_in(dtype) for dtype in DTYPES})


def asked_in(dtype: str) -> list[dict[str, Any]]:
    """All in float32, and a few in float64, where nothing but a mistake makes a difference."""
    return ASKED if dtype == "float32" else ASKED[:4]


@lru_cache
def alone(dtype: str) -> list[torch.Tensor]:
    pipeline = NextStepPipeline.from_pretrained("tiny", dtype=DTYPES[dtype])
    return [draw(pipeline, asked) for asked in asked_in(dtype)]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-3), ("float64", 1e-6)])
def test_every_sampler_draws_and_edits_the_same_tokens(many: Any, dtype: str, most: float) -> None:
    _, found = many
    for n, (asked, expected) in enumerate(zip(asked_in(dtype), alone(dtype))):
        for one in found:
            off = (torch.from_numpy(one["tokens"][dtype][n]) - expected).abs().max().item()
            assert off <= most, (asked, off)


@pytest.mark.slow
def test_all_processes_draw_the_same_bits(many: Any) -> None:
    _, found = many
    for dtype in DTYPES:
        for tokens in zip(*(one["tokens"][dtype] for one in found)):
            assert all((own == tokens[0]).all() for own in tokens)


@pytest.mark.slow
def test_what_is_exchanged_is_two_sums_a_layer(many: Any) -> None:
    """For every position of each row: of the prompt, and of every token but the last."""
    _, found = many
    pipeline = NextStepPipeline.from_pretrained("tiny", dtype=torch.float32)
    for dtype, kind in DTYPES.items():
        for n, asked in enumerate(asked_in(dtype)):
            if "edit" in asked:
                continue
            prompt = len(pipeline.engine.tokenizer.encode("a red circle on a blue background"))
            by_hand = 2 * 7 * 2 * 192 * kind.itemsize  # sums, layers, rows with guidance, hidden size
            assert exchanged_bytes(config(), 2, kind) == by_hand
            for one in found:
                positions, rest = divmod(one["exchanged"][dtype][n], by_hand)
                fed = positions - (PLACES - 1)
                # The prompt was read once, by the first picture that had it; it has a few ids of its own around it.
                assert rest == 0 and (fed == 0 or prompt <= fed <= prompt + 8), (positions, prompt)


@pytest.mark.slow
def test_each_process_reads_its_slices_and_no_more(many: Any) -> None:
    count, found = many
    size = torch.float16.itemsize  # of the files
    heads, inner, hidden, dim = 4, 512, 192, 48
    per_layer = [heads // count * dim * hidden * 2, max(1, 2 // count) * dim * hidden * 2, inner // count * hidden * 3]
    biases = heads // count * dim + max(1, 2 // count) * dim * 2
    for one in found:
        assert sum(nbytes for *_, nbytes in one["read"]) == 7 * (sum(per_layer) + biases) * size
    whole = sum(weight.nbytes for weight in plan_model(TINY).load_model("cpu", torch.float64).parameters())
    layers = 7 * (heads * dim * hidden * 2 + 2 * dim * hidden * 2 + inner * hidden * 3) * torch.float64.itemsize
    for one in found:
        assert one["held"] < whole - layers * (1 - 1.4 / count)


@pytest.mark.parametrize("recipe", ["int8", "fp8", "int4-g32"])
def test_a_share_of_a_quantized_file_stands_for_the_same_numbers(tmp_path: Path, recipe: str) -> None:
    """Every matrix of a share is the same part of the whole one, to the last bit."""
    file = tmp_path / f"{recipe}.safetensors"
    save_model(plan_model(TINY, recipe), file, torch.float32)
    plan = plan_model(file)
    whole = numbers(plan)
    for share in (Share(0, 2), Share(1, 2)):
        cuts = share.cuts(plan.config)
        for name, matrix in numbers(shared(plan, share)).items():
            parts = parts_of(f"{name}.weight", plan.config) or {f"{name}.weight": len(whole[name])}
            pieces = []
            for part, piece in zip(parts, whole[name].split(list(parts.values()))):
                cut = cuts.get(part.split(".")[-2], Cut(0, 0, len(piece)))
                pieces.append(piece.narrow(cut.axis, cut.start, cut.stop - cut.start))
            assert torch.equal(matrix, torch.cat(pieces)), name


def numbers(plan: ModelPlan) -> dict[str, torch.Tensor]:
    """What the quantized matrices of a plan stand for."""
    model = plan.empty_model()
    fill(model, dict(plan.read_model("cpu", torch.float32)))
    return {
        name: layer.format.dequantize(layer.weight, layer.weight_scale, torch.float32)
        for name, layer in quantized_linears(model)
    }


@pytest.mark.parametrize("source", ["tiny", "golden", "with biases"])
@pytest.mark.parametrize("recipe", [None, "int8", "int4"])
@torch.inference_mode()
def test_shares_add_up_to_the_model(source: str, recipe: str | None, checkpoint: Path) -> None:
    """Without any process: the parts that the shares of a layer give are added up here."""
    if source == "with biases":
        edit_json(checkpoint / "config.json", attention_bias=True, o_attention_bias=True, mlp_bias=True)
        make_wide(checkpoint, lambda shape: torch.randn(shape) / 8)
    plan = plan_model(TINY if source == "tiny" else checkpoint, recipe)
    whole = plan.load_model("cpu", torch.float64) if recipe is None else None
    for count in counts(plan.config):
        models = [shared(plan, Share(n, count)).load_model("cpu", torch.float64) for n in range(count)]
        if whole is None:
            continue  # that they load is all there is to see: scales are those of each part
        x = torch.randn(2, 7, plan.config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        span = whole_span(plan.config, torch.ones(2, 7, dtype=torch.bool), torch.float64)
        for n, layer in enumerate(whole.layers):
            parts = [model.layers[n] for model in models]
            for kind in ("self_attn", "mlp"):
                given = (x, span, None) if kind == "self_attn" else (x,)
                total = sum(part.get_submodule(kind)(*given) for part in parts)
                assert (total - layer.get_submodule(kind)(*given)).abs().max() <= 1e-10, (n, kind, count)


def test_a_share_of_the_published_model() -> None:
    published = replace(
        config(), hidden_size=5120, intermediate_size=13824, num_attention_heads=40, num_key_value_heads=8, head_dim=128
    )
    assert list(counts(published)) == [2, 4, 8]
    own = Share(3, 8).of(published)
    assert (own.num_attention_heads, own.num_key_value_heads, own.intermediate_size) == (5, 1, 1728)
    cuts = Share(3, 8).cuts(published)
    assert (cuts["k_proj"].start, cuts["k_proj"].stop) == (384, 512)
    assert (cuts["o_proj"].axis, cuts["o_proj"].start, cuts["o_proj"].stop) == (1, 1920, 2560)
    deep = replace(published, num_hidden_layers=48)
    assert exchanged_bytes(deep, 2, torch.bfloat16) == 2 * 48 * 2 * 5120 * 2


def test_neighbours_share_a_head_with_keys_where_there_are_too_few() -> None:
    cuts = [Share(n, 4).cuts(config())["k_proj"] for n in range(4)]
    assert [(cut.start, cut.stop) for cut in cuts] == [(0, 48), (0, 48), (48, 96), (48, 96)]


@pytest.mark.parametrize("count", [3, 5, 8])
def test_counts_that_the_heads_cannot_be_cut_into_are_refused(count: int) -> None:
    with pytest.raises(NextStepError, match=r"4 attention heads.*Start 2, 4 instead"):
        Share(0, count).of(config())


def fake(count: int = 2) -> Ranks:
    return Ranks(Share(0, count), torch.device("cpu"), None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loras": [("night", 1.0)]}, "--lora"),
        ({"max_memory": 10**9}, "--max-memory"),
        ({"quantization": "auto"}, "--quantization auto"),
    ],
)
def test_options_that_do_not_go_with_it_are_refused_before_anything_is_read(options: dict, said: str) -> None:
    with pytest.raises(NextStepError, match=said):
        NextStepPipeline.from_pretrained("nowhere", ranks=fake(), **options)


def test_formats_that_cannot_be_cut_are_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "int4.safetensors"
    save_model(plan_model(TINY, "int4"), file, torch.float32)  # groups of 64 columns, of which a half has 96
    plan = plan_model(file)
    monkeypatch.setattr("nextstep_core.loading.build.read_tensors", None)
    with pytest.raises(NextStepError, match="int4.safetensors holds matrices in a form"):
        shared(plan, Share(0, 2))


def test_lookahead_and_loras_are_refused_by_the_engine() -> None:
    pipeline = NextStepPipeline.from_pretrained("tiny", dtype=torch.float32)
    pipeline.engine = replace(pipeline.engine, ranks=fake())
    with pytest.raises(NextStepError, match="lookahead"):
        pipeline.generate("a", height=16, width=16, lookahead="exact")
    with pytest.raises(NextStepError, match="--lora"):
        pipeline.load_lora("night")


def test_without_torchrun_the_command_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(NextStepError, match="torchrun --nproc"):
        Ranks.join("cpu")


def test_more_processes_than_gpus_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 2, "LOCAL_RANK": 2, "WORLD_SIZE": 3, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(NextStepError, match="2 GPUs, and this is process 3"):
        Ranks.join("cuda")


def test_what_waits_for_others_is_not_recorded() -> None:
    """A graph of the head alone: in the rest, a process that failed to record would leave the others waiting."""
    model = plan_model(TINY).load_model("cpu", torch.float32)
    fake().exchange(model)
    assert getattr(model.layers, RUNS_PLAIN)

    class Step:
        def __init__(self, *reads: torch.nn.Module) -> None:
            self.reads = reads

    of_layers, of_head = Step(model.layers, model.norm), Step(model.head)
    kept = StepGraphs(model, lambda _: None).steps(
        0, torch.device("cpu"), lambda wrap: [wrap(of_layers), wrap(of_head)]
    )
    assert kept[0] is of_layers and kept[1] is not of_head


def test_a_file_is_read_in_slices(tmp_path: Path) -> None:
    """Of q, k, v that lie as one, and apart, the same rows."""
    whole = tmp_path / "whole.safetensors"
    save_model(plan_model(TINY), whole, torch.float16)
    name = "layers.1.self_attn.qkv_proj.weight"
    for n in range(4):
        apart, one = (shared(plan_model(path), Share(n, 4)).files for path in (TINY, whole))
        (_, expected), (_, found) = next(read_tensors(apart, [name])), next(read_tensors(one, [name]))
        assert torch.equal(expected, found) and found.shape == ((1 + 2) * 48, 192)


COMMAND = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_command_writes_and_speaks_once(tmp_path: Path) -> None:
    asked = ["generate", "a red circle", "32", "2", "-m", "tiny", "--device", "cpu", "--tensor-parallel", "--json"]
    done = torchrun("nextstep_core", *asked, "-o", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (picture,) = json.loads(done.stdout)["pictures"]
    assert [path.name for path in tmp_path.iterdir()] == [Path(picture["file"]).name]


@pytest.mark.slow
def test_what_is_wrong_is_said_once(tmp_path: Path) -> None:
    asked = ["generate", "a", "-m", "tiny", "--device", "cpu", "--tensor-parallel", "-o", str(tmp_path)]
    done = torchrun("nextstep_core", *asked, "--lora", "night")
    assert done.returncode != 0 and done.stderr.count("--lora does not go with several GPUs") == 1, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_and_is_said_once() -> None:
    """The other waits in a sum for the one that fails."""
    done = torchrun("tests.failing_rank", "generate", "a", "32", "-m", "tiny", "--device", "cpu", "--tensor-parallel")
    assert done.returncode != 0 and done.stderr.count("It failed here.") == 1, done.stderr
    assert "several processes failed" not in done.stderr
