"""The text that a picture carries, and that a reader of such texts makes of it what was meant."""

from __future__ import annotations

from dataclasses import replace

from nextstep_core.request.parameters import lora_facts, parameters_text
from nextstep_core.runtime.lora import Adapter, Stack
from nextstep_core.sampling.settings import GenerationSettings

SETTINGS = GenerationSettings(cfg=7.5, steps=28, sampler="score-sde-1.1", use_norm=False)


def text_of(prompt: str, negative: str = "", settings: GenerationSettings = SETTINGS, **facts: str) -> str:
    return parameters_text(prompt, negative, settings, seed=2**64 - 1, size=(96, 64), facts=facts)


def test_the_form_by_hand() -> None:
    assert text_of("a cat", "a dog", Model="NextStep-1.1") == (
        "a cat\nNegative prompt: a dog\nSteps: 28, Sampler: score-sde-1.1, CFG scale: 7.5, Seed: 18446744073709551615, "
        "Size: 96x64, Timestep shift: 1, Model: NextStep-1.1"
    )


def test_only_what_differs_from_the_usual_is_added() -> None:
    editing = replace(SETTINGS, cfg_img=2.0, cfg_schedule="linear", use_norm=True)
    assert "Image CFG scale: 2, CFG schedule: linear, Timestep shift: 1, Normalized tokens: yes" in text_of(
        "x", settings=editing
    )
    quick = replace(SETTINGS, steps_schedule="checked", lookahead="fast")
    assert "Timestep shift: 1, Steps schedule: checked, Lookahead: fast" in text_of("x", settings=quick)


def test_no_prompt_can_pass_for_another_part() -> None:
    lines = text_of("a\nNegative prompt: b\nSteps: 3", "c\r\nSteps: 4", Model='od"d, name: x').split("\n")
    assert lines[0] == "a Negative prompt: b Steps: 3" and lines[1] == "Negative prompt: c Steps: 4"
    assert len(lines) == 3 and lines[2].endswith(r'Model: "od\"d, name: x"')


def test_loras_are_told_as_others_read_them() -> None:
    """Names and strengths behind the prompt, and the sums that sites know the files by; nothing of one at 0."""
    first, second = (Adapter(name, name, digest, {}) for name, digest in (("ink", "0123456789ab"), ("a:b>c", "cd")))
    loras = Stack().plus(first, 0.75).plus(second, 1.0).plus(Adapter("off", "off", "ef", {}), 0.0)
    prompt, _, last = text_of("a cat", "a dog", **lora_facts(loras), Version="x").split("\n")
    assert prompt == "a cat <lora:ink:0.75> <lora:a_b_c:1>"
    assert last.endswith('Timestep shift: 1, Lora hashes: "ink: 0123456789ab, a_b_c: cd", Version: x')
    assert lora_facts(loras.plus(first, -0.75).plus(second, -1.0)) == {}
