"""What a request asks for: OpenAI's fields and ours, checked before the request takes a place. Opens no file."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any

from ...errors import NextStepError, check_choice, check_text, shown
from ...images.rgb import as_seen
from ...images.saving import FORMATS, QUALITY
from ...ranges import Range
from ...request.sizes import nearest_ratio, ratio_size
from ...sampling.settings import SEED, STEPS
from ...sentences import Sentence
from ..hands import FileKind
from ..job_keys import SETTINGS
from ..jobs import BASE, Asked, Order
from ..worker import Data, order_data

WHERE = Sentence("Your request")
N = Range("n", 1, 10)
PARTIAL = Range("partial_images", 0, 3)
COMPRESSION = Range("output_compression", 0, 100)
LONGEST_PROMPT = 32_000  # letters, as at OpenAI
MOST_IMAGES = 4
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
MOST_UPLOADED_PIXELS = 1 << 24  # of one picture; a file of kilobytes can hold gigabytes
AUTO = "auto"
OURS = (
    "steps",
    "steps_schedule",
    "cfg",
    "cfg_img",
    "cfg_schedule",
    "shift",
    "sampler",
    "use_norm",
    "lookahead",
    "negative_prompt",
)
# OpenAI's fields that have one meaning here, and what may stand in them; None: whatever, of no effect.
FIXED: dict[str, tuple[str, ...] | None] = {
    "response_format": ("b64_json",),
    "background": (AUTO, "opaque"),
    "quality": (AUTO,),
    "moderation": (AUTO, "low"),
    "user": None,
}
FIELDS = ("prompt", "model", "n", "size", "stream", "partial_images", "output_format", "output_compression", "seed")
KNOWN = (*FIELDS, *OURS, *FIXED)


@dataclass(frozen=True)
class Limits:
    """What one request may ask for at most."""

    side: int = 1024
    steps: int = 100


@dataclass(frozen=True)
class Wanted:
    """A request that was understood: so many pictures, with the same settings and seeds one after another."""

    orders: tuple[Data, ...]
    seeds: tuple[int, ...]
    width: int
    height: int
    kind: FileKind
    stream: bool
    partial_images: int

    @property
    def alike(self) -> tuple[object, ...]:
        """Pictures of which this is equal can be drawn in one batch."""
        first = self.orders[0]
        asked = tuple(sorted(first["asked"].items()))
        return asked, first["negative_prompt"], len(first["images"]), self.kind.format, self.kind.quality


def wanted(fields: Mapping[str, Any], images: Sequence[bytes], model: str, limits: Limits = Limits()) -> Wanted:
    """What the fields of a request ask of the model of this name; `images` are the files that came with it.
    NextStepError for the first thing that is wrong."""
    fields = {name: value for name, value in fields.items() if value is not None}
    for name in fields:
        check_choice(Sentence("A field of the request"), name, KNOWN)
    for name, allowed in FIXED.items():
        if name in fields and allowed is not None:
            check_choice(name, fields[name], allowed)
        elif name in fields:
            check_text(name, fields[name])
    check_choice("model", fields.get("model", model), (model,))
    prompt = check_text("prompt", fields.get("prompt"))
    if not prompt.strip() or len(prompt) > LONGEST_PROMPT:
        raise NextStepError(
            "prompt has {count:,} letters; write at least one, and at most {most:,}.",
            count=len(prompt),
            most=LONGEST_PROMPT,
        )
    settings = {name: SETTINGS[name].check(WHERE, fields[name]) for name in OURS if name in fields}
    if "steps" in settings:
        Range("steps", STEPS.minimum, limits.steps).check(settings["steps"])
    pictures = [_png(data, limits.side) for data in images]
    width, height = _size(fields.get("size", AUTO), pictures, limits)
    stream = fields.get("stream", False)
    check_choice("stream", stream, (False, True))
    count = (Range("n", 1, 1) if stream else N).check(fields.get("n", 1))
    seed = SEED.check(fields.get("seed", secrets.randbits(32)))
    seeds = tuple((seed + n) % (SEED.maximum + 1) for n in range(count))
    asked = Asked(width=width, height=height, **settings)
    plain = Order(prompt, settings.get("negative_prompt", ""), (), asked, seed, "", WHERE)
    order = order_data(plain) | {"images": [(".png", data) for data, _ in pictures]}
    partial = PARTIAL.check(fields.get("partial_images", 0))
    orders = tuple(order | {"seed": own} for own in seeds)
    return Wanted(orders, seeds, width, height, _kind(fields), stream, partial if stream else 0)


def _kind(fields: Mapping[str, Any]) -> FileKind:
    format = fields.get("output_format", "png")
    check_choice("output_format", format, FORMATS)
    quality = COMPRESSION.check(fields.get("output_compression", QUALITY.maximum))
    return FileKind(format, max(QUALITY.minimum, quality))


def _size(size: object, pictures: Sequence[tuple[bytes, tuple[int, int]]], limits: Limits) -> tuple[int, int]:
    """(width, height) of what is to be drawn: as it is asked, or that of the first input picture's ratio."""
    if size == AUTO:
        found = ratio_size(nearest_ratio(*pictures[0][1]), BASE) if pictures else (BASE, BASE)
        most = max(found)
        if most > limits.side:  # a server for small pictures draws small ones
            found = limits.side // 16 * 16, limits.side // 16 * 16
        return found
    sides = SETTINGS["size"].check(WHERE, size)
    width, height = ratio_size(sides, BASE) if isinstance(sides, str) else sides
    for name, side in (("width", width), ("height", height)):
        Range(name, 16, limits.side).check(side)
    return width, height


def _png(data: bytes, side: int) -> tuple[bytes, tuple[int, int]]:
    """An uploaded picture, the way up that it says, as a PNG of our own, and its (width, height).

    No picture is drawn with a longer side than `side`, so one whose shorter side is longer is waiting in the size in
    which it is needed.
    """
    from PIL import Image

    try:
        with Image.open(BytesIO(data), formats=IMAGE_FORMATS) as image:
            size = image.size
            if size[0] * size[1] > MOST_UPLOADED_PIXELS:
                raise NextStepError(
                    "An input image has {width}x{height} pixels; at most {most:,} are allowed.",
                    width=size[0],
                    height=size[1],
                    most=MOST_UPLOADED_PIXELS,
                )
            plain = as_seen(image)
    except NextStepError:
        raise
    except Exception as error:  # whatever is wrong with whichever kind of file
        raise NextStepError(
            "An input image cannot be read ({reason}). Save it anew as PNG.", reason=type(error).__name__
        ) from None
    if (shorter := min(plain.size)) > side:
        width, height = (max(side, round(own * side / shorter)) for own in plain.size)
        plain = plain.resize((width, height), Image.Resampling.LANCZOS)
    file = BytesIO()
    plain.save(file, "PNG", compress_level=1)
    return file.getvalue(), plain.size


def parse_json(body: bytes) -> dict[str, Any]:
    """The fields of a JSON request; NextStepError for another text."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise NextStepError("The request is no JSON object. Send one with the field prompt.")
    return found


def parse_form(fields: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The fields of a form, whose values are all texts, as JSON would have them."""
    texts = ("prompt", "model", "negative_prompt", "user", "size", *FIXED)
    found: dict[str, Any] = {}
    for name, text in fields:
        if name in found:
            raise NextStepError("The request has {name} twice. Send each field once.", name=shown(name))
        found[name] = text
        if name not in texts:
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                continue
            found[name] = value if isinstance(value, (bool, int, float)) else text
    return found


def picture_data(one: Wanted, number: int) -> Data:
    """A picture of a request, as a replica takes it."""
    return {"order": one.orders[number], "kind": asdict(one.kind), "partial_images": one.partial_images}
