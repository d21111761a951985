"""Weights from strangers: nothing is executed, nothing is believed, and nothing is not a number."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import hostile_files
import pytest
import torch
from checkpoint_files import INDEX, edit_json
from hostile_files import HEADERS, PICKLES, change
from safetensors.torch import load_file, save_file

from nextstep_core import NextStepError, NextStepPipeline
from nextstep_core.loading.build import load_vae_state, plan_model
from nextstep_core.loading.checkpoint import find_tensors, read_tensors
from nextstep_core.model.config import LIMITS, VAE_LIMITS

ROOT = Path(__file__).resolve().parents[3]
SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.filterwarnings("ignore:(Sparse|torch.quantize)")
@pytest.mark.parametrize("name", PICKLES)
def test_a_hostile_pickle_is_one_sentence_and_executes_nothing(tmp_path: Path, name: str) -> None:
    path = tmp_path / "checkpoint.pt"
    PICKLES[name](path)
    with pytest.raises(NextStepError, match=r"checkpoint\.pt is ") as caught:
        find_tensors(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_header_is_one_sentence(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.safetensors"
    HEADERS[name](path)
    with pytest.raises(NextStepError, match=r"x\.safetensors is damaged"):
        find_tensors(path)


def test_a_state_as_pytorch_saves_it_is_read(tmp_path: Path) -> None:
    """With metadata, with parameters, with one tensor under two names, and with texts that look like many tensors."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    for state in (module.state_dict(), dict(module.named_parameters()), {"a": module[0].weight, "b": module[0].weight}):
        torch.save(state, tmp_path / "x.pt")
        assert find_tensors(tmp_path / "x.pt").shapes == {name: tuple(t.shape) for name, t in state.items()}
    text = '{"' + '\\", [{' * 1_000_000
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", {"text": text})
    assert find_tensors(tmp_path / "x.safetensors").shapes == {"a": (1,)}


def test_a_librarys_own_words_are_shortened(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    hostile_files.with_header(path, b'{"a":{"dtype":"F32","shape":[1],"data_offsets":"' + b"a" * 100_000 + b'"}}')
    with pytest.raises(NextStepError, match="damaged") as caught:
        find_tensors(path)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("kind", [".safetensors", ".pt", ".gguf"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"x{kind}"
    for target in ("/dev/zero", str(tmp_path)):
        path.symlink_to(target)
        with pytest.raises(NextStepError, match="not a regular file"):
            find_tensors(path)
        path.unlink()


LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
import torch
from nextstep_core import NextStepError
from nextstep_core.loading.build import load_vae_state, plan_model
from nextstep_core.loading.checkpoint import find_tensors

plan_model(Path(sys.argv[2])), load_vae_state(Path(sys.argv[2]) / "vae")  # libraries are there before memory is limited
use = {".model": plan_model, ".vae": load_vae_state}
folder = Path(sys.argv[1])
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (200 << 20),) * 2)
for path in sorted(folder.iterdir()):
    try:
        use.get(path.suffix, find_tensors)(path)
    except NextStepError as error:
        assert "memory" not in str(error), error
    else:
        raise AssertionError(path)
print("done")
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:(Sparse|torch.quantize)")
@pytest.mark.skipif(sys.platform != "linux", reason="limits the process by its address space")
def test_what_asks_for_much_is_refused_with_little(tmp_path: Path, checkpoint: Path) -> None:
    """Also the largest configs within their limits: modules are built without memory and compared with the files."""
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for number, write in enumerate(PICKLES.values()):
        write(hostile / f"{number}.pt")
    for number, write in enumerate(HEADERS.values()):
        write(hostile / f"{number}.safetensors")
    for kind, source, limits in ((".model", checkpoint, LIMITS), (".vae", checkpoint / "vae", VAE_LIMITS)):
        folder = Path(shutil.copytree(source, hostile / f"largest{kind}"))
        largest = {name: most for name, (_, most) in limits.items()} | {"ch_mult": [1, 2, 4, 8, 8, 8]}
        edit_json(folder / "config.json", **largest | {"latent_channels": 16, "base_image_grid_size": 32})
    child = [sys.executable, "-c", LITTLE_MEMORY, str(hostile), str(checkpoint)]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(child, capture_output=True, text=True, timeout=300, env=environment)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../x.safetensors", "a/x.safetensors", "a\nb.safetensors", "..", "", "a" * 256], ids=repr
)
def test_an_index_names_files_of_its_folder(checkpoint: Path, name: str) -> None:
    edit_json(checkpoint / INDEX, weight_map={"norm.weight": name})
    with pytest.raises(NextStepError, match=f"{INDEX}.*outside|regular|not a weights file") as caught:
        plan_model(checkpoint)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_an_index_of_thousands_of_files_is_refused_before_one_is_opened(checkpoint: Path) -> None:
    edit_json(checkpoint / INDEX, weight_map={f"a{n}": f"{n}.safetensors" for n in range(1001)})
    with pytest.raises(NextStepError, match="1,001 files"):
        plan_model(checkpoint)


def test_numbers_that_are_no_floats_are_refused_before_weights_are_read(checkpoint: Path) -> None:
    name = "layers.0.mlp.down_proj.weight"
    change(checkpoint / SHARD_1, name, load_file(checkpoint / SHARD_1)[name].to(torch.int64))
    with pytest.raises(NextStepError, match=f"1 of a wrong dtype: {name} in {SHARD_1}"):
        plan_model(checkpoint)


BROKEN = [
    "norm.weight",
    "layers.0.self_attn.q_proj.bias",
    "layers.1.mlp.up_proj.weight",
    "layers.0.mlp.down_proj.weight",
]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_a_weight_that_is_not_finite_names_itself(
    checkpoint: Path, name: str, value: float, quantization: str | None
) -> None:
    shard = next(checkpoint / s for s in (SHARD_1, SHARD_2) if name in load_file(checkpoint / s))
    broken = load_file(shard)[name]
    broken.view(-1)[3] = value
    change(shard, name, broken)
    with pytest.raises(NextStepError, match=r"(norm|q_proj|qkv_proj|gate_up_proj|down_proj)\.\w+ holds NaN"):
        plan_model(checkpoint, quantization).load_model("cpu", torch.float32)


def test_numbers_beyond_the_dtype_are_found_where_they_are_converted(checkpoint: Path) -> None:
    """What stays a view of the file is not looked at, however large; and a sum may overflow where no number does."""
    path = checkpoint / "x.safetensors"
    large = torch.full((1100, 1000), 7e4)
    save_file({"large": large, "view": torch.full((1100, 1000), float("nan"))}, path)
    files = find_tensors(path)
    assert torch.equal(dict(read_tensors(files, ["large"]))["large"], large)
    assert dict(read_tensors(files, ["view"]))["view"].isnan().all()
    assert dict(read_tensors(files, ["large"], dtype=torch.bfloat16))["large"].isfinite().all()
    with pytest.raises(NextStepError, match="large holds NaN, or numbers that float16 cannot hold"):
        dict(read_tensors(files, ["large"], dtype=torch.float16))
    with pytest.raises(NextStepError, match="view holds NaN"):
        dict(read_tensors(files, ["view"], dtype=torch.bfloat16))
    save_file({"halves": torch.full((1100, 1000), 6e4, dtype=torch.float16)}, path)
    assert dict(read_tensors(find_tensors(path), ["halves"]))["halves"].isfinite().all()


def test_a_vae_that_is_not_finite_names_the_tensor(checkpoint: Path) -> None:
    path = checkpoint / "vae" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["decoder.conv_in.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, path)
    with pytest.raises(NextStepError, match=r"checkpoint\.pt.*decoder\.conv_in\.weight holds NaN"):
        load_vae_state(checkpoint / "vae")


def test_scales_of_a_file_that_is_quantized_already(checkpoint: Path, tmp_path: Path) -> None:
    from nextstep_core.loading.single_file import save_model

    path = tmp_path / "int8.safetensors"
    save_model(plan_model(checkpoint, "int8"), path, torch.float32)
    NextStepPipeline.from_pretrained(path, vae=checkpoint / "vae", dtype=torch.float32)
    data, scale = path.read_bytes(), load_file(path)["layers.0.mlp.down_proj.weight_scale"]
    at = data.index(scale.view(torch.uint8).numpy().tobytes())
    broken = torch.full_like(scale, float("inf")).view(torch.uint8).numpy().tobytes()
    path.write_bytes(data[:at] + broken + data[at + len(broken) :])
    with pytest.raises(NextStepError, match=r"down_proj\.weight_scale holds NaN"):
        plan_model(path).load_model("cpu", torch.float32)
