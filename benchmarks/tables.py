"""The JSON of `python -m scripts.gpu_check` as the Markdown tables of BENCHMARKS.md.

python -m benchmarks.tables gpu.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


def table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; columns whose title begins with ">" are numbers, at the right."""
    lines = [
        "| " + " | ".join(title.removeprefix(">") for title in titles) + " |",
        "| " + " | ".join("---:" if title.startswith(">") else "---" for title in titles) + " |",
    ]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def number(value: float | None, unit: str = "", scale: float = 1) -> str:
    """Three digits and a unit; a dash where there is none."""
    if value is None:
        return "-"
    scaled = value * scale
    return f"{scaled:.3g}{unit}" if abs(scaled) < 1000 else f"{scaled:.0f}{unit}"


def benches(results: Sequence[dict[str, Any]]) -> str:
    """One row for each run of `python -m benchmarks`."""
    numbers = ("a token", "transformer", "head", "a picture", "VAE", "times the floor", "peak")
    rows = []
    for result in results:
        said, seconds = result["settings"], {name: n["median"] for name, n in result["seconds"].items()}
        weights = said["dtype"] if said["quantization"] == "none" else said["quantization"]
        parts = (number(seconds[part], " ms", 1e3) for part in ("token", "transformer", "head"))
        picture = number(seconds["picture"], " s") + (" (scaled)" if result["scaled_from_tokens"] else "")
        floor = number(result["floor"]["times_the_floor"]["token"])
        peak = number(result["peak_memory"]["bytes"], " GB", 1e-9)
        vae = number(seconds["vae_picture"], " ms", 1e3)
        rows.append([weights, "yes" if said["graphs"] else "no", *parts, picture, vae, floor, peak])
    return table(["weights", "graphs", *(f">{title}" for title in numbers)], rows)


def attention(rows: Sequence[dict[str, Any]]) -> str:
    """A row for each length, a column for each backend; microseconds a layer."""
    names = list(dict.fromkeys(row["backend"] for row in rows))
    times = {(row["visible"], row["backend"]): row["microseconds"] for row in rows}
    lengths = dict.fromkeys(row["visible"] for row in rows)
    cells = ([length, *(number(times[length, name], " us") for name in names)] for length in lengths)
    return table([">keys", *(f">{name}" for name in names)], cells)


def products(rows: Sequence[dict[str, Any]]) -> str:
    """A row for each matrix and product, a column for each number of rows; microseconds a matrix, and the best rate."""
    counts = list(dict.fromkeys(row["rows"] for row in rows))
    cells: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        matrix = f"{row['matrix']}, {row['outputs']}x{row['inputs']}"
        cells.setdefault((matrix, row["stored"], row["product"]), {})[row["rows"]] = row
    lines = []
    for names, times in cells.items():
        each = (times[n]["milliseconds"] / times[n]["count"] if n in times else None for n in counts)
        best = max(time["rate"] for time in times.values())
        lines.append([*names, *(number(t, " us", 1e3) for t in each), number(best, " GB/s", 1e-9)])
    return table(["matrix", "stored as", "product", *(f">{n} rows" for n in counts), ">at most"], lines)


def choice(rows: Sequence[dict[str, Any]]) -> str:
    """A row for each trial: what won, its time beside the usual one's, and why each of the others did not."""
    cells = []
    for row in rows:
        won = next((v for v in row["verdicts"] if v["verdict"] == "won"), None)
        others = [
            f"{v['name']} {v['verdict']}" + (f" {number(v['ratio'])}x" if v["ratio"] else "")
            for v in row["verdicts"]
            if v is not won
        ]
        taken = [won["name"], number(won["seconds"], " us", 1e6), number(won["error"])] if won else ["usual", "-", "-"]
        cells.append([row["what"], number(row["plain"], " us", 1e6), *taken, ", ".join(others)])
    return table(["matrix", ">usual", "taken", ">time", ">error", "others"], cells)


def head(result: dict[str, Any]) -> str:
    """Milliseconds by steps, and what the line through them says."""
    rows = [[row["steps"], number(row["milliseconds"], " ms")] for row in result["samplings"]]
    line = (
        f"{number(result['milliseconds_a_step'], ' ms')} a step and {number(result['milliseconds_besides'], ' ms')} "
        "a token besides."
    )
    return table([">steps", ">a token"], rows) + "\n\n" + line


def streaming(result: dict[str, Any]) -> str:
    """One row."""
    titles = [">layers on the host", ">a token", ">bytes a token", ">over the bus", ">planned", ">used"]
    row = [
        result["layers_on_the_host"],
        number(result["seconds_a_token"], " ms", 1e3),
        number(result["bytes_a_token"], " GB", 1e-9),
        number(result["bytes_per_second"], " GB/s", 1e-9),
        number(result["planned_bytes"], " GB", 1e-9),
        number(result["used_bytes"], " GB", 1e-9),
    ]
    return table(titles, [row])


def pair(result: dict[str, Any]) -> str:
    """One row."""
    times = (number(result[name], " s") for name in ("seconds_before", "seconds_after"))
    return table(
        [">two models loaded", ">one unloaded", "the same tokens"], [[*times, "yes" if result["same"] else "NO"]]
    )


def window(rows: Sequence[dict[str, Any]]) -> str:
    """A row for each number of positions."""
    cells = ([r["positions"], number(r["milliseconds"], " ms"), number(r["times_one"])] for r in rows)
    return table([">positions", ">a pass", ">times one position"], cells)


def own(rows: Sequence[dict[str, Any]]) -> str:
    """A row for each trial."""
    cells = (
        [
            *(r["what"], r["kernel"], r["verdict"]),
            *(number(r["microseconds"], " us"), number(r["plain"], " us"), number(r["error"], " %", 100)),
            r["reason"].replace("|", "/"),
        ]
        for r in rows
    )
    return table(["of what", "kernel", "verdict", ">a pass", ">the plain one", ">off by", "and said"], cells)


PROBES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "own": ("Our own kernels in their trials", own),
    "products": ("Products by shape and number of rows", products),
    "choice": ("What the chooser takes", choice),
    "attention": ("Attention by backend", attention),
    "head": ("The head by its steps", head),
    "streaming": ("Half of the layers on the host", streaming),
    "pair": ("Two models, one unloaded", pair),
    "window": ("Several positions in a pass", window),
}


def table_of(name: str, result: Any) -> str:
    """The table of one probe's result."""
    return PROBES[name][1](result)


def report(steps: Sequence[dict[str, Any]]) -> str:
    """All that the steps of a check say: what was run and how it ended, then the tables."""
    endings = [
        [step["name"], step["ended"], f"{step['seconds']:.0f} s", f"`{step['command']}`", last_words(step)]
        for step in steps
    ]
    parts = ["## How it went", table(["step", "ended", ">after", "command", "and said"], endings)]
    results = [step["result"] for step in steps if step["result"] is not None]
    for said in dict.fromkeys(f"{result['machine']}; {result['versions']}" for result in results):
        parts.insert(0, said)
    measured = [result for result in results if "floor" in result]
    if measured:
        parts += ["## Pictures", benches(measured)]
    for name, (title, _) in PROBES.items():
        parts += [f"## {title}\n\n{table_of(name, result[name])}" for result in results if name in result]
    return "\n\n".join(parts) + "\n"


def last_words(step: dict[str, Any]) -> str:
    """The last line of a step that has no numbers to show."""
    lines = step["output"].strip().splitlines()
    return lines[-1].replace("|", "/") if lines and step["result"] is None else ""


if __name__ == "__main__":
    print(report(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")
