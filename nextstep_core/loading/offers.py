"""Names of checkpoints: which published ones can be fetched, what a list shows for them, and what a saved name means.

What stands in brackets behind a name tells where it lies or that it is to be fetched. Saved workflows keep it, and the
same checkpoint may lie elsewhere by the time they run: so it is ignored, except that it is the user's word for a
download.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from . import catalog, kept, store
from .download import PUBLISHED_CHECKPOINTS

VAE_ALONE, EDITING = "NextStep-1-f8ch16-Tokenizer", "NextStep-1-Large-Edit"
FOUR_BITS = "NextStep-1.1-W4A16-AutoRound"
CHECKPOINTS = tuple(name for name in PUBLISHED_CHECKPOINTS if name != VAE_ALONE)
SIZES = dict.fromkeys(CHECKPOINTS, 29.0) | {
    FOUR_BITS: 10.0,
    VAE_ALONE: 0.3,
}  # GB, about; the true size is known when it is asked for

EMBEDDED, CACHED, KEPT = "embedded", "Hugging Face cache", "kept quantized"
REMARK = re.compile(rf" \((?:{EMBEDDED}|{CACHED}|{KEPT}|downloads [^()]*)\)$")
DOWNLOADS = re.compile(r" \(downloads [^()]*\)$")


def remark(name: str, what: str) -> str:
    """A name with a remark in brackets, as lists show it."""
    return f"{name} ({what})"


def offer(name: str) -> str:
    """What a list shows for a published checkpoint that is not there yet."""
    return remark(name, f"downloads {SIZES[name]:g} GB")


def bare(label: str) -> str:
    """A label without what stands in brackets behind it."""
    return REMARK.sub("", label)


EMBEDDED_LABEL = remark(store.EMBEDDED, EMBEDDED)


def there(roots: Sequence[Path], file_roots: Sequence[Path] = ()) -> dict[str, Path]:
    """Checkpoints by the name that a list shows: those in these folders, then those in the Hugging Face cache, those of
    which only the quantized weights are left, and the embedded one last."""
    found = catalog.models(roots, file_roots)
    found |= {remark(repo, CACHED): folder for repo, folder in catalog.cached_models().items()}
    # What was quantized stands for a checkpoint only where that is gone.
    for name, folder in kept.all_shelves(roots).items():
        if find(name, found) is None:
            found[remark(name, KEPT)] = folder
    if (store.ASSETS / store.EMBEDDED).is_dir():
        found[EMBEDDED_LABEL] = store.ASSETS / store.EMBEDDED
    return found


def vaes_there(roots: Sequence[Path], vae_roots: Sequence[Path] = ()) -> dict[str, Path]:
    """VAEs by the name that a list shows, in the same order."""
    found = catalog.vaes(roots, vae_roots)
    found |= {remark(repo, CACHED): folder for repo, folder in catalog.cached_vaes().items()}
    if (store.ASSETS / store.EMBEDDED / "vae").is_dir():
        found[EMBEDDED_LABEL] = store.ASSETS / store.EMBEDDED / "vae"
    return found


def asked_for(label: str, among: Iterable[str]) -> str | None:
    """The published name of `among` that a label asks to fetch, or None where it asks for no download."""
    name = bare(label)
    return name if DOWNLOADS.search(label) and name in among else None


def find(label: str, among: Mapping[str, Path]) -> Path | None:
    """The path that a saved label means, of those that are there by their labels now.

    The same label first; else the same name with another remark, or none; else the same published checkpoint under the
    hub's name for it, or in a deeper folder.
    """
    if label in among:
        return among[label]
    name = bare(label)
    published = next((own for own, repo_id in PUBLISHED_CHECKPOINTS.items() if name in (own, repo_id)), None)
    same = (path for other, path in among.items() if bare(other) == name)
    official = (path for other, path in among.items() if published is not None and _is_official(other, published))
    return next(same, next(official, None))


def _is_official(label: str, published: str) -> bool:
    """Whether a label is that of a published checkpoint: in the hub's cache under its full name, else in any folder."""
    name = bare(label)
    if label == remark(name, CACHED):
        return name == PUBLISHED_CHECKPOINTS[published]
    return name.split("/")[-1] == published


def offers(names: Iterable[str], there: Mapping[str, Path]) -> list[str]:
    """The labels of those published `names` that are not there."""
    return [offer(name) for name in names if find(name, there) is None]


def is_for_editing(name: str) -> bool:
    """Whether a checkpoint is made for editing pictures, by its name."""
    return "edit" in name.lower()


def nearest(name: str) -> str:
    """The published checkpoint that comes closest to a name: what to fetch for one that is not there."""
    if is_for_editing(name):
        return EDITING
    return max((own for own in CHECKPOINTS if own.lower() in name.lower()), key=len, default=CHECKPOINTS[0])


def substitutes(name: str, there: Iterable[str]) -> list[str]:
    """Labels of what is there and does what the checkpoint called `name` is for; the nearest in name first."""
    wanted = nearest(name).lower()
    fitting = [label for label in there if is_for_editing(label) == is_for_editing(name) and EMBEDDED not in label]
    return sorted(fitting, key=lambda label: wanted not in label.lower())
