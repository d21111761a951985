"""What the README says is what there is: error messages word for word, links, and every workflow and node."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from sentences_in_source import said_in

from nextstep_core.sampling.solvers import SAMPLERS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
VALUES = re.compile(r"…(\s…)+")
PLACE = re.compile(r"{[^{}]+}")


def texts() -> list[str]:
    """Every sentence of the code, with … where a value is filled in."""
    files = (*ROOT.glob("nextstep_core/**/*.py"), *ROOT.glob("nodes/**/*.py"))
    said = (said for path in files for said in said_in(path.read_text(encoding="utf-8"), path.name))
    return [VALUES.sub("…", PLACE.sub("…", one.template)) for one in said]


def test_troubleshooting_quotes_the_code() -> None:
    section = README[README.index("## Troubleshooting") :]
    messages = re.findall(r"^\| `(.+?)` \|", section, flags=re.MULTILINE)
    assert messages
    spoken = texts()
    assert not [message for message in messages if not any(message in text for text in spoken)]


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        "BENCHMARKS.md",
        "CHANGELOG.md",
        "docs/samplers.md",
        "docs/single-files.md",
        "docs/gguf.md",
        "docs/products.md",
        "docs/publishing.md",
    ],
)
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", text)
    headings = {re.sub(r"[^a-z0-9]+", "-", line.lower()) for line in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)}
    for target in (unquote(a or b) for a, b in targets):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif "://" not in target:
            assert (ROOT / document).parent.joinpath(target).exists(), target


def test_one_can_read_it_at_a_sitting() -> None:
    assert len(README.splitlines()) < 180


def test_every_sampler_is_measured() -> None:
    page = (ROOT / "docs" / "samplers.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| ([\w.-]+) \|", page, flags=re.MULTILINE)[2:] == list(SAMPLERS), "below the head"


def test_every_workflow_and_node_is_named() -> None:
    assert not [path.stem for path in ROOT.glob("example_workflows/*.json") if f"<b>{path.stem}</b>" not in README]
    titles = [
        page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ") for page in ROOT.glob("web/docs/*.md")
    ]
    assert titles and not [title for title in titles if title not in README]
