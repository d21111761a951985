"""Other people's tools for ComfyUI, each used on this pack as its users do, and none may find anything.

`python -m scripts.clients`, in the environment of a ComfyUI, packs the committed files as they are published, puts them
into an empty ComfyUI folder, and prints one line for each tool. It ends with 1 when one finds something. The tools go
into an environment of their own, `.venv-clients`, from PyPI; nothing else uses the network. comfy-test also needs a
chromium that is installed already.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

from scripts.comfy_server import PACK_NAME, ROOT, ComfyServer, find_comfyui, make_base, running_server
from scripts.release_check import Failed, ensure, pack_files, report
from scripts.workflows import ALL, FIRST_RUN, ON_EMBEDDED, read_workflow, to_prompt

ENVIRONMENT = ROOT / ".venv-clients"
TOOLS = (
    "comfy-cli>=1.23", "comfy-lint>=0.1", "comfy-script[runtime,transpile]>=0.6.1", "comfy-import-guard>=1.3",
    "comfy-test>=0.4.15", "playwright>=1.45", "pillow>=10",
)  # fmt: skip
SMALL = {"width": 64, "height": 48, "steps": 2, "base": "256", "vae_name": ON_EMBEDDED["model_name"]}
PATIENCE = 600  # seconds for one tool
# What comfy-test's levels say that does not stop it, each with why it stays.
ACCEPTED = {
    "torch.load()": "with weights_only, of an archive that was checked before; the engine runs without ComfyUI too",
    "torch.cuda.empty_cache()": "by the engine without a host, which does the same for Apple's devices",
    "weights": "the embedded model, so that the first workflow needs no download",
    "hardcoded-precision": "the packed products take bf16, and so does the pipeline where no host chooses",
    "cache-clear-in-loop": "between one size of tiles that ran out of memory and the next",
}
SPOKEN = re.compile(r"\[(?:warnings|hazards)\] ([\w-]+) --|Line \d+: (torch[\w.]+\(\))")
# As `comfy-test` on the command line, with the installed browser in place of one that is downloaded, and no apt-get.
COMFY_TEST = """
import sys
from playwright.sync_api import BrowserType
from comfy_test.cli import main
from comfy_test.reporting import screenshot
launch, browser = BrowserType.launch, sys.argv.pop(1)
BrowserType.launch = lambda self, **options: launch(self, executable_path=browser, **options)
screenshot._ensure_mesa_linux = lambda log: False
sys.exit(main())
"""


def make_environment(folder: Path) -> Path:
    """The folder with the tools' commands; they are installed where one is missing, or any was asked for anew."""
    wanted, stated = "\n".join(TOOLS), folder / "tools.txt"
    if not stated.exists() or stated.read_text() != wanted:
        print(f"Installing {', '.join(TOOLS)} in {folder} ...", flush=True)
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *TOOLS], check=True)
        stated.write_text(wanted)
    return folder / "bin"


def unexpected(said: str) -> list[str]:
    """What comfy-test remarked on that is not among ACCEPTED."""
    found = ("".join(groups) for groups in SPOKEN.findall(said))
    return sorted({name for name in found if name not in ACCEPTED})


def browser() -> str:
    """The command of an installed browser."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise Failed("no browser found: install chromium")
    return found


class Clients:
    """The tools in turn, on one running server; each returns what it did, or raises Failed."""

    def __init__(self, tools: Path, comfyui: Path, base: Path, server: ComfyServer) -> None:
        self.tools, self.comfyui, self.base, self.server = tools, comfyui, base, server
        self.folder, self.url = base.parent, f"http://127.0.0.1:{server.port}"
        self.pack = base / "custom_nodes" / PACK_NAME
        self.prompts = self._prompts()

    def _prompts(self) -> list[Path]:
        """The templates in API form, small and on the embedded model."""
        object_info, folder = self.server.call("/object_info"), self.folder / "prompts"
        folder.mkdir()
        for path in ALL:
            prompt = to_prompt(read_workflow(path), object_info, **ON_EMBEDDED, **SMALL)
            (folder / path.with_suffix(".json").name).write_text(json.dumps(prompt))
        return sorted(folder.iterdir())

    def _run(self, *command: object, cwd: Path | None = None, **environment: str) -> str:
        """What a command said; Failed, with its end, when it ends with anything but 0."""
        quiet = {"DO_NOT_TRACK": "1", "HOME": str(self.folder), "PIP_NO_INDEX": "1"}
        ended = subprocess.run(
            list(map(str, command)), cwd=cwd or self.folder, env=os.environ | quiet | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE,
        )  # fmt: skip
        ensure(ended.returncode == 0, f"ended with {ended.returncode}\n{ended.stdout[-4000:]}")
        return ended.stdout

    def _drawn(self) -> int:
        """How many prompts the server has finished; Failed when one of them did not succeed."""
        history = self.server.call("/history")
        bad = [entry["status"] for entry in history.values() if entry["status"]["status_str"] != "success"]
        ensure(not bad, json.dumps(bad)[-2000:])
        return len(history)

    def lint(self) -> str:
        """comfy-lint: every template against the server's nodes, warnings as errors."""
        self._run(self.tools / "comfy-lint", "--strict", "--server", self.url, *self.prompts)
        return f"{len(self.prompts)} templates"

    def cli(self) -> str:
        """comfy run: a template as it is saved, which it converts, and the others small."""
        for workflow in (FIRST_RUN, *self.prompts):
            command = self.tools / "comfy", "--skip-prompt", "--json", "run", "--workflow", workflow, "--wait"
            said = self._run(*command, "--host", "127.0.0.1", "--port", self.server.port, "--timeout", 120)
            answer = json.loads(said.splitlines()[-1])
            ensure(answer["ok"] and answer["data"]["outputs"], said[-2000:])
        return f"{len(self.prompts) + 1} runs"

    def script(self) -> str:
        """comfy-script: every template to a Python script, which then draws."""
        for prompt in self.prompts:
            python = self.tools / "python"
            script = self._run(python, "-m", "comfy_script.transpile", "--runtime", "--api", self.url, prompt)
            script = script.replace("\nload()", f"\nload({self.url!r})")
            script = script.replace("with Workflow():", "with Workflow(wait=True):").replace("    # _ = ", "    _ = ")
            file, before = self.folder / "script.py", self._drawn()
            file.write_text(script)
            self._run(python, file)
            ensure(self._drawn() == before + 1, f"{prompt.stem} drew nothing:\n{script}")
        return f"{len(self.prompts)} scripts"

    def import_guard(self) -> str:
        """comfy-import-guard: every name and call of ComfyUI that the pack uses is in this one; warnings as errors."""
        cache = self.folder / "comfy-import-guard"
        clone = cache / "ComfyUI"  # it asks git what is there
        for file in self.comfyui.rglob("*.py"):
            place = clone / file.relative_to(self.comfyui)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
        git = "git", "-c", "user.name=clients", "-c", "user.email=clients@localhost"
        self._run(*git, "init", "--quiet", cwd=clone)
        self._run(*git, "add", "--all", "--force", cwd=clone)
        self._run(*git, "commit", "--quiet", "--message", "this ComfyUI", cwd=clone)
        command = (
            self.tools / "comfy-import-guard",
            "--cache-dir",
            cache,
            "--offline",
            "check",
            "--comfy-dir",
            self.base,
        )
        said = self._run(*command, "--target", "HEAD", "--no-update", "--strict")
        ensure(f"{PACK_NAME}  SAFE" in said, said)
        (references,) = re.findall(r"(\d+) comfy\.\* reference", said)
        ensure(int(references) > 0, said)
        return f"{references} references"

    def test(self) -> str:
        """comfy-test: the levels that comfy-test.toml names."""
        workflows, logs = self.pack / "workflows", self.folder / "logs"
        workflows.mkdir()
        logs.mkdir()
        for path in ALL:
            (workflows / path.name).write_text(json.dumps(small(read_workflow(path))))
        shutil.copy(ROOT / "comfy-test.toml", self.pack)
        shutil.copy(self.server.log, logs)
        command = self.tools / "python", "-c", COMFY_TEST, browser(), "run", "--server-url", self.url
        said = self._run(*command, cwd=self.pack, COMFY_TEST_LOGS_DIR=str(logs))
        ensure(not unexpected(said), f"{', '.join(unexpected(said))}\n{said}")
        passed = re.findall(r"^\[(\w+)\] PASSED", said, flags=re.MULTILINE)
        return ", ".join(level.lower() for level in passed)


def small(workflow: dict) -> dict:
    """A template as the frontend saves it, on the embedded model and quick."""
    for node in workflow["nodes"]:
        names = [socket["name"] for socket in node.get("inputs", []) if "widget" in socket]
        if "seed" in names:
            names.insert(names.index("seed") + 1, "what happens to the seed after a run")
        for name, value in {**ON_EMBEDDED, **SMALL}.items():
            if name in names:
                node["widgets_values"][names.index(name)] = value
    return workflow


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts.clients", description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", help="one of the tools; may be repeated")
    options = parser.parse_args()
    comfyui = find_comfyui()
    if comfyui is None:
        print("FAIL  ComfyUI: none found; set COMFYUI_PATH to a checkout of it")
        return 1
    comfyui, tools = comfyui.resolve(), make_environment(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as name:
        base = make_base(Path(name) / "ComfyUI", link=False)
        archive = Path(name) / "node.zip"
        pack_files(archive)
        zipfile.ZipFile(archive).extractall(base / "custom_nodes" / PACK_NAME)
        for entry in comfyui.iterdir():  # comfy-test looks for the pack inside a whole ComfyUI
            if not (base / entry.name).exists():
                (base / entry.name).symlink_to(entry)
        with running_server(comfyui, base) as server:
            clients = Clients(tools, comfyui, base, server)
            checks = {
                "comfy-lint": clients.lint,
                "comfy run": clients.cli,
                "comfy-script": clients.script,
                "comfy-import-guard": clients.import_guard,
                "comfy-test": clients.test,
            }
            held = [report(name, run) for name, run in checks.items() if not options.only or name in options.only]
    return 0 if held and all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
