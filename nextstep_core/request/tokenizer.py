"""The checkpoint's own tokenizer, from `tokenizer.json` and the special tokens that `tokenizer_config.json` names.

No class is taken from the checkpoint and none is guessed from its name, so no remote code can run and every version of
transformers gives the same ids.
"""

from __future__ import annotations

from typing import Any

from ..errors import NextStepError
from ..loading.documents import TOKENIZER, TOKENIZER_CONFIG, Documents
from ..model.config import NextStepConfig

IMAGE_AREA = "<|image_area|>"


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


class NextStepTokenizer:
    """Text to ids and back, with what the prompt layout needs to know of the special tokens."""

    def __init__(self, backend: Any, bos_token: str | None) -> None:
        self._backend = backend
        self.bos_token = bos_token

    @classmethod
    def load(cls, documents: Documents, config: NextStepConfig) -> NextStepTokenizer:
        """From a checkpoint's documents; NextStepError when one is absent, damaged or of another model."""
        from transformers import AddedToken, PreTrainedTokenizerFast  # slow to import, so not at module level

        where = documents.where(TOKENIZER)
        documents.read(TOKENIZER)
        settings = documents.read(TOKENIZER_CONFIG)
        bos_token = _content(settings.get("bos_token"))
        try:
            with documents.as_file(TOKENIZER) as path:
                backend = PreTrainedTokenizerFast(
                    tokenizer_file=str(path),
                    bos_token=bos_token,
                    eos_token=_content(settings.get("eos_token")),
                    pad_token=_content(settings.get("pad_token")),
                    padding_side="left",
                    clean_up_tokenization_spaces=False,
                )
        except Exception as error:  # the tokenizers library raises bare Exception on a malformed file
            raise NextStepError(f"{where} is not a usable tokenizer ({error}). Download the file again.") from None
        flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
        declared = settings.get("added_tokens_decoder") or {}
        for _, token in sorted(declared.items(), key=lambda item: int(item[0])):
            backend.add_tokens([AddedToken(token["content"], **{f: bool(token.get(f)) for f in flags})])
        tokenizer = cls(backend, bos_token)
        tokenizer._check_special_tokens(config, where)
        return tokenizer

    def _check_special_tokens(self, config: NextStepConfig, where: str) -> None:
        ids = [self._backend.convert_tokens_to_ids(IMAGE_AREA), config.boi, config.eoi, config.image_placeholder_id]
        texts = [IMAGE_AREA, *map(self.decode, ([i] for i in ids[1:]))]
        for token_id, text in zip(ids, texts):
            if token_id is None or not text or self.encode(text, special=False) != [token_id]:
                raise NextStepError(
                    f"{where} does not know the special token {text or token_id!r} as the id {token_id} of "
                    "config.json: the two belong to different checkpoints."
                )

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of `text`, untruncated; `special` adds what the tokenizer's own post-processor adds."""
        return list(self._backend(text, truncation=False, add_special_tokens=special)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens written out."""
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text
