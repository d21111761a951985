"""Values that no widget and no node of ours gives: refused by the host, or one short sentence; then all goes on."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from comfy_graph import ComfyGraph, GiveValue, node, text_to_image

PICTURE = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
LATENT = torch.zeros(1, 16, 8, 6)
NAN, INF = float("nan"), float("inf")


def edit() -> dict:
    """An edit in API form, small and quick."""
    graph = text_to_image()
    graph["picture"] = node("EmptyImage", width=64, height=64, batch_size=1, color=0x2050E0)
    graph["positive"] = node(
        "NextStepEditEncode",
        model=["model", 0], vae=["model", 1], image=["picture", 0], instruction="<image>x", size="keep",
        width=64, height=64,
    )  # fmt: skip
    graph["sampler"]["inputs"] |= {"latent": ["positive", 1], "cfg_img": 1.5, "on_interrupt": "discard"}
    return graph


def in_one(editing: bool) -> dict:
    """The all-in-one nodes in API form."""
    settings = text_to_image()["sampler"]["inputs"]
    shared = {name: value for name, value in settings.items() if name not in ("model", "positive", "latent")}
    shared |= {"model": ["model", 0], "vae": ["model", 1], "negative_prompt": "", "width": 64, "height": 48}
    graph = {name: text_to_image()[name] for name in ("model", "save")}
    if editing:
        graph["picture"] = edit()["picture"]
        picture = {"image": ["picture", 0], "instruction": "x", "size": "keep", "cfg_img": 1.5}
        graph["box"] = node("NextStepImageEdit", **shared, **picture)
    else:
        graph["box"] = node("NextStepTextToImage", **shared, prompt="x", batch_size=1)
    graph["save"]["inputs"]["images"] = ["box", 0]
    return graph


def with_ratio() -> dict:
    graph = text_to_image()
    graph["ratio"] = node("NextStepAspectRatio", ratio="16:16 square", base="256")
    graph["latent"]["inputs"] |= {"width": ["ratio", 0], "height": ["ratio", 1]}
    return graph


def batch() -> dict:
    graph = text_to_image()
    graph["both"] = node("NextStepPromptBatch", first=["positive", 0], second=["positive", 0])
    graph["sampler"]["inputs"]["positive"] = ["both", 0]
    graph["latent"]["inputs"]["batch_size"] = 2
    return graph


def prepared() -> dict:
    """A photograph that is brought to size, and what becomes of it put back."""
    graph = {name: text_to_image()[name] for name in ("save",)}
    graph["photo"] = node("EmptyImage", width=100, height=64, batch_size=1, color=0x2050E0)
    graph["paint"] = node("SolidMask", value=1.0, width=100, height=64)
    graph["prepare"] = node(
        "NextStepPreparePicture",
        image=["photo", 0], mode="crop", size="nearest aspect ratio", base="256", width=64, height=64,
        mask=["paint", 0], area="around the mask", margin=0.5,
    )  # fmt: skip
    graph["back"] = node("NextStepPasteBack", image=["prepare", 0], original=["prepare", 2], feather=16)
    graph["save"]["inputs"]["images"] = ["back", 0]
    return graph


def compared() -> dict:
    """Two pictures beside each other."""
    graph = text_to_image()
    graph["compare"] = node("NextStepCompare", cfg="2, 3", steps="2", shift="1", sampler="auto", quantization="auto")
    graph["sampler"]["inputs"]["cfg"] = ["compare", 0]
    graph["grid"] = node("NextStepLabelledGrid", image=["decode", 0], columns=2, labels=["compare", 5])
    graph["save"]["inputs"]["images"] = ["grid", 0]
    return graph


def downloaded() -> dict:
    return {"download": node("NextStepDownload", checkpoint="NextStep-1.1", revision="main")}


def resumed() -> dict:
    graph = text_to_image()
    graph["resume"] = node("NextStepResume", latent=["latent", 0], filename_prefix="NextStep/unfinished")
    graph["sampler"]["inputs"]["latent"] = ["resume", 0]
    return graph


def framed() -> dict:
    """The frames of a drawing."""
    graph = text_to_image()
    graph["frames"] = node(
        "NextStepDrawingFrames", samples=["sampler", 0], vae=["model", 1], frames=3, hold=1, longest_side=64
    )
    graph["save"]["inputs"]["images"] = ["frames", 0]
    return graph


def with_lora() -> dict:
    """A changed model."""
    graph = text_to_image()
    graph["lora"] = node("NextStepLoadLora", model=["model", 0], lora_name="night (embedded)", strength=0.5)
    graph["model"]["inputs"]["model_name"] = "tiny (embedded)"
    graph["sampler"]["inputs"]["model"] = ["lora", 0]
    return graph


GRAPHS = {
    "text": text_to_image, "edit": edit, "box": lambda: in_one(False), "edit box": lambda: in_one(True),
    "ratio": with_ratio, "batch": batch, "prepared": prepared, "compared": compared, "resumed": resumed,
    "download": downloaded, "frames": framed, "lora": with_lora,
}  # fmt: skip
NUMBERS: list[Any] = [None, "4", {}, [], 0, -1, NAN, INF, 1e30, 1e-30, 2**64, 10**5000, torch.tensor(3), False]
TEXTS: list[Any] = [None, 5, {}, [], b"x", "half \ud800", "x" * 100_000, " " * 11_000_000]
CHOICES: list[Any] = [None, 5, {}, [], "x" * 5000, "\ud800", "gone"]
MODELS: list[Any] = [None, 5, "tiny-a", {}, [], object(), PICTURE]
LATENTS: list[Any] = [
    None, "x", {}, [], {"samples": None}, {"samples": "x"}, {"samples": LATENT[0]}, {"samples": LATENT[:0]},
    {"samples": LATENT[:, :4]}, {"samples": LATENT.int()}, {"samples": LATENT[..., :0]}, LATENT,
    {"samples": LATENT[:, :, :7]}, {"samples": torch.zeros(1, 16, 1, 1)}, {"samples": LATENT, "noise_mask": "x"},
    {"samples": LATENT, "noise_mask": torch.ones(5)}, {"samples": LATENT * NAN, "noise_mask": torch.ones(1, 64, 48)},
    {"samples": torch.empty(5000, 16, 1, 1).expand(5000, 16, 8, 6)}, {"samples": LATENT.to(torch.float8_e4m3fn)},
    {"samples": LATENT, "noise_mask": torch.ones(1, 64, 48).to_sparse()}, {"samples": LATENT.to("meta")},
]  # fmt: skip
PICTURES: list[Any] = [
    None, "x", {}, PICTURE[0], PICTURE[:0], PICTURE[:, :0], PICTURE * NAN, (PICTURE * 255).byte(), PICTURE[..., :0],
    PICTURE.repeat(1, 1, 1, 2), PICTURE.to_sparse(), PICTURE.to("meta"), PICTURE.to(torch.float8_e4m3fn),
]  # fmt: skip
MASKS: list[Any] = ["x", {}, 5, torch.zeros(0, 8, 8), torch.ones(5), torch.ones(1, 3, 7), torch.tensor(1.0)]
MASKS += [torch.ones(1, 64, 100) * NAN, torch.ones(1, 64, 100).to_sparse(), torch.ones(1, 64, 100).to("meta")]
MASKS += [torch.ones(1, 64, 100, dtype=dtype) for dtype in (torch.complex64, torch.float8_e4m3fn)]
WORDS: list[Any] = [
    None,
    5,
    {},
    [],
    b"x",
    "half \ud800",
    "\0",
    "x" * 100_000,
    "../../../etc/passwd",
    "1e400",
    "9" * 5000,
]
NAMES_OF_REPOSITORIES: list[Any] = [None, 5, {}, b"a/b", "../x", "a/b/c", "ä/ö", "a\0b/c\n", "half/\ud800", "x" * 5000]


class FakeVae:
    """The VAE of another model: what it makes has other shapes, or is nothing."""

    def __init__(self, made: Any) -> None:
        self.encode = self.decode = lambda _: made


VAES: list[Any] = [FakeVae(None), FakeVae(torch.zeros(1, 3)), FakeVae(torch.zeros(1, 16, 3, 3)), FakeVae(PICTURE * NAN)]
VAES.append(FakeVae(PICTURE.repeat(2, 1, 1, 1)))
# For each graph: the nodes, inputs and values that are tried there.
TRIED: dict[str, list[tuple[str, str, list[Any]]]] = {
    "text": [
        ("latent", "width", NUMBERS), ("latent", "batch_size", [*NUMBERS, 65]), ("sampler", "steps", [*NUMBERS, 10**6]),
        ("sampler", "cfg", NUMBERS), ("sampler", "shift", NUMBERS), ("sampler", "seed", [*NUMBERS[:4], *NUMBERS[5:]]),
        ("sampler", "sampler", CHOICES), ("sampler", "cfg_schedule", CHOICES), ("sampler", "use_norm", CHOICES),
        ("sampler", "latent", LATENTS), ("sampler", "model", MODELS), ("sampler", "positive", MODELS),
        ("sampler", "negative", MODELS[1:]), ("positive", "prompt", TEXTS), ("positive", "positive_suffix", TEXTS),
        ("positive", "model", MODELS), ("decode", "samples", [*LATENTS[:12], *LATENTS[18::2]]),
        ("decode", "vae", [*MODELS, *VAES[:2], *VAES[3:]]),
        ("model", "model_name", CHOICES), ("model", "dtype", CHOICES), ("model", "quantization", CHOICES),
    ],
    "edit": [
        ("positive", "instruction", TEXTS), ("positive", "image", PICTURES), ("positive", "size", CHOICES),
        ("positive", "vae", [*MODELS, *VAES]), ("positive", "model", MODELS), ("sampler", "cfg_img", NUMBERS),
        ("sampler", "on_interrupt", CHOICES),
    ],
    "box": [
        ("box", "prompt", TEXTS), ("box", "negative_prompt", TEXTS), ("box", "height", NUMBERS),
        ("box", "vae", [*MODELS, *VAES[:2], VAES[3]]),
        ("box", "model", MODELS), ("box", "steps", NUMBERS),
    ],
    "edit box": [("box", "instruction", TEXTS), ("box", "image", PICTURES), ("box", "cfg_img", NUMBERS)],
    "ratio": [("ratio", "ratio", CHOICES), ("ratio", "base", [*CHOICES, "500", 512, "²"])],
    "prepared": [
        ("prepare", "image", PICTURES), ("prepare", "mode", CHOICES), ("prepare", "size", CHOICES),
        ("prepare", "base", CHOICES), ("prepare", "mask", MASKS), ("prepare", "area", CHOICES),
        ("prepare", "margin", [*NUMBERS[:4], *NUMBERS[5:9]]), ("back", "image", PICTURES),
        ("back", "original", MODELS), ("back", "feather", [*NUMBERS[:4], *NUMBERS[5:], 10**6]),
    ],
    "compared": [
        ("compare", "cfg", WORDS), ("compare", "steps", WORDS), ("compare", "sampler", WORDS),
        ("compare", "quantization", WORDS), ("compare", "strength", WORDS),
        ("grid", "columns", NUMBERS), ("grid", "image", PICTURES), ("grid", "labels", [*TEXTS[:6]]),
    ],
    "resumed": [("resume", "latent", LATENTS[:12]), ("resume", "filename_prefix", [*WORDS[:6], WORDS[8]])],
    "download": [("download", "checkpoint", NAMES_OF_REPOSITORIES), ("download", "revision", NAMES_OF_REPOSITORIES)],
    "batch": [("both", "first", MODELS), ("both", "second", MODELS)],
    "frames": [
        ("frames", "samples", [*LATENTS[:17], *LATENTS[18:], {"samples": LATENT, "nextstep_partial": "x"}]),
        ("frames", "vae", [*MODELS, *VAES[:2], *VAES[3:]]), ("frames", "frames", NUMBERS),
        ("frames", "hold", [*NUMBERS[:4], *NUMBERS[5:]]), ("frames", "longest_side", NUMBERS),
    ],
    "lora": [
        ("lora", "model", MODELS), ("lora", "lora_name", CHOICES),
        ("lora", "strength", [*NUMBERS[:4], *NUMBERS[6:9], *NUMBERS[10:], 100.5]),
    ],
}  # fmt: skip
PLACES = [(name, *place) for name, places in TRIED.items() for place in places]
NAMES = [f"{name}-{where}-{key}" for name, where, key, _ in PLACES]


def assert_told(ending: tuple[str, str], value: Any) -> None:
    """The host did not queue it, or it is our own error in one short sentence."""
    kind, message = ending
    assert kind == "refused" or kind.endswith("NextStepError"), (str(value)[:200], kind, message[:400])
    assert kind == "refused" or (len(message) < 900 and "\n" not in message.strip()), message


@pytest.mark.parametrize(("name", "where", "key", "values"), PLACES, ids=NAMES)
def test_a_linked_value_of_another_kind_is_one_sentence(
    graph: ComfyGraph, name: str, where: str, key: str, values: list[Any]
) -> None:
    for value in values:
        prompt = GRAPHS[name]() | {"given": node("GiveValue")}
        prompt[where]["inputs"][key] = ["given", 0]
        GiveValue.given.append(value)
        assert_told(graph.ending(prompt), value)


@pytest.mark.parametrize(("name", "where", "key", "values"), PLACES, ids=NAMES)
def test_a_literal_value_of_another_kind_is_refused_or_made_one(
    graph: ComfyGraph, name: str, where: str, key: str, values: list[Any]
) -> None:
    """The host makes what it can of a literal: "4" is 4, and 5 a prompt."""
    for value in values:
        try:
            literal = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue  # nothing that a workflow can hold
        prompt = GRAPHS[name]()
        prompt[where]["inputs"][key] = literal
        ending = graph.ending(prompt)
        if ending[0] != "done":
            assert_told(ending, value)


def test_a_good_graph_of_each_kind_runs_after_all_that(graph: ComfyGraph) -> None:
    for name, make in GRAPHS.items():
        if name == "download":
            continue  # what is right would be fetched
        assert graph.ending(make()) == ("done", ""), name


@pytest.mark.parametrize(
    ("name", "where"), [("text", "sampler"), ("text", "model"), ("box", "box"), ("edit box", "box")]
)
def test_a_link_to_an_input_that_a_node_has_not_changes_nothing(graph: ComfyGraph, name: str, where: str) -> None:
    prompt = GRAPHS[name]() | {"given": node("GiveValue")}
    prompt[where]["inputs"]["extra_pnginfo"] = prompt[where]["inputs"]["nothing_of_mine"] = ["given", 0]
    GiveValue.given.append(PICTURE)
    assert graph.ending(prompt) == ("done", "")
