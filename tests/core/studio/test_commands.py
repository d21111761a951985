"""The command line as a new user tries it: every command once, and with a wrong argument."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from nextstep_core.loading import kept
from nextstep_core.loading.build import plan_model
from nextstep_core.loading.calibration import PROMPTS
from nextstep_core.loading.store import ASSETS
from nextstep_core.studio.commands import app
from nextstep_core.studio.commands.calibrate import GENERAL
from nextstep_core.studio.prompts import read_prompts

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "data" / "golden"
SHAPES = ("circle", "square", "triangle", "star")
GUIDE = {
    "prompts": ["a red circle", "a blue square"],
    "settings": {"size": 512, "steps": 20, "guidance": 3.0, "quality": "high"},
}


def run(*arguments: str, code: int = 0) -> str:
    """What a command prints; it must end with this code and without a traceback."""
    result = CliRunner().invoke(app, list(arguments), env={"NEXTSTEP_MODELS": "", "COLUMNS": "120"})
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return " ".join(result.output.split())


def result_of(*arguments: str) -> dict:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    stated: dict = json.loads(result.stdout)
    return stated


def pixels(*arguments: str) -> bytes:
    """What a command draws."""
    with Image.open(result_of(*arguments)["pictures"][0]["file"]) as image:
        return image.tobytes()


@pytest.mark.parametrize("command", [c.name for c in app.registered_commands])
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    assert f"$ nextstep {command}" in run(command, "--help")


def test_generate_as_the_guide_writes_it(tmp_path: Path) -> None:
    told = result_of("generate", "a red circle", "64", "4", "--model", "tiny", "-o", str(tmp_path / "x.png"))
    assert told["pictures"] == [{"file": str(tmp_path / "x.png"), "seed": 0, "width": 64, "height": 64}]
    with Image.open(tmp_path / "x.png") as image:
        assert "Steps: 4," in image.text["parameters"]  # type: ignore[attr-defined]


def test_several_seeds_and_names_that_are_taken(tmp_path: Path) -> None:
    arguments = ["generate", "a/b: red?", "--size", "32x48", "--steps", "2", "--model", "tiny", "-o", str(tmp_path)]
    for _ in range(2):
        result_of(*arguments, "--seed", "1", "--seed", "2", "--format", "webp")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a-b-red-1-2.webp",
        "a-b-red-1.webp",
        "a-b-red-2-2.webp",
        "a-b-red-2.webp",
    ]


def test_edit(tmp_path: Path) -> None:
    Image.new("RGB", (90, 60), "red").save(tmp_path / "cup.png")
    out = str(tmp_path / "blue.jpg")
    told = result_of(
        "edit", str(tmp_path / "cup.png"), "Make it blue.", "--size", "32", "--steps", "2", "-m", "tiny", "-o", out
    )
    assert told["pictures"][0]["file"] == out and Path(out).exists()


def test_loras_by_name_by_path_and_in_the_folder_beside_the_models(tmp_path: Path) -> None:
    night = ASSETS / "night" / "adapter_model.safetensors"
    (tmp_path / "models" / "nextstep").mkdir(parents=True)
    (tmp_path / "models" / "loras").mkdir()
    (tmp_path / "models" / "loras" / "own: it.safetensors").write_bytes(night.read_bytes())
    arguments = ("generate", "a red circle", "64", "4", "--model", "tiny", "-o", str(tmp_path / "x.png"))
    told = result_of(*arguments, "--lora", "night:0.5", "--lora", str(night.parent))
    assert told["LoRAs"] == "<lora:night:1.5>", "one file"
    beside = ("--models", str(tmp_path / "models" / "nextstep"))
    for name in ("own: it", "own: it:1", "own: it.safetensors:1"):
        assert result_of(*arguments, *beside, "--lora", name)["LoRAs"] == "<lora:own_ it:1>"
    with Image.open(tmp_path / "x.png") as image:
        assert image.text["parameters"].startswith("a red circle <lora:own_ it:1>\n")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("lora", "said"),
    [("gone", "no LoRA 'gone'"), ("night:x", "no LoRA"), ("night:1e9", "strength is"), ("", "no LoRA")],
)
def test_loras_that_are_none(tmp_path: Path, lora: str, said: str) -> None:
    out = str(tmp_path / "x.png")
    assert said in run("generate", "a red circle", "64", "4", "--model", "tiny", "-o", out, "--lora", lora, code=1)


def test_a_batch_with_another_lora_is_drawn_again(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red circle\n")
    arguments = ("batch", str(tmp_path / "p.txt"), "-o", str(tmp_path / "out"), "-m", "tiny", "--size", "32")
    drawn = [
        result_of(*arguments, "--steps", "2", *lora)["drawn"] for lora in ((), ("--lora", "night"), ("--lora", "night"))
    ]
    assert drawn == [1, 1, 0]


def test_the_guides_batch_is_read_unchanged_and_drawn_small(tmp_path: Path) -> None:
    (tmp_path / "my_batch.json").write_text(json.dumps(GUIDE))
    arguments = (
        "batch",
        str(tmp_path / "my_batch.json"),
        "-o",
        str(tmp_path / "out"),
        "--model",
        "tiny",
        "--size",
        "64",
    )
    assert result_of(*arguments)["drawn"] == 2
    assert result_of(*arguments) | {"seconds": 0} == {
        "drawn": 0,
        "kept": 2,
        "failed": 0,
        "seconds": 0,
        "report": str(tmp_path / "out" / "report.html"),
    }
    (first, _) = sorted((tmp_path / "out").glob("*.png.json"))
    assert 0 < json.loads(first.read_text())["scores"]["total"] < 1
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_a_shipped_set_is_counted_before_it_is_drawn() -> None:
    assert result_of("batch", "marketing", "--count-only", "--set", "product=a hat | a cup")["pictures"] == 40


def test_a_picture_that_cannot_be_drawn_is_told_by_the_exit_code(tmp_path: Path, monkeypatch) -> None:
    from nextstep_core import NextStepError
    from nextstep_core.studio.drawing import PipelineArtist

    def draw(*_: object) -> None:
        raise NextStepError("It does not work.")

    monkeypatch.setattr(PipelineArtist, "draw", draw)
    (tmp_path / "p.txt").write_text("a\n")
    said = run("batch", str(tmp_path / "p.txt"), "-o", str(tmp_path / "out"), "-m", "tiny", "--size", "32", code=3)
    assert "It does not work." in said


def test_what_the_machine_is_and_does() -> None:
    assert "tiny" in [model["name"] for model in result_of("status", "--quick")["models"]]
    assert result_of("test")["works"]
    assert result_of("bench", "-m", "tiny", "--size", "32", "--runs", "1", "--steps", "2")["quality"]["median"] > 0
    assert "ok" in [finding["verdict"] for finding in result_of("doctor")["findings"]]


def test_convert_and_draw_with_what_came_out(tmp_path: Path) -> None:
    file = tmp_path / "tiny-int8.safetensors"
    assert result_of("convert", "tiny", str(file), "--quantization", "int8")["bytes"] == file.stat().st_size
    result_of("convert", "tiny", str(tmp_path / "vae.safetensors"), "--vae")


def test_what_was_kept_of_a_checkpoint_draws_when_its_weights_are_gone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(kept, "SPARE", 0)
    models = tmp_path / "models"
    checkpoint = Path(shutil.copytree(ASSETS / "tiny", models / "mine"))
    out = tmp_path / "a.png"
    command = ["generate", "a red circle", "64", "2", "--models", str(models), "--device", "cpu", "-o", str(out)]
    plan = plan_model(checkpoint, "int8")
    (shelf,) = kept.shelves("mine", checkpoint, [models])
    shelf.mkdir(parents=True)
    for _ in kept.keep(plan, torch.float32, shelf, plan.read_model("cpu", torch.float32)):
        pass
    drawn = [pixels(*command, "--model", "mine", "--quantization", "int8")]
    for weights in checkpoint.glob("*.safetensors"):
        weights.unlink()
    assert "Of mine only the weights kept as int8 are left" in run(*command, "--model", "mine", code=1)
    drawn.append(pixels(*command, "--model", "mine", "--quantization", "int8"))
    shutil.rmtree(checkpoint)
    drawn.append(pixels(*command, "--quantization", "auto"))
    assert drawn[0] == drawn[1] == drawn[2]
    assert "kept as int8" in run(*command, "--quantization", "int4", code=1)


def test_the_prompts_that_calibrate_comes_with() -> None:
    texts = [prompt.text for prompt in read_prompts(GENERAL)]
    assert len(set(texts)) == len(texts) == PROMPTS.check(48)


@pytest.mark.slow
def test_calibrate_and_convert_with_it(tmp_path: Path) -> None:
    model = Path(shutil.copytree(ASSETS / "tiny", tmp_path / "tiny"))
    (tmp_path / "p.txt").write_text("".join(f"a red {shape} on a blue background\n" for shape in SHAPES))
    drawing = ("calibrate", str(model), "--prompts", str(tmp_path / "p.txt"), "--size", "32")
    told = result_of(*drawing, "--count", "4", "--measure", "int4")
    assert told["file"] == str(model / "calibration.safetensors") and told["prompts"] == 4
    assert 0 < told["error"]["with"] < 0.5 and 0 < told["error"]["without"] < 0.5
    file = str(tmp_path / "int4.safetensors")
    fitted = result_of("convert", str(model), file, "--quantization", "int4")
    assert fitted["calibration"] == told["file"] and fitted["error"] == pytest.approx(told["error"]["with"], rel=0.01)
    plain = result_of("convert", str(model), file, "--quantization", "int4", "--calibration", "none")
    assert "calibration" not in plain and plain["bytes"] == fitted["bytes"]
    assert "calibration" not in result_of("convert", str(model), file, "--quantization", "int8")
    other = ("convert", str(GOLDEN / "tiny-a"), file, "--quantization", "int4", "--calibration", told["file"])
    assert "other weights" in run(*other, code=1)
    assert "already quantized" in run("calibrate", file, "--size", "32", code=1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["calibrate", "tiny", "--count", "1"], "is 1"),
        (["calibrate", "tiny", "--count", "0"], "is 0"),
        (["calibrate", "tiny", "--count", "9999"], "is 9999"),
        (["calibrate", "tiny", "--prompts", "nothere.txt"], "does not exist"),
        (["calibrate", "tiny", "--prompts", "x.bin"], ".txt"),
        (["calibrate", "tiny", "--size", "16:9"], "--size is 16:9"),
        (["calibrate", "tiny", "--measure", "int8"], "int4"),
        (["calibrate", "tiny", "-o", "x.bin"], ".safetensors"),
        (["calibrate", "tiny", "--device", "tpu"], "--device is tpu"),
        (["calibrate", "nothere"], "nothere"),
        (["convert", "tiny", "x.safetensors", "--quantization", "int4", "--calibration", "nothere"], "does not exist"),
        (["convert", "tiny", "x.safetensors", "--quantization", "int8", "--calibration", "y"], "--calibration is for"),
        (["convert", "tiny", "x.safetensors", "--vae", "--calibration", "y"], "--calibration is for"),
        (["generate", "a", "50", "--model", "tiny"], "multiple of 16"),
        (["generate", "a", "64", "0", "--model", "tiny"], "steps is 0"),
        (["generate", "a", "--preset", "best", "--model", "tiny"], "draft"),
        (["generate", "a", "--sampler", "euler", "--model", "tiny"], "flow-ode"),
        (["generate", "a", "--size", "32", "--model", "nothere"], "nothere"),
        (["generate", "a", "--size", "32", "--model", "NextStep-1.1"], "nextstep download NextStep-1.1"),
        (["generate", "a", "--size", "32", "--models", "nothere"], "--model tiny"),
        (["generate", "a", "--device", "tpu", "--model", "tiny"], "--device is tpu"),
        (["generate", "a", "--dtype", "fp8", "--model", "tiny"], "--dtype"),
        (["generate", "a", "--quantization", "int3", "--model", "tiny"], "int8"),
        (["generate", "a", "--max-memory", "much", "--model", "tiny"], "20GB"),
        (["generate", "a", "-o", "x.bmp", "--model", "tiny"], ".bmp"),
        (["generate", "a", "--seed", "-1", "--model", "tiny"], "seed is -1"),
        (["edit", "nothere.png", "Make it blue.", "--model", "tiny"], "does not exist"),
        (["edit", __file__, "Make it blue.", "--model", "tiny"], "not a readable picture"),
        (["batch", "nothere.json"], "does not exist"),
        (["batch", "brand"], "--output"),
        (["batch", "brand", "--set", "brand", "--count-only"], "--set"),
        (["batch", "brand", "--set", "x=y", "--count-only"], "brand, style"),
        (["batch", "brand", "--together", "0", "--count-only"], "together is 0"),
        (["batch", "brand", "--gpus", "many", "--count-only"], "gpus is 'many'"),
        (["batch", "brand", "--gpus", "0", "--count-only"], "gpus is 0"),
        (["batch", "brand", "--gpus", "all", "--workers", "2", "--count-only"], "not both"),
        (["batch", "brand", "--workers", "0", "--count-only"], "workers is 0"),
        (["batch", "brand", "--cluster", "host", "--count-only"], "ray://host:10001"),
        (["batch", "brand", "--names", "../{name}", "--count-only"], "no pattern"),
        (["convert", "tiny", "x.bin"], ".safetensors"),
        (["convert", "tiny", "x.safetensors", "--quantization", "int3"], "int8"),
        (["download", "../x"], "x"),
        (["status", "--size", "huge"], "size is 'huge'"),
        (["status", "--device", "tpu", "--quick"], "--device is tpu"),
        (["doctor", "--device", "tpu"], "--device is tpu"),
        (["test", "--device", "tpu"], "--device is tpu"),
        (["bench", "-m", "tiny", "--size", "16:9"], "--size is 16:9"),
        (["bench", "-m", "tiny", "--size", "32", "--runs", "0"], "runs is 0"),
    ],
)
def test_a_wrong_argument_is_one_sentence(arguments: list[str], said: str) -> None:
    assert said in run(*arguments, code=1)


def test_a_wrong_argument_as_json() -> None:
    assert "steps is 0" in json.loads(run("generate", "a", "64", "0", "-m", "tiny", "--json", code=1))["error"]


@pytest.mark.parametrize("arguments", [["paint"], ["generate"], ["generate", "a", "64", "many"]])
def test_a_wrong_command_line(arguments: list[str]) -> None:
    run(*arguments, code=2)


def test_without_typer_the_one_line_that_installs_it() -> None:
    code = "import sys, runpy; sys.modules['typer'] = None; runpy.run_module('nextstep_core', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and 'pip install "typer' in done.stderr and "Traceback" not in done.stderr
