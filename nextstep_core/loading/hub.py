"""The only door to the network: whether it may be used, and what came back where it failed, in plain words.

huggingface_hub reads its own variables: HF_TOKEN, HF_ENDPOINT (a mirror), HF_HOME.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..errors import NextStepError, shown
from ..sentences import Sentence

FORBIDDING = ("NEXTSTEP_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
YES = ("1", "ON", "YES", "TRUE")
PUBLIC = "https://huggingface.co"
UNREACHABLE = ("ConnectError", "ConnectionError", "TransportError", "Timeout", "LocalEntryNotFoundError", "ProxyError")

Answer = TypeVar("Answer")


class NotReached(NextStepError):
    """The hub was not asked, or gave no answer: it may well have what was wanted. `reason` says why, in short."""

    reason = Sentence("")


def forbidden() -> str | None:
    """The environment variable that forbids the network, if one does."""
    return next((name for name in FORBIDDING if os.environ.get(name, "").upper() in YES), None)


def endpoint() -> str:
    """The address of the hub or of the mirror in its place."""
    return (os.environ.get("HF_ENDPOINT") or PUBLIC).rstrip("/")


def check_form(repo_id: str) -> None:
    """NextStepError for what can be no repository's name, before it meets the network."""
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, yet not in __all__

    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        reason = str(error).replace(f": '{repo_id}'", "").rstrip(".")  # the name may be anything
        raise NextStepError(
            "{repo_id} cannot be the name of a repository ({reason}). Write it as on its page: owner/name.",
            repo_id=shown(repo_id),
            reason=reason,
        ) from None


def reach(repo_id: str, call: Callable[[], Answer], folder: Path | None = None) -> Answer:
    """What `call` gets from a repository of the hub. Everything that uses the network goes through here.

    NextStepError says what happened and the way by hand, for which `folder` is where the files would go.
    """
    variable = forbidden()
    if variable is not None:
        reason = Sentence("{variable} is set, which forbids downloads; unset it to allow them", variable=variable)
        raise _not_reached(repo_id, reason, folder)
    try:
        return call()
    except NextStepError:
        raise
    except Exception as error:  # the hub's exception types moved between versions
        refused = _not_reached if _is_away(error) else refusal
        raise refused(repo_id, explain(error), folder) from error


def refusal(repo_id: str, reason: Sentence, folder: Path | None = None) -> NextStepError:
    """The error for a repository that was not downloaded: the reason, then how to get it without this program."""
    return NextStepError(
        "{repo_id} was not downloaded: {reason}. {by_hand}",
        repo_id=repo_id,
        reason=reason,
        by_hand=by_hand(repo_id, folder),
    )


def _not_reached(repo_id: str, reason: Sentence, folder: Path | None) -> NotReached:
    error = NotReached.of(refusal(repo_id, reason, folder).sentence)
    error.reason = reason
    return error


def by_hand(repo_id: str, folder: Path | None = None) -> Sentence:
    """How to get a repository without this program."""
    address = f"{endpoint()}/{repo_id}"
    if folder is not None:
        how = Sentence("put the files of {address} into {folder}", address=address, folder=folder)
    else:
        how = Sentence(
            "put the files of {address} into a folder of the same name, and give that folder's path", address=address
        )
    if endpoint() != PUBLIC:
        return Sentence("By hand: {how}.", how=how)
    return Sentence("By hand: {how}; the environment variable HF_ENDPOINT can name a mirror.", how=how)


def _is_away(error: BaseException) -> bool:
    """Whether an exception means that nobody answered, or that the hub itself is in trouble."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return bool(status >= 500)
    return any(sign in kind.__name__ for kind in type(error).__mro__ for sign in UNREACHABLE)


def explain(error: BaseException) -> Sentence:
    """What happened, in plain words, for an exception of huggingface_hub or of what it calls."""
    names = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    at = endpoint()
    if "LocalEntryNotFoundError" in names and error.__cause__ is not None:
        return explain(error.__cause__)
    if "GatedRepoError" in names or status == 403:
        return Sentence(
            "{at} refused access; accept the terms on its page there and set HF_TOKEN to a token of your account", at=at
        )
    if "RevisionNotFoundError" in names:
        return Sentence("{at} has no such branch, tag or commit", at=at)
    if "RepositoryNotFoundError" in names or status == 404:
        return Sentence("{at} has no such repository, or it is private and HF_TOKEN does not give access to it", at=at)
    if status == 401:
        return Sentence("{at} refused access; check HF_TOKEN, or unset it", at=at)
    if status is not None:
        return Sentence("{at} answered with HTTP status {status}; try again later", at=at, status=status)
    if getattr(error, "errno", None) == errno.ENOSPC:
        return Sentence("the disk is full; make room and run it again to resume")
    if isinstance(error, (PermissionError, FileExistsError, NotADirectoryError)):
        return Sentence("the folder cannot be written to ({reason})", reason=error)
    if _is_away(error):
        return Sentence(
            "{at} could not be reached; check the network, a proxy (HTTPS_PROXY) or the mirror (HF_ENDPOINT)", at=at
        )
    lines = str(error).strip().splitlines()
    return Sentence("{reason}", reason=lines[0].rstrip(".") if lines else type(error).__name__)
