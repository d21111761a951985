"""All that one benchmark run says: as an object for JSON, and as text for people."""

from __future__ import annotations

import platform
import shlex
import sys
from dataclasses import asdict
from typing import Any

import torch

from nextstep_core.decoding.floor import TokenBytes, token_bytes
from nextstep_core.runtime.bandwidth import Bandwidth, bandwidth
from nextstep_core.runtime.devices import device_name, forget_peak, peak_memory

from .timing import Case, measure

ROWS = {
    "prefill_position": "prefill, a position",
    "transformer": "transformer, a token",
    "head": "head, a token",
    "token": "a token in the loop",
    "vae_token": "VAE, a token",
    "vae_picture": "VAE, a picture",
    "picture": "a picture",
}


def context(device: torch.device) -> dict[str, str]:
    """What a number means nothing without."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "machine": device_name(device),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
    }


def settings_of(case: Case, quantization: str | None) -> dict[str, Any]:
    """The case in words and numbers."""
    return {
        "model": case.subject.name,
        "size": f"{case.width}x{case.height}",
        "tokens": case.tokens,
        "batch": case.batch,
        "rows": case.rows,
        "prompt_length": case.prompt_length,
        "sampler": case.settings.sampler,
        "steps": case.settings.steps,
        "network_calls": case.calls,
        "cfg": case.settings.cfg,
        "dtype": str(case.dtype).removeprefix("torch."),
        "quantization": quantization or "none",
        "graphs": case.captures,
        "device": str(case.device),
        "threads": torch.get_num_threads(),
    }


def floor_of(read: TokenBytes, rate: Bandwidth, token_seconds: dict[str, float]) -> dict[str, dict[str, float]]:
    """Floor in seconds, and how many times as long it took, of the transformer, the head and the whole token."""
    sizes = {"transformer": read.step, "head": read.sampling, "token": read.token}
    floors = {name: size / rate.bytes_per_second for name, size in sizes.items()}
    return {
        "seconds": floors,
        "times_the_floor": {name: token_seconds[name] / floor for name, floor in floors.items()},
    }


def benchmark(case: Case, quantization: str | None, repeat: int, warmup: int, only: int | None) -> dict[str, Any]:
    """Measure everything about one case."""
    forget_peak(case.device)
    seconds = measure(case, repeat, warmup, only)
    peak, of = peak_memory(case.device)  # before the bandwidth's buffers
    rate = bandwidth(case.device)
    subject = case.subject
    sizes = subject.tensor_bytes
    read = token_bytes(subject.config, sizes, case.rows, case.prompt_length, case.tokens, case.calls, case.dtype)
    medians = {name: numbers["median"] for name, numbers in seconds.items()}
    return {
        "settings": settings_of(case, quantization),
        "scaled_from_tokens": only if only is not None and only < case.tokens else None,
        "runs": {"counted": repeat, "not_counted": warmup},
        "tokens_per_second": seconds.pop("tokens_per_second"),
        "seconds": seconds,
        "bytes": {**asdict(read), "token": read.token},
        "bandwidth": asdict(rate),
        "floor": floor_of(read, rate, medians),
        "peak_memory": {"bytes": peak, "of": of},
    }


def show(result: dict[str, Any]) -> None:
    """Print a `benchmark` result."""
    floor, ratio = result["floor"]["seconds"], result["floor"]["times_the_floor"]
    print("settings  ", ", ".join(f"{name} {value}" for name, value in result["settings"].items()))
    print(f"{'seconds':22}{'median':>12}{'lowest':>12}{'highest':>12}{'floor':>12}  times the floor")
    for name, title in ROWS.items():
        numbers = "".join(f"{result['seconds'][name][part]:12.5f}" for part in ("median", "low", "high"))
        print(f"{title:22}{numbers}" + (f"{floor[name]:12.5f}{ratio[name]:9.2f}" if name in floor else ""))
    rate = result["tokens_per_second"]
    print(f"{'tokens per second':22}{rate['median']:12.2f}{rate['low']:12.2f}{rate['high']:12.2f}")
    if result["scaled_from_tokens"]:
        print(
            f"Scaled: {result['scaled_from_tokens']} of {result['settings']['tokens']} tokens, spread evenly over the "
            "picture, and one picture through the VAE were timed; picture and loop are sums of these parts."
        )
    show_floor(result)


def show_floor(result: dict[str, Any]) -> None:
    """Print what the floor was made of, and the memory in use."""
    read, rate, peak = result["bytes"], result["bandwidth"], result["peak_memory"]
    print(
        f"a token reads {read['token'] / 1e6:.1f} MB: transformer {read['transformer'] / 1e6:.1f}, KV cache "
        f"{read['kv'] / 1e6:.1f}, head once {read['head_once'] / 1e6:.1f} and {read['calls']} times "
        f"{read['head_call'] / 1e6:.1f}"
    )
    print(f"bandwidth {rate['bytes_per_second'] / 1e9:.1f} GB/s ({rate['method']})")
    used = "unknown" if peak["bytes"] is None else f"{peak['bytes'] / 2**20:.0f} MiB"
    print(f"peak memory {used} ({peak['of']})")
