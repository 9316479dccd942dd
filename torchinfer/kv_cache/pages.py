"""Who owns which page of the cache. Numbers only: the tensors are in kv_cache/tensors.py.

A page is in exactly one of three states:

    free        nobody uses it and its content is worthless
    used        at least one sequence holds it (reference count > 0)
    evictable   nobody holds it, but the prefix cache may still find it; least recently released goes first

Page 0 is never handed out: padded tokens write there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable


class PagePool:
    """Reference counts of `num_pages` pages, of which page 0 is reserved for padding."""

    def __init__(self, num_pages: int) -> None:
        assert num_pages >= 2, num_pages
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, 0, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._cached: set[int] = set()  # pages that the prefix cache knows, used or evictable
        self.on_evict: Callable[[int], None] = lambda page: None

    @property
    def num_usable(self) -> int:
        """Pages that can be handed out at all."""
        return self.num_pages - 1

    @property
    def num_available(self) -> int:
        """Pages that can be handed out now."""
        return len(self._free) + len(self._evictable)

    def allocate(self) -> int | None:
        """A page with one reference, or None when all are used. May evict a cached page."""
        if self._free:
            page = self._free.pop()
        elif self._evictable:
            page, _ = self._evictable.popitem(last=False)
            self._cached.discard(page)
            self.on_evict(page)
        else:
            return None
        self._references[page] = 1
        return page

    def hold(self, page: int) -> None:
        """Add a reference to a page that is used or evictable."""
        if self._references[page] == 0:
            del self._evictable[page]
        self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop one reference of each page. A cached page stays findable until its memory is needed."""
        for page in pages:
            assert self._references[page] > 0, page
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._cached:
                    self._evictable[page] = None
                else:
                    self._free.append(page)

    def keep(self, page: int) -> None:
        """The prefix cache knows this used page: when released it becomes evictable instead of free."""
        assert self._references[page] > 0, page
        self._cached.add(page)

    def check(self, held: Iterable[int]) -> None:
        """Assert that the states are consistent with `held`, all sequences' pages with repetition."""
        counts = [0] * self.num_pages
        for page in held:
            counts[page] += 1
        assert counts == self._references, "reference counts differ from what sequences hold"
        used = sum(1 for count in counts if count)
        assert len(self._free) + len(self._evictable) + used == self.num_usable, "a page is lost or owned twice"
        assert len(set(self._free)) == len(self._free) and not set(self._free) & self._evictable.keys()
        assert counts[0] == 0 and 0 not in self._free, "page 0 was handed out"
