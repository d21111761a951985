"""What a checkpoint recommends, and what that is when it says nothing."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nextstep_core import GenerationSettings, NextStepError, NextStepPipeline
from nextstep_core.loading.documents import Documents
from nextstep_core.loading.published import published, published_settings
from nextstep_core.model.config import NextStepConfig

PUBLISHED_SETTINGS = {
    "NextStep-1-Large": GenerationSettings(7.5, 1.0, "constant", 50, 1.0, "score-sde-1.0", True),
    "NextStep-1-Large-Pretrain": GenerationSettings(7.5, 1.0, "constant", 28, 1.0, "score-sde-1.0", False),
    "NextStep-1-Large-Edit": GenerationSettings(7.5, 2.0, "constant", 50, 3.2, "score-sde-1.0", True),
    "NextStep-1.1": GenerationSettings(7.5, 1.0, "constant", 28, 1.0, "score-sde-1.1", False),
    "NextStep-1.1-Pretrain": GenerationSettings(7.5, 1.0, "constant", 28, 1.0, "score-sde-1.1", False),
}
EDIT_1_1 = replace(PUBLISHED_SETTINGS["NextStep-1-Large-Edit"], sampler="score-sde-1.1")


@pytest.fixture
def config(golden: Path) -> NextStepConfig:
    return NextStepConfig.from_dict(json.loads((golden / "tiny-a" / "config.json").read_text()))


@pytest.mark.parametrize("name", PUBLISHED_SETTINGS)
def test_published_settings_by_name(checkpoint: Path, config: NextStepConfig, name: str) -> None:
    says = published(Documents(checkpoint.rename(checkpoint.with_name(name))), config)
    assert says.text_to_image == PUBLISHED_SETTINGS[name]
    assert says.is_1_1 == name.startswith("NextStep-1.1")


@pytest.mark.parametrize(
    ("newer", "name", "editing", "settings"),
    [
        (False, "NextStep-1-Large", True, PUBLISHED_SETTINGS["NextStep-1-Large-Edit"]),
        (False, "nextstep-1-large-EDIT", False, PUBLISHED_SETTINGS["NextStep-1-Large-Edit"]),
        (True, "NextStep-1.1", True, EDIT_1_1),
        (True, "NextStep-1.1-Edit", False, EDIT_1_1),
        (True, "mine", False, PUBLISHED_SETTINGS["NextStep-1.1"]),
        (False, "mine-PRETRAIN", False, PUBLISHED_SETTINGS["NextStep-1-Large-Pretrain"]),
        (False, "pretrain-mine", False, PUBLISHED_SETTINGS["NextStep-1-Large"]),
    ],
)
def test_settings_by_family_name_and_task(newer: bool, name: str, editing: bool, settings: GenerationSettings) -> None:
    assert published_settings(newer, name, editing) == settings


def test_a_stated_sampler_or_family_leaves_nothing_to_the_name(
    checkpoint: Path, config: NextStepConfig, caplog
) -> None:
    caplog.set_level(logging.INFO)
    (checkpoint / "generation_config.json").unlink(missing_ok=True)
    assert not published(Documents(checkpoint), config).is_1_1
    assert "by its name it is taken for NextStep-1.0" in caplog.text
    caplog.clear()
    (checkpoint / "generation_config.json").write_text('{"sampler": "flow-ode", "cfg_img": 3}')
    says = published(Documents(checkpoint), config)
    assert not caplog.records
    assert (says.text_to_image.cfg_img, says.editing.cfg_img, says.editing.sampler) == (3, 3, "flow-ode")


def test_what_only_a_name_tells_is_said_in_the_log(checkpoint: Path, config: NextStepConfig, caplog) -> None:
    caplog.set_level(logging.INFO)
    newer = replace(config, base_image_grid_size=32)
    says = published(Documents(checkpoint), newer)
    assert says.is_1_1 and says.editing.shift == 3.2
    assert says.text_to_image.sampler == says.editing.sampler == "score-sde-1.1"
    assert not caplog.records, "its config tells"
    published(Documents(checkpoint.rename(checkpoint.with_name("NextStep-1.1"))), config)
    assert "by its name it is taken for NextStep-1.1" in caplog.text


def test_a_generation_config_has_the_last_word(checkpoint: Path, config: NextStepConfig) -> None:
    stated = {"cfg": 4, "num_sampling_steps": 12, "timesteps_shift": 1.5, "sampler": "flow-ode", "use_norm": False}
    (checkpoint / "generation_config.json").write_text(json.dumps({**stated, "eos_token_id": 600}))
    assert published(Documents(checkpoint), config).text_to_image == GenerationSettings(
        4, 1.0, "constant", 12, 1.5, "flow-ode", False
    )
    pipe = NextStepPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    stated_all = pipe.generate("A red apple.", height=32, width=32)
    by_hand = pipe.generate(
        "A red apple.", height=32, width=32, cfg=4.0, steps=12, shift=1.5, sampler="flow-ode", use_norm=False
    )
    assert torch.equal(stated_all.tokens, by_hand.tokens)


@pytest.mark.parametrize(
    ("stated", "sentence"),
    [
        ({"num_sampling_steps": "many"}, "`num_sampling_steps` is 'many'; use a whole number"),
        ({"num_sampling_steps": 10**9}, "`num_sampling_steps` is 1000000000; use a whole number from 1 to 1000"),
        ({"timesteps_shift": 1e-30}, "`timesteps_shift` is 1e-30"),
        ({"sampler": "euler"}, "generation_config.json: sampler is 'euler'; choose one of"),
        ({"cfg": 0.1}, "`cfg` is 0.1"),
        ({"cfg": "4"}, "`cfg` is '4'"),
        ({"use_norm": 1}, "use_norm is 1"),
        ({"num_sampling_steps": 12.5}, "`num_sampling_steps` is 12.5"),
    ],
)
def test_a_wrong_generation_config_is_one_sentence(checkpoint: Path, stated: dict, sentence: str) -> None:
    """Before weights are read: their files are not even looked into."""
    (checkpoint / "generation_config.json").write_text(json.dumps(stated))
    with pytest.raises(NextStepError) as caught:
        NextStepPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    assert sentence in str(caught.value)
