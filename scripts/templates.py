"""The templates and subgraph blueprints, written from what they hold and in which columns it stands.

`python -m scripts.templates` writes `example_workflows/*.json` and `subgraphs/*.json`. A node has the same id in every
template, by the part that it plays: previews and texts name their node by its id alone, and one that comes late, when
another template is open, then lands on its like.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RELEASED = json.loads((ROOT / "tests" / "host" / "released_nodes.json").read_text())
LOCALES, LANGUAGES = ROOT / "locales", {"ko": "한국어", "zh": "中文", "ja": "日本語"}
PACK, VERSION, HOST_VERSION = "nextstep", "0.1.0", "0.3.64"
WIDGETS = ("INT", "FLOAT", "STRING", "COMBO", "BOOLEAN")

# The host's own nodes that are used: (inputs, outputs), each (name, type); the widgets among them are of a type above.
CORE: dict[str, tuple[list[tuple[str, str]], list[tuple[str, str]]]] = {
    "LoadImage": ([("image", "COMBO"), ("upload", "IMAGEUPLOAD")], [("IMAGE", "IMAGE"), ("MASK", "MASK")]),
    "SaveImage": ([("images", "IMAGE"), ("filename_prefix", "STRING")], []),
    "PreviewImage": ([("images", "IMAGE")], []),
    "SaveLatent": ([("samples", "LATENT"), ("filename_prefix", "STRING")], []),
    "ImageScaleBy": (
        [("image", "IMAGE"), ("upscale_method", "COMBO"), ("scale_by", "FLOAT")],
        [("IMAGE", "IMAGE")],
    ),
    "ImagePadForOutpaint": (
        [("image", "IMAGE"), *((side, "INT") for side in ("left", "top", "right", "bottom", "feathering"))],
        [("IMAGE", "IMAGE"), ("MASK", "MASK")],
    ),
    "VAEDecodeTiled": (
        [
            ("samples", "LATENT"),
            ("vae", "VAE"),
            *((name, "INT") for name in ("tile_size", "overlap", "temporal_size", "temporal_overlap")),
        ],
        [("IMAGE", "IMAGE")],
    ),
    "MarkdownNote": ([], []),
}
# What our outputs are called on the node, where that is not their id.
OUTPUT_NAMES = {
    "NextStepTextEncode": ["prompt"],
    "NextStepEditEncode": ["prompt", "latent"],
    "NextStepPromptBatch": ["prompt"],
    "NextStepSampler": ["latent"],
    "NextStepPreparePicture": ["image", "mask", "original", "width", "height", "report", "latent"],
    "NextStepPasteBack": ["image"],
    "NextStepCompare": ["cfg", "steps", "shift", "sampler", "quantization", "labels", "columns", "strength"],
    "NextStepLoadLora": ["model"],
    "NextStepLabelledGrid": ["image"],
    "NextStepResume": ["latent"],
}

GREEN, RED, BROWN = ("#232", "#353"), ("#322", "#533"), ("#432", "#653")
GROUP_COLORS = {
    "Model": "#3f789e", "Prompt": "#88A", "Picture": "#8A8", "Settings": "#8A8", "Draw": "#a1309b", "Result": "#b58b2a",
}  # fmt: skip
TITLE, GAP, SMALL_GAP, COLUMN_GAP, GROUP_HEAD, FRAME, LANE = 30, 24, 6, 66, 44, 14, 13
# Of the canvas in a window of 1366x768, from its own corner: what is free of menus (left, top, right, bottom), and the
# upper left corner of the minimap. Frontends that leave the corner to their menus count from there, 64 and 78 pixels
# further in at most; those that do not fit a template into the window themselves.
FREE, MINIMAP, LARGEST = (60, 70, 1290, 680), (1000, 418), 0.85
WIDE = 340  # of the first column: the longest name of a checkpoint is read in full
FAR = 250  # a wire that rises or falls so much bends beside its node, or it would swing under the next column


@dataclass
class Node:
    """A node by the part that it plays; `links` are of its inputs: name -> (part, output)."""

    part: str
    type: str
    size: tuple[int, int]
    values: list[Any] = field(default_factory=list)
    links: dict[str, tuple[str, int]] = field(default_factory=dict)
    title: str | None = None
    color: tuple[str, str] | None = None
    collapsed: bool = False
    pos: tuple[int, int] = (0, 0)

    @property
    def ours(self) -> bool:
        return self.type in RELEASED

    @property
    def height(self) -> int:
        """Below its title, as it is opened."""
        return 0 if self.collapsed else self.size[1]

    def inputs(self) -> list[tuple[str, str]]:
        if self.ours:
            return [(entry["id"], entry["type"]) for entry in RELEASED[self.type]["inputs"]]
        return CORE[self.type][0]

    def outputs(self) -> list[tuple[str, str]]:
        if self.ours:
            named = RELEASED[self.type]["outputs"]
            names = OUTPUT_NAMES.get(self.type, [entry["id"] for entry in named])
            return [(name, entry["type"]) for name, entry in zip(names, named)]
        return CORE[self.type][1]


@dataclass
class Group:
    """Nodes under a title, one below the other."""

    title: str
    nodes: list[Node]


Column = list[Node | Group]

# Every part has its number in all templates. The sampler's previews come by it.
PARTS = (
    "model", "note", "positive", "negative", "size", "sampler", "decode", "save", "load", "edit", "prepare", "paste",
    "pad", "ratio", "second", "batch", "grid", "compare", "resume", "kept", "scale", "languages", "studio",
    "lora",
)  # fmt: skip


def number(part: str) -> int:
    return PARTS.index(part) + 1


@dataclass
class Template:
    """What one file holds. `app` are the widgets that app mode shows, as (part, widget)."""

    name: str
    columns: list[Column]
    app: list[tuple[str, str]]

    def nodes(self) -> Iterator[Node]:
        for item in (item for column in self.columns for item in column):
            yield from item.nodes if isinstance(item, Group) else [item]


def lay_out(template: Template) -> tuple[list[dict], dict[str, int]]:
    """Give every node its place; (groups as the file has them, the column that each part stands in)."""
    groups, column_of, left = [], {}, 0
    for n, column in enumerate(template.columns):
        top = 0
        width = max(node.size[0] for item in column for node in (item.nodes if isinstance(item, Group) else [item]))
        for item, below in zip(column, [*column[1:], None]):
            if isinstance(item, Node):
                item.pos, column_of[item.part] = (left, top + TITLE), n
                top += TITLE + item.height + (SMALL_GAP if isinstance(below, Node) else GAP)
                continue
            start, top = top, top + GROUP_HEAD
            for node in item.nodes:
                node.pos, column_of[node.part] = (left, top + TITLE), n
                top += TITLE + node.size[1] + GAP
            top += FRAME - GAP
            box = [left - FRAME, start, width + 2 * FRAME, top - start]
            groups.append({"id": len(groups) + 1, "title": item.title, "bounding": box,
                           "color": GROUP_COLORS[item.title], "font_size": 24, "flags": {}})  # fmt: skip
            top += GAP
        left += width + COLUMN_GAP
    return groups, column_of


def socket(name: str, kind: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "type": kind}
    if kind in (*WIDGETS, "IMAGEUPLOAD"):
        entry["widget"] = {"name": name}
    return entry | {"link": None}


def written(node: Node, order: int) -> dict[str, Any]:
    """A node as the file has it, without links."""
    entry = {
        "id": number(node.part), "type": node.type, "pos": list(node.pos), "size": list(node.size),
        "flags": {"collapsed": True} if node.collapsed else {},
        "order": order, "mode": 0, "inputs": [socket(*each) for each in node.inputs()],
        "outputs": [{"name": name, "type": kind, "links": []} for name, kind in node.outputs()],
        "properties": {}, "widgets_values": node.values,
    }  # fmt: skip
    if node.type != "MarkdownNote":
        pack, version = (PACK, VERSION) if node.ours else ("comfy-core", HOST_VERSION)
        entry["properties"] = {"cnr_id": pack, "ver": version, "Node name for S&R": node.type}
    if node.title:
        entry["title"] = node.title
    if node.color:
        entry["color"], entry["bgcolor"] = node.color
    return entry


def in_order(nodes: list[Node]) -> list[Node]:
    """Every node behind those that it takes from."""
    done: list[Node] = []
    while len(done) < len(nodes):
        there = {node.part for node in done}
        done += [n for n in nodes if n.part not in there and all(part in there for part, _ in n.links.values())]
    return done


class Wires:
    """The links between nodes, and the points that lead them around whatever stands between their ends."""

    def __init__(self, template: Template, nodes: dict[str, dict], columns: dict[str, int]) -> None:
        self.nodes, self.columns = nodes, columns
        self.links: list[list[Any]] = []
        self.reroutes: list[dict[str, Any]] = []
        self.extensions: list[dict[str, int]] = []
        self.lanes: dict[tuple[str, int], int] = {}
        for node in template.nodes():
            for name, (source, output) in node.links.items():
                self._connect(node.part, name, source, output)

    def _connect(self, part: str, name: str, source: str, output: int) -> None:
        start, end, link = self.nodes[source], self.nodes[part], len(self.links) + 1
        slot = next(n for n, each in enumerate(end["inputs"]) if each["name"] == name)
        start["outputs"][output]["links"].append(link)
        end["inputs"][slot]["link"] = link
        kind = start["outputs"][output]["type"]
        self.links.append([link, start["id"], output, end["id"], slot, kind])
        points = self._way(source, output, part, slot)
        for n, place in enumerate(points):
            reroute = {"id": len(self.reroutes) + 1, "pos": place, "linkIds": [link]}
            self.reroutes.append(reroute | ({"parentId": len(self.reroutes)} if n else {}))
        if points:
            self.extensions.append({"id": link, "parentId": len(self.reroutes)})

    def _way(self, source: str, output: int, part: str, slot: int) -> list[list[int]]:
        """Nothing for the next column; between two nodes that stand in one column; above all nodes for any other."""
        start, end, steps = self.nodes[source], self.nodes[part], self.columns[part] - self.columns[source]
        if steps == 1:
            return []
        if steps == 0:
            between = end["pos"][1] - TITLE - GAP // 2
            right, height = start["pos"][0] + start["size"][0] + 10, start["pos"][1] + 20 * output
            beside_start = [[right, height + 40]] if between - height > FAR else []
            return [*beside_start, [right, between], [end["pos"][0] - 10, between]]
        lane = self.lanes.setdefault((source, output), len(self.lanes))
        beside = sum(self.columns[other] == self.columns[source] for other, _ in list(self.lanes)[:lane])
        above, left = -LANE * (lane + 1), end["pos"][0] - 22 - 4 * (lane % 3)
        right, height = self._right(self.columns[source]) + 18 + 6 * beside, start["pos"][1] + 20 * output
        way = [[right, above], [left, above]]
        if height - above > FAR:
            way.insert(0, [right, height - 40])
        if steps < 0:
            way.append([left, end["pos"][1] + end["size"][1] // 2])
        elif end["pos"][1] + 20 * slot - above > FAR:
            way.append([left, end["pos"][1] + 20 * slot - 40])
        return way

    def _right(self, column: int) -> int:
        standing = [self.nodes[part] for part, own in self.columns.items() if own == column]
        return max(node["pos"][0] + node["size"][0] for node in standing)


def view(template: Template, wires: Wires) -> dict[str, Any]:
    """Scale and offset at which all of it is seen in a small window, beside the menus and the minimap."""
    nodes = list(template.nodes())
    top = min([-TITLE, *(reroute["pos"][1] for reroute in wires.reroutes)])
    width = max(node.pos[0] + node.size[0] for node in nodes)
    bottom = max(node.pos[1] + node.height for node in nodes)
    scale = min(LARGEST, (FREE[2] - FREE[0]) / width, (FREE[3] - FREE[1]) / (bottom - top))
    for node in nodes:
        right, low = node.pos[0] + node.size[0], node.pos[1] + node.height - top
        if FREE[0] + right * scale > MINIMAP[0]:
            scale = min(scale, max((MINIMAP[1] - FREE[1]) / low, (MINIMAP[0] - FREE[0]) / right))
    return {"scale": round(scale, 3), "offset": [round(FREE[0] / scale), round(FREE[1] / scale - top)]}


def workflow(template: Template) -> dict[str, Any]:
    """The template's file."""
    groups, columns = lay_out(template)
    ordered = in_order(list(template.nodes()))
    nodes = {node.part: written(node, order) for order, node in enumerate(ordered)}
    wires = Wires(template, nodes, columns)
    shown = [[str(number(part)), widget] for part, widget in template.app]
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"nextstep/{template.name}")),
        "revision": 0,
        "last_node_id": len(PARTS),
        "last_link_id": len(wires.links),
        "nodes": sorted(nodes.values(), key=lambda node: node["id"]),
        "links": wires.links,
        "groups": groups,
        "config": {},
        "extra": {
            "ds": view(template, wires),
            "linearMode": False,
            "linearData": {"inputs": shown, "outputs": [str(number("save"))]},
            "reroutes": wires.reroutes,
            "linkExtensions": wires.extensions,
        },
        "version": 0.4,
    }


# --- What the templates hold ---

NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, jpeg artifacts, signature, watermark, username, blurry."
)
FOX = "A red fox asleep in fresh snow under a pine tree, early morning light, photograph."
AUTUMN = "A red fox asleep in autumn leaves under an oak tree, evening light, photograph."
COAST = "A lighthouse on a rocky coast at dusk, waves below, warm light in the lantern room, photograph."
BOAT = "A small sailing boat with white sails on the calm sea at sunset, the sun's path on the water, digital painting."
CLIFF = (
    "A lighthouse with red and white bands on a cliff at sunset, dark rocks and breaking waves at its foot, "
    "digital painting."
)
MAIN, EDITING, EMBEDDED = "NextStep-1.1", "NextStep-1-Large-Edit", "tiny (embedded)"
FETCHES = (
    "**The first Run downloads {0} (29 GB)** into `models/nextstep`. An interrupted download resumes where it stopped. "
    "If you have a NextStep checkpoint already, choose it in the loader."
)
# What the notes say, below their heading and above and below the line about the download.
NOTES = {
    "First Run": """
Nothing to download: **tiny** comes with the pack and draws simple shapes, on any computer, within seconds. Press
**Run**.

Try *a small yellow star on a black background*, or *a red circle left of a blue square on a white background*.

For real pictures open **NextStep Text to Image**.
""",
    "Text to Image": """
Write what you want to see, and press **Run**.

{fetches}

**quantization** `auto` stores the weights in the format that fits your card. Sizes near 512 x 512 work best.
""",
    "Image Edit": """
Load a picture of any size, say what to change, and press **Run**.

{fetches}

`<image>` stands where the picture belongs. **cfg** follows the instruction, **cfg_img** the picture: raise it if too
much changes, lower it if too little does.
""",
    "Inpaint": """
Redraws what is masked, and leaves the rest of the picture as it is.

{fetches}

Your own picture, of any size: load it, right-click it, choose **Open in MaskEditor** and paint. The model sees what
is masked and its surroundings: describe those in the prompt.
""",
    "Outpaint": """
Makes room around a picture of any size and continues the picture into it.

{fetches}

The model draws from top to bottom: room at the bottom and on the right is filled best. Describe the whole picture,
with what is new in it.
""",
    "Aspect Ratios": """
The model was trained at 17 ratios; other sizes work less well. Base **512** draws best.

{fetches}

| ratio | at 512 | like |
| --- | --- | --- |
| 21:12 | 672 x 384 | 16:9 |
| 19:13 | 608 x 416 | 3:2 |
| 18:14 | 576 x 448 | 4:3 |
| 14:18 | 448 x 576 | 3:4 |
""",
    "Batch Grid": """
**NextStep Batch Prompts** joins two prompts, and **batch_size** says how many pictures are drawn in all: 4 is two of
each. They are drawn together as far as memory allows, which takes much less time than one after another.

{fetches}

A third prompt: put it and the batch into another **NextStep Batch Prompts**, and set **batch_size** to a multiple of
3.
""",
    "Low VRAM": """
For cards of 12 GB and less. **quantization** `auto` takes int4 there: 8 GB of weights. What does not fit stays in the
computer's memory and is streamed, which is slower. The picture is decoded in tiles.

{fetches}

Still out of memory? Set width and height to 256, start ComfyUI with `--reserve-vram 1`, and close what else uses the
card.

Too slow? **Interrupt** keeps what is drawn. **cfg** 1 halves the work but follows the prompt less.
""",
    "Compare": """
Write several values, separated by commas, in **Values to compare**. A picture of every combination is drawn, with
the same seed, and all are put into one grid, with labels.

{fetches}

Samplers by name, such as `auto, flow-ode`. Several formats in **quantization** are all kept in memory: `int8, int4`
takes 21 GB.
""",
    "Brand": """
A logo, a business card, a web banner, a profile picture and a brochure cover for one brand, two of each.

{fetches}

Write your brand and your style into **lists**. All pictures are written into **folder**, with a report: press **Open
report**. **Interrupt** keeps what is drawn; the next **Run** draws the rest.
""",
    "Marketing": """
A product photo, a story, an ad, a newsletter header and a thumbnail, each in two settings: A with cfg 7.0 and 25 steps,
B with cfg 8.5 and 35 steps.

{fetches}

Write your product and your moods into **lists**. **Open report** shows A and B side by side, with a slider.
""",
    "Education": """
Three kinds of pictures for lessons: visual, conceptual and practical, for every topic and level, at 1024 x 1024.

{fetches}

Write your topics and levels into **lists**, with **|** between them. **size** 512 draws faster and better. **Open
report** shows all pictures with what they were made with.
""",
    "Resume": """
Press **Run**, and **Interrupt** whenever you need the computer. What is drawn is kept. **Run** again resumes from
there and finishes the same picture, also after a restart.

{fetches}

The seed stays fixed for it. Another name in **NextStep Resume** and **Save Latent** starts another picture.
""",
    "LoRA": """
Nothing to download: **night** is a LoRA that comes with the pack. It makes the embedded model draw scenes at night.
Press **Run** for three pictures of one seed, at the strengths 0 (the plain model), 0.5 and 1.

Your own: put a `.safetensors` file that was trained on NextStep-1 into `models/loras`, press R, and choose it, with its
model in the loader. For several, put one **NextStep Load LoRA** behind the other.
""",
}


def group(title: str, *nodes: Node) -> Group:
    return Group(title, list(nodes))


def loader(checkpoint: str = MAIN, **links: tuple[str, int]) -> Node:
    embedded = checkpoint == EMBEDDED
    name = checkpoint if embedded else f"{checkpoint} (downloads 29 GB)"
    title = None if embedded else "Model: first Run downloads 29 GB"
    return Node("model", "NextStepModelLoader", (WIDE, 224), [name, "auto", "auto", True, "auto"], links, title)


def note(name: str, height: int, checkpoint: str = MAIN) -> Node:
    said = NOTES[name].strip().replace("\n\n", "\0").replace("\n|", "\1").replace("\n", " ")
    said = said.replace("\0", "\n\n").replace("\1", "\n|").format(fetches=FETCHES.format(checkpoint))
    return Node(
        "note", "MarkdownNote", (WIDE, height), [f"## NextStep: {name}\n\n{said}"], title="Read me", color=BROWN
    )


def in_other_languages(name: str, checkpoint: str = MAIN) -> Node:
    """The note for those who read it in their own language, closed, so that it is in nobody's way. It opens over nodes
    that hold no text: newer frontends show one text through the other."""
    notes = {language: json.loads((LOCALES / language / "notes.json").read_text("utf-8")) for language in LANGUAGES}
    said = [f"## {LANGUAGES[language]}\n\n{note[name]}".format(fetches=note["fetches"].format(checkpoint))
            for language, note in notes.items()]  # fmt: skip
    title = " · ".join(LANGUAGES.values())
    return Node("languages", "MarkdownNote", (WIDE, 420), ["\n\n".join(said)], title=title, color=BROWN, collapsed=True)


def notes(name: str, height: int, checkpoint: str = MAIN) -> list[Node]:
    return [note(name, height, checkpoint), in_other_languages(name, checkpoint)]


def prompt(part: str, title: str, text: str, height: int = 150) -> Node:
    color = RED if part == "negative" else GREEN
    return Node(part, "NextStepTextEncode", (320, height), [text, ""], {"model": ("model", 0)}, title, color)


def positive(text: str) -> Node:
    return prompt("positive", "Positive prompt", text)


def negative(text: str = NEGATIVE) -> Node:
    return prompt("negative", "Negative prompt", text)


def size(width: int = 512, height: int = 512, batch: int = 1, fed: dict[str, tuple[str, int]] | None = None) -> Node:
    return Node("size", "NextStepEmptyLatent", (320, 106), [width, height, batch], fed or {})


def sampler(
    latent: tuple[str, int] = ("size", 0),
    encoded: str = "positive",
    steps: int = 28,
    cfg: float = 7.5,
    shift: float = 1.0,
    seed: tuple[int, str] = (42, "randomize"),
    on_interrupt: str = "discard",
    fed: dict[str, tuple[str, int]] | None = None,
) -> Node:
    values = [*seed, steps, cfg, "constant", shift, "auto", "auto", 2.0, on_interrupt, "off", "auto"]
    links = {
        "model": ("model", 0),
        "positive": (encoded, 0),
        "latent": latent,
        "negative": ("negative", 0),
        **(fed or {}),
    }
    return Node("sampler", "NextStepSampler", (300, 652), values, links)


def decode(width: int = 340) -> Node:
    return Node("decode", "NextStepVAEDecode", (width, 46), [], {"samples": ("sampler", 0), "vae": ("model", 1)})


def save(name: str, source: str = "decode", height: int = 300, width: int = 340) -> Node:
    return Node("save", "SaveImage", (width, height), [f"NextStep/{name}"], {"images": (source, 0)})


def load(picture: str) -> Node:
    return Node("load", "LoadImage", (WIDE, 316), [picture, "image"], title="Your picture")


def change() -> Node:
    return Node(
        "edit",
        "NextStepEditEncode",
        (320, 240),
        ["<image>Turn the sunset into a night with a full moon and stars.", "nearest aspect ratio", 512, 512],
        {"model": ("model", 0), "vae": ("model", 1), "image": ("load", 0)},
        "What to change",
        GREEN,
    )


def paste() -> Node:
    links = {"image": ("decode", 0), "original": ("prepare", 2)}
    return Node("paste", "NextStepPasteBack", (340, 78), [16], links)


def prepare(source: str, area: str) -> Node:
    values = ["crop", "nearest aspect ratio", "512", 512, 512, area, 0.5]
    links = {"image": (source, 0), "mask": (source, 1), "vae": ("model", 1)}
    return Node("prepare", "NextStepPreparePicture", (320, 372), values, links)


def text_app(*more: tuple[str, str]) -> list[tuple[str, str]]:
    return [("positive", "prompt"), ("negative", "prompt"), *more, ("sampler", "seed")]


SIZED = [("size", "width"), ("size", "height"), ("size", "batch_size")]


def enlarge() -> Node:
    """What the embedded model draws is small."""
    return Node("scale", "ImageScaleBy", (340, 82), ["nearest-exact", 6], {"image": ("decode", 0)})


def first_run() -> Template:
    return Template(
        "NextStep First Run",
        [
            [*notes("First Run", 220), group("Model", loader(EMBEDDED))],
            [
                group("Prompt", positive("a red circle on a blue background"), negative("")),
                group("Picture", size(64, 64)),
            ],
            [group("Draw", sampler(steps=20, cfg=3.0, seed=(1, "randomize")), decode(300))],
            [group("Result", enlarge(), save("first-run", "scale", 270))],
        ],
        text_app(*SIZED),
    )


def text_to_image() -> Template:
    return Template(
        "NextStep Text to Image",
        [
            [*notes("Text to Image", 230), group("Model", loader())],
            [group("Prompt", positive(FOX), negative()), group("Picture", size())],
            [group("Draw", sampler())],
            [group("Result", decode(), save("image"))],
        ],
        text_app(*SIZED),
    )


def image_edit() -> Template:
    return Template(
        "NextStep Image Edit",
        [
            [
                *notes("Image Edit", 168, EDITING),
                group("Model", loader(EDITING)),
                group("Picture", load("nextstep_lighthouse.jpg")),
            ],
            [group("Prompt", change(), negative("Copy original image."))],
            [group("Draw", sampler(("edit", 1), "edit", steps=50, shift=3.2))],
            [group("Result", decode(), save("edit"))],
        ],
        [("load", "image"), ("edit", "instruction"), ("sampler", "cfg_img"), ("sampler", "seed")],
    )


def inpaint() -> Template:
    return Template(
        "NextStep Inpaint",
        [
            [*notes("Inpaint", 168), group("Model", loader()), group("Picture", load("nextstep_inpaint.png"))],
            [group("Prompt", positive(BOAT), negative()), group("Picture", prepare("load", "around the mask"))],
            [group("Draw", sampler(("prepare", 6)))],
            [group("Result", decode(), paste(), save("inpaint", "paste"))],
        ],
        [("load", "image"), *text_app()],
    )


def outpaint() -> Template:
    pad = Node("pad", "ImagePadForOutpaint", (220, 174), [0, 0, 0, 256, 0], {"image": ("load", 0)}, "Room to draw")
    return Template(
        "NextStep Outpaint",
        [
            [*notes("Outpaint", 168), group("Model", loader()), group("Picture", load("nextstep_lighthouse.jpg"))],
            [group("Picture", pad)],
            [group("Prompt", positive(CLIFF), negative()), group("Picture", prepare("pad", "whole picture"))],
            [group("Draw", sampler(("prepare", 6)))],
            [group("Result", decode(width=300), save("outpaint", width=300))],
        ],
        [("load", "image"), ("pad", "right"), ("pad", "bottom"), *text_app()],
    )


def aspect_ratios() -> Template:
    ratio = Node("ratio", "NextStepAspectRatio", (WIDE, 138), ["21:12 landscape", "512"])
    return Template(
        "NextStep Aspect Ratios",
        [
            [*notes("Aspect Ratios", 262), group("Model", loader()), group("Picture", ratio)],
            [
                group("Prompt", positive(COAST), negative()),
                group("Picture", size(fed={"width": ("ratio", 0), "height": ("ratio", 1)})),
            ],
            [group("Draw", sampler())],
            [group("Result", decode(), save("ratio"))],
        ],
        text_app(("ratio", "ratio")),
    )


def batch_grid() -> Template:
    joined = {"first": ("positive", 0), "second": ("second", 0)}
    batch = Node("batch", "NextStepPromptBatch", (320, 46), [], joined)
    prompts = [prompt("positive", "Prompt 1", FOX, 130), prompt("second", "Prompt 2", AUTUMN, 130), batch, negative()]
    grid = Node("grid", "NextStepLabelledGrid", (340, 78), [2], {"image": ("decode", 0)})
    return Template(
        "NextStep Batch Grid",
        [
            [*notes("Batch Grid", 270), group("Model", loader())],
            [group("Prompt", *prompts), group("Picture", size(batch=4))],
            [group("Draw", sampler(encoded="batch"))],
            [group("Result", decode(), grid, save("grid", "grid"))],
        ],
        [("positive", "prompt"), ("second", "prompt"), ("size", "batch_size"), ("sampler", "seed")],
    )


def low_vram() -> Template:
    tiled = {"samples": ("sampler", 0), "vae": ("model", 1)}
    return Template(
        "NextStep Low VRAM",
        [
            [*notes("Low VRAM", 310), group("Model", loader())],
            [group("Prompt", positive(FOX), negative()), group("Picture", size())],
            [
                group(
                    "Draw",
                    sampler(on_interrupt="keep"),
                    Node("decode", "VAEDecodeTiled", (300, 150), [256, 64, 64, 8], tiled),
                )
            ],
            [group("Result", save("low-vram"))],
        ],
        text_app(*SIZED),
    )


def compare() -> Template:
    values = ["5, 7.5, 10", "12, 28", "1", "auto", "auto", "1"]
    table = Node("compare", "NextStepCompare", (320, 340), values, title="Values to compare")
    settings = {name: ("compare", n) for n, name in enumerate(("cfg", "steps", "shift", "sampler"))}
    sheet = {"image": ("decode", 0), "labels": ("compare", 5), "columns": ("compare", 6)}
    grid = Node("grid", "NextStepLabelledGrid", (340, 98), [2], sheet)
    return Template(
        "NextStep Compare",
        [
            [*notes("Compare", 230), group("Model", loader(quantization=("compare", 4))), group("Picture", size())],
            [group("Prompt", positive(FOX), negative()), group("Settings", table)],
            [group("Draw", sampler(seed=(42, "fixed"), fed=settings))],
            [group("Result", decode(), grid, save("compare", "grid", 270))],
        ],
        text_app(("compare", "cfg"), ("compare", "steps"), ("compare", "sampler")),
    )


def resume() -> Template:
    name = "NextStep/unfinished"
    canvas = Node("resume", "NextStepResume", (320, 116), [name], {"latent": ("size", 0)})
    kept = Node("kept", "SaveLatent", (340, 58), [name], {"samples": ("sampler", 0)})
    return Template(
        "NextStep Resume",
        [
            [*notes("Resume", 250), group("Model", loader()), group("Picture", size())],
            [group("Prompt", positive(FOX), negative()), group("Picture", canvas)],
            [group("Draw", sampler(("resume", 0), seed=(42, "fixed"), on_interrupt="keep"))],
            [group("Result", decode(), save("resumed", height=270), kept)],
        ],
        text_app(*SIZED),
    )


def lora() -> Template:
    values = ["3", "20", "1", "auto", "auto", "0, 0.5, 1"]
    table = Node("compare", "NextStepCompare", (320, 340), values, title="Strengths to compare")
    changed = Node("lora", "NextStepLoadLora", (WIDE, 106), ["night (embedded)", 1.0],
                   {"model": ("model", 0), "strength": ("compare", 7)})  # fmt: skip
    sheet = {"image": ("scale", 0), "labels": ("compare", 5)}
    grid = Node("grid", "NextStepLabelledGrid", (340, 98), [3], sheet)
    settings = {"model": ("lora", 0)}
    return Template(
        "NextStep LoRA",
        [
            [*notes("LoRA", 200), group("Model", loader(EMBEDDED), changed), group("Picture", size(64, 64))],
            [group("Prompt", positive("a red circle on a blue background"), negative("")), group("Settings", table)],
            [group("Draw", sampler(steps=20, cfg=3.0, seed=(2, "fixed"), fed=settings), decode(300))],
            [group("Result", enlarge(), grid, save("lora", "grid", 270))],
        ],
        [("positive", "prompt"), ("lora", "lora_name"), ("compare", "strength"), ("sampler", "seed")],
    )


def studio(title: str, lists: str) -> Template:
    """A shipped set of prompts in one node."""
    name = title.lower()
    values = [name, "", lists, "", "", f"NextStep/{name}", 4, "off"]
    batch = Node("studio", "NextStepBatchStudio", (420, 740), values, {"model": ("model", 0), "vae": ("model", 1)})
    return Template(
        f"NextStep {title}",
        [
            [*notes(title, 215), group("Model", loader())],
            [group("Draw", batch)],
            [group("Result", save(f"{name}-sheet", "studio", 420, 420))],
        ],
        [("studio", widget) for widget in ("lists", "size", "seeds", "folder")],
    )


def brand() -> Template:
    return studio("Brand", "brand: Northwind Coffee\nstyle: minimal, flat colors, plenty of white space")


def marketing() -> Template:
    return studio("Marketing", "product: a ceramic coffee mug\nmood: bright and fresh | warm and calm")


def education() -> Template:
    return studio("Education", "topic: photosynthesis | the water cycle\nlevel: primary school | university")


TEMPLATES = (
    first_run, text_to_image, image_edit, inpaint, outpaint, aspect_ratios, batch_grid, low_vram, compare, resume,
    brand, marketing, education, lora,
)  # fmt: skip


def main() -> None:
    from scripts import blueprints

    files = {f"example_workflows/{template.name}": workflow(template) for template in (make() for make in TEMPLATES)}
    for blueprint in (make() for make in blueprints.BLUEPRINTS):
        files[f"subgraphs/{blueprint.name}"] = blueprints.workflow(blueprint)
    for name, content in files.items():
        path = ROOT / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()
