"""Find pages that already hold the keys and values of a prompt's beginning.

A full page is named by a digest of all tokens from the sequence's start to the page's end, chained page by page, so
that equal digests mean equal prefixes. Source: the block hashing of arXiv 2309.06180's implementation.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from torchinfer.kv_cache.pages import PagePool

ROOT = b""


def page_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Digest of a page that holds `token_ids`, after the page with digest `parent`."""
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


class PrefixCache:
    """Digests of full pages. A page that is evicted from the pool is forgotten here."""

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self._pool = pool
        self._page_size = page_size
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        pool.on_evict = self._forget
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0

    def extend(self, digests: list[bytes], token_ids: list[int]) -> None:
        """Append the digests of those full pages of `token_ids` that `digests` lacks."""
        size = self._page_size
        for end in range((len(digests) + 1) * size, len(token_ids) + 1, size):
            parent = digests[-1] if digests else ROOT
            digests.append(page_digest(parent, token_ids[end - size : end]))

    def match(self, digests: list[bytes]) -> list[int]:
        """The pages of the longest known prefix, each with one more reference."""
        pages: list[int] = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            self._pool.hold(page)
            pages.append(page)
        return pages

    def count(self, num_queried_tokens: int, num_hit_tokens: int) -> None:
        """Add to the hit rate's counters: once for each admission, however often it was tried."""
        self.num_queried_tokens += num_queried_tokens
        self.num_hit_tokens += num_hit_tokens

    def add(self, page: int, digest: bytes) -> None:
        """Remember a full page that a sequence holds. The first page of a digest stays."""
        if digest not in self._page_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest
            self._pool.keep(page)

    def _forget(self, page: int) -> None:
        del self._page_of[self._digest_of.pop(page)]
