"""One file of a repository to a folder, going on within it where an earlier run stopped.

huggingface_hub's own downloads begin a file anew since its 2.0, and files here have gigabytes; so its function for a
single request is used, with the bytes that are there already.
"""

from __future__ import annotations

import os
from glob import escape
from pathlib import Path

UNFINISHED = Path(".cache") / "huggingface"  # below the folder; where huggingface_hub kept what was unfinished
SUFFIX = ".incomplete"


def fetch_file(repo_id: str, commit: str, path: str, size: int, content: str, folder: Path) -> None:
    """Fetch a file of `size` bytes, if it is not there in that size, to folder / path.

    `content` names what is in it, so that nothing goes on from another version's beginning. Raises what huggingface_hub
    raises.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, yet not in __all__

    target = folder / path
    if target.is_file() and target.stat().st_size == size:
        return
    part = folder / UNFINISHED / f"{path}.{content[:16]}{SUFFIX}"
    part.parent.mkdir(parents=True, exist_ok=True)
    for other in part.parent.glob(f"{escape(Path(path).name)}.*{SUFFIX}"):
        if other != part or other.stat().st_size > size:
            other.unlink()
    with part.open("ab") as file:
        there = file.seek(0, os.SEEK_END)
        if there < size:
            url = hf_hub_url(repo_id, path, revision=commit)
            http_get(url, file, resume_size=there, headers=build_hf_headers(), expected_size=size)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, target)
