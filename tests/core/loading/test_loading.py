"""Loading: strict, complete before the first weight is read, and frugal with memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from checkpoint_files import INDEX, edit_json, make_wide
from safetensors.torch import load_file, save_file

from nextstep_core import NextStepError, NextStepPipeline
from nextstep_core.model.positions import grid_codes

SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def load(path: Path, **options) -> NextStepPipeline:
    return NextStepPipeline.from_pretrained(path, dtype=torch.float32, **options)


def draw(pipe: NextStepPipeline) -> torch.Tensor:
    return pipe.generate("A red apple.", height=32, width=32, steps=3, cfg=2.0, sampler="score-sde-1.1").tokens


def merge_shards(folder: Path, prefix: str = "") -> None:
    """Turn the sharded checkpoint into a single file, each key under an optional prefix."""
    tensors = load_file(folder / SHARD_1) | load_file(folder / SHARD_2)
    save_file({prefix + name: t for name, t in tensors.items()}, folder / "model.safetensors")
    for name in (SHARD_1, SHARD_2, INDEX):
        (folder / name).unlink()


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_single_file_is_the_sharded_checkpoint(pipeline, checkpoint: Path, prefix: str) -> None:
    merge_shards(checkpoint, prefix)
    for path in (checkpoint, checkpoint / "model.safetensors"):
        loaded = load(path)
        expected = pipeline.engine.model.state_dict()
        assert all(torch.equal(t, expected[name]) for name, t in loaded.engine.model.state_dict().items())
        assert (draw(loaded) - draw(pipeline)).abs().max() <= 1e-5  # kernels round by how a file aligns its tensors


def test_vae_may_be_a_folder_or_a_file(pipeline, checkpoint: Path) -> None:
    folder = checkpoint.rename(checkpoint.parent / "moved") / "vae"
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    save_file(state, folder / "renamed.safetensors")
    for vae in (folder, folder / "checkpoint.pt", folder / "renamed.safetensors"):
        decoder = load(checkpoint.parent / "moved", vae=vae).vae.decoder
        assert torch.equal(decoder.conv_in.weight, pipeline.vae.decoder.conv_in.weight)


def test_language_head_is_not_loaded_and_text_embedding_keeps_its_dtype(checkpoint: Path) -> None:
    engine = NextStepPipeline.from_pretrained(checkpoint, dtype=torch.bfloat16).engine
    assert not any("lm_head" in name for name in engine.model.state_dict())
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
    assert engine.text_embedding.embed_tokens.weight.dtype == torch.float32


def remove_tensor(folder: Path) -> None:
    tensors = load_file(folder / SHARD_1)
    del tensors["layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / SHARD_1)


def remove_tensor_everywhere(folder: Path) -> None:
    merge_shards(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def add_tensor(folder: Path) -> None:
    merge_shards(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"surprise.weight": torch.zeros(1)}, folder / "model.safetensors")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rename_image_area(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((folder / name).read_text().replace("<|image_area|>", "<|other|>"))


DAMAGES = {
    "shard lacks an indexed tensor": (remove_tensor, [SHARD_1, "layers.0.mlp.up_proj.weight"]),
    "missing tensor": (remove_tensor_everywhere, ["1 missing", "layers.0.mlp.up_proj.weight", "model.safetensors"]),
    "unexpected tensor": (add_tensor, ["1 unexpected", "surprise.weight", "model.safetensors"]),
    "misshapen tensors": (
        lambda f: edit_json(f / "config.json", fm_head_dim=32),
        ["of a wrong shape", "image_head.net", SHARD_2, "[64"],
    ),
    "truncated shard": (lambda f: truncate(f / SHARD_2), [SHARD_2, "damaged or incomplete"]),
    "corrupt shard": (lambda f: (f / SHARD_2).write_bytes(b"\xff" * 999), [SHARD_2, "damaged or incomplete"]),
    "absent shard": (lambda f: (f / SHARD_1).unlink(), [SHARD_1, "missing"]),
    "shard outside the folder": (
        lambda f: edit_json(f / INDEX, weight_map={"norm.weight": "../norm.safetensors"}),
        [INDEX, "outside its folder"],
    ),
    "no weights": (lambda f: (f / INDEX).unlink(), [INDEX, "model.safetensors", "weights are missing"]),
    "another kind of model": (lambda f: edit_json(f / "config.json", model_type="llama"), ["config.json", "'llama'"]),
    "missing key": (
        lambda f: edit_json(f / "config.json", fm_head_layers="<remove>"),
        ["config.json", "`fm_head_layers`"],
    ),
    "key of a wrong type": (lambda f: edit_json(f / "config.json", boi="603"), ["config.json", "`boi`", "'603'"]),
    "contradictory keys": (lambda f: edit_json(f / "config.json", num_key_value_heads=4), ["(6)", "(4)"]),
    "unknown rope scaling": (lambda f: edit_json(f / "config.json", rope_scaling={"type": "yarn"}), ["`rope_scaling`"]),
    "wrong JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json", "not readable JSON"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json"]),
    "another tokenizer": (rename_image_area, ["tokenizer.json", "<|image_area|>", "different checkpoints"]),
    "broken VAE": (lambda f: truncate(f / "vae" / "checkpoint.pt"), ["checkpoint.pt", "damaged or incomplete"]),
    "pickled code as VAE": (
        lambda f: torch.save({"encoder": Path("x")}, f / "vae" / "checkpoint.pt"),
        ["checkpoint.pt", "damaged or incomplete"],
    ),
    "VAE of other channels": (
        lambda f: edit_json(f / "vae" / "config.json", z_channels=4),
        ["wrong shape", "checkpoint.pt"],
    ),
    "no VAE": (lambda f: (f / "vae").rename(f / "elsewhere"), ["holds no VAE"]),
    "VAE outside the folder": (lambda f: edit_json(f / "config.json", vae_name_or_path="../../"), ["holds no VAE"]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_one_sentence(checkpoint: Path, name: str) -> None:
    damage, words = DAMAGES[name]
    damage(checkpoint)
    with pytest.raises(NextStepError) as caught:
        load(checkpoint)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_a_vae_of_other_channels_is_one_sentence(checkpoint: Path, tmp_path: Path) -> None:
    from nextstep_core.model.config import VAEConfig
    from nextstep_core.model.vae import AutoencoderKL

    shape = json.loads((checkpoint / "vae" / "config.json").read_text()) | {"z_channels": 4}
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape))
    torch.save(AutoencoderKL(VAEConfig.from_dict(shape)).state_dict(), folder / "checkpoint.pt")
    with pytest.raises(NextStepError, match="This VAE has 4 latent channels at 1/8 of the size; the model needs 16"):
        load(checkpoint, vae=folder)


def test_a_name_that_is_nothing_says_what_to_give() -> None:
    with pytest.raises(NextStepError, match="Give a checkpoint folder, a .safetensors file or a hub id"):
        NextStepPipeline.from_pretrained("/nowhere/at/all")


def test_a_hub_id_is_taken_from_the_cache(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    snapshot = checkpoint.parent / "models--someone--NextStep-1.1" / "snapshots" / "0a1b2c"
    shutil.copytree(checkpoint, snapshot)

    def snapshot_download(hub_id: str, **options) -> str:
        calls.append((hub_id, options.get("local_files_only", False)))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load("someone/NextStep-1.1").engine.recommended().sampler == "score-sde-1.1"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda hub_id, **_: str(checkpoint / "vae"))
    assert load(checkpoint, vae="someone/tokenizer").vae.config.ch == 32
    assert calls and all(call == ("someone/NextStep-1.1", True) for call in calls), "the network was not asked"


def test_generation_codes_are_read_or_computed(pipeline, checkpoint: Path) -> None:
    recorded = load_file(checkpoint / SHARD_1)["gen_pos_embed"]
    assert (grid_codes(96, 32)[None] - recorded).abs().max() <= 1e-6
    edit_json(checkpoint / "config.json", use_gen_pos_embed=True)
    read = draw(load(checkpoint))
    merge_shards(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["gen_pos_embed"]
    save_file(tensors, checkpoint / "model.safetensors")
    assert (draw(load(checkpoint)) - read).abs().max() <= 1e-4
    assert (read - draw(pipeline)).abs().max() > 1e-2, "the codes change the picture"


def test_too_many_tokens_for_the_codes_is_one_sentence(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", use_gen_pos_embed=True)
    with pytest.raises(NextStepError, match="positions for 1024 image tokens; 512x528 pixels needs 1056"):
        load(checkpoint).generate("A tall picture.", height=528, width=512)


PEAK = """
import sys
import torch
from pathlib import Path
import tokenizers
from nextstep_core.loading.build import plan_model
def peak():  # not ru_maxrss, which a process inherits from the one that started it
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

plan_model(Path(sys.argv[2])).load_model("cpu", torch.bfloat16)  # pages in the libraries, which are not the model
before = peak()
plan = plan_model(Path(sys.argv[1]))
model, text_embedding = plan.load_model("cpu", torch.bfloat16), plan.load_text_embedding()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_peak_memory_stays_below_model_plus_one_shard(checkpoint: Path, golden: Path) -> None:
    """Converting float32 files to bf16 must not hold the float32 model: wide layers make the difference visible."""
    sizes = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
    edit_json(checkpoint / "config.json", **sizes, intermediate_size=8192, num_hidden_layers=8)
    shard_bytes, model_bytes = make_wide(checkpoint)
    out = subprocess.run(
        [sys.executable, "-c", PEAK, str(checkpoint), str(golden / "tiny-a")],
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    assert model_bytes / 2 < int(out.stdout) < model_bytes + shard_bytes
