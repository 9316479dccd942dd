"""The physical layout of the cache's pages that the ragged attention kernel reads and writes.

A page is a blob of rows of 128 words of 32 bits, so that one copy fetches it whole, scales included. It holds 128
tokens, whose scales are the 128 lanes of a row: one scale meets one column of scores without any shuffle.

    rows of a page   [groups, K, tiles, 8]   words of the keys and values
                     [2 * K]                 scales, float32: of all keys, of all values; padded to a multiple of 8

A word holds a lane of 4 tokens (8 bits) or 2 (bfloat16), so that 8 rows are a group of 32 or 16 tokens, which the
matrix unit takes after a bitcast. The groups are outermost: what a new token touches is contiguous. A head of up to 64
numbers has one tile, with the key in lanes 0 to 63 and the value in the rest; zeros in the query hide the value. All
others have tiles of 128 lanes for the key, then for the value, padded with zeros.

Plain arithmetic, which planning needs without jax; page_packing.py packs pages.
"""

from __future__ import annotations

from dataclasses import dataclass

LANES = 128
SUBLANES = 8
PAGE_SIZE = 128
HALF = 64  # the largest head of which a tile holds key and value
FORMATS = {"bfloat16": 2, "int8": 4, "float8_e4m3fn": 4}  # dtype -> tokens in a word
MAX_GROUP_SIZE = 128


@dataclass(frozen=True)
class PageLayout:
    """Where a page has what, for one dtype and shape of heads."""

    num_kv_heads: int
    head_dim: int
    dtype: str  # a key of FORMATS

    @property
    def tokens_per_word(self) -> int:
        """Tokens whose numbers share a word."""
        return FORMATS[self.dtype]

    @property
    def group_tokens(self) -> int:
        """Tokens in 8 rows of words."""
        return SUBLANES * self.tokens_per_word

    @property
    def num_groups(self) -> int:
        """Groups of tokens in a page."""
        return PAGE_SIZE // self.group_tokens

    @property
    def key_tiles(self) -> int:
        """Tiles of 128 lanes that a query meets."""
        return -(-self.head_dim // LANES)

    @property
    def value_tile(self) -> int:
        """The first tile of a value."""
        return 0 if self.head_dim <= HALF else self.key_tiles

    @property
    def num_tiles(self) -> int:
        """Tiles of a head, keys and values."""
        return self.value_tile + self.key_tiles

    @property
    def value_lane(self) -> int:
        """The first lane of a value in its tiles."""
        return HALF if self.head_dim <= HALF else 0

    @property
    def group_rows(self) -> int:
        """Rows of a group of tokens."""
        return self.num_kv_heads * self.num_tiles * SUBLANES

    @property
    def data_rows(self) -> int:
        """Rows before the scales."""
        return self.num_groups * self.group_rows

    @property
    def scale_rows(self) -> int:
        """Rows of scales, padding included; 0 where there are none."""
        return 0 if self.dtype == "bfloat16" else round_up(2 * self.num_kv_heads, SUBLANES)

    @property
    def fresh_words(self) -> int:
        """Rows of words of a new token on its way to a page, without its scales: see token_insertion.py."""
        return -(-self.num_kv_heads * self.num_tiles // self.tokens_per_word)

    @property
    def fresh_rows(self) -> int:
        """Rows of a new token on its way to a page, padding included."""
        return round_up(self.fresh_words + -(-self.scale_rows // LANES), SUBLANES)

    @property
    def num_rows(self) -> int:
        """Rows of a page."""
        return self.data_rows + self.scale_rows

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.num_rows * LANES * 4

    def shape(self, num_pages: int) -> tuple[int, int, int]:
        """Shape of a cache of so many pages, int32."""
        return num_pages, self.num_rows, LANES


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not less."""
    return -(-value // multiple) * multiple


def head_problem(num_heads: int, num_kv_heads: int, dtype: str) -> str | None:
    """Why the attention kernel cannot take such heads over a cache of a dtype; None: it can."""
    if dtype not in FORMATS:
        return f"a cache of dtype {dtype} is not among {', '.join(FORMATS)}"
    if num_heads % num_kv_heads or not 1 <= num_heads // num_kv_heads <= MAX_GROUP_SIZE:
        return (
            f"{num_heads} query heads over {num_kv_heads} KV heads: each KV head needs 1 to {MAX_GROUP_SIZE} whole "
            "query heads"
        )
    return None
