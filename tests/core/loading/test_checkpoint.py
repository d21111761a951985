"""Tensors in files: where they lie, what is said of files that do not fit, how they are read."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_files import INDEX, edit_json
from safetensors.torch import load_file, save_file

from nextstep_core import NextStepError
from nextstep_core.loading.build import find_vae, load_vae_state, plan_model
from nextstep_core.loading.checkpoint import (
    MAX_NAMES_SHOWN,
    TensorFiles,
    _readable,
    check_complete,
    find_model_files,
    find_tensors,
    read_tensors,
)
from nextstep_core.loading.documents import Documents, file_metadata, find_documents, is_marked, parse_object
from nextstep_core.loading.fusion import fuse_locations, parts_of, published_shapes, split

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
ROW = torch.arange(12.0).view(3, 4)


@pytest.fixture
def two_files(tmp_path: Path) -> TensorFiles:
    save_file({"a": ROW, "b": ROW + 100, "whole": torch.arange(5)}, tmp_path / "one.safetensors")
    save_file({"c": ROW[:2] + 200}, tmp_path / "two.safetensors")
    one, two = (find_tensors(tmp_path / name) for name in ("one.safetensors", "two.safetensors"))
    locations = one.locations | {"fused": (*one.locations["b"], *two.locations["c"])} | two.locations
    return TensorFiles("here", locations, one.shapes | two.shapes | {"fused": (5, 4)})


def test_parts_are_joined_in_order_in_the_wanted_dtype(two_files: TensorFiles) -> None:
    read = dict(read_tensors(two_files, ["c", "fused", "whole", "a"], dtype=torch.bfloat16, keep=["a"]))
    assert torch.equal(read["fused"], torch.cat([ROW + 100, ROW[:2] + 200]).bfloat16())
    assert read["fused"].dtype == read["c"].dtype == torch.bfloat16
    assert read["a"].dtype == torch.float32, "kept"
    assert read["whole"].dtype == torch.int64, "only floats are cast"
    plain = dict(read_tensors(two_files, ["fused", "a"]))
    assert plain["fused"].dtype == plain["a"].dtype == torch.float32


def test_a_file_is_closed_after_its_last_tensor(two_files: TensorFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    from nextstep_core.loading import checkpoint

    opened, close = [], checkpoint._OpenFiles.close

    def watched(self, paths) -> None:
        close(self, paths)
        opened.append(len(self._tensors))

    monkeypatch.setattr(checkpoint._OpenFiles, "close", watched)
    list(read_tensors(two_files, ["a", "c", "b"]))
    assert opened == [1, 0, 0, 0], "after a, b, c and all"


def test_every_problem_is_listed_and_no_more_than_a_few_by_name() -> None:
    where = Path("x.safetensors")
    names = [f"n{i}" for i in range(MAX_NAMES_SHOWN + 1)]
    files = TensorFiles(
        "here", {n: ((where, n),) for n in ("odd", "may", "fits")}, {"odd": (1,), "may": (9,), "fits": (2,)}
    )
    check_complete(files, {"fits": (2,)}, optional=["odd", "may", "absent"])
    check_complete(files, {"fits": (2,), "absent": (1,)}, optional=["odd", "may", "absent"])
    with pytest.raises(NextStepError) as caught:
        check_complete(files, dict.fromkeys(names, (1,)) | {"fits": (2, 1)}, optional=["may"])
    said = str(caught.value)
    assert (
        f"{len(names)} missing" in said
        and f"n{MAX_NAMES_SHOWN - 1}" in said
        and names[-1] not in said
        and "..." in said
    )
    assert "1 unexpected: odd in x.safetensors" in said
    assert "1 of a wrong shape: fits is [2] in x.safetensors, the config asks for [2, 1]" in said
    with pytest.raises(NextStepError) as caught:
        check_complete(files, dict.fromkeys(names[:-1], (1,)), optional=["odd", "may", "fits"])
    assert "..." not in str(caught.value), "all of them fit"


def test_optional_tensors_of_a_wrong_shape_are_named() -> None:
    files = TensorFiles("here", {"may": ((Path("x"), "may"),)}, {"may": (9,)})
    with pytest.raises(NextStepError, match="may is"):
        check_complete(files, {"may": (8,)}, optional=["may"])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("broken\npipe"), "broken)"),
        (EOFError(), "EOFError"),
        (ValueError("odd"), "odd"),
        (FileNotFoundError("no such"), "x.pt"),
        (NextStepError("as it is"), "as it is"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_however_a_file_is_broken_it_is_one_sentence(error: Exception, reason: str) -> None:
    with pytest.raises(NextStepError) as caught, _readable(Path("x.pt")):
        raise error
    said = str(caught.value)
    assert reason in said and "\n" not in said
    assert "x.pt" in said or isinstance(error, NextStepError)


def test_other_errors_are_ours_and_stay() -> None:
    with pytest.raises(KeyError), _readable(Path("x.pt")):
        raise KeyError("a bug")


def test_the_index_comes_before_a_single_file(checkpoint: Path) -> None:
    save_file({"norm.weight": torch.zeros(96)}, checkpoint / "model.safetensors")
    assert len(find_model_files(checkpoint).shapes) > 1
    (checkpoint / INDEX).unlink()
    assert set(find_model_files(checkpoint).shapes) == {"norm.weight"}


@pytest.mark.parametrize("weight_map", [None, [], {"norm.weight": 1}], ids=str)
def test_an_index_without_a_map_is_one_sentence(checkpoint: Path, weight_map: object) -> None:
    edit_json(checkpoint / INDEX, weight_map=weight_map)
    with pytest.raises(NextStepError, match="weight_map"):
        find_model_files(checkpoint)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "vae/x.safetensors"])
def test_an_index_stays_in_its_folder_though_the_file_is_there(checkpoint: Path, name: str) -> None:
    for target in (checkpoint.parent / "x.safetensors", checkpoint / "vae" / "x.safetensors"):
        save_file({"norm.weight": torch.zeros(96)}, target)
    edit_json(checkpoint / INDEX, weight_map={"norm.weight": name})
    with pytest.raises(NextStepError, match=f"{INDEX}.*{name}"):
        find_model_files(checkpoint)


def test_a_file_of_another_kind_is_one_sentence(checkpoint: Path) -> None:
    (checkpoint / "model.ckpt").write_bytes(b"x")
    with pytest.raises(NextStepError, match=r"model.ckpt.*\.gguf"):
        find_tensors(checkpoint / "model.ckpt")


def test_a_state_dict_of_something_else_is_one_sentence(checkpoint: Path) -> None:
    for content in ([torch.zeros(1)], {"a": torch.zeros(1), "epoch": 3}):
        torch.save(content, checkpoint / "x.pt")
        with pytest.raises(NextStepError, match="x.pt"):
            find_tensors(checkpoint / "x.pt")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tensors_are_views_of_a_mapped_file(checkpoint: Path) -> None:
    """Loading in the file's own dtype copies nothing."""
    for path in (checkpoint / SHARDS[0], checkpoint / "vae" / "checkpoint.pt"):
        files = find_tensors(path)
        name = next(n for n, shape in files.shapes.items() if len(shape) > 1)
        ((_, tensor),) = read_tensors(files, [name])
        with open("/proc/self/maps") as maps:
            mapped = [line.split()[0].split("-") for line in maps if str(path) in line]
        assert any(int(a, 16) <= tensor.data_ptr() < int(b, 16) for a, b in mapped), path.name


def test_fusion_and_split_are_inverse(pipeline, checkpoint: Path) -> None:
    config = pipeline.engine.config
    published = {n: t for shard in SHARDS for n, t in load_file(checkpoint / shard).items()}
    ours = pipeline.engine.model.state_dict()
    parts = split(ours, config)
    assert set(parts) == set(published) - {"embed_tokens.weight", "lm_head.weight", "gen_pos_embed"}
    assert all(torch.equal(parts[name], published[name]) for name in parts)
    q, k, v = (published[f"layers.1.self_attn.{n}_proj.bias"] for n in "qkv")
    assert torch.equal(ours["layers.1.self_attn.qkv_proj.bias"], torch.cat([q, k, v]))


def test_parts_by_hand(pipeline) -> None:
    config = replace(pipeline.engine.config, num_attention_heads=6, num_key_value_heads=2, head_dim=16)
    name = "layers.4.self_attn.qkv_proj.weight"
    parts = {"layers.4.self_attn.q_proj.weight": 96, "layers.4.self_attn.k_proj.weight": 32}
    parts |= {"layers.4.self_attn.v_proj.weight": 32}
    assert parts_of(name, config) == parts and parts_of("layers.4.self_attn.o_proj.weight", config) == {}
    shapes = {name: (160, 96), "norm.weight": (96,)}
    assert published_shapes(shapes, [], config) == {n: (rows, 96) for n, rows in parts.items()} | {"norm.weight": (96,)}
    assert published_shapes(shapes, [name], config) == shapes
    place = {n: ((Path("x"), n),) for n in (*parts, "norm.weight")}
    files = TensorFiles("here", place, {n: (rows, 96) for n, rows in parts.items()} | {"norm.weight": (96,)})
    fused = fuse_locations(files, shapes, config)
    assert fused.locations[name] == tuple((Path("x"), n) for n in parts) and fused.shapes[name] == (160, 96)
    assert fuse_locations(fused, shapes, config) == fused, "what is one already stays"


def test_documents_lie_in_a_folder_or_in_a_file(checkpoint: Path, tmp_path: Path) -> None:
    folder = find_documents(checkpoint)
    assert folder == Documents(checkpoint) == find_documents(checkpoint / SHARDS[0])
    assert folder.name == "tiny-a" and folder.quantization is None and folder.has("config.json")
    assert not folder.has("absent.json") and folder.where("x") == str(checkpoint / "x")
    snapshot = Documents(Path("hub/models--someone--NextStep-1.1/snapshots/0a1b"))
    assert snapshot.name == "NextStep-1.1"
    path = tmp_path / "file.safetensors"
    carried = {"config.json": '{"a": 1}', "nextstep.name": "N", "nextstep.quantization": "int8"}
    save_file({"a": ROW}, path, metadata={"nextstep": "1", **carried})
    assert file_metadata(path) == {"nextstep": "1", **carried}
    file = Documents(tmp_path, carried, path)
    assert (file.name, file.quantization, file.read("config.json")) == ("N", "int8", {"a": 1})
    assert file.has("config.json") and not file.has("tokenizer.json") and str(path) in str(file.where("config.json"))
    with file.as_file("config.json") as written:
        assert written.read_text() == '{"a": 1}'
    assert not written.exists()
    with pytest.raises(NextStepError, match="file.safetensors.*tokenizer.json"):
        file.text("tokenizer.json")
    assert not is_marked(tmp_path / "absent") and not is_marked(checkpoint / SHARDS[0])


def test_what_is_no_object_is_one_sentence(checkpoint: Path) -> None:
    with pytest.raises(NextStepError, match="there.*list"):
        parse_object("[1]", "there")
    (checkpoint / "config.json").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(NextStepError, match="config.json"):
        Documents(checkpoint).read("config.json")


def test_a_vae_is_found_by_its_weights(checkpoint: Path) -> None:
    folder = checkpoint / "vae"
    (folder / "checkpoint.pt").unlink()
    for name in ("diffusion_pytorch_model.safetensors", "model.safetensors", "checkpoint.pt"):
        (folder / name).touch()
        assert find_vae(folder) == (folder / name, Documents(folder)), "the first of the known names"
    with pytest.raises(NextStepError, match="VAE"):
        find_vae(checkpoint.parent)


def test_a_vae_comes_in_the_dtype_that_is_asked_for(checkpoint: Path) -> None:
    for dtype, got in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        _, state = load_vae_state(checkpoint / "vae", dtype)
        assert {tensor.dtype for tensor in state.values()} == {got}


def test_a_plan_counts_its_numbers_and_reports_each_tensor(checkpoint: Path) -> None:
    plan = plan_model(checkpoint)
    told = []
    tensors = dict(plan.read_model("cpu", torch.bfloat16, lambda done, total: told.append((done, total))))
    assert plan.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert told == [(n, len(tensors)) for n in range(len(tensors))]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert not plan.stored and plan.recipe is None
