"""ComfyUI-NextStep: run NextStep-1, an autoregressive image model, in ComfyUI. Entry point for the host only."""

from importlib.util import find_spec

if find_spec("comfy_api") is not None:
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
