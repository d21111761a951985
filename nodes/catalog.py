"""What the dropdowns offer: names for what lies in the model folders, and what to do where one is not there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..nextstep_core.errors import NextStepError, shown
from ..nextstep_core.loading import catalog, hub, offers
from ..nextstep_core.loading.download import PUBLISHED_CHECKPOINTS
from ..nextstep_core.sentences import Sentence, any_of, in_a_row
from . import host

EMBEDDED_LABEL = offers.EMBEDDED_LABEL
NOTHING_FOUND = "no model found"
MOST_NAMED = 3


@dataclass(frozen=True)
class Kind:
    """What a dropdown lists: its word in a sentence, what of it is published, and a single file as an example."""

    word: Sentence
    published: Sequence[str]
    file: Sentence


MODEL = Kind(
    Sentence("model"),
    offers.CHECKPOINTS,
    Sentence("such as {file} in {folder}", file="nextstep-1.1-int8.safetensors", folder="models/diffusion_models"),
)
VAE = Kind(
    Sentence("VAE"),
    (offers.VAE_ALONE,),
    Sentence("{file} in {folder}", file="nextstep-vae.safetensors", folder="models/vae"),
)


def models() -> dict[str, Path]:
    """Checkpoints by the name that the dropdown shows, in the host's folders and elsewhere."""
    return offers.there(host.model_roots(), host.single_file_roots())


def vaes() -> dict[str, Path]:
    """VAEs by the name that the dropdown shows, in the same order."""
    return offers.vaes_there(host.model_roots(), host.vae_roots())


def model_options() -> list[str]:
    """The dropdown of models: what is there, then what can be fetched."""
    return _options(models(), MODEL)


def vae_options() -> list[str]:
    """The dropdown of VAEs: what is there, then what can be fetched."""
    return _options(vaes(), VAE)


def _options(there: dict[str, Path], kind: Kind) -> list[str]:
    # The first is what a new node starts with: never a download.
    return [*(there or [NOTHING_FOUND]), *(offers.offers(kind.published, there) if hub.forbidden() is None else ())]


def name_of(checkpoint: Path) -> str:
    """The name of a checkpoint that is listed, without remarks."""
    return next((offers.bare(label) for label, path in models().items() if path == checkpoint), checkpoint.name)


def vae_of(checkpoint: Path) -> Path | None:
    """The VAE that goes with a checkpoint: its own or, where it has none, the only other one there is."""
    others = catalog.vaes(host.model_roots(), host.vae_roots()) or catalog.cached_vaes()
    return catalog.vae_of(checkpoint, others.values())


def fingerprint(checkpoint: Path) -> str:
    """Changes when the files of a checkpoint change, or another VAE goes with it."""
    vae_path = vae_of(checkpoint)
    return catalog.fingerprint(checkpoint) + ("" if vae_path is None else catalog.fingerprint(vae_path))


def find_model(name: str) -> Path | None:
    """Path of the checkpoint that a saved name means; None where the name asks for a download of what is not there.

    NextStepError says what would do instead and how to get it if it is not there.
    """
    there, text = models(), name if isinstance(name, str) else ""
    fitting = offers.substitutes(text, (label for label in there if label != EMBEDDED_LABEL))
    return _find(name, there, MODEL, offers.nearest(text), fitting)


def find_vae(name: str) -> Path | None:
    """Path of the VAE that a saved name means; see `find_model`."""
    there = vaes()
    return _find(name, there, VAE, offers.VAE_ALONE, [label for label in there if label != EMBEDDED_LABEL])


def _find(name: str, there: dict[str, Path], kind: Kind, wanted: str, fitting: list[str]) -> Path | None:
    if isinstance(name, str):
        found = offers.find(name, there)
        if found is not None or (offers.asked_for(name, kind.published) and hub.forbidden() is None):
            return found
        name = offers.bare(name)
    if name == NOTHING_FOUND:
        said = [Sentence("There is no NextStep {kind}.", kind=kind.word)]
    else:
        said = [Sentence("There is no NextStep {kind} {name}.", kind=kind.word, name=shown(name))]
    if fitting:
        named = any_of(fitting[:MOST_NAMED])
        said.append(Sentence("Of those you have, {these} will do: choose one in the node.", these=named))
    if offers.find(wanted, there) is None:
        forbids = hub.forbidden()
        how = Sentence("choose {offer} in the node and press Run", offer=offers.offer(wanted))
        if forbids:
            how = Sentence("unset {variable}, which forbids downloads, and {how}", variable=forbids, how=how)
        said.append(Sentence("To get {wanted}: {how}.", wanted=wanted, how=how))
        said.append(hub.by_hand(PUBLISHED_CHECKPOINTS[wanted], host.model_roots()[0] / wanted))
    said.append(Sentence("A single file ({file}) works too. Then press R to refresh the node.", file=kind.file))
    raise NextStepError.of(in_a_row(said))
