"""What a user of the published archive would meet, checked before a version is published.

`python -m scripts.release_check` packs the files that `comfy node pack` would, installs them into an empty base
directory of a real ComfyUI, runs the first workflow there, and prints one line for each check. It ends with 1 when one
fails.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from scripts.comfy_server import ROOT, ComfyServer, find_comfyui, make_base, running_server

NEEDED = ("__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md", "CHANGELOG.md")
NEEDED_FOLDERS = (
    "nodes/",
    "nextstep_core/assets/tiny/",
    "nextstep_core/assets/night/",
    "web/docs/",
    "locales/",
    "example_workflows/",
    "example_pictures/",
)
UNWANTED = ("benchmarks/", "scripts/", "tests/", "training/", ".ci/", ".git")
LARGEST_MB = 30


class Failed(Exception):
    """A check that did not hold, with the reason."""


def ensure(holds: object, reason: str) -> None:
    """Raise Failed with `reason` unless `holds`."""
    if not holds:
        raise Failed(reason)


def requirements() -> str:
    """pip would change nothing in an environment that runs ComfyUI: this one."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "-r", str(ROOT / "requirements.txt")]
    pip = subprocess.run(command, capture_output=True, text=True)
    ensure(pip.returncode == 0, f"pip: {pip.stderr.strip()}")
    would = [line for line in pip.stdout.splitlines() if line.startswith("Would install")]
    ensure(not would, f"pip: {would}")
    return "pip would install nothing"


def pack_files(archive: Path) -> None:
    """Write the archive that `comfy node pack` would."""
    ensure((ROOT / ".git").exists(), "not a git checkout, so it cannot be told which files belong to the pack")
    command = "import sys; from comfy_cli.file_utils import zip_files; zip_files(sys.argv[1])"
    subprocess.run([sys.executable, "-c", command, str(archive)], cwd=ROOT, check=True, capture_output=True)


class ReleaseCheck:
    """The checks in their order; each returns what it found, or raises Failed."""

    def __init__(self, folder: Path, comfyui: Path, cleanup: ExitStack) -> None:
        self.folder, self.comfyui, self._cleanup = folder, comfyui, cleanup
        self.archive = folder / "node.zip"
        self.name = self.version = ""
        self.server: ComfyServer | None = None

    def metadata(self) -> str:
        """pyproject.toml as the registry reads it, and a changelog entry for its version."""
        from comfy_cli.registry.config_parser import extract_node_configuration

        config = extract_node_configuration(str(ROOT / "pyproject.toml"))
        ensure(config is not None, "pyproject.toml cannot be read")
        self.name, self.version = config.project.name, config.project.version
        ensure(re.fullmatch(r"\d+\.\d+\.\d+", self.version), f"version {self.version!r} is not major.minor.patch")
        for key, value in (
            ("supported_os", config.project.supported_os),
            ("PublisherId", config.tool_comfy.publisher_id),
        ):
            ensure(value, f"pyproject.toml: {key} is empty or was refused")
        ensure(
            f"\n## {self.version}" in (ROOT / "CHANGELOG.md").read_text(), f"CHANGELOG.md: no entry for {self.version}"
        )
        todo = "" if config.project.urls.repository else ", no repository address yet"
        return f"{self.name} {self.version} by {config.tool_comfy.publisher_id}{todo}"

    def pack(self) -> str:
        """The archive, with everything that is needed and nothing else."""
        pack_files(self.archive)
        names = zipfile.ZipFile(self.archive).namelist()
        for needed in NEEDED:
            ensure(needed in names, f"{needed} is not in the archive")
        for start in NEEDED_FOLDERS:
            ensure(any(name.startswith(start) for name in names), f"{start} is not in the archive")
        unwanted = [name for name in names if name.startswith(UNWANTED)]
        ensure(not unwanted, f"the archive holds {', '.join(unwanted[:3])}")
        size = self.archive.stat().st_size / 1e6
        ensure(size <= LARGEST_MB, f"the archive is {size:.1f} MB, more than {LARGEST_MB}")
        return f"{len(names)} files, {size:.1f} MB"

    def start(self) -> str:
        """ComfyUI with the unpacked archive where the registry's installers put it."""
        base = make_base(self.folder / "base", link=False)
        zipfile.ZipFile(self.archive).extractall(base / "custom_nodes" / self.name)
        self.server = self._cleanup.enter_context(running_server(self.comfyui, base))
        nodes = [name for name in self.server.call("/object_info") if name.startswith("NextStep")]
        ensure(nodes, f"the nodes are missing:\n{self.server.log.read_text()[-2000:]}")
        templates = self.server.call("/workflow_templates").get(self.name, [])
        ensure(templates, "the templates are missing")
        version = self.server.call("/system_stats")["system"]["comfyui_version"]
        return f"ComfyUI {version}, {len(nodes)} nodes, {len(templates)} templates"

    def first_run(self) -> str:
        """The first workflow gives a picture."""
        from PIL import Image

        from scripts.workflows import FIRST_RUN, read_workflow, to_prompt

        ensure(self.server, "ComfyUI did not start")
        workflow = read_workflow(FIRST_RUN)
        run = self.server.run(to_prompt(workflow, self.server.call("/object_info")), workflow)
        ensure(run.ended == "execution_success", run.events[-1][1].get("exception_message", run.ended))
        picture = Image.open(self.server.images(run)[0])
        return f"a picture of {picture.width}x{picture.height}"


def report(name: str, check: Callable[[], str]) -> bool:
    """Run one check and print its line; whether it held."""
    try:
        print(f"ok    {name}: {check()}", flush=True)
    except (Failed, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"FAIL  {name}: {error}", flush=True)
        return False
    return True


def main() -> int:
    comfyui = find_comfyui()
    if comfyui is None:
        print("FAIL  ComfyUI: none found; set COMFYUI_PATH to a checkout of it")
        return 1
    with tempfile.TemporaryDirectory() as folder, ExitStack() as cleanup:
        check = ReleaseCheck(Path(folder), comfyui.resolve(), cleanup)
        checks = {
            "metadata": check.metadata,
            "archive": check.pack,
            "requirements": requirements,
            "installed": check.start,
            "first run": check.first_run,
        }
        held = [report(name, run) for name, run in checks.items()]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
