"""Folders of models as strangers make them, through the listing: links, pipes, devices, odd names, bad documents."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import torch

from nextstep_core import NextStepError
from nextstep_core.loading.build import find_vae, plan_model
from nextstep_core.loading.catalog import fingerprint, models, vae_of, vaes
from nextstep_core.studio.doctor import doctor

from . import good
from .case import Case
from .json_mutation import mutated

CPU = torch.device("cpu")
NAMES = (
    b"config.json", b"config.json", b"config.json", b"model.safetensors", b"model.safetensors.index.json",
    b"x.safetensors", b"x.gguf", b"checkpoint.pt", b"vae", b"tokenizer.json", b"generation_config.json", b"snapshots",
)  # fmt: skip
ODD_NAMES = (
    b"line\nbreak",
    b"half \xff",
    b"\xed\xa0\x80",
    b"a" * 255,
    b".hidden",
    b" ",
    b"-rf",
    b"$(id)",
    b"\xe3\x80\x80",
)
TARGETS = (
    b"/dev/zero", b"/dev/urandom", b"/dev/full", b"/dev/stdin", b"/dev/tty", b"/proc/kmsg", b"/proc/self/mem",
    b"/proc/self", b".", b"..", b"../..", b"itself", b"nowhere", b"config.json", b"/", b"/etc", b"", b"a" * 4000,
)  # fmt: skip
FILES = tuple(path for path in good.CHECKPOINT.rglob("*") if path.is_file())


def warm_up() -> None:
    models([good.CHECKPOINT.parent])
    doctor([good.CHECKPOINT.parent], device=CPU)


def case(rng: Random) -> Case:
    plan = [_entry(rng) for _ in range(rng.choice((1, 3, 10, 30)))]

    def attempt(folder: Path) -> None:
        kept = folder / "kept"
        kept.mkdir()
        good.lay_out(kept)
        for place, name, make in plan:
            parent = os.path.join(os.fsencode(folder), *place)
            try:
                os.makedirs(parent, exist_ok=True)
                make(os.path.join(parent, name))
            except OSError:  # not every plan can be carried out
                continue
        found = models([folder], [folder])
        if found.get("kept") != kept:
            raise AssertionError(f"the good checkpoint is not listed, but {list(found)[:5]}")
        for path in [*found.values(), *vaes([folder], [folder]).values()]:
            fingerprint(path), vae_of(path, [])
            for use in (plan_model, find_vae):
                try:
                    use(path)
                except NextStepError as error:
                    if "\n" in str(error):
                        raise AssertionError(f"two lines: {error}") from None
        for finding in doctor([folder], [folder], device=CPU):
            if "\n" in f"{finding.what}{finding.remedy}":
                raise AssertionError(f"two lines: {finding}")

    return Case("; ".join(f"{name[:20]!r} {make.__name__}" for _, name, make in plan[:5]), attempt)


def _entry(rng: Random):
    """(folders above, name, what makes it) of one thing in the root.

    No folder above has a name that a link may have: nothing is ever made behind a link.
    """
    above = [rng.choice((b"a", b"b", b"c", b"odd " + rng.choice(ODD_NAMES)[:200])) for _ in range(rng.randrange(4))]
    name = rng.choice((rng.choice(NAMES), rng.choice(ODD_NAMES)))
    return above, name, rng.choice((_link, _link, _pipe, _folder, _file, _document, _document))(rng)


def _link(rng: Random):
    target = rng.choice(TARGETS)

    def link(path: bytes) -> None:
        os.symlink(target, path)

    return link


def _pipe(rng: Random):
    def pipe(path: bytes) -> None:
        os.mkfifo(path)

    return pipe


def _folder(rng: Random):
    mode = rng.choice((0o755, 0o000))

    def folder(path: bytes) -> None:
        os.mkdir(path, mode)

    return folder


def _file(rng: Random):
    data = rng.choice((b"", b"\0" * 100, b'{"', rng.choice(FILES).read_bytes()))

    def file(path: bytes) -> None:
        with open(path, "xb") as opened:
            opened.write(data)

    return file


def _document(rng: Random):
    source = rng.choice((good.CHECKPOINT / "config.json", good.CHECKPOINT / "vae" / "config.json"))
    what, text = mutated(source.read_text(), rng)

    def document(path: bytes) -> None:
        with open(path, "xb") as opened:
            opened.write(text.encode("utf-8", "surrogatepass"))

    return document
