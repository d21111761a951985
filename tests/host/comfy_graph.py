"""Runs graphs on a real ComfyUI inside the test process: no server, seconds instead of a start-up per test.

The host's executor changes between versions; everything that depends on it is here.
"""

from __future__ import annotations

import asyncio
import sys
import uuid
from pathlib import Path
from types import ModuleType
from typing import Any

from comfy_server import ROOT, make_base, stub_path


class FakeServer:
    """What the executor needs of the real one."""

    def __init__(self) -> None:
        self.client_id, self.last_node_id, self.last_prompt_id = "tests", None, None
        self.sockets_metadata: dict[str, Any] = {}
        self.events: list[tuple[str, dict]] = []

    def send_sync(self, event: str, data: Any, sid: str | None = None) -> None:
        self.events.append((event, data))


class ComfyGraph:
    """One host with the pack loaded. There can be only one per process."""

    def __init__(self, comfyui: Path, base: Path) -> None:
        sys.path[:0] = [str(comfyui), *stub_path()]
        from comfy.cli_args import args

        args.cpu, args.base_directory = True, str(base)
        import execution
        import folder_paths
        import torch

        import nodes

        torch.set_num_threads(1)  # quickest for models this small

        folder_paths.models_dir = str(base / "models")
        folder_paths.set_output_directory(str(base / "output"))
        folder_paths.set_temp_directory(str(base / "temp"))
        folder_paths.set_input_directory(str(base / "input"))
        assert asyncio.run(nodes.load_custom_node(str(ROOT)))
        self.nodes, self._execution = nodes, execution
        self.server = FakeServer()
        self._executor = execution.PromptExecutor(self.server)

    def pack(self, module: str) -> ModuleType:
        """A module of the pack as the host imported it, such as "nodes.host"."""
        prefix = self.nodes.NODE_CLASS_MAPPINGS["NextStepSampler"].__module__.removesuffix(".nodes.sampler")
        return sys.modules[f"{prefix}.{module}"]

    def run(self, prompt: dict) -> dict[str, Any]:
        """Validate and execute; the outputs by node id. Raises AssertionError with the host's messages on failure."""
        prompt_id = uuid.uuid4().hex
        ok, error, outputs, node_errors = asyncio.run(self._execution.validate_prompt(prompt_id, prompt, None))
        assert ok, (error, node_errors)
        self._executor.execute(prompt, prompt_id, {"client_id": "tests"}, outputs)
        failures = [data for name, data in self._executor.status_messages if name == "execution_error"]
        assert self._executor.success, failures[-1]["exception_message"] if failures else "failed"
        return self._executor.history_result["outputs"]


def make_graph_host(comfyui: Path, folder: Path) -> ComfyGraph:
    """A host in this process on a fresh base directory."""
    return ComfyGraph(comfyui, make_base(folder))
