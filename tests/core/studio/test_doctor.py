"""Every mistake that the doctor knows is made once, and told with its remedy."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nextstep_core.runtime import chosen, ledger
from nextstep_core.runtime.trials import WON, Outcome, Verdict
from nextstep_core.studio import doctor as doctors
from nextstep_core.studio import model_files
from nextstep_core.studio.doctor import PACKAGES, doctor, folders, host_memory, processor, versions
from nextstep_core.studio.finding import OK, PROBLEM, WARNING, Finding
from nextstep_core.studio.machine import Format, Model
from nextstep_core.studio.model_files import checkpoints

ROOT = Path(__file__).resolve().parents[3]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def a_machine_like_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a card, a Hugging Face cache, or a word against downloads."""
    for name in ("cached_models", "cached_vaes"):
        monkeypatch.setattr(f"nextstep_core.loading.catalog.{name}", dict)
    for name in ("NVIDIA", "AMD"):
        monkeypatch.setattr(doctors, name, Path("/nowhere"))
    monkeypatch.setattr(doctors.shutil, "which", lambda name: None)
    monkeypatch.setattr("nextstep_core.loading.hub.forbidden", lambda: None)


@pytest.fixture
def root(golden: Path, tmp_path: Path) -> Path:
    """A models' folder with a whole checkpoint."""
    shutil.copytree(golden / "tiny-a", tmp_path / "models" / "whole")
    return tmp_path / "models"


def told(findings: object, verdict: str, what: str, remedy: str = "") -> Finding:
    """The only finding of this verdict that says `what`, and that it has this remedy."""
    found = [f for f in findings if f.verdict == verdict and re.search(what, f.what)]
    assert len(found) == 1, f"{what!r} in {list(findings)}"
    assert re.search(remedy, found[0].remedy) and "\n" not in found[0].what + found[0].remedy
    return found[0]


def test_a_whole_set_up_has_no_problem(root: Path, tmp_path: Path) -> None:
    findings = doctor([root], output=tmp_path / "out" / "pictures", device=CPU)
    assert {f.what for f in findings if f.verdict == PROBLEM} == set()
    told(findings, OK, "whole is complete; quantization none fits")
    told(findings, OK, r"pictures can be written to")
    assert not (tmp_path / "out").exists(), "nothing is changed"
    assert all(bool(f.remedy) == (f.verdict != OK) for f in findings)


def test_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctors.sys, "version_info", (3, 9, 18))
    monkeypatch.setattr(platform, "python_version", lambda: "3.9.18")
    told(versions(), PROBLEM, r"Python is 3\.9\.18; 3\.10", "newer Python")


@pytest.mark.parametrize(
    ("version", "verdict"), [("2.6.1+cu124", PROBLEM), ("2.7.0", OK), ("2.13.0+cpu", OK), ("3.0.dev1", OK)]
)
def test_an_old_torch(monkeypatch: pytest.MonkeyPatch, version: str, verdict: str) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "torch" else real(name))
    found = [f for f in versions() if "torch" in f.what]
    assert [f.verdict for f in found] == [verdict]
    if verdict == PROBLEM:
        assert found[0].remedy == 'Run: pip install --upgrade "torch>=2.7"'


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def without(name: str) -> str:
        if name == "einops":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    told(versions(), PROBLEM, "package einops is missing", 'pip install "einops>=0.7"')


def test_the_packages_are_those_that_the_project_needs() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.M | re.S)[1]
    assert dict(re.findall(r'"([\w-]+)>=([\d.]+)"', listed)) == PACKAGES
    assert f">={sys.version_info[0]}.{doctors.PYTHON[1]}" in text


def test_a_cuda_card_and_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctors.shutil, "which", lambda name: f"/bin/{name}" if name == "nvidia-smi" else None)
    monkeypatch.setattr(torch.version, "cuda", None)
    told(processor(CPU), PROBLEM, "NVIDIA card.*without CUDA", "Install PyTorch with CUDA")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    told(processor(CPU), PROBLEM, r"NVIDIA card.*cannot use it.*13\.0", "driver")


def test_a_card_of_amd_and_a_torch_without_rocm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctors, "AMD", tmp_path)
    monkeypatch.setattr(torch.version, "hip", None)
    told(processor(CPU), WARNING, "AMD card.*without ROCm", "ROCm")


def test_a_mac_whose_card_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    told(processor(CPU), WARNING, "Apple GPU", "arm64")


def test_no_card_and_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    told(processor(CPU), WARNING, "no card", "12 GB")
    monkeypatch.setattr(doctors, "device_name", lambda device: "H100")
    monkeypatch.setattr(torch.version, "hip", None)
    told(processor(CUDA), OK, "CUDA: H100")


def test_no_folder_for_models(tmp_path: Path) -> None:
    told(folders([tmp_path / "not there"], None), WARNING, "not there is not there", "download a model")


def test_a_folder_that_cannot_be_written(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").write_text("a file where a folder is to be")
    told(folders([root], tmp_path / "pictures"), PROBLEM, r"pictures cannot be written to \(Not a directory\)", "other")

    def refused(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctors.tempfile, "TemporaryFile", refused)
    told(folders([root], None), PROBLEM, r"models cannot be written to \(Permission denied\)", "chown")


def test_a_full_disk(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctors, "disk_free", lambda folder: 1_500_000_000)
    told(folders([root], None), PROBLEM, r"disk of .*models has 1\.50 GB left", "Make room")


def test_shards_that_the_index_names_and_nobody_has(root: Path) -> None:
    folder = root / "whole"
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= {"a": "model-00004-of-00005.safetensors", "b": "model-00005-of-00005.safetensors"}
    (folder / INDEX).write_text(json.dumps(index))
    findings = doctor([root], device=CPU)
    finding = told(findings, PROBLEM, "lacks 2 of the files.*00004-of-00005.*00005-of-00005", "Download .* again")
    assert finding.where == str(folder)
    assert [f for f in findings if f.verdict == PROBLEM] == [finding], "one mistake is told once"


def test_a_pointer_of_git_in_the_place_of_a_file(root: Path) -> None:
    weights = next((root / "whole").glob("*.safetensors"))
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    findings = doctor([root], device=CPU)
    told(findings, PROBLEM, f"{weights.name} is what Git puts", "git lfs pull")
    assert sum(f.verdict == PROBLEM for f in findings) == 1


@pytest.mark.parametrize("part", [".cache/huggingface/model.safetensors.0123.incomplete", "model.safetensors.part"])
def test_a_download_that_did_not_end(root: Path, part: str) -> None:
    (root / "whole" / part).parent.mkdir(parents=True, exist_ok=True)
    (root / "whole" / part).touch()
    told(doctor([root], device=CPU), WARNING, "download that did not end.*model.safetensors", "goes on where it stop")


def test_half_a_file(root: Path) -> None:
    weights = next((root / "whole").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:5000])
    told(doctor([root], device=CPU), PROBLEM, f"whole cannot be used: .*{weights.name} is damaged or incomplete")


def test_weights_without_a_config(root: Path) -> None:
    folder = root / "whole"
    (folder / INDEX).write_text(json.dumps({"weight_map": {}}))
    (folder / "config.json").unlink()
    told(doctor([root], device=CPU), PROBLEM, "whole holds weights and no config.json", "tokenizer.json")


def test_a_checkpoint_without_its_vae(root: Path) -> None:
    shutil.rmtree(root / "whole" / "vae")
    told(doctor([root], device=CPU), PROBLEM, "whole has no VAE", "NextStep-1-f8ch16-Tokenizer")


def test_no_model_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told(doctor([tmp_path], device=CPU), WARNING, "no model but the small one", "^Download NextStep-1")
    monkeypatch.setattr("nextstep_core.loading.hub.forbidden", lambda: "NEXTSTEP_OFFLINE")
    told(doctor([tmp_path], device=CPU), WARNING, "no model but the small one", "^Unset NEXTSTEP_OFFLINE")


WHOLE, STREAMED = Format("int8", 13, 15, "whole", 0), Format("int4", 7 * 10**9, 9 * 10**9, "streamed", 2 * 10**9)
MODEL = Model("NextStep-1.1", "/m", "text to image", "/m/vae", "bfloat16", 1, (WHOLE,), "int8")


def test_only_models_that_cannot_edit_or_only_such_that_can() -> None:
    edit = replace(MODEL, name="NextStep-1-Large-Edit", purpose="editing")
    told(checkpoints([MODEL], (), CUDA), WARNING, "trained to edit", "NextStep-1-Large-Edit")
    told(checkpoints([edit], (), CUDA), WARNING, "for editing", "NextStep-1.1")
    for models in ([MODEL, edit], [MODEL, replace(MODEL, purpose=None)]):
        assert {f.verdict for f in checkpoints(models, (), CUDA)} == {OK}


def test_memory_that_is_too_small_for_every_format_or_only_by_streaming() -> None:
    none = replace(
        MODEL, formats=(Format("none", 1, 3 * 10**9, "no", 0), Format("int4", 1, 10**9, "no", 0)), chosen=None
    )
    told(
        checkpoints([none], (), CUDA), PROBLEM, r"does not fit .* in any format: the smallest needs 1\.00 GB", "memory"
    )
    slow = replace(MODEL, formats=(STREAMED,), chosen="int4")
    told(checkpoints([slow], (), CUDA), WARNING, r"only as int4 with 2\.00 GB streamed", "Close other programs")


def test_a_linux_in_windows_with_half_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctors, "host_bytes", lambda: 8 * 10**9)
    assert list(host_memory()) == []
    monkeypatch.setattr(platform, "release", lambda: "5.15.0-microsoft-standard-WSL2")
    told(host_memory(), WARNING, r"WSL\) 8\.00 GB", r"\.wslconfig")
    monkeypatch.setattr(doctors, "host_bytes", lambda: 64 * 10**9)
    assert list(host_memory()) == []
    monkeypatch.setattr(doctors, "host_bytes", lambda: None)
    assert list(host_memory()) == []


def test_what_only_looks_like_a_model_is_left_alone(root: Path) -> None:
    """A folder that may not be read, a pipe, an index that is none."""
    (root / "other").mkdir()
    (root / "other" / INDEX).write_text("[")
    (root / "other" / "config.json").write_text("[")
    assert [f for f in model_files.files([root]) if f.verdict != OK] == []


def test_fast_paths(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured, what took the process down, and a switch that says nothing."""
    monkeypatch.setenv(ledger.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(chosen, "_ledgers", {})
    assert not list(doctors.fast_paths(CPU)), "nothing to tell"
    known = chosen.ledger_of(CPU)
    won = Verdict(chosen.NAMES[0], WON, 1e-4, 2.0, 0.001)
    known.outcomes |= {"a": Outcome("a", 2e-4, 1e6, (won,)), "b": Outcome("b", 2e-4, 1e6, ())}
    told(doctors.fast_paths(CPU), OK, "taken for 1 of 2 products")
    known.lost.add("deadly 1")
    told(doctors.fast_paths(CPU), WARNING, "deadly 1 took the process down", "delete .*json")
    monkeypatch.setenv(chosen.SWITCH, "faster")
    told(doctors.fast_paths(CPU), PROBLEM, "NEXTSTEP_PRODUCTS is 'faster'", "Unset NEXTSTEP_PRODUCTS")
