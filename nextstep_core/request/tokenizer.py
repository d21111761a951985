"""The checkpoint's own tokenizer, from `tokenizer.json` and the special tokens that `tokenizer_config.json` names.

No class is taken from the checkpoint and none is guessed from its name, so no remote code can run and every version of
the library gives the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from ..errors import NextStepError, check_text, shown
from ..loading.documents import TOKENIZER, TOKENIZER_CONFIG, Documents
from ..model.config import NextStepConfig
from ..sentences import Sentence, Words, named
from .tokenizer_file import ADDED, check_token, checked

IMAGE_AREA = "<|image_area|>"
CONTEXT = 131_072  # tokens, where a config states none
# Text is bounded before it is counted, since to count a megabyte takes a second. In prose a token is some 4 bytes, in
# other scripts fewer; only a run of one character, such as thousands of spaces, is more than so many on average.
BYTES_PER_TOKEN = 16
LONGEST = 2**20  # bytes, whatever the context
FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


def context_of(config: NextStepConfig) -> int:
    """How many tokens of prompt and picture together the model can hold."""
    return config.max_position_embeddings or CONTEXT


@contextmanager
def _library(wrong: Sentence) -> Iterator[None]:
    """Whatever the library raises inside as a NextStepError that begins with `wrong`.

    It raises bare `Exception`, and where it panics something that is no `Exception`, which no caller is prepared for.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise NextStepError("{wrong} ({reason!r}).", wrong=wrong, reason=str(error)[:200]) from None


class NextStepTokenizer:
    """Text to ids and back, with what the prompt layout needs to know of the special tokens."""

    def __init__(self, backend: Any, bos_token: str | None, config: NextStepConfig) -> None:
        self._backend = backend
        self.bos_token = bos_token
        self._known, self._context = config.vocab_size, context_of(config)

    @classmethod
    def load(cls, documents: Documents, config: NextStepConfig) -> NextStepTokenizer:
        """From a checkpoint's documents; NextStepError when one is absent, damaged or of another model, or describes a
        tokenizer of a kind that no published checkpoint has."""
        from tokenizers import AddedToken, Tokenizer

        where, stated = documents.where(TOKENIZER), documents.where(TOKENIZER_CONFIG)
        parts = checked(documents.read(TOKENIZER), where)
        settings = documents.read(TOKENIZER_CONFIG)
        special = {
            name: _special(settings.get(name), Sentence("{where}: `{key}`", where=stated, key=name))
            for name in ("bos_token", "eos_token", "pad_token")
        }
        declared = _declared(settings.get("added_tokens_decoder") or {}, stated)
        with _library(Sentence("{where} is not a usable tokenizer; download the file again", where=where)):
            backend = Tokenizer.from_str(json.dumps(parts))
            backend.add_special_tokens([token for token in special.values() if token])
            backend.add_tokens(
                [AddedToken(token["content"], **{f: bool(token.get(f)) for f in FLAGS}) for token in declared]
            )
        tokenizer = cls(backend, special["bos_token"], config)
        tokenizer._check_special_tokens(config, where)
        return tokenizer

    def _check_special_tokens(self, config: NextStepConfig, where: Words) -> None:
        ids = [self._backend.token_to_id(IMAGE_AREA), config.boi, config.eoi, config.image_placeholder_id]
        texts = [IMAGE_AREA, *map(self.decode, ([i] for i in ids[1:]))]
        for token_id, text in zip(ids, texts):
            if token_id is None or not text or self.encode(text, special=False) != [token_id]:
                raise NextStepError(
                    "{where} does not know the special token {token} as the id {number} of config.json: the two "
                    "belong to different checkpoints.",
                    where=where,
                    token=shown(text or token_id),
                    number=token_id,
                )

    def check_length(self, name: Words, text: object) -> str:
        """The text; NextStepError for what is no text, or longer than any that fits the model's context."""
        limit = min(self._context * BYTES_PER_TOKEN, LONGEST)
        size = len(text) if isinstance(text, str) else 0
        if size <= limit:  # a character is a byte at least, so others need not even be written as bytes
            text = check_text(name, text)
            size = len(text.encode())
        if size > limit:
            raise NextStepError(
                "{name} is {size:,} bytes long; for this model, which can hold {context:,} tokens, the limit is "
                "{limit:,}. Shorten it.",
                name=named(name),
                size=size,
                context=self._context,
                limit=limit,
            )
        return cast(str, text)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of `text`, untruncated; `special` adds what the tokenizer's own post-processor adds.

        Takes a second for some megabytes: what a user wrote is first given to `check_length`.
        """
        with _library(Sentence("The tokenizer cannot read this text; shorten it")):
            ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=special)[0].ids
        if ids and max(ids) >= self._known:
            raise NextStepError(
                "The tokenizer gives the id {number}, but the model knows only {known} tokens: the two belong to "
                "different checkpoints.",
                number=max(ids),
                known=self._known,
            )
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens written out."""
        with _library(Sentence("The tokenizer cannot write these ids as text")):
            text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text


def _special(token: Any, where: Words) -> str | None:
    """A special token's text, which is stated as such or in an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return None if content is None else check_token(content, where)


def _declared(tokens: Any, where: Words) -> list[dict[str, Any]]:
    """What `added_tokens_decoder` declares, in the order of its ids."""
    where = Sentence("{where}: `{key}`", where=where, key="added_tokens_decoder")
    if not isinstance(tokens, dict) or len(tokens) > ADDED.maximum:
        raise NextStepError(
            "{where} is not an object of at most {most} tokens. Download the file again.",
            where=where,
            most=ADDED.maximum,
        )
    for number, token in tokens.items():
        if not (number.isascii() and number.isdecimal() and len(number) <= 10 and isinstance(token, dict)):
            raise NextStepError(
                "{where} has {token} for the id {number}. Download the file again.",
                where=where,
                token=shown(token),
                number=shown(number),
            )
        check_token(token.get("content"), where)
    return [token for _, token in sorted(tokens.items(), key=lambda item: int(item[0]))]
