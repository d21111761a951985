"""Requests to the server, fields and files changed at random, until a replica draws them with a stub; and models that
so many processes are to share."""

from __future__ import annotations

import json
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from random import Random

from PIL import Image

from nextstep_core.loading.build import ModelPlan, plan_model
from nextstep_core.loading.shares import shared
from nextstep_core.loading.store import ASSETS
from nextstep_core.request.sizes import RATIO_NAMES
from nextstep_core.runtime.interrupt import go_on
from nextstep_core.runtime.parallel import Share, counts
from nextstep_core.studio.serving.asked import KNOWN, parse_form, parse_json, picture_data, wanted
from nextstep_core.studio.serving.replica import draw_batch

from .case import Case
from .jobs import Stub
from .json_mutation import VALUES, mutated
from .prompts import PIECES

SMALL = 256  # pixels of a side, of what the stub is to draw
GOOD = {
    "prompt": "a red circle", "model": "tiny", "n": 2, "size": "32x16", "stream": False, "partial_images": 1,
    "output_format": "webp", "output_compression": 80, "seed": 3, "steps": 4, "cfg": 2.0, "cfg_img": 1.5, "shift": 1.0,
    "sampler": "flow-ode", "use_norm": True, "lookahead": "off", "negative_prompt": "blur", "quality": "auto",
    "background": "auto", "user": "somebody",
}  # fmt: skip
SIZES = ("16", "32x16", "auto", "17x16", "0x0", "1024x16", "16x16x16", "x", "-16x16", "٣٢x16", *RATIO_NAMES)
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO")


def warm_up() -> None:
    plan()


def plan() -> ModelPlan:
    return plan_model(ASSETS / "tiny")


def case(rng: Random) -> Case:
    return rng.choice((_json, _form, _form, _shares))(rng)


def _draw(fields: dict, images: list[bytes]) -> None:
    one = wanted(fields, images, "tiny")
    assert 1 <= len(one.orders) <= 10 and max(one.width, one.height) <= 1024
    if max(one.width, one.height) > SMALL:
        return
    events: list[dict] = []
    draw_batch(Stub(), [picture_data(one, n) for n in range(len(one.orders))], events.append, go_on)
    assert sorted(event["picture"] for event in events) == list(range(len(one.orders)))


def _json(rng: Random) -> Case:
    fields = dict(GOOD)
    for name in rng.sample(list(fields)[1:], rng.choice((0, 5, 15))):
        del fields[name]
    if rng.random() < 0.3:
        fields["size"] = rng.choice(SIZES)
    what, text = mutated(json.dumps(fields), rng)

    def attempt(_: Path) -> None:
        _draw(parse_json(text.encode("utf-8", "surrogatepass")), [])

    return Case(f"json: {what}", attempt)


def _picture(rng: Random) -> bytes:
    mode, format = rng.choice(MODES), rng.choice(FORMATS)
    file = BytesIO()
    try:
        Image.new(mode, (rng.choice((1, 16, 100, 5000)), rng.choice((1, 16, 100)))).save(file, format)
    except (OSError, ValueError):  # not every format has every mode
        Image.new("RGB", (16, 16)).save(file, "PNG")
    data = bytearray(file.getvalue())
    for _ in range(rng.choice((0, 0, 1, 3, 20))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data[: rng.choice((len(data), len(data), rng.randrange(len(data))))])


def _form(rng: Random) -> Case:
    names = rng.sample(KNOWN, rng.choice((0, 2, 4)))
    texts = (*VALUES, *SIZES, *PIECES, "true", "4", "2.5")
    fields = [("prompt", "Make it blue."), *((name, rng.choice(texts)) for name in names)]
    if rng.random() < 0.1:
        fields.append(rng.choice(fields))
    images = [_picture(rng) for _ in range(rng.choice((1, 1, 2)))]

    def attempt(_: Path) -> None:
        _draw(parse_form(fields), images)

    return Case(f"form: {[(name, text[:40]) for name, text in fields]} and {[len(image) for image in images]}", attempt)


def _shares(rng: Random) -> Case:
    """What is refused is refused by the config, before files are looked at; what is not is cut without a remainder."""
    heads = rng.choice((1, 2, 3, 4, 7, 40, 1024))
    groups = rng.choice([n for n in range(1, heads + 1) if heads % n == 0])
    inner, count = rng.choice((1, 7, 512, 13824)), rng.choice((1, 2, 3, 4, 8, 40, 1000))

    def attempt(_: Path) -> None:
        config = replace(plan().config, num_attention_heads=heads, num_key_value_heads=groups, intermediate_size=inner)
        cuts = [Share(n, count).cuts(config) for n in range(count)]
        assert count == 1 or count in counts(config)
        assert sum(cut["q_proj"].stop - cut["q_proj"].start for cut in cuts) == heads * config.head_dim
        assert {cut["k_proj"].stop for cut in cuts} >= {groups * config.head_dim}
        if (heads, groups, inner) == (4, 2, 512):
            shared(plan(), Share(count - 1, count))

    return Case(f"shares: {heads} heads in {groups}, {inner}, by {count}", attempt)
