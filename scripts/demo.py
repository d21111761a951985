"""A contact sheet of the embedded model's pictures and one edit, and the first workflow in ComfyUI if one is found;
or, with --serve, that ComfyUI itself with the pack in it.

Run it through `scripts/demo.sh`, which makes the environment.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from http.client import HTTPException
from pathlib import Path
from urllib.parse import quote
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parent.parent

PROMPTS = (
    "a red circle on a blue background",
    "a small yellow star on a black background",
    "a green square on a white background",
    "a large purple triangle on an orange background",
    "a white diamond on a green background",
    "a red circle left of a blue square on a white background",
)
EDIT = "make the circle yellow"
SCALE, MARGIN, CAPTION = 3, 12, 30


def draw_pictures() -> list[tuple[str, object]]:
    """(caption, picture (64, 64, 3) in [0, 1]) for every prompt, and one edit of the first."""
    import torch

    from nextstep_core import NextStepPipeline

    pipe = NextStepPipeline.from_pretrained("tiny", dtype=torch.float32)
    out = pipe.generate(PROMPTS, height=64, width=64, seed=7)
    edited = pipe.generate(f"<image>{EDIT}", images=out.images[0], height=64, width=64, seed=7)
    return [*zip(PROMPTS, out.images), (f"edit of the first: {EDIT}", edited.images[0])]


def contact_sheet(pictures: list[tuple[str, object]], columns: int = 4) -> object:
    """One PIL image of all pictures with their captions."""
    from PIL import Image, ImageDraw

    side = 64 * SCALE
    cell = (side + MARGIN, side + CAPTION + MARGIN)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell[0] + MARGIN, rows * cell[1] + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (caption, pixels) in enumerate(pictures):
        x, y = MARGIN + i % columns * cell[0], MARGIN + i // columns * cell[1]
        picture = Image.fromarray((pixels * 255).round().byte().numpy())
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, y))
        pen.multiline_text((x, y + side + 3), wrap(caption, side // 6), fill="black")
    return sheet


def wrap(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))


def run_in_comfyui(comfyui: Path, output: Path) -> Path:
    """Run the first workflow in a real ComfyUI on a throw-away base folder; the saved picture."""
    from scripts.comfy_server import make_base, running_server
    from scripts.workflows import FIRST_RUN, read_workflow, to_prompt

    workflow = read_workflow(FIRST_RUN)
    with tempfile.TemporaryDirectory() as folder, running_server(comfyui, make_base(Path(folder) / "base")) as server:
        run = server.run(to_prompt(workflow, server.call("/object_info")), workflow)
        if run.ended != "execution_success":
            sys.exit(f"The workflow failed in ComfyUI: {run.events[-1][1].get('exception_message', run.ended)}")
        return Path(shutil.copy(server.images(run)[0], output / "comfyui-first-run.png"))


def link_pack(comfyui: Path) -> str:
    """The pack's folder name in ComfyUI's custom_nodes; makes a link there unless one is there already."""
    from scripts.comfy_server import PACK_NAME

    link = comfyui / "custom_nodes" / PACK_NAME
    if not link.exists():
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(ROOT, target_is_directory=True)
    elif link.resolve() != ROOT:
        print(f"{link} already exists and will run instead of {ROOT}.")
    return PACK_NAME


def serve(comfyui: Path, port: int) -> int:
    """Run ComfyUI until it ends or is stopped, and say where its first workflow is; its exit status."""
    if taken(port):
        sys.exit(f"Port {port} is already in use, perhaps by another ComfyUI. Stop it, or choose another --port.")
    import torch

    from scripts.workflows import FIRST_RUN

    pack = link_pack(comfyui)
    on_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    paths = ROOT / "scripts" / "demo_page" / "paths.yaml"
    command = [sys.executable, "main.py", "--port", str(port), "--extra-model-paths-config", str(paths)]
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda *_: sys.exit(0))
    print("Starting ComfyUI; until it is ready, its own messages follow ...", flush=True)
    # In a session of its own: Ctrl+C comes here alone, and ComfyUI is told to end, not interrupted wherever it is.
    process = subprocess.Popen([*command, *([] if on_gpu else ["--cpu"])], cwd=comfyui, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None and not answers(address):
            time.sleep(0.3)
        if process.poll() is None:
            first = quote(f"{pack}/{FIRST_RUN.stem}", safe="/")
            print(f"\nOpen {address}/?open={first} and press Run. Ctrl+C here stops ComfyUI.", flush=True)
        return process.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        process.terminate()
        process.wait()


def taken(port: int) -> bool:
    """Whether something of this computer listens on a port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def answers(address: str) -> bool:
    """Whether ComfyUI is ready."""
    try:
        with urlopen(f"{address}/system_stats", timeout=5):
            return True
    except (OSError, HTTPException):
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "output", help="folder for the pictures")
    parser.add_argument("--serve", action="store_true", help="start ComfyUI with the pack instead of drawing")
    parser.add_argument("--port", type=int, default=8188, help="where --serve listens (default %(default)s)")
    arguments = parser.parse_args()
    from scripts.comfy_server import find_comfyui

    if arguments.serve:
        comfyui = find_comfyui()
        sys.exit(serve(comfyui, arguments.port) if comfyui else "No ComfyUI found: set COMFYUI_PATH to a checkout.")
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    sheet = output / "contact-sheet.png"
    print(f"Drawing {len(PROMPTS)} pictures and an edit with the embedded model ...", flush=True)
    contact_sheet(draw_pictures()).save(sheet)
    print(f"Contact sheet: {sheet}", flush=True)
    comfyui = find_comfyui()
    if comfyui is None:
        print("No ComfyUI found (set COMFYUI_PATH to a checkout), so the pictures were drawn by the engine alone.")
    else:
        print(f"Running the first workflow in the ComfyUI at {comfyui} ...", flush=True)
        try:
            print(f"Workflow's picture: {run_in_comfyui(comfyui, output)}")
        except RuntimeError as error:  # it did not start
            sys.exit(str(error))
    print(f"Done in {time.monotonic() - started:.0f} s.")


if __name__ == "__main__":
    main()
