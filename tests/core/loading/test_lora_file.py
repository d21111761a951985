"""LoRA files of every layout come to the same additions, and what is none, or for another model, is refused by name."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from hostile_files import HEADERS
from lora_files import kohya, matrices, peft, write, write_config
from safetensors.torch import load_file, save_file

from nextstep_core import NextStepError
from nextstep_core.loading.lora_file import find_lora, fingerprint, read_lora, slots_of
from nextstep_core.model.config import NextStepConfig

GOLDEN = Path(__file__).resolve().parents[2] / "data" / "golden" / "lora"
QV = ("layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj")


@pytest.fixture(scope="module")
def config(pipeline) -> NextStepConfig:
    return pipeline.engine.config


def delta(adapter, slot) -> torch.Tensor:
    """What is added to the weight of a published layer at strength 1."""
    low = adapter.layers[slot.layer]
    return ((low.up.float() * low.scale) @ low.down.float())[slot.start : slot.start + slot.rows]


LAYOUTS = {
    "peft": peft,
    "peft, of an adapter by name": lambda layer, part: f"base_model.model.{layer}.lora_{part}.default.weight",
    "peft, below model": lambda layer, part: f"base_model.model.model.{layer}.lora_{part}.weight",
    "diffusers": lambda layer, part: f"transformer.{layer}.lora_{part}.weight",
    "diffusers, old": lambda layer, part: f"unet.{layer}.lora.{ {'A': 'down', 'B': 'up'}[part] }.weight",
    "diffusion_model": lambda layer, part: f"diffusion_model.model.{layer}.lora_{part}.weight",
    "kohya": kohya,
    "kohya, transformer": lambda layer, part: kohya(layer, part).replace("lora_unet_", "lora_transformer_"),
    "kohya, below model": lambda layer, part: kohya(layer, part).replace("lora_unet_", "lora_unet_model_"),
    "kohya, with dots": lambda layer, part: f"{layer}.lora_{ {'A': 'down', 'B': 'up'}[part] }.weight",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(config: NextStepConfig, tmp_path: Path, layout: str) -> None:
    pairs, slots = matrices(config), slots_of(config)
    adapter = read_lora(write(tmp_path / "x.safetensors", pairs, LAYOUTS[layout]), config)
    assert adapter.name == "x" and not adapter.unused
    for name, (down, up) in pairs.items():
        assert torch.allclose(delta(adapter, slots[name]), up @ down, atol=1e-6), name
    assert len(adapter.layers) == len({slot.layer for slot in slots.values()})


def test_parts_may_be_given_alone(config: NextStepConfig, tmp_path: Path) -> None:
    pairs, slots = matrices(config, layers=QV), slots_of(config)
    adapter = read_lora(write(tmp_path / "x.safetensors", pairs), config)
    assert list(adapter.layers) == ["layers.1.self_attn.qkv_proj"]
    assert torch.allclose(delta(adapter, slots[QV[1]]), pairs[QV[1]][1] @ pairs[QV[1]][0], atol=1e-6)
    assert not delta(adapter, slots["layers.1.self_attn.k_proj"]).any()


def test_alpha_over_rank(config: NextStepConfig, tmp_path: Path) -> None:
    """From the file, from what lies beside it, and by the square root where peft says so; none is a factor of one."""
    pairs, slot = matrices(config, rank=4, layers=QV), slots_of(config)[QV[0]]
    plain = pairs[QV[0]][1] @ pairs[QV[0]][0]
    file = write(tmp_path / "kohya.safetensors", pairs, kohya, alpha=2.0)
    assert torch.allclose(delta(read_lora(file, config), slot), plain / 2, atol=1e-6)
    folder = tmp_path / "peft"
    write(folder / "adapter_model.safetensors", pairs)
    for stated, factor in (
        ({"lora_alpha": 6, "r": 4}, 1.5),
        ({"lora_alpha": 6, "use_rslora": True}, 3.0),
        ({"lora_alpha": 6, "alpha_pattern": {"q_proj": 8}}, 2.0),
        ({"lora_alpha": 6, "alpha_pattern": {"v_proj": 8}}, 1.5),
        ({}, 1.0),
    ):
        write_config(folder, **stated)
        adapter = read_lora(folder, config)
        assert adapter.name == "peft" and torch.allclose(delta(adapter, slot), plain * factor, atol=1e-6), stated
    before = fingerprint(folder)
    write_config(folder, lora_alpha=7)
    assert fingerprint(folder) != before and read_lora(folder, config).identity != adapter.identity


def test_what_peft_wrote_is_what_peft_adds(config: NextStepConfig) -> None:
    """Written by peft 0.21.2 itself, with other ranks and alphas for some layers; what it adds is recorded beside."""
    adapter, wanted, slots = read_lora(GOLDEN, config), load_file(GOLDEN / "deltas.safetensors"), slots_of(config)
    for name, of_peft in wanted.items():
        assert torch.allclose(delta(adapter, slots[name]), of_peft, atol=1e-6), name
    assert not adapter.unused


def test_sites_know_a_file_by_the_sum_of_its_numbers(config: NextStepConfig, tmp_path: Path) -> None:
    """The header, where notes of the trainer stand, is no part of it, but of what tells pictures apart it is one."""
    pairs = matrices(config, layers=QV)
    path = write(tmp_path / "x.safetensors", pairs)
    first = read_lora(path, config)
    save_file(load_file(path), path, {"ss_note": "a word"})
    second = read_lora(path, config)
    assert first.digest == second.digest and len(first.digest) == 12
    pairs[QV[0]][0][0, 0] += 1
    assert read_lora(write(path, pairs), config).digest != first.digest


def test_what_fits_nothing_is_named(config: NextStepConfig, tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.WARNING)
    pairs = matrices(config, layers=QV)
    pairs["lm_head"] = pairs["layers.77.mlp.up_proj"] = pairs[QV[0]]
    adapter = read_lora(write(tmp_path / "x.safetensors", pairs), config)
    assert len(adapter.unused) == 2 and len(adapter.layers) == 1
    (record,) = caplog.records
    assert "lm_head" in record.getMessage() and "layers.77" in record.getMessage()


def other_model(*names: str):
    def make(path: Path, pairs: dict) -> None:
        down, up = next(iter(pairs.values()))
        write(path, dict.fromkeys(names, (down, up)))

    return make


def wrong_shape(path: Path, pairs: dict) -> None:
    down, up = pairs[QV[0]]
    write(path, pairs | {QV[0]: (torch.cat([down, down], dim=1), up)})


def halves(path: Path, pairs: dict) -> None:
    write(path, pairs)
    tensors = load_file(path)
    del tensors[peft(QV[1], "B")]
    save_file(tensors, path)


def wrong_rank(path: Path, pairs: dict) -> None:
    down, up = pairs[QV[0]]
    write(path, pairs | {QV[0]: (down, up[:, :2])})


def renamed(old: str, new: str):
    def make(path: Path, pairs: dict) -> None:
        write(path, pairs)
        tensors = load_file(path)
        tensors[new] = tensors[old].clone()
        save_file(tensors, path)

    return make


def of_values(value: float):
    def make(path: Path, pairs: dict) -> None:
        pairs[QV[1]][1][3, 1] = value
        write(path, pairs)

    return make


def with_config(**stated: object):
    def make(path: Path, pairs: dict) -> None:
        write(path, pairs)
        write_config(path.parent, **stated)

    return make


def of_dtype(dtype: torch.dtype):
    return lambda path, pairs: write(path, pairs, dtype=dtype)


WRONG = {
    "for Flux": (other_model("double_blocks.0.img_attn.proj"), "Flux.*double_blocks"),
    "for Flux, kohya": (other_model("lora_unet_single_blocks_3_linear1"), "Flux"),
    "for SD": (other_model("unet.down_blocks.1.attentions.0.proj_in"), "Stable Diffusion"),
    "for nobody knows": (other_model("backbone.7.proj"), r"another model.*backbone\.7"),
    "of a wrong shape": (wrong_shape, r"another model.*q_proj.*96 x 192.*96 x 96"),
    "without a half": (halves, "v_proj.*no lora_B"),
    "of two ranks": (wrong_rank, "q_proj.*do not go together"),
    "twice": (renamed(peft(QV[0], "A"), f"{QV[0]}.lora_A.weight"), "no lora_B"),
    "NaN": (of_values(float("nan")), "v_proj.*NaN"),
    "infinite": (of_values(float("inf")), "v_proj.*NaN"),
    "whole numbers": (of_dtype(torch.int8), "do not go together.*int8"),
    "DoRA": (renamed(peft(QV[0], "A"), f"base_model.model.{QV[0]}.lora_magnitude_vector"), "DoRA"),
    "LoHa": (renamed(peft(QV[0], "A"), f"{QV[0]}.hada_w1_a"), "LoHa"),
    "an alpha that is none": (renamed(peft(QV[0], "A"), f"base_model.model.{QV[0]}.alpha"), "no single number"),
    "another kind of adapter": (with_config(peft_type="LOHA"), "peft_type.*LOHA"),
    "another adapter's config": (with_config(r=77, lora_alpha=8), "rank 77.*3"),
    "an alpha in words": (with_config(lora_alpha="eight"), "lora_alpha.*eight"),
    "a pattern that is none": (with_config(alpha_pattern=[1]), "alpha_pattern"),
    "weights that it would change": (with_config(init_lora_weights="pissa_niter_4"), "pissa"),
    "not a LoRA": (lambda path, pairs: save_file({"layers.0.mlp.up_proj.weight": torch.zeros(3, 3)}, path), "no pairs"),
    "cut short": (lambda path, pairs: path.write_bytes(write(path, pairs).read_bytes()[:-9]), "damaged"),
    "a folder": (lambda path, pairs: path.mkdir(), "not readable"),
    "nothing": (lambda path, pairs: None, "not readable"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_files_are_refused_by_name_and_reason(config: NextStepConfig, tmp_path: Path, kind: str) -> None:
    make, reason = WRONG[kind]
    path = tmp_path / "wrong.safetensors"
    make(path, matrices(config, layers=QV))
    with pytest.raises(NextStepError, match=reason) as caught:
        read_lora(path, config)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    if "lora_alpha" not in reason:
        assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["x.pt", "x.bin", "x"])
def test_only_safetensors_are_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\0" * 100)
    with pytest.raises(NextStepError, match="not a LoRA file"):
        find_lora(tmp_path / name)


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_header_is_one_sentence(tmp_path: Path, name: str) -> None:
    HEADERS[name](tmp_path / "x.safetensors")
    with pytest.raises(NextStepError, match=r"x\.safetensors is damaged"):
        find_lora(tmp_path / "x.safetensors")


def test_a_file_may_be_written_again_while_it_is_in_use(config: NextStepConfig, tmp_path: Path) -> None:
    pairs = matrices(config, layers=QV)
    adapter = read_lora(write(tmp_path / "x.safetensors", pairs), config)
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.write(b"\0" * (tmp_path / "x.safetensors").stat().st_size)
    slot = slots_of(config)[QV[0]]
    assert torch.allclose(delta(adapter, slot), pairs[QV[0]][1] @ pairs[QV[0]][0], atol=1e-6)
    shutil.rmtree(tmp_path)
