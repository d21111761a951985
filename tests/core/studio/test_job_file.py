"""Job files: the public guide's own, every way to say a setting, and each mistake with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nextstep_core import NextStepError
from nextstep_core.studio.job_file import Wishes, parse_job, read_job
from nextstep_core.studio.job_keys import schema
from nextstep_core.studio.jobs import Asked, BatchJob
from nextstep_core.studio.lines import lines_of
from nextstep_core.studio.names import file_name
from nextstep_core.studio.sets import SETS, set_path

SCHEMA = Path(__file__).parents[3] / "nextstep_core" / "studio" / "data" / "job.schema.json"
GUIDE = """{
  "prompts": ["A red circle on a blue background", "A green square on a white background"],
  "settings": {"size": 512, "steps": 28, "guidance": 7.5, "quality": "high"}
}"""


NOTHING = Wishes()


def job(stated: Any, wishes: Wishes = NOTHING, folder: Path | None = None) -> BatchJob:
    return parse_job(stated if isinstance(stated, str) else json.dumps(stated), "jobs.json", wishes, folder=folder)


def asked(**settings: Any) -> Asked:
    return job({"prompts": ["a"], "settings": settings}).orders[0].asked


def test_the_guides_own_file_is_read_unchanged() -> None:
    orders = job(GUIDE).orders
    assert [order.prompt for order in orders] == [
        "A red circle on a blue background",
        "A green square on a white background",
    ]
    assert orders[0].asked == Asked(width=512, height=512, steps=28, cfg=7.5)
    small = job(GUIDE, Wishes({"size": "64"})).orders[1].asked
    assert (small.width, small.height, small.steps) == (64, 64, 28)


@pytest.mark.parametrize(
    ("stated", "size"),
    [
        ({"size": 64}, (64, 64)),
        ({"size": "64x96"}, (64, 96)),
        ({"size": [64, 96]}, (64, 96)),
        ({"size": "16:9"}, (672, 384)),
        ({"preset": "premium", "size": "1:1"}, (1024, 1024)),
        ({"preset": "standard"}, (768, 768)),
        ({"preset": "standard", "width": 64}, (64, 768)),
    ],
)
def test_ways_to_say_a_size(stated: dict[str, Any], size: tuple[int, int]) -> None:
    found = asked(**stated)
    assert (found.width, found.height) == size


def test_every_picture_of_prompts_settings_and_seeds_in_order() -> None:
    orders = job(
        {
            "settings": [{"cfg": 7.0, "steps": 25}, {"cfg": 8.5, "steps": 35, "label": "strong"}],
            "seeds": {"first": 5, "count": 2},
            "jobs": [
                {"prompt": "a", "negative_prompt": "blur"},
                {"prompt": "b", "name": "second", "seeds": [9], "settings": {"shift": 2.0}},
            ],
        }
    ).orders
    found = [(o.prompt, o.negative_prompt, o.name, o.asked.label, o.asked.cfg, o.asked.shift, o.seed) for o in orders]
    assert found == [
        ("a", "blur", "", "A", 7.0, None, 5),
        ("a", "blur", "", "A", 7.0, None, 6),
        ("a", "blur", "", "strong", 8.5, None, 5),
        ("a", "blur", "", "strong", 8.5, None, 6),
        ("b", "", "second", "A", 7.0, 2.0, 9),
        ("b", "", "second", "strong", 8.5, 2.0, 9),
    ]


def test_a_jobs_own_settings_are_over_those_above_and_what_is_asked_wins() -> None:
    stated = {"settings": {"steps": 9, "cfg": 2.0}, "jobs": [{"prompt": "a", "settings": [{"steps": 3}, {"steps": 4}]}]}
    both = job(stated, Wishes({"cfg": 5.0}, seeds=(7,))).orders
    assert [(o.asked.steps, o.asked.cfg, o.asked.label, o.seed) for o in both] == [(3, 5.0, "A", 7), (4, 5.0, "B", 7)]


def test_templates_fill_prompts_and_names() -> None:
    stated = {
        "lists": {"topic": ["rain", "sun"], "level": ["school"]},
        "jobs": [{"name": "{topic} one", "prompt": "{topic} for {level}"}, {"prompt": "plain"}],
    }
    assert [(o.name, o.prompt) for o in job(stated).orders] == [
        ("rain one", "rain for school"),
        ("sun one", "sun for school"),
        ("", "plain"),
    ]
    other = job(stated, Wishes(lists={"topic": ("snow",)})).orders
    assert other[0].prompt == "snow for school"
    with pytest.raises(NextStepError, match="weather"):
        job(stated, Wishes(lists={"weather": ("snow",)}))


WRONG = [
    ('{"jobs": [\n{"prompt": "a", "settings":\n{"steps": 0}}]}', "line 3: steps is 0"),
    ('{"settings": [{"steps": 3},\n{"cfg": "high"}], "prompts": ["a"]}', "line 2: cfg is 'high'"),
    ('{"settings": {"steps": 1, "sampler": "score-sde-1.0"}, "prompts": ["a"]}', "needs at least 2"),
    ('{"settings": {"size": 50}, "prompts": ["a"]}', "multiple of 16"),
    ('{"settings": {"size": "big"}, "prompts": ["a"]}', "size is 'big'"),
    ('{"settings": {"preset": "best"}, "prompts": ["a"]}', "draft, standard"),
    ('{"settings": [], "prompts": ["a"]}', "empty list"),
    ('{"settings": {"stpes": 3}, "prompts": ["a"]}', "'stpes'"),
    ('{"prompts": ["a"],\n"job": []}', "line 2: a key is 'job'"),
    ('{"jobs": [{"text": "a"}]}', "'text'"),
    ('{"jobs": [{"name": "a"}]}', "no prompt"),
    ('{"jobs": {}}', "write a list"),
    ('{"seeds": [1]}', 'neither "jobs" nor "prompts"'),
    ('{"prompts": ["a"], "seeds": [1, 1]}', "twice"),
    ('{"prompts": ["a"], "seeds": 4}', "seeds is 4"),
    ('{"prompts": ["a"], "seeds": [-1]}', "seed is -1"),
    ('{"prompts": ["a"], "seeds": {"first": 1, "count": 0}}', "count is 0"),
    ('{"prompts": ["a"], "format": "bmp"}', "png, jpeg, webp"),
    ('{"prompts": ["a"], "quality": 101}', "quality is 101"),
    ('{"prompts": ["a"], "names": "../{name}"}', "no pattern"),
    ('{"prompts": ["a"], "names": "/tmp/{name}"}', "no pattern"),
    ('{"prompts": ["a"], "names": "a/./{name}"}', "no pattern"),
    ('{"prompts": ["a"], "names": "C:{name}"}', "no pattern"),
    ('{"prompts": ["a"], "names": "{path}"}', "{path} is not known"),
    ('{"prompts": ["a <image>"]}', "1 <image> for 0"),
    ('{"jobs": [{"prompt": "a", "images": ["../x.png"]}]}', "outside of the job's folder"),
    ('{"jobs": [{"prompt": "a", "images": ["none.png"]}]}', "does not exist"),
    ('{"jobs": [{"prompt": "a", "images": ["text.png"]}]}', "not a readable picture"),
    ('{"jobs": [{"prompt": "<image><image>", "images": ["real.png"]}]}', "2 <image> for 1"),
    ('{"prompts": ["a {x}"], "lists": {"y": ["1"]}}', "{x}"),
    ('{"prompts": ["a"], "lists": []}', "lists is"),
    ('{"prompts": ["{x}"], "lists": {"x": "ab"}}', "x"),
    ('{"jobs": [{"prompt": "a", "name": "' + "n" * 201 + '"}]}', "201 letters"),
    ('{"prompts": ["a"]', "not readable JSON"),
    ('{"prompts": ["a"], "prompts": ["b"]}', "twice"),
    ('{"prompts": ["a"], "seeds": {"first": 1, "count": 100001}}', "100000"),
    ('{"prompts": ["a","b"], "seeds": {"first": 1, "count": 60000}}', "120000"),
]


@pytest.mark.parametrize(("text", "said"), WRONG)
def test_what_is_wrong_is_told_before_anything_is_drawn(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (32, 32)).save(tmp_path / "real.png")
    with pytest.raises(NextStepError) as error:
        job(text, folder=tmp_path)
    assert said in str(error.value)


def test_input_pictures_lie_beside_the_file_and_not_behind_a_link(tmp_path: Path) -> None:
    inside, outside = tmp_path / "job", tmp_path / "secret.png"
    inside.mkdir()
    for path in (outside, inside / "mine.png"):
        Image.new("RGB", (32, 32)).save(path)
    (inside / "link.png").symlink_to(outside)
    found = job({"jobs": [{"prompt": "edit it", "images": ["mine.png"]}]}, folder=inside).orders[0]
    assert found.images == ((inside / "mine.png").resolve(),)
    with pytest.raises(NextStepError, match="outside"):
        job({"jobs": [{"prompt": "edit it", "images": ["link.png"]}]}, folder=inside)


def test_lines_of_every_value() -> None:
    assert lines_of('{"a":\n[1,\n{"b\\n": "x,]"}], "c": {}}') == {
        (): 1,
        ("a",): 2,
        ("a", 0): 2,
        ("a", 1): 3,
        ("a", 1, "b\n"): 3,
        ("c",): 3,
    }


def test_the_published_schema_is_that_of_the_reader() -> None:
    assert json.loads(SCHEMA.read_text()) == schema()


@pytest.mark.parametrize("name", SETS)
def test_shipped_sets_are_right(name: str) -> None:
    assert read_job(set_path(name)).orders


def test_names_of_files_stay_inside_and_short() -> None:
    values = dict.fromkeys(("index", "name", "prompt", "label", "seed", "width", "height", "steps", "cfg"), "")
    hostile = values | {"name": "../../etc/passwd", "prompt": "a" * 500, "label": "con"}
    assert file_name("{name}", hostile) == "etc-passwd"
    assert len(file_name("{prompt}{prompt}{prompt}{prompt}", hostile)) <= 180
    assert file_name("{label}", hostile) == "con_"
    assert file_name("{seed}", hostile) == "picture"
    whole = values | {"index": "007", "name": "Käse 고양이", "seed": 3}
    assert file_name("{index}-{name}-{label}-{seed}", whole) == "007-käse-고양이-3"
    assert file_name("{label}/{name}", values | {"label": "A", "name": "x"}) == "a/x"


def test_the_same_order_in_other_words_is_the_same_picture() -> None:
    first, second = asked(size=512, guidance=3), asked(width=512, height=512, cfg=3.0)
    assert first == second
