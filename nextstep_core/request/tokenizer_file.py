"""Which tokenizers are read: byte-level BPE in the few forms that published checkpoints have, and of a bounded size.

The library builds whatever a `tokenizer.json` describes, and a description can be a pattern that takes years to match.
So a part of another kind is refused by its name before the library sees it, and nothing is handed over but what was
checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..errors import NextStepError, check_text, shown
from ..ranges import Range
from ..sentences import Sentence, Words

# Where text is split into words: the patterns of Qwen2 and of Llama 3, letter by letter.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = (_WORDS + r"\p{N}" + _REST, _WORDS + r"\p{N}{1,3}" + _REST)

# More than published checkpoints have: 152 thousand tokens, the longest of 128 bytes, and 30 added ones. Others have
# 280 thousand merges. So many take 200 MB while they are read.
VOCABULARY = Range(Sentence("the number of tokens"), 1, 200_000)
MERGES = Range(Sentence("the number of merges"), 0, 300_000)
ADDED = Range(Sentence("the number of added tokens"), 0, 1_000)
TOKEN_LENGTH = 256
PARTS = 8  # of a sequence of steps, or of a template

Check = Callable[[Mapping[str, Any]], bool]


def _has_known_pattern(part: Mapping[str, Any]) -> bool:
    return any(part.get("pattern") == {"Regex": pattern} for pattern in PATTERNS)


def _is_short_template(part: Mapping[str, Any]) -> bool:
    specials = part.get("special_tokens")
    if not isinstance(specials, dict) or len(specials) > PARTS:
        return False
    ids = [special.get("ids") if isinstance(special, dict) else None for special in specials.values()]
    return all(isinstance(some, list) and len(some) <= PARTS for some in (part.get("single"), part.get("pair"), *ids))


def _any(part: Mapping[str, Any]) -> bool:
    return True


# The kinds of each part of a tokenizer, and what is asked of them besides.
KINDS: dict[str, dict[str, Check]] = {
    "normalizer": {"NFC": _any},
    "pre_tokenizer": {"ByteLevel": _any, "Split": _has_known_pattern},
    "post_processor": {"ByteLevel": _any, "TemplateProcessing": _is_short_template},
    "decoder": {"ByteLevel": _any},
}
# How a sequence of several is written down.
SEQUENCES = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}


def checked(data: dict[str, Any], where: Words) -> dict[str, Any]:
    """The parts of a parsed `tokenizer.json` that make a tokenizer; NextStepError names what is not accepted.

    Truncation and padding are left out: what a caption's ids are does not hang on them.
    """
    for name, kinds in KINDS.items():
        part = data.get(name)
        steps: Any = [] if part is None else [part]
        if isinstance(part, dict) and part.get("type") == "Sequence":
            steps = part.get(SEQUENCES.get(name, ""))
        if not isinstance(steps, list) or len(steps) > PARTS:
            raise NextStepError(
                "{where}: its {name} is not a sequence of at most {most} steps. {advice}",
                where=where,
                name=name,
                most=PARTS,
                advice=_ADVICE,
            )
        for step in steps:
            _check_step(name, step, kinds, where)
    model, added = _checked_model(data.get("model"), where), data.get("added_tokens") or []
    if not isinstance(added, list):
        raise NextStepError(
            "{where}: `added_tokens` is {what}, not a list. {advice}", where=where, what=shown(added), advice=_ADVICE
        )
    _count(ADDED, added, where)
    for token in added:
        if not isinstance(token, dict):
            raise NextStepError(
                "{where}: an added token is {token}. {advice}", where=where, token=shown(token), advice=_ADVICE
            )
        check_token(token.get("content"), where)
    _check_ids({**model["vocab"], **{token["content"]: token.get("id") for token in added}}, where)
    return {"version": "1.0", "added_tokens": added, "model": model} | {name: data.get(name) for name in KINDS}


_ADVICE = Sentence("Use the tokenizer of a published NextStep checkpoint.")


def _check_step(name: str, step: Any, kinds: dict[str, Check], where: Words) -> None:
    kind = step.get("type") if isinstance(step, dict) else step
    check = kinds.get(kind) if isinstance(kind, str) else None
    if check is None:
        raise NextStepError(
            "{where}: its {name} is {kind}; only {known} can be used here. {advice}",
            where=where,
            name=name,
            kind=shown(kind),
            known=", ".join(kinds),
            advice=_ADVICE,
        )
    if not check(step):
        raise NextStepError(
            "{where}: its {name} {kind} has an unknown pattern or template. {advice}",
            where=where,
            name=name,
            kind=kind,
            advice=_ADVICE,
        )


def _checked_model(model: Any, where: Words) -> dict[str, Any]:
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else model
        raise NextStepError(
            "{where}: its model is {kind}; only BPE can be used here. {advice}",
            where=where,
            kind=shown(kind),
            advice=_ADVICE,
        )
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocabulary, dict) or not isinstance(merges, list):
        raise NextStepError("{where} has no vocabulary and merges. {advice}", where=where, advice=_ADVICE)
    _count(VOCABULARY, vocabulary, where)
    _count(MERGES, merges, where)
    if model.get("dropout"):
        raise NextStepError(
            "{where}: its model drops merges at random, so the same prompt would be read differently each time.",
            where=where,
        )
    for token in vocabulary:
        check_token(token, where)
    return model


def _count(limit: Range[int], some: Any, where: Words) -> None:
    replace(limit, name=Sentence("{where}: {what}", where=where, what=limit.name)).check(len(some))


def check_token(token: Any, where: Words) -> str:
    """A token's text; NextStepError when it is none or too long for one."""
    text = check_text(Sentence("{where}: a token", where=where), token)
    if len(text) > TOKEN_LENGTH:
        raise NextStepError(
            "{where}: the token {token} is longer than {most}. {advice}",
            where=where,
            token=shown(text),
            most=TOKEN_LENGTH,
            advice=_ADVICE,
        )
    return text


def _check_ids(ids: dict[str, Any], where: Words) -> None:
    owners: dict[int, str] = {}
    for token, number in ids.items():
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**31:
            raise NextStepError(
                "{where}: the id of {token} is {number}. {advice}",
                where=where,
                token=shown(token),
                number=shown(number),
                advice=_ADVICE,
            )
        if owners.setdefault(number, token) != token:
            raise NextStepError(
                "{where}: {token} and {other} have the same id {number}. {advice}",
                where=where,
                token=shown(token),
                other=shown(owners[number]),
                number=number,
                advice=_ADVICE,
            )
