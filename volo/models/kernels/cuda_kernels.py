"""Outlook attention on the device, in Triton; volo/models/kernels/cuda.py starts it and says how it divides the work.

B images, H x W grid, C channels, h x w windows, K kernel side, D channels of one head (padded to a power of two).

A *lane* is one of the neighbouring windows of a row that a program works on at once, and a *tile* is a value for
every lane and channel, [LANES, D]. S is the stride and P the padding; window (r, c) has its corner at cell
(S*r - P, S*c - P). One program walks down the rows of windows. What it keeps from one row to the next are the K - S
rows of cells that both rows of windows look at, and the sums of outputs that the next row adds to, so that each row
of the grid is read and written once.

Per row of windows the K^2 tiles of cells are stacked to [LANES, D, KEYS] and the softmax to [LANES, QUERIES, KEYS],
and small matrix products, batched over the lanes, do the sums over keys, queries and channels: on tensor cores for
16-bit types, in fp32 arithmetic for fp32. K^2 is padded to a power of two for them, in registers, not in memory.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _stack(tiles, LOG: tl.constexpr):
    """Tuple of at most 2^LOG tensors [A, N] -> [A, N, 2^LOG]: member i at index i of the last axis, then zeros."""
    A: tl.constexpr = tiles[0].shape[0]
    N: tl.constexpr = tiles[0].shape[1]
    tiles = tiles + (tl.zeros([A, N], tiles[0].dtype),) * (2**LOG - len(tiles))
    for level in tl.static_range(LOG):
        joined = ()
        for i in tl.static_range(2 ** (LOG - 1 - level)):
            # A new last axis: the highest bit of the index that is still open.
            joined = joined + (tl.join(tiles[i], tiles[i + 2 ** (LOG - 1 - level)]),)
        tiles = joined
    return tl.reshape(tiles[0], [A, N, 2**LOG])


@triton.jit
def _unstack(stack, COUNT: tl.constexpr, LOG: tl.constexpr):
    """[A, N, 2^LOG] -> tuple of the first COUNT tensors [A, N]."""
    tiles = (tl.reshape(stack, (stack.shape[0], stack.shape[1]) + (2,) * LOG),)
    for level in tl.static_range(LOG):
        even = ()
        odd = ()
        for i in tl.static_range(2**level):
            first, second = tl.split(tiles[i])  # takes the last axis away: the lowest bit still open
            even = even + (first,)
            odd = odd + (second,)
        tiles = even + odd
    return tiles[:COUNT]


@triton.jit
def _move(tile, STEP: tl.constexpr, LANES: tl.constexpr, D: tl.constexpr):
    """moved[lane] = tile[lane - STEP], and 0 if there is no such lane."""
    source = tl.arange(0, LANES) - STEP
    inside = (source >= 0) & (source < LANES)
    index = tl.where(inside, source, 0)[:, None] + tl.zeros([LANES, D], tl.int32)
    return tl.where(inside[:, None], tl.gather(tile, index, axis=0), 0.0)


@triton.jit
def _read_row(cells, y, keep, x, channel_ok, W, C: tl.constexpr, K: tl.constexpr):
    """Row y of the grid -> K tiles; tile j has the cell in column j of each lane's window, 0 if ``keep`` is false.

    Neighbouring windows share columns, so a column is asked for up to ceil(K / S) times; see cuda.py on what it costs.

    Args:
        cells: Pointers [LANES, D] to column x of row 0; they may point outside the grid.
        keep: Whether the row is wanted, for each lane.
        x: Column of each lane's corner.
    """
    row = ()
    for j in tl.static_range(K):
        ok = keep & (x + j >= 0) & (x + j < W)
        row = row + (tl.load(cells + (y * W + j) * C, mask=ok[:, None] & channel_ok, other=0.0),)
    return row


@triton.jit
def _softmax(logits, ok, SCALE: tl.constexpr, AREA: tl.constexpr):
    """Weights of each key, AREA tensors [LANES, QUERIES], for the pointers of key 0; all 0 if ``ok`` is false."""
    raw = ()
    for key in tl.static_range(AREA):
        raw = raw + (tl.load(logits + key, mask=ok, other=0.0).to(tl.float32),)
    top = raw[0]
    for key in tl.static_range(1, AREA):
        top = tl.maximum(top, raw[key])
    weights = ()
    total = tl.zeros(top.shape, tl.float32)
    for key in tl.static_range(AREA):
        weights = weights + (tl.exp2((raw[key] - top) * (SCALE * LOG2_E)),)
        total += weights[key]
    share = tl.where(ok, 1.0 / total, 0.0)
    normed = ()
    for key in tl.static_range(AREA):
        normed = normed + (weights[key] * share,)
    return normed


@triton.jit
def _cast(tiles, TYPE: tl.constexpr):
    cast = ()
    for i in tl.static_range(len(tiles)):
        cast = cast + (tiles[i].to(TYPE),)
    return cast


@triton.jit
def _write_rows(
    grid, sums, y, y0, y1, x0, x1, lanes, channels, channel_ok, W,
    C: tl.constexpr, K: tl.constexpr, S: tl.constexpr, P: tl.constexpr, LANES: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write the S rows of cells from y on, to which no further window adds, where they lie in [y0, y1) x [x0, x1).

    Column j of window c is grid column S*c - P + j = S*lane + rest: it goes to the lane (j - P) // S further on,
    to the (j - P) % S-th of the S columns of that lane. Cells under no window get 0.
    """
    for i in tl.static_range(S):
        for rest in tl.static_range(S):
            total = tl.zeros([LANES, D], tl.float32)
            if i < K:
                for j in tl.static_range(K):
                    if (j - P) % S == rest:
                        # Moved even where the step is 0: all tiles then have the layout that suits the moving, and
                        # the compiler keeps none of them twice.
                        total += _move(sums[i * K + j], (j - P) // S, LANES, D)
            x = S * lanes + rest
            ok = (y + i >= y0) & (y + i < y1) & (x >= x0) & (x < x1)
            at = ((y + i) * W + x)[:, None] * C + channels
            tl.store(grid + at, total.to(grid.dtype.element_ty), mask=ok[:, None] & channel_ok)


@triton.jit
def _place(
    h, w, H, W, rows, tiles, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
    P: tl.constexpr, LANES: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """What this program works on. Heads are neighbours in memory, so neighbouring programs take them."""
    program = tl.program_id(0)
    head = program % HEADS
    tile = program // HEADS % tiles
    steps = tl.maximum(h, (H - 1 + P) // S + 1)  # rows of windows, and further ones if that leaves rows of cells over
    chunks = tl.cdiv(steps, rows)
    chunk = program // (HEADS * tiles) % chunks
    image = (program // (HEADS * tiles) // chunks).to(tl.int64)

    first = chunk * rows  # its own rows of windows are [first, last), and the windows [left, right) of each
    last = tl.minimum(first + rows, steps)
    left = tile * (LANES - BEFORE - AFTER)
    right = left + LANES - BEFORE - AFTER
    start = tl.maximum(first - (K - 1) // S, 0)  # rows of windows above that reach into its rows of cells
    lanes = left - BEFORE + tl.arange(0, LANES)
    channels = head * HEAD_DIM + tl.arange(0, D)[None, :]
    channel_ok = tl.arange(0, D)[None, :] < HEAD_DIM
    return image, head, first, last, left, right, start, lanes, channels, channel_ok


@triton.jit(do_not_specialize=["H", "W", "h", "w", "rows", "tiles"])
def forward(
    value, logits, out, H, W, h, w, rows, tiles, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, K: tl.constexpr,
    S: tl.constexpr, P: tl.constexpr, LANES: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    D: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """value [B, H, W, C], logits [B, h, w, HEADS * K^4] -> out [B, H, W, C]. Each program owns cells of out."""
    AREA: tl.constexpr = K * K
    C: tl.constexpr = HEADS * HEAD_DIM
    SCALE: tl.constexpr = HEAD_DIM**-0.5
    SHARED: tl.constexpr = K - S if K > S else 0  # rows of cells that neighbouring rows of windows share
    image, head, first, last, left, right, start, lanes, channels, channel_ok = _place(
        h, w, H, W, rows, tiles, HEADS, HEAD_DIM, K, S, P, LANES, BEFORE, AFTER, D
    )
    value += image * H * W * C
    out += image * H * W * C
    logits += image * h * w * (HEADS * AREA * AREA) + head * (AREA * AREA)
    y0, y1 = tl.maximum(S * first - P, 0), tl.minimum(S * last - P, H)  # the cells it owns
    x0, x1 = S * left, tl.minimum(S * right, W)

    corner = S * lanes - P
    cells = value + corner[:, None] * C + channels
    is_window = (lanes >= 0) & (lanes < w)
    query = tl.arange(0, 2**LOG)
    query_x = corner[:, None] + (query % K)[None, :]
    query_ok = (query_x >= x0) & (query_x < x1) & is_window[:, None] & (query < AREA)[None, :]
    zero = tl.zeros([LANES, D], tl.float32)

    kept = ()
    for i in tl.static_range(SHARED):
        y = S * start - P + i
        kept = kept + _read_row(cells, y, is_window & (y >= 0) & (y < H), corner, channel_ok, W, C, K)
    begun = (zero,) * (SHARED * K)
    for r in tl.range(start, last, num_stages=1):
        window = kept  # K^2 tiles of values
        for i in tl.static_range(SHARED, K):
            y = S * r - P + i
            window = window + _read_row(cells, y, is_window & (y >= 0) & (y < H), corner, channel_ok, W, C, K)

        # Every logit is asked for by the one program that owns the cell of its query, those of padding by none.
        query_y = S * r - P + query // K
        ok = query_ok & ((query_y >= y0) & (query_y < y1) & (r < h))[None, :]
        at = (r * w + lanes)[:, None] * (HEADS * AREA * AREA) + query[None, :] * AREA
        weights = _softmax(logits + at, ok, SCALE, AREA)

        keys = tl.permute(_stack(window, LOG), (0, 2, 1))  # [LANES, KEYS, D]
        mixed = tl.dot(_stack(_cast(weights, keys.dtype), LOG), keys, input_precision="ieee")  # [LANES, QUERIES, D]
        mixed = _unstack(tl.permute(mixed, (0, 2, 1)), AREA, LOG)
        sums = ()
        for i in tl.static_range(AREA):
            sums = sums + ((begun[i] + mixed[i] if i < SHARED * K else mixed[i]),)

        _write_rows(out, sums, S * r - P, y0, y1, x0, x1, lanes, channels, channel_ok, W, C, K, S, P, LANES, D)
        kept = window[AREA - SHARED * K :]
        begun = sums[AREA - SHARED * K :]


@triton.jit(do_not_specialize=["H", "W", "h", "w", "rows", "tiles"])
def backward(
    grad, value, logits, grad_value, grad_logits, H, W, h, w, rows, tiles, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, K: tl.constexpr, S: tl.constexpr, P: tl.constexpr, LANES: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, D: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """grad of out -> grad_value and grad_logits. Each program owns cells of the first and windows of the second."""
    AREA: tl.constexpr = K * K
    C: tl.constexpr = HEADS * HEAD_DIM
    SCALE: tl.constexpr = HEAD_DIM**-0.5
    SHARED: tl.constexpr = K - S if K > S else 0
    image, head, first, last, left, right, start, lanes, channels, channel_ok = _place(
        h, w, H, W, rows, tiles, HEADS, HEAD_DIM, K, S, P, LANES, BEFORE, AFTER, D
    )
    grad += image * H * W * C
    value += image * H * W * C
    grad_value += image * H * W * C
    logits += image * h * w * (HEADS * AREA * AREA) + head * (AREA * AREA)
    grad_logits += image * h * w * (HEADS * AREA * AREA) + head * (AREA * AREA)
    y0, y1 = tl.maximum(S * first - P, 0), tl.minimum(S * last - P, H)
    x0, x1 = S * left, tl.minimum(S * right, W)

    corner = S * lanes - P
    values = value + corner[:, None] * C + channels
    grads = grad + corner[:, None] * C + channels
    is_window = (lanes >= 0) & (lanes < w)
    owned = is_window & (lanes >= left) & (lanes < right)  # the others are there for their share of grad_value
    query = tl.arange(0, 2**LOG)
    query_x = corner[:, None] + (query % K)[None, :]
    query_ok = (query_x >= 0) & (query_x < W) & is_window[:, None] & (query < AREA)[None, :]
    zero = tl.zeros([LANES, D], tl.float32)

    kept, kept_grad = (), ()
    for i in tl.static_range(SHARED):
        y = S * start - P + i
        kept = kept + _read_row(values, y, owned & (y >= y0) & (y < H), corner, channel_ok, W, C, K)
        kept_grad = kept_grad + _read_row(grads, y, is_window & (y >= 0) & (y < H), corner, channel_ok, W, C, K)
    begun = (zero,) * (SHARED * K)
    for r in tl.range(start, last, num_stages=1):
        window, window_grad = kept, kept_grad
        for i in tl.static_range(SHARED, K):
            y = S * r - P + i
            window = window + _read_row(values, y, owned & (y >= y0) & (y < H), corner, channel_ok, W, C, K)
            inside = is_window & (y >= 0) & (y < H)
            window_grad = window_grad + _read_row(grads, y, inside, corner, channel_ok, W, C, K)

        query_y = S * r - P + query // K
        ok = query_ok & ((query_y >= 0) & (query_y < H) & (r < h))[None, :]
        at = (r * w + lanes)[:, None] * (HEADS * AREA * AREA) + query[None, :] * AREA
        weights = _softmax(logits + at, ok, SCALE, AREA)

        # out = weights @ values, so the gradient of a weight is the product of its query's and its key's cells.
        keys = _stack(window, LOG)  # [LANES, D, KEYS]
        queries = _stack(window_grad, LOG)  # [LANES, D, QUERIES]
        grad_weights = tl.dot(tl.permute(queries, (0, 2, 1)), keys, input_precision="ieee")
        grad_weights = _unstack(grad_weights, AREA, LOG)  # K^2 of [LANES, QUERIES]
        mean = weights[0] * grad_weights[0]
        for key in tl.static_range(1, AREA):
            mean += weights[key] * grad_weights[key]
        mine = (owned & (r >= first) & (r < h))[:, None] & (query < AREA)[None, :]
        for key in tl.static_range(AREA):
            grad_logit = weights[key] * (grad_weights[key] - mean) * SCALE
            tl.store(grad_logits + at + key, grad_logit.to(grad_logits.dtype.element_ty), mask=mine)

        mixed = tl.dot(queries, _stack(_cast(weights, queries.dtype), LOG), input_precision="ieee")
        mixed = _unstack(mixed, AREA, LOG)  # K^2 of [LANES, D]
        sums = ()
        for i in tl.static_range(AREA):
            sums = sums + ((begun[i] + mixed[i] if i < SHARED * K else mixed[i]),)

        _write_rows(grad_value, sums, S * r - P, y0, y1, x0, x1, lanes, channels, channel_ok, W, C, K, S, P, LANES, D)
        kept, kept_grad = window[AREA - SHARED * K :], window_grad[AREA - SHARED * K :]
        begun = sums[AREA - SHARED * K :]
