"""ComfyUI's folders and the files in them: models, inputs, outputs, and names that must stay inside."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from glob import escape
from pathlib import Path

import folder_paths

from ...nextstep_core.errors import NextStepError, check_text, shown
from ...nextstep_core.loading.files import can_be_shown
from ...nextstep_core.loading.lora_file import SUFFIXES

log = logging.getLogger(__name__)

MODEL_FOLDER, LORA_FOLDER = "nextstep", "loras"


def register_model_folder() -> None:
    """Make `models/nextstep` (or wherever extra_model_paths.yaml points that name) known to the host."""
    folder_paths.add_model_folder_path(MODEL_FOLDER, os.path.join(folder_paths.models_dir, MODEL_FOLDER))


def user_folder() -> Path:
    """Where the host keeps what belongs to its users."""
    return Path(folder_paths.get_user_directory())


def model_roots() -> list[Path]:
    """The folders in which NextStep checkpoints are looked for."""
    return [Path(root) for root in folder_paths.get_folder_paths(MODEL_FOLDER)]


def single_file_roots() -> list[Path]:
    """The folders in which single files are looked for beside the NextStep folders."""
    return [Path(root) for root in folder_paths.get_folder_paths("diffusion_models")]


def vae_roots() -> list[Path]:
    """The folders in which VAE files are looked for."""
    return [Path(root) for root in folder_paths.get_folder_paths("vae")]


def lora_names() -> list[str]:
    """The host's LoRA files of the kinds that are read here, as its own loader lists them."""
    return [n for n in folder_paths.get_filename_list(LORA_FOLDER) if n.endswith(SUFFIXES) and can_be_shown(n)]


def lora_file(name: str) -> Path | None:
    """Where a file of this list lies; None for any other name."""
    path = folder_paths.get_full_path(LORA_FOLDER, name) if name in lora_names() else None
    return None if path is None else Path(path)


def last_saved_latent(filename_prefix: str) -> Path | None:
    """The file that the host's Save Latent wrote last under this name; NextStepError for a name that cannot be one."""
    folder, name, *_ = _place_to_save(filename_prefix)
    files = Path(folder).glob(f"{escape(name)}_*_.latent")
    return max(files, key=lambda file: file.name, default=None)


def check_name(filename_prefix: str) -> None:
    """NextStepError for a name of files to save that leads out of the host's output folder."""
    root = os.path.abspath(folder_paths.get_output_directory())
    folder = os.path.abspath(os.path.join(root, os.path.dirname(os.path.normpath(filename_prefix))))
    try:
        inside = "\0" not in filename_prefix and os.path.commonpath([root, folder]) == root
    except ValueError:  # another drive
        inside = False
    if not inside:
        raise _not_inside(filename_prefix)


def _not_inside(filename_prefix: str) -> NextStepError:
    return NextStepError(
        "filename_prefix {value} is not a name inside ComfyUI's output folder.", value=shown(filename_prefix)
    )


def _place_to_save(filename_prefix: str, width: int = 0, height: int = 0) -> tuple[str, str, int, str, str]:
    """(folder, name, count, folder below the output folder, prefix) as the host's savers have it; NextStepError for a
    prefix that leads out of the output folder."""
    try:
        root = folder_paths.get_output_directory()
        place: tuple[str, str, int, str, str] = folder_paths.get_save_image_path(filename_prefix, root, width, height)
    except OSError as error:
        raise NextStepError("ComfyUI's output folder cannot be written to ({reason}).", reason=error) from None
    except Exception:  # the host has no kind of its own for a name outside its folder
        raise _not_inside(filename_prefix) from None
    return place


def output_folder(name: str) -> Path:
    """A folder below the host's output folder; NextStepError for a name that leads out of it."""
    check_text("folder", name)
    try:
        root = Path(folder_paths.get_output_directory()).resolve()
        folder = (root / name).resolve()
        inside = folder.is_relative_to(root) and folder != root
    except (OSError, RuntimeError, ValueError):  # what can be no name, or a circle of links
        inside = False
    if not inside:
        raise NextStepError(
            "folder is {name}; write a name for a folder inside ComfyUI's output folder.", name=shown(name)
        )
    return folder


def shown_output(path: Path) -> dict[str, str]:
    """How the frontend is told of a file below the output folder."""
    below = path.relative_to(Path(folder_paths.get_output_directory()).resolve())
    return {"filename": below.name, "subfolder": below.parent.as_posix().removeprefix("."), "type": "output"}


def input_files(*endings: str) -> list[str]:
    """Names of the files with these endings that lie in the host's input folder itself."""
    try:
        found = sorted(os.listdir(folder_paths.get_input_directory()))
    except OSError:
        return []
    return [name for name in found if name.lower().endswith(endings) and can_be_shown(name)]


def input_file(name: str) -> Path:
    """The path of such a file; NextStepError for a name that is none of the input folder's."""
    check_text("file", name)
    if Path(name).name != name or name in ("", ".."):
        raise NextStepError("{name} is not the name of a file in ComfyUI's input folder.", name=shown(name))
    return input_folder() / name


def input_folder() -> Path:
    """Where the host keeps what its users bring."""
    return Path(folder_paths.get_input_directory())


@dataclass(frozen=True)
class OutputFile:
    """A new file in the host's output folder, and how its frontend is told of it."""

    path: Path
    shown: dict[str, str]


def new_files(filename_prefix: str, width: int, height: int, count: int, suffix: str) -> list[OutputFile]:
    """The next free names under a prefix, as the host's Save Image counts; NextStepError for any outside its folder."""
    folder, name, first, subfolder, _ = _place_to_save(filename_prefix, width, height)
    names = [f"{name.replace('%batch_num%', str(n))}_{first + n:05}_{suffix}" for n in range(count)]
    return [OutputFile(Path(folder) / n, {"filename": n, "subfolder": subfolder, "type": "output"}) for n in names]


def offer_pictures(folder: Path) -> None:
    """Put the pictures of a folder where the host's Load Image finds them. What is there already stays as it is.

    A disk that fails leaves no half a picture, and none of this keeps the pack from loading.
    """
    for picture in folder.glob("*"):
        target = Path(folder_paths.get_input_directory()) / picture.name
        ours = False
        try:
            with target.open("xb") as file:
                ours = True
                file.write(picture.read_bytes())
        except OSError as error:  # there already, a folder that one can only read, or a full disk
            log.debug("%s was not written: %s", target, error)
            if ours:
                target.unlink(missing_ok=True)
