"""Prompts that were read already: a run with another seed begins where the prompt ends."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

from ..model.kv_cache import KVCache
from ..runtime.devices import host_bytes

MOST, LEAST = 1 << 30, 1 << 28  # bytes
SHARE = 32  # one part in so many of the computer's memory


def fitting_bytes() -> int:
    """How much of this computer's memory prompts may take: a small part of it, and never more than a gigabyte."""
    return max(LEAST, min(MOST, (host_bytes() or 0) // SHARE))


class PrefillCache:
    """Keys, values and last hidden states of recent prompts, in host memory, by the content of the prompt."""

    def __init__(self, max_bytes: int | None = None) -> None:
        """`max_bytes` None is what suits the computer."""
        self.max_bytes = fitting_bytes() if max_bytes is None else max_bytes
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
        """Keep the first `length` positions of `cache`, if they fit at all; the oldest entries make room."""
        kv = cache.data[..., :length, :]
        if kv.nbytes > self.max_bytes:
            return
        while self._entries and self.nbytes + kv.nbytes > self.max_bytes:
            self._entries.popitem(last=False)
        self._entries[key] = (kv.to("cpu", copy=True), hidden.to("cpu", copy=True))

    def clear(self) -> None:
        """Forget every prompt."""
        self._entries.clear()
