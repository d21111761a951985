"""The door to the network: closed by a variable, and failures in plain words."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import httpx
import pytest

from nextstep_core import NextStepError
from nextstep_core.loading import hub
from nextstep_core.loading.store import resolve_source


@pytest.fixture(autouse=True)
def open_door(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*hub.FORBIDDING, "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("variable", hub.FORBIDDING)
def test_a_variable_closes_the_door(variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    assert hub.reach("a/b", lambda: 1) == 1
    monkeypatch.setenv(variable, "0")
    assert hub.reach("a/b", lambda: 1) == 1
    monkeypatch.setenv(variable, "true")
    with pytest.raises(
        NextStepError, match=f"^a/b was not downloaded: {variable} is set.*huggingface.co/a/b into {tmp_path}"
    ):
        hub.reach("a/b", lambda: 1, tmp_path)


def test_a_hub_id_of_the_python_interface_goes_through_the_same_door(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("NEXTSTEP_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, local_files_only=False, **__: 1 / 0)
    with pytest.raises(NextStepError, match="NEXTSTEP_OFFLINE"):
        resolve_source("someone/else")


def failure(kind: str, status: int | None = None, base: type[Exception] = Exception, **facts) -> Exception:
    """An exception as a version of huggingface_hub may raise it: told by its name and its answer's status."""
    error = type(kind, (base,), {})("the library's own words\nand more")
    if status is not None:
        error.response = SimpleNamespace(status_code=status)
    for name, value in facts.items():
        setattr(error, name, value)
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (failure("GatedRepoError", 403), "accept the terms"),
        (failure("HfHubHTTPError", 403), "refused access"),
        (failure("RepositoryNotFoundError", 401), "no such repository"),
        (failure("HfHubHTTPError", 401), "check HF_TOKEN"),
        (failure("RevisionNotFoundError", 404), "branch, tag or commit"),
        (failure("HfHubHTTPError", 502), "HTTP status 502"),
        (httpx.ConnectError("[Errno -2] Name or service not known"), "could not be reached"),
        (httpx.ReadTimeout("timed out"), "could not be reached"),
        (failure("LocalEntryNotFoundError"), "could not be reached"),
        (failure("LocalEntryNotFoundError", __cause__=failure("HfHubHTTPError", 503)), "HTTP status 503"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/models"), "cannot be written.*/models"),
        (failure("Unheard"), "the library's own words$"),
    ],
)
def test_what_happened_is_said_in_plain_words(error: Exception, words: str) -> None:
    import re

    assert re.search(words, str(hub.explain(error)))
    assert "\n" not in str(hub.explain(error))


def test_the_mirror_is_named_and_used(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    assert "HF_ENDPOINT" in str(hub.by_hand("a/b", tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    assert f"https://mirror.example/a/b into {tmp_path}" in str(hub.by_hand("a/b", tmp_path))


@pytest.mark.parametrize(
    ("error", "away"),
    [
        (httpx.ConnectError("no route"), True),
        (failure("ReadTimeout"), True),
        (failure("HfHubHTTPError", 503), True),
        (failure("RepositoryNotFoundError", 404), False),
        (failure("GatedRepoError", 403), False),
        (failure("HfHubHTTPError", 401), False),
        (OSError(errno.ENOSPC, "full"), False),
    ],
)
def test_a_hub_that_did_not_answer_is_told_from_one_that_refused(error: Exception, away: bool) -> None:
    def call() -> None:
        raise error

    with pytest.raises(NextStepError) as caught:
        hub.reach("a/b", call)
    assert isinstance(caught.value, hub.NotReached) == away
    if away:
        assert caught.value.reason and str(caught.value.reason) in str(caught.value)
