"""Thumbnails of the templates: every shipped workflow, run with the embedded model in a real ComfyUI.

`python -m scripts.render_thumbnails` writes `example_workflows/<name>.jpg`, which ComfyUI's template browser shows.
The published models' prompts and sizes are replaced by scenes that the embedded model was trained on.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from scripts.comfy_server import ComfyServer, find_comfyui, make_base, running_server
from scripts.templates import number
from scripts.workflows import FOLDER, ON_EMBEDDED, read_workflow, to_prompt

LOADED = "thumbnail.png"
SIDE, GAP, INK, PAPER = 400, 8, (236, 238, 242), (48, 52, 60)
TINY = {**ON_EMBEDDED, "dtype": "auto", "steps": 20, "cfg": 3.0, "shift": 1.0, "size": "keep"}

AS_IT_IS = {"mode": "keep", "size": "nearest aspect ratio", "area": "whole picture"}  # of Prepare Picture


class Studio:
    """Runs templates on a server with other words, sizes and pictures in them."""

    def __init__(self, server: ComfyServer) -> None:
        self.server, self.info = server, server.call("/object_info")

    def draw(self, template: str, *texts: str, picture: Image.Image | None = None, **widgets: object) -> Image.Image:
        """The picture that `NextStep <template>` saves; `texts` replace its prompts in order, the others fall empty.

        `picture` is the one that it loads.
        """
        if picture is not None:
            picture.save(self.server.base / "input" / LOADED)
            widgets["image"] = LOADED
        prompt = to_prompt(read_workflow(FOLDER / f"NextStep {template}.json"), self.info, **TINY | widgets)
        left = list(texts)
        for key in sorted(prompt, key=lambda key: (key == str(number("negative")), int(key))):
            inputs = prompt[key]["inputs"]
            for name in {"prompt", "instruction"} & inputs.keys():
                inputs[name] = left.pop(0) if left else ""
            if "width" in widgets and isinstance(inputs.get("width"), list):  # the sizes that the model knows, not 256
                inputs |= {name: widgets[name] for name in ("width", "height")}
        run = self.server.run(prompt)
        if run.ended != "execution_success":
            sys.exit(f"{template}: {run.events[-1][1].get('exception_message', run.ended)}")
        return Image.open(self.server.images(run)[-1]).convert("RGB")


def sheet(*placed: tuple[Image.Image, tuple[int, int, int, int]]) -> Image.Image:
    """A square of paper with pictures enlarged into boxes (left, top, right, bottom)."""
    paper = Image.new("RGB", (SIDE, SIDE), PAPER)
    for picture, (left, top, right, bottom) in placed:
        paper.paste(picture.resize((right - left, bottom - top), Image.Resampling.BICUBIC), (left, top))
    return paper


def before_and_after(before: Image.Image, after: Image.Image) -> Image.Image:
    """Two pictures of one size side by side, with an arrow from the first to the second."""
    width = (SIDE - 3 * GAP) // 2
    height, middle = width * after.height // after.width, SIDE // 2
    top = (SIDE - height) // 2
    boxes = [(left, top, left + width, top + height) for left in (GAP, SIDE - GAP - width)]
    out = sheet((before, boxes[0]), (after, boxes[1]))
    pen = ImageDraw.Draw(out)
    pen.ellipse((middle - 24, middle - 24, middle + 24, middle + 24), fill=PAPER, outline=INK, width=3)
    pen.polygon([(middle - 8, middle - 12), (middle - 8, middle + 12), (middle + 13, middle)], fill=INK)
    return out


def with_hatching(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """What is to be drawn, shown as stripes over a dimmed picture."""
    large = picture.resize((SIDE, SIDE * picture.height // picture.width), Image.Resampling.BICUBIC)
    veil = Image.new("RGB", large.size, PAPER)
    pen = ImageDraw.Draw(veil)
    for offset in range(0, sum(large.size), 24):
        pen.line((offset, 0, offset - large.height, large.height), fill=INK, width=7)
    return Image.composite(veil, large, mask.resize(large.size, Image.Resampling.NEAREST))


def masked(picture: Image.Image, box: tuple[int, int, int, int]) -> tuple[Image.Image, Image.Image]:
    """(picture whose alpha is clear in `box`, mask) as the mask editor makes them."""
    mask = Image.new("L", picture.size, 0)
    mask.paste(255, box)
    see_through = picture.convert("RGBA")
    see_through.putalpha(mask.point(lambda value: 255 - value))
    return see_through, mask


def edit(studio: Studio) -> Image.Image:
    before = studio.draw("Text to Image", "a red circle on a blue background", width=64, height=64, seed=3)
    after = studio.draw("Image Edit", "<image>make the circle yellow", picture=before, seed=7, cfg_img=1.0)
    return before_and_after(before, after)


def inpaint(studio: Studio) -> Image.Image:
    scene = "a red circle left of a {} on a white background"
    before = studio.draw("Text to Image", scene.format("blue square"), width=64, height=64, seed=4)
    see_through, mask = masked(before, (32, 0, 64, 64))
    after = studio.draw("Inpaint", scene.format("green star"), picture=see_through, seed=3, **AS_IT_IS)
    return before_and_after(with_hatching(before, mask), after)


def outpaint(studio: Studio) -> Image.Image:
    scene = "a yellow star above a purple circle on a white background"
    whole = studio.draw("Text to Image", scene, width=64, height=64, seed=5)
    half = whole.crop((0, 0, 64, 32))
    after = studio.draw("Outpaint", scene, picture=half, bottom=32, seed=6, **AS_IT_IS)
    padded = Image.new("RGB", (64, 64))
    padded.paste(half)
    return before_and_after(with_hatching(padded, masked(padded, (0, 32, 64, 64))[1]), after)


def ratios(studio: Studio) -> Image.Image:
    scenes = (
        ("a yellow star on a blue background", (128, 64), (4, 4, 260, 132)),
        ("a green square on a white background", (64, 64), (4, 140, 260, 396)),
        ("a red diamond on a black background", (64, 96), (268, 4, 396, 196)),
        ("a purple circle on an orange background", (64, 96), (268, 204, 396, 396)),
    )
    return sheet(
        *((studio.draw("Aspect Ratios", text, width=w, height=h, seed=12), box) for text, (w, h), box in scenes)
    )


def low_vram(studio: Studio) -> Image.Image:
    out = whole(studio.draw("Low VRAM", "a green triangle on a black background", width=64, height=64, seed=2))
    pen = ImageDraw.Draw(out)
    pen.rounded_rectangle((GAP, SIDE - 88, 190, SIDE - GAP), 12, fill=PAPER)
    pen.text((24, SIDE - 78), "12 GB", fill=INK, font=ImageFont.load_default(56))
    return out


def compare(studio: Studio) -> Image.Image:
    drawn = studio.draw(
        "Compare", "a yellow star on a blue background", width=64, height=64, seed=3, cfg="1, 3", steps="4, 20"
    )
    side = min(SIDE, SIDE * drawn.height // drawn.width)
    return sheet((drawn, (0, (SIDE - side) // 2, SIDE, (SIDE + side) // 2)))


def lora(studio: Studio) -> Image.Image:
    drawn = studio.draw("LoRA", "a yellow star on a blue background", seed=8)
    height = SIDE * drawn.height // drawn.width
    return sheet((drawn, (0, (SIDE - height) // 2, SIDE, (SIDE + height) // 2)))


def resume(studio: Studio) -> Image.Image:
    drawn = studio.draw("Resume", "a white triangle on a purple background", width=64, height=64, seed=2)
    rest = masked(drawn, (0, 40, 64, 64))[1]
    return before_and_after(with_hatching(drawn, rest), drawn)


def many(studio: Studio, name: str, seeds: str, *scenes: str) -> Image.Image:
    """The contact sheet of a job, in scenes that the embedded model knows."""
    drawn = studio.draw(
        name, job="the text below", text="\n".join(scenes), lists="", size="64", seeds=seeds, folder=f"NextStep/{name}"
    )
    width = SIDE * min(1.0, drawn.width / drawn.height)
    height = round(width * drawn.height / drawn.width)
    left, top = (SIDE - round(width)) // 2, (SIDE - height) // 2
    return sheet((drawn, (left, top, left + round(width), top + height)))


def whole(picture: Image.Image) -> Image.Image:
    return sheet((picture, (0, 0, SIDE, SIDE)))


THUMBNAILS = {
    "First Run": lambda s: whole(s.draw("First Run", "a red circle on a blue background", seed=3)),
    "Text to Image": lambda s: whole(
        s.draw(
            "Text to Image", "a yellow star above a purple circle on a black background", width=64, height=64, seed=1
        )
    ),
    "Image Edit": edit,
    "Inpaint": inpaint,
    "Outpaint": outpaint,
    "Aspect Ratios": ratios,
    "Batch Grid": lambda s: whole(
        s.draw(
            "Batch Grid",
            *("a red circle on a yellow background", "a white star on a blue background"),
            width=64,
            height=64,
            seed=1,
        )  # fmt: skip
    ),
    "Low VRAM": low_vram,
    "Compare": compare,
    "Resume": resume,
    "LoRA": lora,
    "Brand": lambda s: many(
        s,
        "Brand",
        "4, 7",
        "a red diamond on a white background",
        "a blue star on a white background",
        "a green circle on a white background",
    ),
    "Marketing": lambda s: many(
        s,
        "Marketing",
        "4, 20",
        "a large orange circle on a purple background",
        "a yellow star on a blue background",
        "a red triangle on a yellow background",
    ),
    "Education": lambda s: many(
        s,
        "Education",
        "1, 2",
        "a red circle left of a blue square on a white background",
        "a small green triangle on a black background",
        "a yellow diamond above a purple star on a white background",
    ),
}


def main() -> None:
    comfyui = find_comfyui()
    if comfyui is None:
        sys.exit("No ComfyUI found: set COMFYUI_PATH to a checkout of it.")
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder) / "base")
        with running_server(comfyui, base) as server:
            studio = Studio(server)
            for name, render in THUMBNAILS.items():
                path = FOLDER / f"NextStep {name}.jpg"
                render(studio).save(path, quality=88, optimize=True)
                print(f"{path} ({path.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main()
