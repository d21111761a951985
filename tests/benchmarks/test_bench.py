"""The benchmark command: what its JSON says of the embedded model, and the reference beside it where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = os.environ.get("NEXTSTEP_REFERENCE")
FLOAT32 = 4


def bench(folder: Path, *arguments: str) -> dict:
    """The JSON of a run on two small pictures."""
    out = folder / "bench.json"
    command = [sys.executable, "-m", "benchmarks", "--device", "cpu", "--threads", "1", *arguments]
    run = subprocess.run([*command, "--json", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(out.read_text())


def linear(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + outputs * bias


def test_every_part_is_timed_and_the_floor_counts_what_a_token_reads(tmp_path: Path) -> None:
    result = bench(
        tmp_path, "--size", "48x32", "--batch", "2", "--repeat", "2", "--steps", "5", "--prompt-length", "10"
    )
    parts = {"prefill_position", "transformer", "head", "token", "vae_token", "vae_picture", "picture"}
    assert set(result["seconds"]) == parts
    assert all(0 < n["low"] <= n["median"] <= n["high"] for n in result["seconds"].values())
    assert {"machine", "versions", "command", "tokens_per_second", "bandwidth", "floor", "peak_memory"} <= set(result)
    assert result["settings"]["rows"] == 4 and result["settings"]["network_calls"] == 5

    c = json.loads((ROOT / "nextstep_core" / "assets" / "tiny" / "config.json").read_text())
    hidden, inner, dim, blocks = c["hidden_size"], c["intermediate_size"], c["fm_head_dim"], c["fm_head_layers"]
    token = c["latent_channels"] * c["latent_patch_size"] ** 2
    q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    layer = linear(hidden, q + 2 * kv) + linear(q, hidden, False) + 3 * hidden * inner + 2 * hidden
    once = linear(hidden, hidden) + linear(hidden, dim) + blocks * linear(dim, 3 * dim) + linear(dim, 2 * dim)
    call = linear(token, dim) + blocks * (2 * linear(dim, dim) + 2 * dim) + linear(dim, token)
    seen = [10 + n + 1 for n in range(6 - 1)]  # positions that each of the 6 tokens but the last sees when it is fed
    read = result["bytes"]
    assert read["transformer"] == FLOAT32 * (c["num_hidden_layers"] * layer + hidden + linear(token, hidden))
    assert read["head_once"] == FLOAT32 * once
    assert read["head_call"] == FLOAT32 * call
    assert read["kv"] == FLOAT32 * 4 * 2 * c["num_hidden_layers"] * kv * sum(seen) / len(seen)
    assert read["token"] == read["transformer"] + read["kv"] + read["head_once"] + 5 * read["head_call"]
    floor = result["floor"]["seconds"]["token"]
    assert floor == pytest.approx(read["token"] / result["bandwidth"]["bytes_per_second"])
    times = result["floor"]["times_the_floor"]["token"]
    assert times == pytest.approx(result["seconds"]["token"]["median"] / floor)


def test_a_model_that_needs_no_file_is_timed_too(tmp_path: Path) -> None:
    only = ("--random", "medium", "--size", "32x32", "--tokens", "1", "--repeat", "1", "--warmup", "0", "--steps", "2")
    assert bench(tmp_path, *only)["settings"]["model"] == "random medium"


@pytest.mark.skipif(REFERENCE is None, reason="NEXTSTEP_REFERENCE names no checkout of the public 1.0 inference code")
def test_the_reference_draws_the_same_tokens(tmp_path: Path) -> None:
    python = os.environ.get("NEXTSTEP_REFERENCE_PYTHON", sys.executable)
    model = ("--model", str(ROOT / "tests" / "data" / "golden" / "tiny-a"))
    with_reference = ("--reference", REFERENCE, "--reference-python", python)
    result = bench(
        tmp_path, "--size", "48x32", "--batch", "2", "--repeat", "1", "--steps", "6", *model, *with_reference
    )
    reference = result["reference"]
    assert reference["tokens_agree"] and reference["token_difference"] <= 1e-4
    assert reference["ours"]["median"] > 0 and reference["reference"]["median"] > 0
