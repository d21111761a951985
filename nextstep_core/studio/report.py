"""What a batch run made, to look at: a contact sheet and an HTML page that needs no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from html import escape
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import NextStepError, not_written
from ..images.contact_sheet import contact_sheet
from ..images.rgb import to_pixels
from ..images.saving import save_picture
from .manifest import Record, write_whole

REPORT, SHEET = "report.html", "contact-sheet.jpg"
PAGE = Path(__file__).parent / "data" / "report.html"
TITLE, DATA = "<!-- title -->", "<!-- data -->"
ON_SHEET, CELL, COLUMNS = 200, 256, 8  # pictures, pixels of the longer side, pictures in a row
ON_LABEL = 24  # letters of a name


def report_page(title: str, records: Sequence[Record], served_from: str | None = None) -> str:
    """The page as text. Its pictures lie beside it, or, where ComfyUI serves it, in this folder of its outputs."""
    page = PAGE.read_text(encoding="utf-8")
    # In a script's text only a closing tag or a comment could end it early; texts are put into the page as texts.
    data = json.dumps(
        {"records": [asdict(record) for record in records], "served_from": served_from}, ensure_ascii=False
    )
    for sign in ("<", "\u2028", "\u2029"):
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    return page.replace(TITLE, escape(title)).replace(DATA, data)


def write_report(folder: Path, title: str, records: Sequence[Record]) -> Path:
    """The page of a run, beside its pictures, which it shows with all that is known of them. NextStepError where it
    cannot be written."""
    page = report_page(title, records)
    path = folder / REPORT
    try:
        write_whole(path, page)
    except OSError as error:
        raise not_written(path, error) from None
    return path


def write_sheet(folder: Path, records: Sequence[Record]) -> Path | None:
    """The first pictures of a run as one, each with what tells it apart; None where there is none."""
    from PIL import Image

    pictures: list[Tensor] = []
    labels: list[str] = []
    for record in records:
        if record.error or len(pictures) == ON_SHEET:
            continue
        with suppress(OSError, NextStepError), Image.open(folder / record.file) as image:
            image.draft("RGB", (CELL, CELL))
            pixels = to_pixels(image) / 2 + 0.5
            scale = CELL / max(pixels.shape[-2:])
            if scale < 1:
                size = [max(1, round(side * scale)) for side in pixels.shape[-2:]]
                pixels = F.interpolate(pixels, size=size, mode="area")
            pictures.append(pixels[0].movedim(0, -1))
            labels.append(", ".join(filter(None, (record.label, record.name[:ON_LABEL], f"seed {record.seed}"))))
    if not pictures:
        return None
    columns = min(COLUMNS, max(1, round(len(pictures) ** 0.5 + 0.5)))
    path = folder / SHEET
    save_picture(path, contact_sheet(pictures, labels, columns)[0].to(torch.float32), "jpeg", 90)
    return path
