"""How a text is cut into windows, and by how much context its tokens are grouped."""

from __future__ import annotations

from dataclasses import dataclass

from torchinfer.tokenizer import Tokenizer

FIRST_BUCKET_END = 16  # tokens of context; below that a bucket has too few


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens [start, end) of a text, behind `num_prefix` special ones; those of [first, end) are scored."""

    start: int
    first: int
    end: int
    num_prefix: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_prefix + self.end - self.start

    def context_of(self, token: int) -> int:
        """Tokens that a token of the text has before it in this window."""
        return self.num_prefix + token - self.start


def make_windows(num_tokens: int, context: int, stride: int, num_prefix: int = 0) -> list[Window]:
    """Windows of at most `context` tokens that score each of a text's tokens once, but the first one without a prefix.

    `num_tokens` is that of the text alone. `stride` is less than context - num_prefix: windows share a token at least.
    """
    assert 1 <= stride < context - num_prefix, (stride, context, num_prefix)
    windows = [Window(0, 0 if num_prefix else 1, min(context - num_prefix, num_tokens), num_prefix)]
    while windows[-1].end < num_tokens:
        start = windows[-1].start + stride
        windows.append(Window(start, windows[-1].end, min(start + context - num_prefix, num_tokens), num_prefix))
    return windows


def find_prefix(tokenizer: Tokenizer) -> list[int]:
    """The special tokens, such as BOS, that the model expects in front of a text."""
    bare, full = (tokenizer.encode("a", add_special_tokens=added) for added in (False, True))
    starts = (at for at in range(len(full)) if full[at : at + len(bare)] == bare)
    return full[: next(starts, 0)]


def buckets(longest: int) -> list[tuple[int, int]]:
    """Ranges [from, to) of context lengths up to `longest`: 1 to 15, then from each power of two to the next."""
    found = [(1, FIRST_BUCKET_END)]
    while found[-1][1] <= longest:
        found.append((found[-1][1], 2 * found[-1][1]))
    return found
