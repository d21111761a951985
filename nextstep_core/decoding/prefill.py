"""Prompts that were read already: a run with another seed begins where the prompt ends."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

from ..model.kv_cache import KVCache


class PrefillCache:
    """Keys, values and last hidden states of recent prompts, in host memory, by the content of the prompt."""

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes that the entries hold."""
        return sum(kv.nbytes for kv, _ in self._entries.values())

    def restore(self, key: str, cache: KVCache) -> Tensor | None:
        """Fill the front of `cache` and return the last hidden state (B, hidden), or None when `key` is not here."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        kv, hidden = self._entries[key]
        cache.data[..., : kv.shape[-2], :] = kv.to(cache.data.device)
        return hidden.to(cache.data.device)

    def forget(self, key: str) -> None:
        """Have a prompt read anew the next time."""
        self._entries.pop(key, None)

    def store(self, key: str, cache: KVCache, length: int, hidden: Tensor) -> None:
        """Keep the first `length` positions of `cache`; the oldest entries go when the room is spent."""
        self._entries[key] = (cache.data[..., :length, :].to("cpu", copy=True), hidden.to("cpu", copy=True))
        while self.nbytes > self.max_bytes:
            self._entries.popitem(last=False)
