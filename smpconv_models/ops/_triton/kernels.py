"""Depthwise convolution as matrix products, in two forms. Only ``@triton.jit``; launch.py calls them.

Whole map: a channel's convolution of N maps of H * W pixels is one product, ``Y[n, o] = sum over i of X[n, i] T[i, o]``
with ``T[i, o] = w[ih - oh + kh // 2, iw - ow + kw // 2]``, gathered from the kernel as it is needed.

Blocks: the output is cut into blocks of R rows and S columns, and every input row is one product for all blocks,
``Y[(r, s), block] = sum over delta, t of T[delta - r, s, t] X[delta, t, block]``. delta counts input rows from
kh // 2 above the block, t input columns from LEFT before it, in CHUNKS of TC; ``T[row, s, t]`` is kernel row ``row`` as
a banded matrix, ``w[row, t - LEFT + kw // 2 - s]``, the same for every block (:func:`expand_rows`). A step of the loop
takes UNROLL chunks, a divisor of CHUNKS: all of a row for small kernels; fewer compile faster and take less memory.

The input's gradient is the forward pass of the output's gradient with the kernel FLIPPED, rotated by 180 degrees.

The weight gradient is the transposed product of either form, then a sum along diagonals: each row of the product is
rotated until the terms of one kernel element are in one column. Terms that wrapped around the end belong to another
element, which follows from their position.

Sums are in float32, in an order fixed by shapes and tiles, without atomics: results are deterministic.

Widths and strides are passed divided by A, which divides them all, so that the compiler sees how rows are aligned.
Names ending in ``_A`` are these quotients.
"""
import triton
import triton.language as tl

# Sizes of the data: a kernel compiled for one of them serves all.
SIZES = (
    'total', 'N', 'C', 'H', 'W', 'W_A', 'HW_A', 'x_stride_n_A', 'x_stride_c_A', 'g_stride_n_A', 'g_stride_c_A',
    'splits', 'P_B', 'Q_A', 'x_stride_p_A',
)


def jit(function, compiler=triton.jit):
    """Apply a compiler's ``jit`` without a separate build for sizes that are 1 or divide by 16."""
    names = function.__code__.co_varnames[:function.__code__.co_argcount]
    return compiler(function, do_not_specialize=[name for name in names if name in SIZES])


@triton.jit
def noop_kernel():
    """Do nothing, to show that Triton can compile and launch."""
    pass


@jit
def transpose_maps(
        x_ptr, y_ptr, P_B, Q_A, x_stride_n_A, x_stride_p_A, A: tl.constexpr, B: tl.constexpr, BP: tl.constexpr,
        BQ: tl.constexpr):
    """Copy x (N, P, Q) to y (N, Q, P), a tile per program: pixels and channels change places. y is contiguous."""
    P = P_B * B
    Q = Q_A * A
    p_blocks = tl.cdiv(P, BP)
    q_blocks = tl.cdiv(Q, BQ)
    program = tl.program_id(0)
    p = (program % p_blocks * BP + tl.arange(0, BP))[:, None]
    q = (program // p_blocks % q_blocks * BQ + tl.arange(0, BQ))[None, :]
    n = (program // (p_blocks * q_blocks)).to(tl.int64)
    inside = (p < P) & (q < Q)
    x = tl.load(x_ptr + (n * x_stride_n_A + p.to(tl.int64) * x_stride_p_A) * A + q, mask=inside)
    tl.store(y_ptr + (n * Q + q) * P + p, x, mask=inside)


@jit
def map_forward(
        x_ptr, w_ptr, bias_ptr, y_ptr, N, C, W, HW_A, x_stride_n_A, x_stride_c_A, A: tl.constexpr, KH: tl.constexpr,
        KW: tl.constexpr, FLIPPED: tl.constexpr, COVERS: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
        BN: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr):
    """Compute BN images and BO output pixels of a channel per program. y is contiguous."""
    HW = HW_A * A
    o_blocks = tl.cdiv(HW, BO)
    n_blocks = tl.cdiv(N, BN)
    program = tl.program_id(0)
    o = program % o_blocks * BO + tl.arange(0, BO)
    n = program // o_blocks % n_blocks * BN + tl.arange(0, BN)
    c = (program // (o_blocks * n_blocks)).to(tl.int64)
    x_ptrs = x_ptr + (n[:, None].to(tl.int64) * x_stride_n_A + c * x_stride_c_A) * A
    w_ptrs = w_ptr + c * (KH * KW)
    oh, ow = tl.minimum(o, HW - 1) // W, tl.minimum(o, HW - 1) % W
    acc = tl.zeros((BN, BO), dtype=tl.float32)
    for i0 in range(0, HW, BI):
        i = i0 + tl.arange(0, BI)
        x = tl.load(x_ptrs + i[None, :], mask=(n < N)[:, None] & (i < HW)[None, :], other=0.)
        i = tl.minimum(i, HW - 1)
        ih, iw = i // W, i % W
        w_offsets = (ih * KW + iw)[:, None] - (oh * KW + ow)[None, :]
        w_offsets = (KH // 2 * KW + KW // 2) + (-w_offsets if FLIPPED else w_offsets)
        if COVERS:                                  # every pixel sees every pixel
            weight = tl.load(w_ptrs + w_offsets)
        else:
            kh = ih[:, None] - oh[None, :] + KH // 2
            kw = iw[:, None] - ow[None, :] + KW // 2
            inside = (kh >= 0) & (kh < KH) & (kw >= 0) & (kw < KW)
            weight = tl.load(w_ptrs + w_offsets, mask=inside, other=0.)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + c).to(tl.float32)
    y_ptrs = y_ptr + (n[:, None].to(tl.int64) * C + c) * HW + o[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(n < N)[:, None] & (o < HW)[None, :])


@jit
def map_weight_grad(
        g_ptr, x_ptr, dw_ptr, N, H, W, HW_A, g_stride_n_A, g_stride_c_A, x_stride_n_A, x_stride_c_A, A: tl.constexpr,
        KH: tl.constexpr, KW: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr,
        BO: tl.constexpr, BQ: tl.constexpr):
    """Compute a channel per program, row by output row. BI, a power of two, is at least H * W + W - 1; BO, W.

    ``E[i, ow] = sum over n of x[n, i] g[n, oh, ow]`` adds to ``dw[ih - oh + KH // 2, iw - ow + KW // 2]``. Column ow,
    rotated by ow, has the pixels i = d + ow in row d; negative d are the last rows. The distance of i from the output
    pixel is ``d - oh * W``, which is two elements of dw, that for pixels right of ow and that for pixels left of it.
    """
    HW = HW_A * A
    c = tl.program_id(0).to(tl.int64)
    g_ptr += c * g_stride_c_A * A
    x_ptr += c * x_stride_c_A * A
    i = tl.arange(0, BI)
    ow = tl.arange(0, BO)
    past_row = tl.where(i < HW, i % W, ((i - BI) % W + W) % W)[:, None] + ow[None, :] >= W
    rotated = (i[:, None] + ow[None, :]) & (BI - 1)
    distance = tl.arange(0, 2 * BI) - BI
    right = tl.zeros((2 * BI,), dtype=tl.float32)
    left = tl.zeros((2 * BI,), dtype=tl.float32)
    for n0 in range(0, N, BN):
        n = (n0 + tl.arange(0, BN)).to(tl.int64)
        x_ptrs = x_ptr + n[None, :] * x_stride_n_A * A + i[:, None]
        x = tl.load(x_ptrs, mask=(i < HW)[:, None] & (n < N)[None, :], other=0.)
        g_ptrs = g_ptr + n[:, None] * g_stride_n_A * A + ow[None, :]
        for oh in range(0, H):
            g = tl.load(g_ptrs + oh * W, mask=(n < N)[:, None] & (ow < W)[None, :], other=0.)
            terms = tl.gather(tl.dot(x, g, input_precision=PRECISION), rotated, 0)
            source = distance + oh * W
            real = (source > -W) & (source < HW)
            row = tl.sum(tl.where(past_row, 0., terms), 1)
            right += tl.where(real, tl.gather(row, source & (BI - 1), 0), 0.)
            row = tl.sum(tl.where(past_row, terms, 0.), 1)
            left += tl.where(real, tl.gather(row, source & (BI - 1), 0), 0.)
    for q0 in range(0, KH * KW, BQ):
        q = q0 + tl.arange(0, BQ)
        dh = q // KW - KH // 2
        dw = q % KW - KW // 2
        reached = (dh > -H) & (dh < H) & (dw > -W) & (dw < W)
        place = (dh * W + dw + BI) & (2 * BI - 1)
        value = tl.where(dw < 0, tl.gather(left, place, 0), tl.gather(right, place, 0))
        value = tl.where(reached, value, 0.)
        tl.store(dw_ptr + c * (KH * KW) + q, value.to(dw_ptr.dtype.element_ty), mask=q < KH * KW)


@triton.jit
def _load_elements(
        w_ptr, c, row, column, real, KH: tl.constexpr, KW: tl.constexpr, FLIPPED: tl.constexpr):
    """Load elements of w (C, KH, KW), zeros outside of the kernel."""
    inside = real & (row >= 0) & (row < KH) & (column >= 0) & (column < KW)
    element = row * KW + column
    if FLIPPED:
        element = KH * KW - 1 - element
    return tl.load(w_ptr + c * (KH * KW) + element, mask=inside, other=0.)


@jit
def expand_rows(
        w_ptr, rows_ptr, total, KH: tl.constexpr, KW: tl.constexpr, FLIPPED: tl.constexpr, R: tl.constexpr,
        S: tl.constexpr, LEFT: tl.constexpr, CHUNKS: tl.constexpr, TC: tl.constexpr, BLOCK: tl.constexpr):
    """Expand w (C, KH, KW) to banded rows (C, KH + 2 (R - 1), CHUNKS, S, TC), with R - 1 rows of zeros on each side."""
    ROWS: tl.constexpr = KH + 2 * (R - 1)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    t = index % TC
    s = index // TC % S
    chunk = index // (TC * S) % CHUNKS
    row = index // (TC * S * CHUNKS) % ROWS - (R - 1)
    c = index // (TC * S * CHUNKS * ROWS)
    column = chunk * TC + t - LEFT + KW // 2 - s
    value = _load_elements(w_ptr, c, row, column, index < total, KH, KW, FLIPPED)
    tl.store(rows_ptr + index, value, mask=index < total)


@jit
def expand_fragments(
        w_ptr, fragments_ptr, total, KH: tl.constexpr, KW: tl.constexpr, FLIPPED: tl.constexpr, BLOCK: tl.constexpr):
    """Expand w (C, KH, KW) to banded matrices (C, KH + 15, 3, 32, 8), with 7 rows of zeros before and 8 behind.

    Row s of a matrix is an output column, and its column t an input column, of the block to the left, the same and the
    one to the right. The last two dimensions are a thread of wgmma and its elements of the left operand.
    """
    ROWS: tl.constexpr = KH + 15
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    item = index % 8
    lane = index // 8 % 32
    s = lane // 4 + item // 2 % 2 * 8
    t = lane % 4 * 2 + item // 4 * 8 + item % 2
    row = index // 768 % ROWS - 7
    c = index // (768 * ROWS)
    column = (index // 256 % 3 - 1) * 16 + t + KW // 2 - s
    value = _load_elements(w_ptr, c, row, column, index < total, KH, KW, FLIPPED)
    tl.store(fragments_ptr + index, value, mask=index < total)


@jit
def block_forward(
        x_ptr, rows_ptr, bias_ptr, y_ptr, N, C, H, W_A, x_stride_n_A, x_stride_c_A, A: tl.constexpr, KH: tl.constexpr,
        HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, R: tl.constexpr, S: tl.constexpr, LEFT: tl.constexpr,
        CHUNKS: tl.constexpr, UNROLL: tl.constexpr, TC: tl.constexpr, BP: tl.constexpr):
    """Compute R output rows of a channel per program, BP of the blocks (n, j) in them. y is contiguous."""
    ROW: tl.constexpr = CHUNKS * S * TC
    STEPS: tl.constexpr = CHUNKS // UNROLL          # of an input row
    W = W_A * A
    J = tl.cdiv(W, S)
    p_blocks = tl.cdiv(N * J, BP)
    i_blocks = tl.cdiv(H, R)
    program = tl.program_id(0)
    position = program % p_blocks * BP + tl.arange(0, BP)
    top = program // p_blocks % i_blocks * R
    c = (program // (p_blocks * i_blocks)).to(tl.int64)
    n = position // J
    j = position % J
    r = tl.arange(0, R * S) // S
    s = tl.arange(0, R * S) % S
    t = tl.arange(0, TC)
    first = tl.maximum(KH // 2 - top, 0)            # rows above and below the map are never visited
    last = tl.minimum(KH + R - 1, H + KH // 2 - top)
    rows_ptrs = rows_ptr + c * ((KH + 2 * (R - 1)) * ROW) + ((first + R - 1 - r) * ROW + s * TC)[:, None] + t[None, :]
    column = (j * S - LEFT)[None, :] + t[:, None]
    x_base = x_ptr + (n.to(tl.int64) * x_stride_n_A + c * x_stride_c_A) * A
    x_ptrs = x_base[None, :] + (top - KH // 2 + first).to(tl.int64) * W + column
    acc = tl.zeros((R * S, BP), dtype=tl.float32)
    for step in range(0, (last - first) * STEPS):
        part = step % STEPS
        for i in tl.static_range(0, UNROLL):
            x_column = column + (part * UNROLL + i) * TC
            inside = (n < N)[None, :] & (x_column >= 0) & (x_column < W)
            weight = tl.load(rows_ptrs + i * (S * TC))
            x = tl.load(x_ptrs + i * TC, mask=inside, other=0.)
            acc = tl.dot(weight, x, acc, input_precision=PRECISION)
        rows_ptrs += UNROLL * S * TC
        if STEPS == 1:
            x_ptrs += W
        else:
            x_ptrs += tl.where(part == STEPS - 1, W - (CHUNKS - UNROLL) * TC, UNROLL * TC)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + c).to(tl.float32)
    row = top + r[:, None]
    column = (j * S)[None, :] + s[:, None]
    y_ptrs = y_ptr + ((n.to(tl.int64) * C + c) * H)[None, :] * W + row.to(tl.int64) * W + column
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(n < N)[None, :] & (row < H) & (column < W))


@jit
def block_weight_grad(
        g_ptr, x_ptr, parts_ptr, N, C, H, W_A, g_stride_n_A, g_stride_c_A, x_stride_n_A, x_stride_c_A, splits,
        A: tl.constexpr, KH: tl.constexpr, PRECISION: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
        LEFT: tl.constexpr, CHUNKS: tl.constexpr, TC: tl.constexpr, D: tl.constexpr, BN: tl.constexpr,
        BJ: tl.constexpr):
    """Sum D values of delta and a chunk of columns per program and channel, over every ``splits``-th BN * BJ blocks.

    parts (splits, C, GROUPS, CHUNKS, 2, 2, D, TC) are sums along the diagonals of ``E[(delta, t), (r, s)] = sum over
    blocks of x[delta, t] g[r, s]``: column (r, s), rotated by r in delta and by s in t, has the terms of kernel row
    ``delta - r`` and column ``t - s`` in one row, or D rows and TC columns earlier if it wrapped around the end.
    """
    GROUPS: tl.constexpr = (KH + R - 1 + D - 1) // D
    W = W_A * A
    program = tl.program_id(0)
    chunk = program % CHUNKS
    group = program // CHUNKS % GROUPS
    c = (program // (CHUNKS * GROUPS) % C).to(tl.int64)
    split = program // (CHUNKS * GROUPS) // C

    rs = tl.arange(0, R * S)
    r, s = rs // S, rs % S
    dt = tl.arange(0, D * TC)
    delta, t = dt // TC, dt % TC
    k = tl.arange(0, BN * BJ)
    above = group * D - KH // 2                     # of a block's first row, the group's first input row
    i_first = (tl.maximum(-above - (D - 1), 0) + R - 1) // R
    i_count = tl.maximum(tl.minimum(tl.cdiv(H, R), (tl.maximum(H - above, 0) + R - 1) // R) - i_first, 0)
    j_blocks = tl.cdiv(tl.cdiv(W, S), BJ)
    n_blocks = tl.cdiv(N, BN)

    g_ptr += c * g_stride_c_A * A
    x_ptr += c * x_stride_c_A * A
    n = (k // BJ).to(tl.int64)
    x_ptrs = x_ptr + (n * x_stride_n_A * A + k % BJ * S)[None, :] + (delta.to(tl.int64) * W + t)[:, None]
    g_ptrs = g_ptr + (n * g_stride_n_A * A + k % BJ * S)[:, None] + (r.to(tl.int64) * W + s)[None, :]
    acc = tl.zeros((D * TC, R * S), dtype=tl.float32)
    for step in range(split, n_blocks * j_blocks * i_count, splits):
        top = (i_first + step % i_count) * R
        j = step // i_count % j_blocks * BJ
        n0 = (step // i_count // j_blocks * BN).to(tl.int64)
        x_offset = n0 * x_stride_n_A * A + (top + above).to(tl.int64) * W + j * S - LEFT + chunk * TC
        g_offset = n0 * g_stride_n_A * A + top.to(tl.int64) * W + j * S
        real = n + n0 < N
        column = (j + k % BJ) * S
        x_row = top + above + delta
        x_column = column[None, :] - LEFT + chunk * TC + t[:, None]
        g_column = column[:, None] + s[None, :]
        x_inside = real[None, :] & ((x_row >= 0) & (x_row < H))[:, None] & (x_column >= 0) & (x_column < W)
        g_inside = real[:, None] & (top + r < H)[None, :] & (g_column < W)
        x = tl.load(x_ptrs + x_offset, mask=x_inside, other=0.)
        g = tl.load(g_ptrs + g_offset, mask=g_inside, other=0.)
        acc = tl.dot(x, g, acc, input_precision=PRECISION)

    rotated = t[:, None] + s[None, :]
    acc = tl.gather(acc, delta[:, None] * TC + (rotated & (TC - 1)), 0)
    within = tl.sum(tl.reshape(tl.where(rotated < TC, acc, 0.), (D * TC, R, S)), 2)
    beyond = tl.sum(tl.reshape(tl.where(rotated < TC, 0., acc), (D * TC, R, S)), 2)
    rotated = delta[:, None] + tl.arange(0, R)[None, :]
    rows = (rotated & (D - 1)) * TC + t[:, None]
    within = tl.gather(within, rows, 0)
    beyond = tl.gather(beyond, rows, 0)
    parts_ptrs = parts_ptr + program.to(tl.int64) * (4 * D * TC) + dt
    tl.store(parts_ptrs, tl.sum(tl.where(rotated < D, within, 0.), 1))
    tl.store(parts_ptrs + D * TC, tl.sum(tl.where(rotated < D, beyond, 0.), 1))
    tl.store(parts_ptrs + 2 * D * TC, tl.sum(tl.where(rotated < D, 0., within), 1))
    tl.store(parts_ptrs + 3 * D * TC, tl.sum(tl.where(rotated < D, 0., beyond), 1))


@jit
def add_parts(
        parts_ptr, dw_ptr, C, splits, KH: tl.constexpr, KW: tl.constexpr, R: tl.constexpr, LEFT: tl.constexpr,
        CHUNKS: tl.constexpr, TC: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Sum the parts of :func:`block_weight_grad` to dw (C, KH, KW)."""
    GROUPS: tl.constexpr = (KH + R - 1 + D - 1) // D
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kh = (index // KW % KH).to(tl.int32)
    kw = (index % KW).to(tl.int32)
    c = index // (KH * KW)
    column = kw + LEFT - KW // 2 + TC * KW          # TC * KW: the quotients of negative numbers round down
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(0, splits):
        for below in tl.static_range(0, 2):
            for beyond in tl.static_range(0, 2):
                group = kh // D + below
                chunk = column // TC - KW + beyond
                inside = (c < C) & (group < GROUPS) & (chunk >= 0) & (chunk < CHUNKS)
                part = ((split * C + c) * GROUPS + group) * CHUNKS + chunk
                offset = (part * 4 + below * 2 + beyond) * (D * TC) + kh % D * TC + column % TC
                total += tl.load(parts_ptr + offset, mask=inside, other=0.)
    tl.store(dw_ptr + index, total.to(dw_ptr.dtype.element_ty), mask=c < C)


@jit
def add_splits(parts_ptr, dw_ptr, total, splits, BLOCK: tl.constexpr):
    """Sum the parts (splits, total) of :func:`hopper.hopper_block_weight_grad` to dw."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(0, splits):
        value += tl.load(parts_ptr + split * total.to(tl.int64) + index, mask=index < total, other=0.)
    tl.store(dw_ptr + index, value.to(dw_ptr.dtype.element_ty), mask=index < total)
