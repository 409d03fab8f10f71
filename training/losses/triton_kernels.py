"""Triton kernels of `clipsys.training.losses.fused`, which alone imports this module.

Q queries, K keys, D width; a program owns a block of rows and walks over the other side in tiles.
The cosines of a tile are added up over blocks of D, so that any width fits into shared memory.
Rows, columns and widths that do not divide are masked. Few rows would leave most of a GPU idle:
the other side is then split among programs, whose parts are added up afterwards, in a fixed order.
"""

# Triton reads a kernel's source: annotations and names here are its language, not Python's.
# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def _cosines(
    own_ptr,
    other_ptr,
    own_rows,
    other_rows,
    own_mask,
    other_mask,
    WIDTH: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BLOCK_OWN, BLOCK_OTHER) inner products in float32, 0 where masked."""
    cosine = tl.zeros((BLOCK_OWN, BLOCK_OTHER), tl.float32)
    for start in range(0, WIDTH, BLOCK_WIDTH):
        column = start + tl.arange(0, BLOCK_WIDTH)
        inside = column < WIDTH
        own = tl.load(
            own_ptr + own_rows[:, None] * WIDTH + column[None, :],
            mask=own_mask[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        other = tl.load(
            other_ptr + other_rows[None, :] * WIDTH + column[:, None],
            mask=other_mask[None, :] & inside[:, None],
            other=0.0,
        ).to(tl.float32)
        cosine = tl.dot(own, other, cosine, input_precision=PRECISION)
    return cosine


@triton.jit
def row_statistics(
    query_ptr,
    key_ptr,
    scale_ptr,
    query_ids_ptr,
    key_ids_ptr,
    lse_ptr,
    positive_sum_ptr,
    positive_count_ptr,
    num_queries,
    num_keys,
    keys_per_split,
    WIDTH: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums of one block of queries over one split of the keys: three outputs of (splits, Q).

    The log-sum-exp of the logits, the sum of the positives' logits and the number of positives.
    """
    split = tl.program_id(1)
    query_rows = tl.program_id(0).to(tl.int64) * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    query_mask = query_rows < num_queries
    query_ids = tl.load(query_ids_ptr + query_rows, mask=query_mask, other=0)
    scale = tl.load(scale_ptr)
    first = split * keys_per_split
    last = tl.minimum(first + keys_per_split, num_keys)
    maximum = tl.full((BLOCK_OWN,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_OWN,), tl.float32)
    positive_sum = tl.zeros((BLOCK_OWN,), tl.float32)
    positive_count = tl.zeros((BLOCK_OWN,), tl.int32)
    for start in range(first, last, BLOCK_OTHER):
        key_rows = (start + tl.arange(0, BLOCK_OTHER)).to(tl.int64)
        key_mask = key_rows < last
        logits = scale * _cosines(
            query_ptr, key_ptr, query_rows, key_rows, query_mask, key_mask,
            WIDTH, BLOCK_OWN, BLOCK_OTHER, BLOCK_WIDTH, PRECISION,
        )  # fmt: skip
        key_ids = tl.load(key_ids_ptr + key_rows, mask=key_mask, other=0)
        positive = (query_ids[:, None] == key_ids[None, :]) & key_mask[None, :]
        positive_sum += tl.sum(tl.where(positive, logits, 0.0), axis=1)
        positive_count += tl.sum(positive.to(tl.int32), axis=1)
        logits = tl.where(key_mask[None, :], logits, float("-inf"))
        # The sum is kept relative to the largest logit so far (Milakov & Gimelshein 2018).
        grown = tl.maximum(maximum, tl.max(logits, axis=1))
        total = total * tl.exp(maximum - grown) + tl.sum(tl.exp(logits - grown[:, None]), axis=1)
        maximum = grown
    out = split.to(tl.int64) * num_queries + query_rows
    tl.store(lse_ptr + out, maximum + tl.log(total), mask=query_mask)
    tl.store(positive_sum_ptr + out, positive_sum, mask=query_mask)
    tl.store(positive_count_ptr + out, positive_count, mask=query_mask)


@triton.jit
def feature_gradient(
    own_ptr,
    other_ptr,
    scale_ptr,
    own_ids_ptr,
    other_ids_ptr,
    lse_ptr,
    inverse_count_ptr,
    gradient_ptr,
    scale_gradient_ptr,
    num_own,
    num_other,
    others_per_split,
    WIDTH: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ERROR_PRECISION: tl.constexpr,
    OWN_IS_QUERY: tl.constexpr,
):
    """Error (softmax minus target) times features, for one block of one side.

    ``gradient``: zeros of (splits, own, D), without the factors that are the same for all.
    ``scale_gradient``: (splits, Q), the sum of error times cosine; only where queries are owned.
    """
    split = tl.program_id(1)
    own_rows = tl.program_id(0).to(tl.int64) * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    own_mask = own_rows < num_own
    own_ids = tl.load(own_ids_ptr + own_rows, mask=own_mask, other=0)
    scale = tl.load(scale_ptr)
    first = split * others_per_split
    last = tl.minimum(first + others_per_split, num_other)
    out_rows = split.to(tl.int64) * num_own + own_rows
    scale_gradient = tl.zeros((BLOCK_OWN,), tl.float32)
    if OWN_IS_QUERY:
        own_lse = tl.load(lse_ptr + own_rows, mask=own_mask, other=0.0)
        own_inverse_count = tl.load(inverse_count_ptr + own_rows, mask=own_mask, other=0.0)
    for start in range(first, last, BLOCK_OTHER):
        other_rows = (start + tl.arange(0, BLOCK_OTHER)).to(tl.int64)
        other_mask = other_rows < last
        cosine = _cosines(
            own_ptr, other_ptr, own_rows, other_rows, own_mask, other_mask,
            WIDTH, BLOCK_OWN, BLOCK_OTHER, BLOCK_WIDTH, PRECISION,
        )  # fmt: skip
        other_ids = tl.load(other_ids_ptr + other_rows, mask=other_mask, other=0)
        if OWN_IS_QUERY:
            lse = own_lse[:, None]
            inverse_count = own_inverse_count[:, None]
        else:
            lse = tl.load(lse_ptr + other_rows, mask=other_mask, other=0.0)[None, :]
            inverse_count = tl.load(inverse_count_ptr + other_rows, mask=other_mask, other=0.0)
            inverse_count = inverse_count[None, :]
        error = tl.exp(scale * cosine - lse)
        error -= tl.where(own_ids[:, None] == other_ids[None, :], inverse_count, 0.0)
        error = tl.where(own_mask[:, None] & other_mask[None, :], error, 0.0)
        if OWN_IS_QUERY:
            scale_gradient += tl.sum(error * cosine, axis=1)
        for left in range(0, WIDTH, BLOCK_WIDTH):
            column = left + tl.arange(0, BLOCK_WIDTH)
            inside = column < WIDTH
            other = tl.load(
                other_ptr + other_rows[:, None] * WIDTH + column[None, :],
                mask=other_mask[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
            place = gradient_ptr + out_rows[:, None] * WIDTH + column[None, :]
            mask = own_mask[:, None] & inside[None, :]
            part = tl.load(place, mask=mask, other=0.0)
            part = tl.dot(error, other, part, input_precision=ERROR_PRECISION)
            tl.store(place, part, mask=mask)
        # The rows are this program's alone, but its next tile may read them in other threads.
        tl.debug_barrier()
    if OWN_IS_QUERY:
        tl.store(scale_gradient_ptr + out_rows, scale_gradient, mask=own_mask)
