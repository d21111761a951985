"""A picture to a file that tells what it was made with, in the places where programs look for it."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

from PIL import Image, PngImagePlugin
from torch import Tensor

from ..errors import check_choice, not_written
from ..ranges import Range

QUALITY = Range("quality", 1, 100)
FORMATS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
PARAMETERS = "parameters"
COMPRESSION = 4  # of PNG, as ComfyUI does
EXIF_PLACES = (0x0110, 0x010F)  # where ComfyUI looks for the prompt and the workflow in WebP files, in its own order
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
LONGEST_EXIF = 65_500  # bytes that a JPEG's one segment holds


def save_picture(
    path: Path,
    picture: Tensor,
    format: str,
    quality: int = 90,
    parameters: str = "",
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write a picture (H, W, 3) in [0, 1] as `format`, one of FORMATS.

    `parameters` goes where readers of that text look: a chunk of a PNG, the user comment of JPEG and WebP. `notes` are
    ComfyUI's own, such as prompt and workflow, as JSON, in that order; where a JPEG cannot hold them, it goes without.
    `quality` is of JPEG and WebP, whose 100 is lossless. NextStepError for a format that is none of ours, a quality out
    of range, and what the disk refuses.
    """
    try:
        _write(path, picture, format, quality, parameters, notes or {})
    except OSError as error:
        raise not_written(path, error) from None


def encoded_picture(picture: Tensor, format: str, quality: int = 90, parameters: str = "") -> bytes:
    """The bytes of the file that `save_picture` would write."""
    file = BytesIO()
    _write(file, picture, format, quality, parameters, {})
    return file.getvalue()


def _write(
    target: Path | BytesIO, picture: Tensor, format: str, quality: int, parameters: str, notes: Mapping[str, str]
) -> None:
    check_choice("format", format, FORMATS)
    quality = QUALITY.check(quality)
    image = Image.fromarray((picture.clamp(0, 1) * 255).round().byte().cpu().numpy())
    if format == "png":
        image.save(target, format, pnginfo=_chunks(parameters, notes), compress_level=COMPRESSION)
    elif format == "webp":
        lossless = quality == QUALITY.maximum
        image.save(target, format, exif=_exif(parameters, notes), quality=quality, lossless=lossless)
    else:
        whole, short = _exif(parameters, notes), _exif(parameters, {})
        exif = whole if len(whole) <= LONGEST_EXIF else short if len(short) <= LONGEST_EXIF else b""
        image.save(target, format, exif=exif, quality=quality, subsampling=0)


def _chunks(parameters: str, notes: Mapping[str, str]) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    for name, text in {PARAMETERS: parameters, **notes}.items():
        if text:
            chunks.add_text(name, text)
    return chunks


def _exif(parameters: str, notes: Mapping[str, str]) -> bytes:
    exif = Image.Exif()
    places = iter((*EXIF_PLACES, *range(EXIF_PLACES[-1] - 1, 0x0100, -1)))
    for name, text in notes.items():
        exif[next(places)] = f"{name}:{text}"
    if parameters:
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = b"UNICODE\0" + parameters.encode("utf-16-be")
    return exif.tobytes()
