"""Ragged paged attention: two kernels that attend, one for rows of one token and one for chunks, and one that merges.

A tile is some tokens of a row times the query heads that share a key-value head, so that a key is read once for all
of them. Rows of one token are cut into spans of their context, which several programs attend to: how many there are
follows from the length alone, so that a token's bits are the same in any batch. Tiles of keys begin at multiples of
their size, and what a token does not see adds exact zeros: so they are the same in any chunk of several tokens, too.

Scales of keys multiply scores, scales of values probabilities: fewer numbers than the keys and values by the head size.

Letters: M rows of a tile (tokens times heads), N keys of a step, D head size.
"""

from __future__ import annotations

import triton
import triton.language as tl

LEAST_SPAN: tl.constexpr = tl.constexpr(512)  # positions; shorter ones would write results that are read again
MOST_SPANS: tl.constexpr = tl.constexpr(64)
HIGH: tl.constexpr = tl.constexpr(16384.0)  # of probabilities in float16, which ends at 65504
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def span_of(
    length: tl.tensor,
    window: tl.tensor,
    HAS_WINDOW: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The first position that the last one sees, rounded down to a tile; positions of a span; how many spans."""
    start = 0
    if HAS_WINDOW:
        start = tl.maximum(length - window, 0) // BLOCK_KEYS * BLOCK_KEYS
    wanted = tl.minimum(tl.maximum((length - start + LEAST_SPAN - 1) // LEAST_SPAN, 1), MOST_SPANS)
    num_tiles = (length - start + BLOCK_KEYS - 1) // BLOCK_KEYS
    size = (num_tiles + wanted - 1) // wanted * BLOCK_KEYS
    return start, size, (length - start + size - 1) // tl.maximum(size, 1)


@triton.jit
def unpack(pairs: tl.tensor, DTYPE: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """int16 blocks that hold two int8, or two e4m3, as float16: the lower and the higher ones; e4m3 by 2^-8 of itself.

    An integer with its sign turned over, behind the bits of 1024, is 1152 more than itself.
    """
    if DTYPE == tl.int8:
        shift = tl.full((1, 1), 1152, tl.float16)
        low = ((pairs & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True) - shift
        high = (((pairs >> 8) & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True) - shift
    else:
        low = (((pairs << 7) & 0x3F80) | ((pairs << 8) & -0x8000)).to(tl.float16, bitcast=True)
        high = (((pairs >> 1) & 0x3F80) | (pairs & -0x8000)).to(tl.float16, bitcast=True)
    return low, high


@triton.jit
def attend(
    query: tl.tensor,  # [M, D]
    position: tl.tensor,  # [M]
    largest: tl.tensor,  # [M] float32: of the scores so far, times log2(e)
    total: tl.tensor,  # [M] float32: of the weights so far
    result: tl.tensor,  # [M, D] float32: the weighted values so far; of even columns where IS_PAIRED
    second: tl.tensor,  # [M, D / 2] float32: of odd columns where IS_PAIRED, else not used
    pages: tl.tensor,  # the row's
    data: tl.tensor,  # [2, slots, K, D]
    scales: tl.tensor,  # [2, slots, K]
    half: tl.tensor,  # slots * K: from a key to its value
    kv_head: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    score_scale: tl.tensor,  # times log2(e); with a soft cap, times 2 log2(e) / cap
    soft_cap: tl.tensor,  # times log2(e)
    window: tl.tensor,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_PAIRED: tl.constexpr,
    IS_MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Go on over the keys [start, end); without IS_MASKED all of them are seen, and they are whole tiles.

    IS_PAIRED: two values in 8 bits are read as one number of 16, and are float16 after few instructions. The largest
    scale of a tile is taken out of the probabilities, and HIGH put in, so that they stay in float16's range.
    """
    column = tl.arange(0, BLOCK_SIZE)
    for first in range(start, end, BLOCK_KEYS):
        key = first + tl.arange(0, BLOCK_KEYS)
        is_there = key < end
        if PAGE_SIZE % BLOCK_KEYS == 0:
            page = tl.load(pages + first // PAGE_SIZE).to(tl.int64)
        else:
            page = tl.load(pages + key // PAGE_SIZE, mask=is_there, other=0).to(tl.int64)
        place = (page * PAGE_SIZE + key % PAGE_SIZE) * KV_HEADS + kv_head
        # Zeros past the context, not only masked scores: nobody knows what lies there, and zero times NaN is NaN.
        mask = is_there[None, :] & (column < SIZE)[:, None] if SIZE < BLOCK_SIZE else is_there[None, :]
        keys = tl.load(data + place[None, :] * SIZE + column[:, None], mask=mask, other=0.0)
        scores = tl.dot(query, keys.to(KEY), input_precision="tf32x3") * score_scale
        if HAS_SCALE:
            scores *= tl.load(scales + place, mask=is_there, other=0.0)[None, :]
        if HAS_CAP:
            scores = soft_cap * (1.0 - 2.0 / (tl.exp2(scores) + 1.0))
        if IS_MASKED:
            is_seen = is_there[None, :] & (key[None, :] <= position[:, None])
            if HAS_WINDOW:
                is_seen &= key[None, :] > position[:, None] - window
            scores = tl.where(is_seen, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        # Minus infinity where nothing was seen yet; less itself it would be NaN.
        origin = tl.where(new_largest == float("-inf"), 0.0, new_largest) if IS_MASKED else new_largest
        weights = tl.exp2(scores - origin[:, None])
        shrink = tl.exp2(largest - origin)
        total = total * shrink + tl.sum(weights, 1)
        largest = new_largest
        if IS_PAIRED:
            value_scale = tl.load(scales + half + place, mask=is_there, other=0.0)
            most = tl.maximum(tl.max(value_scale, 0), 1e-30) / HIGH
            pair = tl.arange(0, BLOCK_SIZE // 2)
            mask = is_there[:, None] & (pair < SIZE // 2)[None, :] if SIZE < BLOCK_SIZE else is_there[:, None]
            pairs = data.to(tl.pointer_type(tl.int16)) + (half + place)[:, None] * (SIZE // 2) + pair[None, :]
            low, high = unpack(tl.load(pairs, mask=mask, other=0), data.dtype.element_ty)
            weights = (weights * (value_scale / most)[None, :]).to(tl.float16)
            if data.dtype.element_ty == tl.float8e4nv:
                most *= 256.0
            result = result * shrink[:, None] + tl.dot(weights, low) * most
            second = second * shrink[:, None] + tl.dot(weights, high) * most
        else:
            if HAS_SCALE:
                weights *= tl.load(scales + half + place, mask=is_there, other=0.0)[None, :]
            mask = is_there[:, None] & (column < SIZE)[None, :] if SIZE < BLOCK_SIZE else is_there[:, None]
            values = tl.load(data + (half + place)[:, None] * SIZE + column[None, :], mask=mask, other=0.0)
            product = tl.dot(weights.to(VALUE), values.to(VALUE), input_precision="tf32x3")
            result = result * shrink[:, None] + product
    return largest, total, result, second


@triton.jit(
    do_not_specialize=["table_width", "num_spans"],
    do_not_specialize_on_alignment=["page_table", "query_start", "kv_length"],
)
def decode_kernel(
    query: tl.tensor,  # [T, H, D]
    data: tl.tensor,  # [2, slots, K, D]
    scales: tl.tensor,  # [2, slots, K] float32
    page_table: tl.tensor,  # [R, W]
    query_start: tl.tensor,  # [R + 1]
    kv_length: tl.tensor,  # [R]
    partial: tl.tensor,  # [R, H, spans, D] float32, written: weighted values of a span
    statistics: tl.tensor,  # [R, H, spans, 2] float32, written: its largest score and the sum of its weights
    num_slots: tl.tensor,
    stride_token: tl.tensor,
    stride_head: tl.tensor,
    table_width: tl.tensor,
    num_spans: tl.tensor,
    score_scale: tl.tensor,
    soft_cap: tl.tensor,
    window: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_PAIRED: tl.constexpr,
) -> None:
    """A program attends to a span of a row, for BLOCK_HEADS heads. Rows without exactly one token are passed over."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    BLOCKS: tl.constexpr = (GROUP + BLOCK_HEADS - 1) // BLOCK_HEADS
    kv_head, row, span = tl.program_id(0) // BLOCKS, tl.program_id(1), tl.program_id(2)
    token = tl.load(query_start + row).to(tl.int64)
    length = tl.load(kv_length + row)
    first, size, count = span_of(length, window, HAS_WINDOW, BLOCK_KEYS)
    if (tl.load(query_start + row + 1) - token != 1) | (span >= count):
        return
    in_group = tl.program_id(0) % BLOCKS * BLOCK_HEADS + tl.arange(0, BLOCK_ROWS)
    is_head = (tl.arange(0, BLOCK_ROWS) < BLOCK_HEADS) & (in_group < GROUP)
    head = kv_head * GROUP + in_group
    column = tl.arange(0, BLOCK_SIZE)
    mask = is_head[:, None] & (column < SIZE)[None, :]
    place = query + token * stride_token + head[:, None] * stride_head + column[None, :]
    own = tl.load(place, mask=mask, other=0.0).to(KEY)
    position = tl.full((BLOCK_ROWS,), 0, tl.int32) + length - 1
    largest = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    result = tl.zeros((BLOCK_ROWS, BLOCK_SIZE // 2 if IS_PAIRED else BLOCK_SIZE), tl.float32)
    second = result if IS_PAIRED else total
    start = first + span * size
    end = tl.minimum(start + size, length)
    pages = page_table + row.to(tl.int64) * table_width
    half = num_slots.to(tl.int64) * KV_HEADS
    middle = start if HAS_WINDOW else start + (end - start) // BLOCK_KEYS * BLOCK_KEYS
    if not HAS_WINDOW:
        largest, total, result, second = attend(
            own, position, largest, total, result, second, pages, data, scales, half, kv_head, start, middle,
            score_scale, soft_cap, window, KV_HEADS, SIZE, PAGE_SIZE, BLOCK_SIZE, BLOCK_KEYS,
            KEY, VALUE, HAS_SCALE, HAS_CAP, HAS_WINDOW, IS_PAIRED, False,
        )  # fmt: skip
    largest, total, result, second = attend(
        own, position, largest, total, result, second, pages, data, scales, half, kv_head, middle, end,
        score_scale, soft_cap, window, KV_HEADS, SIZE, PAGE_SIZE, BLOCK_SIZE, BLOCK_KEYS,
        KEY, VALUE, HAS_SCALE, HAS_CAP, HAS_WINDOW, IS_PAIRED, True,
    )  # fmt: skip
    place = (row.to(tl.int64) * HEADS + head) * num_spans + span
    tl.store(statistics + place * 2, largest, mask=is_head)
    tl.store(statistics + place * 2 + 1, total, mask=is_head)
    if IS_PAIRED:
        result = tl.reshape(tl.join(result, second), (BLOCK_ROWS, BLOCK_SIZE))
    tl.store(partial + place[:, None] * SIZE + column[None, :], result, mask=mask)


@triton.jit(do_not_specialize=["num_spans"], do_not_specialize_on_alignment=["query_start", "kv_length"])
def merge_kernel(
    partial: tl.tensor,  # [R, H, spans, D] float32
    statistics: tl.tensor,  # [R, H, spans, 2] float32
    query_start: tl.tensor,  # [R + 1]
    kv_length: tl.tensor,  # [R]
    result: tl.tensor,  # [T, H, D]
    num_spans: tl.tensor,
    window: tl.tensor,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
) -> None:
    """A program merges the spans of a row and head, as many as there are, always in a block of MOST_SPANS."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tl.load(query_start + row).to(tl.int64)
    length = tl.load(kv_length + row)
    if (tl.load(query_start + row + 1) - token != 1) | (length <= 0):
        return
    _, _, count = span_of(length, window, HAS_WINDOW, BLOCK_KEYS)
    span = tl.arange(0, MOST_SPANS)
    column = tl.arange(0, BLOCK_SIZE)
    place = (row * HEADS + head) * num_spans + span
    largest = tl.load(statistics + place * 2, mask=span < count, other=float("-inf"))
    total = tl.load(statistics + place * 2 + 1, mask=span < count, other=0.0)
    share = tl.exp2(largest - tl.max(largest, 0))
    mask = (span < count)[:, None] & (column < SIZE)[None, :]
    values = tl.load(partial + place[:, None] * SIZE + column[None, :], mask=mask, other=0.0)
    merged = tl.sum(values * share[:, None], 0) / tl.sum(total * share, 0)
    place = result + (token * HEADS + head) * SIZE + column
    tl.store(place, merged.to(result.dtype.element_ty), mask=column < SIZE)


@triton.jit
def row_of(
    block: tl.tensor,
    query_start: tl.tensor,  # [R + 1]
    num_rows: tl.tensor,
    BLOCK_TOKENS: tl.constexpr,
) -> tl.tensor:
    """The row of a block of tokens, where row r's blocks begin at query_start[r] // BLOCK_TOKENS + r at the latest."""
    low, high = 0, num_rows
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // BLOCK_TOKENS + middle <= block:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit(
    do_not_specialize=["num_rows", "table_width"],
    do_not_specialize_on_alignment=["page_table", "query_start", "kv_length"],
)
def chunk_kernel(
    query: tl.tensor,  # [T, H, D]
    data: tl.tensor,  # [2, slots, K, D]
    scales: tl.tensor,  # [2, slots, K] float32
    page_table: tl.tensor,  # [R, W]
    query_start: tl.tensor,  # [R + 1]
    kv_length: tl.tensor,  # [R]
    attended: tl.tensor,  # [T, H, D], written
    num_rows: tl.tensor,
    num_slots: tl.tensor,
    stride_token: tl.tensor,
    stride_head: tl.tensor,
    table_width: tl.tensor,
    score_scale: tl.tensor,
    soft_cap: tl.tensor,
    window: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
) -> None:
    """A program attends for BLOCK_TOKENS tokens of a row times BLOCK_HEADS heads. Rows of one token are passed over."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    BLOCKS: tl.constexpr = (GROUP + BLOCK_HEADS - 1) // BLOCK_HEADS
    # One dimension of the grid, since only the first may have more than 65,535 programs.
    in_block = tl.program_id(0) % (KV_HEADS * BLOCKS)
    kv_head = in_block // BLOCKS
    # The last blocks of a chunk see the most keys: they begin first.
    block = (tl.num_programs(0) - 1 - tl.program_id(0)) // (KV_HEADS * BLOCKS)
    row = row_of(block, query_start, num_rows, BLOCK_TOKENS)
    start_token = tl.load(query_start + row)
    num_tokens = tl.load(query_start + row + 1) - start_token
    first_token = (block - (start_token // BLOCK_TOKENS + row)) * BLOCK_TOKENS
    length = tl.load(kv_length + row)
    if (num_tokens <= 1) | (first_token >= num_tokens) | (length <= 0):
        return
    index = tl.arange(0, BLOCK_ROWS)
    token, in_group = first_token + index // BLOCK_HEADS, in_block % BLOCKS * BLOCK_HEADS + index % BLOCK_HEADS
    is_row = (index < BLOCK_TOKENS * BLOCK_HEADS) & (token < num_tokens) & (in_group < GROUP)
    head = kv_head * GROUP + in_group
    column = tl.arange(0, BLOCK_SIZE)
    mask = is_row[:, None] & (column < SIZE)[None, :]
    place = (start_token + token).to(tl.int64)
    offset = (place * stride_token + head * stride_head)[:, None] + column[None, :]
    own = tl.load(query + offset, mask=mask, other=0.0).to(KEY)
    position = length - num_tokens + token
    first_position = length - num_tokens + first_token
    end = tl.minimum(first_position + BLOCK_TOKENS, length)
    largest = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    result = tl.zeros((BLOCK_ROWS, BLOCK_SIZE), tl.float32)
    pages = page_table + row.to(tl.int64) * table_width
    half = num_slots.to(tl.int64) * KV_HEADS
    if HAS_WINDOW:
        middle = tl.maximum(first_position - window + 1, 0) // BLOCK_KEYS * BLOCK_KEYS
    else:
        middle = (first_position + 1) // BLOCK_KEYS * BLOCK_KEYS
        largest, total, result, _ = attend(
            own, position, largest, total, result, total, pages, data, scales, half, kv_head, 0, middle,
            score_scale, soft_cap, window, KV_HEADS, SIZE, PAGE_SIZE, BLOCK_SIZE, BLOCK_KEYS,
            KEY, VALUE, HAS_SCALE, HAS_CAP, HAS_WINDOW, False, False,
        )  # fmt: skip
    largest, total, result, _ = attend(
        own, position, largest, total, result, total, pages, data, scales, half, kv_head, middle, end,
        score_scale, soft_cap, window, KV_HEADS, SIZE, PAGE_SIZE, BLOCK_SIZE, BLOCK_KEYS,
        KEY, VALUE, HAS_SCALE, HAS_CAP, HAS_WINDOW, False, True,
    )  # fmt: skip
    offset = ((place * HEADS + head) * SIZE)[:, None] + column[None, :]
    tl.store(attended + offset, (result / total[:, None]).to(attended.dtype.element_ty), mask=mask)
