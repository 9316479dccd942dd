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

    def match(self, token_ids: list[int]) -> tuple[list[int], list[bytes]]:
        """The pages of the longest known prefix, each with one more reference, and their digests.

        At least one token is left over, because its logits are wanted.
        """
        size = self._page_size
        pages: list[int] = []
        digests: list[bytes] = []
        digest = ROOT
        for end in range(size, len(token_ids), size):
            digest = page_digest(digest, token_ids[end - size : end])
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
            digests.append(digest)
        for page in pages:
            self._pool.hold(page)
        return pages, digests

    def count(self, num_queried_tokens: int, num_hit_tokens: int) -> None:
        """Add to the hit rate's counters: once for each admission, however often it was tried."""
        self.num_queried_tokens += num_queried_tokens
        self.num_hit_tokens += num_hit_tokens

    def add(self, page: int, parent: bytes, token_ids: list[int]) -> bytes:
        """Remember a full page that a sequence holds; returns its digest. The first page of a digest stays."""
        digest = page_digest(parent, token_ids)
        if digest not in self._page_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest
            self._pool.keep(page)
        return digest

    def _forget(self, page: int) -> None:
        del self._page_of[self._digest_of.pop(page)]
