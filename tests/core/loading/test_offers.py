"""What lists offer to fetch, and which checkpoint a saved name means wherever it lies by now."""

from __future__ import annotations

from pathlib import Path

import pytest

from nextstep_core.loading import offers
from nextstep_core.loading.download import PUBLISHED_CHECKPOINTS

FOLDER, CACHED, TINY = Path("folder"), Path("cached"), Path("tiny")
OFFER = "NextStep-1.1 (downloads 29 GB)"


def test_lists_offer_what_is_published_and_not_there() -> None:
    there = {"NextStep-1.1": FOLDER, "stepfun-ai/NextStep-1-Large (Hugging Face cache)": CACHED}
    assert offers.offers(offers.CHECKPOINTS, there) == [
        "NextStep-1.1-Pretrain (downloads 29 GB)",
        "NextStep-1-Large-Edit (downloads 29 GB)",
        "NextStep-1-Large-Pretrain (downloads 29 GB)",
        "NextStep-1.1-W4A16-AutoRound (downloads 10 GB)",
    ]
    assert offers.offers([offers.VAE_ALONE], {}) == ["NextStep-1-f8ch16-Tokenizer (downloads 0.3 GB)"]
    assert set(PUBLISHED_CHECKPOINTS) == {*offers.CHECKPOINTS, offers.VAE_ALONE}


@pytest.mark.parametrize("saved", ["NextStep-1.1", OFFER, "NextStep-1.1 (downloads 30.5 GB)"])
@pytest.mark.parametrize(
    "there",
    ["NextStep-1.1", "stepfun-ai/NextStep-1.1 (Hugging Face cache)", "stepfun-ai/NextStep-1.1", "big/NextStep-1.1"],
)
def test_a_saved_name_means_the_checkpoint_wherever_it_lies(saved: str, there: str) -> None:
    others = {"NextStep-1.1-Pretrain": CACHED, "NextStep-1.1-int8.safetensors": CACHED, "tiny (embedded)": TINY}
    assert offers.find(saved, others | {there: FOLDER}) == FOLDER
    assert offers.find(saved, others) is None


def test_the_hubs_name_means_the_folder_too() -> None:
    there = {"NextStep-1.1": FOLDER, "tiny (embedded)": TINY}
    assert offers.find("stepfun-ai/NextStep-1.1 (Hugging Face cache)", there) == FOLDER
    assert offers.find("tiny", there) == offers.find("tiny (embedded)", there) == TINY


def test_another_publishers_checkpoint_of_the_same_name_is_another() -> None:
    there = {"someone/NextStep-1.1 (Hugging Face cache)": CACHED}
    assert offers.find("NextStep-1.1", there) is None
    assert offers.find("someone/NextStep-1.1", there) == CACHED


def test_the_same_label_comes_first_and_brackets_of_a_users_own_belong_to_the_name() -> None:
    there = {"mine (old)": CACHED, "mine": FOLDER, OFFER: TINY, "NextStep-1.1": FOLDER}
    assert offers.find(OFFER, there) == TINY
    assert offers.find("mine (old)", there) == CACHED
    assert offers.find("mine (new)", there) is None


@pytest.mark.parametrize(
    ("saved", "asked"),
    [
        (OFFER, "NextStep-1.1"),
        ("NextStep-1.1 (downloads 1 GB)", "NextStep-1.1"),
        ("NextStep-1.1", None),
        ("NextStep-1.1 (Hugging Face cache)", None),
        ("someone/else (downloads 29 GB)", None),
        ("NextStep-1-f8ch16-Tokenizer (downloads 0.3 GB)", None),  # of the other list
        ("../x (downloads 1 GB)", None),
    ],
)
def test_only_a_published_name_that_says_so_asks_for_a_download(saved: str, asked: str | None) -> None:
    assert offers.asked_for(saved, offers.CHECKPOINTS) == asked


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("nextstep-1.1-int8.safetensors", "NextStep-1.1"),
        ("NextStep-1.1-Pretrain-q4.gguf", "NextStep-1.1-Pretrain"),
        ("nextstep-1-large-edit-int8.safetensors", "NextStep-1-Large-Edit"),
        ("my edits.safetensors", "NextStep-1-Large-Edit"),
        ("nextstep-1-large.safetensors", "NextStep-1-Large"),
        ("something", "NextStep-1.1"),
    ],
)
def test_the_published_checkpoint_that_comes_closest(name: str, published: str) -> None:
    assert offers.nearest(name) == published


def test_what_would_do_is_for_the_same_purpose_and_the_nearest_first() -> None:
    there = ["NextStep-1-Large", "NextStep-1.1", "NextStep-1-Large-Edit", "tiny (embedded)"]
    assert offers.substitutes("nextstep-1.1-int8.safetensors", there) == ["NextStep-1.1", "NextStep-1-Large"]
    assert offers.substitutes("nextstep-1-large-edit-int8.safetensors", there) == ["NextStep-1-Large-Edit"]
    assert offers.substitutes("nextstep-1-large-edit-int8.safetensors", there[:2]) == []
