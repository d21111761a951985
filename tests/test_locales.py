"""Whatever is said to a user is there in every language, with the same values in it, and not much longer."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import pytest
from sentences_in_source import faults, has_words, places, said_in, titles_in

from scripts import templates

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = ("ja", "ko", "zh")
SHIPPED = [*sorted((ROOT / "nextstep_core").rglob("*.py")), *sorted((ROOT / "nodes").rglob("*.py"))]
SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in SHIPPED}
SAID = {said.template: said for file, text in SOURCES.items() for said in said_in(text, file)}
TITLES = {node: title for text in SOURCES.values() for node, title in titles_in(text).items()}
LENGTH, SPARE = 1.6, 10  # times the English, and columns that a short word may have beside
WORDLESS = "{some} {one}"  # how sentences follow one another


def of(language: str, file: str) -> dict:
    return json.loads((ROOT / "locales" / language / file).read_text(encoding="utf-8"))


def columns(text: str) -> int:
    """How wide a text is, in letters of the Latin alphabet."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


@pytest.mark.parametrize("file", SOURCES)
def test_every_sentence_in_the_source_can_be_translated(file: str) -> None:
    assert not faults(SOURCES[file], file)


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_sentence_is_missing_and_none_is_stale(language: str) -> None:
    known = of(language, "sentences.json")
    assert len(SAID) > 200
    missing = [f"{said.file}:{said.line} {said.template!r}" for said in SAID.values() if said.template not in known]
    assert not missing, f"to be translated in locales/{language}/sentences.json"
    assert set(known) - set(SAID) <= {WORDLESS}, "no longer said"


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_translation_has_the_values_of_its_sentence(language: str) -> None:
    other = [text for text, said in of(language, "sentences.json").items() if places(said) != places(text)]
    assert not other


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_translation_is_about_as_long(language: str) -> None:
    sentences = of(language, "sentences.json").items()
    long = {text: said for text, said in sentences if columns(said) > LENGTH * columns(text) + SPARE}
    assert not long


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_node_is_called_as_the_language_shows_it(language: str) -> None:
    shown = {TITLES[node]: told["display_name"] for node, told in of(language, "nodeDefs.json").items()}
    assert set(shown) == set(TITLES.values()) and len(shown) > 15
    other = [
        (text, title)
        for text, said in of(language, "sentences.json").items()
        for title in shown
        if title in text and shown[title] not in said
    ]
    assert not other


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_input_has_one_label_in_all_nodes(language: str) -> None:
    """A message names an input without its node."""
    labels: dict[str, set[str]] = {}
    for node in of(language, "nodeDefs.json").values():
        for name, told in node["inputs"].items():
            labels.setdefault(name, set()).add(told["name"])
    assert not {name: told for name, told in labels.items() if len(told) > 1}


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_label_has_no_sign_that_the_frontend_takes_for_syntax(language: str) -> None:
    """It fills in {name}, chooses among texts with | between them, and follows @; see vue-i18n's message format."""
    text = (ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8")
    texts = re.findall(r'"(?:[^"\\]|\\.)*"', text)
    assert not [one for one in texts if set(one) & set("{}|@")]


FAULTY = {
    "NextStepError(f'{name} is wrong.')": "not written out",
    "NextStepError('a' + reason)": "not written out",
    "NextStepError(reason)": "not written out",
    "NextStepError()": "not written out",
    "errors.NextStepError(reason)": "not written out",
    "Sentence('{} is wrong.', name)": "not written out",
    "OutOfMemory('{name} is wrong.')": "the places",
    "NextStepError('{name} is wrong.', value=1)": "the places",
    "NextStepError('{name.upper} is wrong.', name=1)": "the places",
    "NextStepError('{0} is wrong.', name=1)": "the places",
    "NextStepError('{name is wrong.', name=1)": "the places",
    "NextStepError('{name} is wrong.', **values)": "the places",
    "Range('the number of tokens', 1, 2)": "a phrase",
    "check_choice(f'{where}: a key', key, known)": "a phrase",
}
SOUND = (
    "NextStepError('{name} is {value:,}, not {value!r}.', name=1, value=2)",
    "NextStepError('A mask holds NaN.')",
    "NextStepError('Write {\"width\": 640}.')",
    "NextStepError.of(sentence)",
    "Range('steps', 1, 2)",
    "ValueError(f'{name} is wrong.')",
)


@pytest.mark.parametrize("source", FAULTY)
def test_each_rule_is_seen_to_fail(source: str) -> None:
    (fault,) = faults(source, "nodes/x.py")
    assert FAULTY[source] in fault


@pytest.mark.parametrize("source", SOUND)
def test_what_can_be_translated_is_allowed(source: str) -> None:
    assert not faults(source, "nodes/x.py")


def test_what_is_to_be_translated_is_told_from_what_is_not() -> None:
    assert has_words("{least} to {most}") and not has_words("{some}: `{one}` 1/2")
    assert places("{a:,} {{x}} {b!r}") == {("a", "", ","), ("b", "r", "")}


PAGES = sorted((ROOT / "web" / "docs").glob("*.md"))
IMAGE, LINK = re.compile(r"!\[[^\]]*\]\(([^)]*)\)"), re.compile(r"(?<!!)\[[^\]]*\]\(([^)]*)\)")
CODE, ENVIRONMENT = re.compile(r"`([^`\n]+)`"), re.compile(r"\b[A-Z]+_[A-Z_]+\b")


def form_of(page: str) -> dict[str, list]:
    """What a page consists of in any language, in order."""
    lines = page.splitlines()
    return {
        "headings": [len(line) - len(line.lstrip("#")) for line in lines if line.startswith("#")],
        "rows of tables": [line.count("|") for line in lines if line.startswith("|")],
        "bold words": [line.startswith("**") for line in lines if "**" in line],
        "fences": [line for line in lines if line.startswith("```")],
        "pictures": IMAGE.findall(page),
        "links": LINK.findall(page),
    }


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_help_page_has_the_same_parts_in_every_language(page: Path, language: str) -> None:
    english = page.read_text(encoding="utf-8")
    said = (page.parent / page.stem / f"{language}.md").read_text(encoding="utf-8")
    nodes = of(language, "nodeDefs.json")
    assert said.startswith(f"# {nodes[page.stem]['display_name']}\n")
    assert form_of(said) == form_of(english)
    sockets = {name for node in nodes.values() for name in node["inputs"]} | {"prompt", "image", "text", "folder"}
    kept = {word for word in CODE.findall(english) if word not in sockets} | set(ENVIRONMENT.findall(english))
    assert not [word for word in kept if word not in said], "what is typed or chosen stays as it is"
    shown = {TITLES[node]: told["display_name"] for node, told in nodes.items()}
    assert not [title for title in shown if title in english and shown[title] not in said]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_help_page_calls_inputs_by_their_labels(page: Path, language: str) -> None:
    said = (page.parent / page.stem / f"{language}.md").read_text(encoding="utf-8")
    first = " ".join(line.split("|")[1] for line in said.splitlines() if line.startswith("|"))
    labels = [told["name"] for told in of(language, "nodeDefs.json")[page.stem]["inputs"].values()]
    missing = [label for label in labels if label not in first]
    assert not missing or " ... " in first


def test_no_help_page_is_of_a_node_that_is_gone() -> None:
    there = {path.relative_to(ROOT / "web" / "docs").as_posix() for path in (ROOT / "web" / "docs").glob("*/*")}
    assert there == {f"{page.stem}/{language}.md" for page in PAGES for language in LANGUAGES}
    assert {page.stem for page in PAGES} == set(TITLES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_notes_of_all_templates_are_there(language: str) -> None:
    notes = {"fetches": templates.FETCHES} | templates.NOTES
    known = of(language, "notes.json")
    assert list(known) == list(notes)
    shown = {TITLES[node]: told["display_name"] for node, told in of(language, "nodeDefs.json").items()}
    for name, note in notes.items():
        said = known[name]
        english = note.split("\n|")[0]  # a table of numbers is the same for all
        assert columns(said) <= LENGTH * columns(english), name
        assert CODE.findall(said) == CODE.findall(english), name
        assert places(said) == places(english), name
        own = [title for title in shown if f"**{title}**" in english and title not in templates_by_name()]
        assert not [title for title in own if shown[title] not in said], name


def templates_by_name() -> set[str]:
    return {make().name for make in templates.TEMPLATES}


WRITTEN = [*(ROOT / "web" / "docs").rglob("*.md"), *(ROOT / "locales").glob("*/notes.json")]


def not_bold(line: str) -> list[str]:
    """The stars of a line that Markdown leaves as they are: those between a letter outside and a sign inside, where
    English has a space."""
    line = CODE.sub("`", line)
    runs = [match.span() for match in re.finditer(r"\*+", line)]
    beside = [(line[:start][-1:], line[stop:][:1]) for start, stop in runs]
    sides = [(after, before) if n % 2 == 0 else (before, after) for n, (before, after) in enumerate(beside)]
    return [f"{inside}*{outside}" for inside, outside in sides if outside.isalnum() and not inside.isalnum()]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_bold_words_are_shown_bold(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").replace("\\n", "\n").splitlines()
    assert all(line.count("**") % 2 == 0 for line in lines)
    assert not [fault for line in lines for fault in not_bold(line)]


def test_stars_that_stay_are_seen() -> None:
    assert not not_bold("**下载 29 GB（大）** 到 **运行**和*列数*，（*Any*）。") and not_bold("**下载（大）**到")
    assert not_bold("之后的*“保存”*节点") and not_bold("크기는 *672 (21:12)*처럼")
