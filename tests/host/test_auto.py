"""`quantization: auto` chooses by the card's memory, says what it chose, and holds on to nothing while it loads."""

from __future__ import annotations

import json
import logging
import re
import weakref

import pytest
import torch
from comfy_graph import ComfyGraph
from PIL import Image

from nextstep_core.decoding.memory import PICTURE_512, VAE_BYTES, working_bytes
from scripts.comfy_server import ComfyServer
from scripts.workflows import FIRST_RUN, read_workflow, to_prompt


def stored(graph: ComfyGraph, monkeypatch: pytest.MonkeyPatch, card: int | None, dtype: str = "fp32") -> str:
    loaders = graph.pack("nodes.loaders")
    monkeypatch.setattr(graph.pack("nodes.host"), "card_memory", lambda: card)
    loaders._loaded.clear()
    model = loaders.load_model("tiny-a", loaders.LoadOptions(dtype, "auto"))
    loaders._loaded.clear()
    return model.facts["weights"]


def test_auto_takes_the_first_format_that_leaves_room(graph: ComfyGraph, monkeypatch, caplog) -> None:
    loaders, catalog = graph.pack("nodes.loaders"), graph.pack("nodes.catalog")
    plan = loaders.plan_model(catalog.find_model("tiny-a"))
    beside = working_bytes(plan.config, PICTURE_512, torch.float32) + VAE_BYTES
    cards = {name: beside + plan.weight_bytes(name, torch.float32) for name in (None, "int8", "int4")}
    assert stored(graph, monkeypatch, None) == "float32", "a CPU takes what the file has"
    assert stored(graph, monkeypatch, cards[None]) == "float32"
    caplog.set_level(logging.INFO)
    assert stored(graph, monkeypatch, cards[None] - 1) == "int8"
    assert "quantization auto takes int8 for a card of" in caplog.text
    assert stored(graph, monkeypatch, cards["int8"] - 1) == "int4"
    assert stored(graph, monkeypatch, 1) == "int4", "the least there is, and then streamed"


def test_auto_counts_the_weights_in_the_dtype_they_are_stored_in(graph: ComfyGraph, monkeypatch) -> None:
    """A card without bfloat16 units stores in it all the same, and computes in float32."""
    loaders, catalog, host = graph.pack("nodes.loaders"), graph.pack("nodes.catalog"), graph.pack("nodes.host")
    bf16, fp32 = torch.bfloat16, torch.float32
    monkeypatch.setattr(host, "pick_dtypes", lambda choice, parameters: (bf16, fp32))
    plan = loaders.plan_model(catalog.find_model("tiny-a"))
    card = working_bytes(plan.config, PICTURE_512, fp32) + VAE_BYTES + plan.weight_bytes(None, bf16)
    assert stored(graph, monkeypatch, card, "auto") == "bfloat16"
    assert stored(graph, monkeypatch, card - 1, "auto") == "int8"


def test_an_api_graph_that_does_not_ask_keeps_what_the_file_has(graph: ComfyGraph, monkeypatch) -> None:
    loaders = graph.pack("nodes.loaders")
    monkeypatch.setattr(graph.pack("nodes.host"), "card_memory", lambda: 1)
    assert loaders.LoadOptions().quantization == "none"
    quantization = loaders.NextStepModelLoader.define_schema().inputs[2]
    assert (quantization.id, quantization.default) == ("quantization", "auto")


def test_nothing_else_holds_a_tensor_while_it_is_laid_out_anew(graph: ComfyGraph, monkeypatch) -> None:
    """Held ones would double the memory of a model that is repacked."""
    loaders, models = graph.pack("nodes.loaders"), graph.pack("nodes.host.models")
    plans = graph.pack("nextstep_core.loading.build").ModelPlan
    read, tensors, alive = plans.read_model, [], []

    def watched(self, *arguments, **options):
        for name, tensor in read(self, *arguments, **options):
            tensors.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    make_ready = models.make_ready

    def counting(*arguments):
        alive.append(sum(reference() is not None for reference in tensors))
        make_ready(*arguments)

    monkeypatch.setattr(plans, "read_model", watched)
    monkeypatch.setattr(models, "make_ready", counting)
    loaders._loaded.clear()
    loaders.load_model("tiny-a", loaders.LoadOptions("bf16", "int4"))
    assert tensors and alive == [0]


def test_a_picture_tells_how_the_weights_were_stored(server: ComfyServer) -> None:
    workflow = read_workflow(FIRST_RUN)
    run = server.run(to_prompt(workflow, server.call("/object_info")), workflow)
    (path,) = server.images(run)
    told = json.loads(Image.open(path).text["nextstep"])
    assert (told["model"], told["weights"]) == ("tiny", "float32")
    assert re.fullmatch("[0-9a-f]{10}", told["hash"])
