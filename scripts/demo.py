"""A contact sheet of the embedded model's pictures and one edit, and the first workflow in ComfyUI if one is found.

Run it through `scripts/demo.sh`, which makes the environment.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

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
    from comfy_server import make_base, running_server
    from workflows import FIRST_RUN, read_workflow, to_prompt

    workflow = read_workflow(FIRST_RUN)
    with tempfile.TemporaryDirectory() as folder, running_server(comfyui, make_base(Path(folder) / "base")) as server:
        run = server.run(to_prompt(workflow, server.call("/object_info")), workflow)
        if run.ended != "execution_success":
            sys.exit(f"The workflow failed in ComfyUI: {run.events[-1][1].get('exception_message', run.ended)}")
        return Path(shutil.copy(server.images(run)[0], output / "comfyui-first-run.png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "output", help="folder for the pictures")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    from comfy_server import find_comfyui

    started = time.monotonic()
    sheet = output / "contact-sheet.png"
    contact_sheet(draw_pictures()).save(sheet)
    print(f"Contact sheet: {sheet}")
    comfyui = find_comfyui()
    if comfyui is None:
        print("No ComfyUI found (set COMFYUI_PATH to a checkout), so the pictures were drawn by the engine alone.")
    else:
        print(f"Workflow in the ComfyUI at {comfyui}: {run_in_comfyui(comfyui, output)}")
    print(f"Done in {time.monotonic() - started:.0f} s.")


if __name__ == "__main__":
    main()
