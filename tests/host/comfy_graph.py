"""Runs graphs on a real ComfyUI inside the test process: no server, seconds instead of a start-up per test.

The host's executor changes between versions; everything that depends on it is here.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import inspect
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from scripts.comfy_server import ROOT, make_base

PROMPT = "A red apple lies on a wooden table."


class FakeServer:
    """What the executor needs of the real one."""

    def __init__(self) -> None:
        self.client_id, self.last_node_id, self.last_prompt_id = "tests", None, None
        self.sockets_metadata: dict[str, Any] = {}
        self.events: list[tuple[str, dict]] = []

    def send_sync(self, event: str, data: Any, sid: str | None = None) -> None:
        self.events.append((event, data))


class KeepValue:
    """Test node: keeps the value that a link carries, exactly as the next node would get it."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "keep", "tests", True
    kept: ClassVar[list[Any]] = []

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"value": ("*",)}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: dict) -> bool:
        return True

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:
        return float("nan")

    def keep(self, value: Any) -> tuple:
        self.kept.append(value)
        return ()


class AnyType(str):
    """A socket's type that goes with every other."""

    def __ne__(self, other: object) -> bool:
        return False


class GiveValue:
    """Test node: gives any value at all, as nodes of other packs may, at which the host looks no further."""

    RETURN_TYPES, FUNCTION, CATEGORY = (AnyType("*"),), "give", "tests"
    given: ClassVar[list[Any]] = []

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {}}

    @classmethod
    def IS_CHANGED(cls) -> float:
        return float("nan")

    def give(self) -> tuple:
        return (self.given[-1],)


def node(class_type: str, **inputs: Any) -> dict:
    """One node of a prompt in API form; a link is [node id, output index]."""
    return {"class_type": class_type, "inputs": inputs}


def text_to_image(seed: int = 1, decode: str = "NextStepVAEDecode", **sampler: Any) -> dict:
    """The text-to-image graph in API form, small and quick."""
    settings = {"steps": 4, "cfg": 3.0, "cfg_schedule": "constant", "shift": 1.0, "sampler": "auto", "use_norm": "auto"}
    return {
        "model": node("NextStepModelLoader", model_name="tiny-a", dtype="fp32"),
        "positive": node("NextStepTextEncode", model=["model", 0], prompt=PROMPT),
        "latent": node("NextStepEmptyLatent", width=48, height=64, batch_size=1),
        "sampler": node(
            "NextStepSampler",
            model=["model", 0], positive=["positive", 0], latent=["latent", 0], seed=seed, **(settings | sampler),
        ),
        "decode": node(decode, samples=["sampler", 0], vae=["model", 1]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="test"),
    }  # fmt: skip


class ComfyGraph:
    """One host with the pack loaded. There can be only one per process."""

    def __init__(self, comfyui: Path, base: Path) -> None:
        self.base = base
        sys.path.insert(0, str(comfyui))
        from comfy.cli_args import args

        args.cpu, args.base_directory = True, str(base)
        importlib.import_module("utils.extra_config")  # nodes.py makes the name `utils` mean another module

        import execution
        import folder_paths
        import torch

        import nodes

        torch.set_num_threads(1)  # quickest for models this small

        folder_paths.models_dir = str(base / "models")
        folder_paths.set_output_directory(str(base / "output"))
        folder_paths.set_temp_directory(str(base / "temp"))
        folder_paths.set_input_directory(str(base / "input"))
        asyncio.run(nodes.init_builtin_extra_nodes())
        assert asyncio.run(nodes.load_custom_node(str(ROOT)))
        nodes.NODE_CLASS_MAPPINGS |= {"KeepValue": KeepValue, "GiveValue": GiveValue}
        self.nodes, self._execution = nodes, execution
        self.server = FakeServer()
        # The cache that keeps the last prompt's outputs, however little memory is free.
        self._executor = self._make_executor("CLASSIC")

    def _make_executor(self, cache: str, headroom: float = 0.0) -> Any:
        options: dict[str, Any] = {"cache_type": self._execution.CacheType[cache]}
        if "cache_args" in inspect.signature(self._execution.PromptExecutor).parameters:
            options["cache_args"] = {"lru": 0, "ram": headroom, "ram_inactive": headroom}
        return self._execution.PromptExecutor(self.server, **options)

    @contextmanager
    def short_of_ram(self) -> Iterator[None]:
        """Inside, graphs run with the cache that drops outputs where RAM is short, and it is."""
        if not hasattr(self._execution.CacheType, "RAM_PRESSURE"):
            pytest.skip("this ComfyUI has no cache that looks at free RAM")
        import comfy_execution.caching

        kept, self._executor = self._executor, self._make_executor("RAM_PRESSURE", headroom=1.0)
        full = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=0))
        with pytest.MonkeyPatch.context() as patch:
            for module in (self._execution, comfy_execution.caching):
                patch.setattr(module, "psutil", full)
            try:
                yield
            finally:
                self._executor = kept

    def pack(self, module: str) -> ModuleType:
        """A module of the pack as the host imported it, such as "nodes.host"."""
        prefix = self.nodes.NODE_CLASS_MAPPINGS["NextStepSampler"].__module__.removesuffix(".nodes.sampler")
        return sys.modules[f"{prefix}.{module}"]

    def ending(self, prompt: dict) -> tuple[str, str]:
        """How a prompt ends: "refused" by the host with its message, in an error of this type with its message, or
        "done"."""
        prompt_id = uuid.uuid4().hex
        ok, error, outputs, node_errors = asyncio.run(self._execution.validate_prompt(prompt_id, prompt, None))
        if not ok:
            return "refused", f"{error} {node_errors}"
        self._executor.execute(prompt, prompt_id, {"client_id": "tests"}, outputs)
        errors = [data for name, data in self._executor.status_messages if name == "execution_error"]
        return (errors[-1]["exception_type"], errors[-1]["exception_message"]) if errors else ("done", "")

    def run(self, prompt: dict, only: list[str] | None = None) -> dict[str, Any]:
        """Validate and execute (`only`: ids of the output nodes to run); the outputs by node id. Raises AssertionError
        with the host's messages on failure."""
        prompt_id = uuid.uuid4().hex
        ok, error, outputs, node_errors = asyncio.run(self._execution.validate_prompt(prompt_id, prompt, only))
        assert ok, (error, node_errors)
        self._executor.execute(prompt, prompt_id, {"client_id": "tests"}, outputs)
        failures = [data for name, data in self._executor.status_messages if name == "execution_error"]
        assert self._executor.success, failures[-1]["exception_message"] if failures else "failed"
        return self._executor.history_result["outputs"]

    def value(self, prompt: dict, source: str, output: int = 0) -> Any:
        """What a node's output carries when the prompt runs that far."""
        self.run(prompt | {"kept": node("KeepValue", value=[source, output])}, only=["kept"])
        return KeepValue.kept.pop()

    def saved(self, outputs: dict[str, Any], source: str = "save") -> list[Path]:
        """The files that an output node wrote."""
        folders = {"output": self.base / "output", "temp": self.base / "temp"}
        return [folders[f["type"]] / f["subfolder"] / f["filename"] for f in next(iter(outputs[source].values()))]

    def free(self) -> None:
        """What the server's worker does after `POST /free`: every model unloaded, every cached output dropped."""
        import comfy.model_management as mm

        mm.unload_all_models()
        self._executor.reset()
        gc.collect()
        mm.soft_empty_cache()


def make_graph_host(comfyui: Path, folder: Path) -> ComfyGraph:
    """A host in this process on a fresh base directory."""
    return ComfyGraph(comfyui, make_base(folder))
