"""Kernels for compute capability 9.0, in Gluon, which chooses registers and shared memory itself.

launch.py imports this module at the first use. Gluon is experimental, and its names change between versions of Triton.

``hopper_forward`` is the block form. It differs from ``kernels.block_forward``, whose time is that of its loads from
the L2 cache:

- A row of BN images is copied to shared memory once, as J blocks (BN, 16). The products of the three chunks read the
  blocks of a column's neighbours; those beyond the map are left out.
- The weight is never in shared memory. Warp r computes output row r, so its operand is one banded 16 x 16 matrix, which
  ``kernels.expand_fragments`` stores in the order of the registers: 16 bytes a thread. All warps load the same matrix,
  one step after the other, so that seven of eight loads hit the L1 cache.
- The rows in the middle of the map, which take longest, are computed first.

``hopper_map_forward`` is for small maps. It differs from ``kernels.map_forward``, whose time is that of instructions,
and from ``kernels.block_forward``, which loads rows again and launches another kernel before: the map is copied once,
and each warp loads the elements of its rows of the kernel straight into registers, all but the first time from L1.

``hopper_map_weight_grad`` is the whole-map form. It differs from ``kernels.map_weight_grad``, whose time is that of its
instructions: products of rows at the same distance are summed by the tensor cores, over the map and the batch, so that
diagonals are summed once, of a third of the values.

``hopper_small_map_weight_grad`` is the same for maps of at most 8 rows and columns, in one product of all pixels.

``hopper_block_weight_grad`` is the block form. It differs from ``kernels.block_weight_grad``, whose time is that of its
loads too: a program has all sums of a channel in registers, and loads x and g of its images alone, each four times.
"""
import functools

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from . import kernels

_barrier = getattr(gl, 'barrier', None) or gl.thread_barrier                                        # the latter: 3.6
_async_load = getattr(async_copy, 'async_load', None) or async_copy.async_copy_global_to_shared    # the latter: 3.6
_RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, 'reinterpret'))                        # since 3.9


jit = functools.partial(kernels.jit, compiler=gluon.jit)


@gluon.constexpr_function
def _copy_layout(A, J, BN, WARPS, ROWS=1):
    """Return the layout of a copy (ROWS * J * BN, 16): A elements a thread, then columns, blocks, images and rows."""
    def bits(count):
        return [1 << bit for bit in range(count.bit_length() - 1)]
    registers = [[0, column] for column in bits(A)]
    others = [[0, A * column] for column in bits(16 // A)] + [[BN * block, 0] for block in bits(J)]
    others += [[image, 0] for image in bits(BN)] + [[J * BN * row, 0] for row in bits(ROWS)]
    threads = 4 + WARPS.bit_length()
    others += [[0, 0]] * (threads - len(others))        # more threads than copies
    return gl.DistributedLinearLayout(
        reg_bases=registers + others[threads:], lane_bases=others[:5], warp_bases=others[5:threads], block_bases=[],
        shape=[ROWS * J * BN, 16])


@gluon.jit
def _load_fragment(ptrs, operand: gl.constexpr, mask=None):
    """Load (warp, lane, 8) elements as the (16 warps, 16) operand of a product. No data moves between threads."""
    if mask is None:
        values = gl.load(ptrs)
    else:
        values = gl.load(ptrs, mask=mask, other=0.)
    R: gl.constexpr = values.shape[0]
    values = values.reshape([R, 8, 4, 2, 2, 2])                 # r, s % 8, t % 8 // 2, t // 8, s // 8, t % 2
    values = values.permute([0, 4, 1, 3, 2, 5]).reshape([R * 16, 16])
    return gl.convert_layout(values, operand, assert_trivial=True)


@jit
def hopper_forward(
        x_ptr, fragments_ptr, bias_ptr, y_ptr, N, C, H, W_A, x_stride_n_A, x_stride_c_A, A: gl.constexpr,
        KH: gl.constexpr, HAS_BIAS: gl.constexpr, J: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr):
    """Compute 8 output rows of a channel and BN images per program, J blocks of 16 columns. y is contiguous."""
    R: gl.constexpr = 8
    S: gl.constexpr = 16
    P: gl.constexpr = KH // 2
    ROW: gl.constexpr = 3 * S * S               # elements of a kernel row's three matrices
    accumulator: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[R, 1], instr_shape=[16, BN, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, accumulator, 2)
    copy: gl.constexpr = _copy_layout(A, J, BN, R)
    fragment: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 32, 1], [8, 1, 1], [2, 1, 0])
    pixels: gl.constexpr = gl.BlockedLayout([4, 1], [16, 2], [2, 4], [0, 1])     # of y: 32 bytes at a time
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2)

    W = W_A * A
    n_blocks = gl.cdiv(N, BN)
    i_blocks = gl.cdiv(H, R)
    program = gl.program_id(0)
    n0 = program % n_blocks * BN
    c = (program // n_blocks % C).to(gl.int64)
    order = program // (n_blocks * C)           # 0, 1, 2, 3, ... is the middle, one above, one below, two above, ...
    top = (i_blocks // 2 + (order + 1) // 2 * (order % 2 * -2 + 1)) * R
    first = gl.maximum(P - top, 0)              # rows above and below the map are never visited
    left = gl.minimum(KH + R - 1, H + P - top) - first

    rows = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [STAGES, J * BN, S], shared)
    if _RENAMED:
        blocks = rows.reinterpret(x_ptr.dtype.element_ty, [STAGES * J, BN, S], shared)
    else:
        blocks = rows._reinterpret(x_ptr.dtype.element_ty, [STAGES * J, BN, S], shared)

    position = gl.arange(0, J * BN, gl.SliceLayout(1, copy))
    n = n0 + position % BN
    column = (position // BN * S)[:, None] + gl.arange(0, S, gl.SliceLayout(0, copy))[None, :]
    inside = (n < N)[:, None] & (column < W)
    x_ptrs = x_ptr + ((n.to(gl.int64) * x_stride_n_A + c * x_stride_c_A) * A)[:, None] \
        + (top - P + first).to(gl.int64) * W + column
    for stage in gl.static_range(STAGES - 1):
        _async_load(rows.index(stage), x_ptrs, mask=inside & (stage < left))
        async_copy.commit_group()
        x_ptrs += W

    warp = gl.arange(0, R, gl.SliceLayout(1, gl.SliceLayout(2, fragment)))
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, fragment)))
    item = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, fragment)))
    w_ptrs = fragments_ptr + c * ((KH + 2 * R - 1) * ROW) + ((first + R - 1 - warp) * ROW)[:, None, None] \
        + (lane * 8)[None, :, None] + item[None, None, :]
    w_left = _load_fragment(w_ptrs, operand)
    w_middle = _load_fragment(w_ptrs + S * S, operand)
    w_right = _load_fragment(w_ptrs + 2 * S * S, operand)

    sums = ()
    for _ in gl.static_range(J):
        sums = sums + (gl.zeros([R * S, BN], gl.float32, accumulator),)     # type: ignore[assignment]
    stage = 0
    into = STAGES - 1
    for step in range(left):
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        _barrier()      # the row has arrived, and the products with the row that the next copy replaces are done
        started = ()
        for j in gl.static_range(J):
            acc = warpgroup_mma(w_middle, blocks.index(stage * J + j).permute((1, 0)), sums[j], is_async=True)
            if j > 0:
                acc = warpgroup_mma(w_left, blocks.index(stage * J + j - 1).permute((1, 0)), acc, is_async=True)
            if j < J - 1:
                acc = warpgroup_mma(w_right, blocks.index(stage * J + j + 1).permute((1, 0)), acc, is_async=True)
            started = started + (acc,)      # type: ignore[assignment]
        _async_load(rows.index(into), x_ptrs, mask=inside & (step + STAGES - 1 < left))
        async_copy.commit_group()
        x_ptrs += W
        w_ptrs += ROW   # after the last step a row of zeros
        next_left = _load_fragment(w_ptrs, operand)
        next_middle = _load_fragment(w_ptrs + S * S, operand)
        next_right = _load_fragment(w_ptrs + 2 * S * S, operand)
        sums = warpgroup_mma_wait(0, deps=started)
        w_left = next_left
        w_middle = next_middle
        w_right = next_right
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
        into = gl.where(into == STAGES - 1, 0, into + 1)
    async_copy.wait_group(0)

    rs = gl.arange(0, R * S, gl.SliceLayout(1, pixels))
    n = n0 + gl.arange(0, BN, gl.SliceLayout(0, pixels))
    row = top + rs // S
    y_ptrs = y_ptr + ((n.to(gl.int64) * C + c) * H)[None, :] * W + (row.to(gl.int64) * W + rs % S)[:, None]
    for j in gl.static_range(J):
        acc = sums[j]
        if HAS_BIAS:
            acc += gl.load(bias_ptr + c).to(gl.float32)
        mask = (n < N)[None, :] & ((row < H) & (j * S + rs % S < W))[:, None]
        acc = gl.convert_layout(acc.to(y_ptr.dtype.element_ty), pixels)
        gl.store(y_ptrs + j * S, acc, mask=mask)


@jit
def hopper_map_forward(
        x_ptr, w_ptr, bias_ptr, y_ptr, N, C, x_stride_n_A, x_stride_c_A, A: gl.constexpr, HEIGHT: gl.constexpr,
        WIDTH: gl.constexpr, KH: gl.constexpr, KW: gl.constexpr, FLIPPED: gl.constexpr, HAS_BIAS: gl.constexpr,
        R: gl.constexpr, BN: gl.constexpr):
    """Compute R strips of the output, a warp each, of a channel and BN images per program. y is contiguous.

    A strip is a row of up to 16 pixels, or two rows of up to 8.
    """
    S: gl.constexpr = 8 if WIDTH <= 8 else 16                       # columns of a strip
    ROWS: gl.constexpr = 16 // S
    STRIPS: gl.constexpr = (HEIGHT + ROWS - 1) // ROWS
    PROGRAMS: gl.constexpr = (STRIPS + R - 1) // R                  # of a channel and BN images
    V: gl.constexpr = 2 if A == 1 else A
    accumulator: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[R, 1], instr_shape=[16, BN, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, accumulator, 2)
    copy: gl.constexpr = gl.BlockedLayout([1, V], [2 * V, 16 // V], [R, 1], [1, 0])
    fragment: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 32, 1], [R, 1, 1], [2, 1, 0])
    pixels: gl.constexpr = gl.BlockedLayout([4, 1], [16, 2], [1, R], [0, 1])        # of y
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2)

    n_blocks = gl.cdiv(N, BN)
    program = gl.program_id(0)
    top = program % PROGRAMS * R
    n0 = program // PROGRAMS % n_blocks * BN
    c = (program // (PROGRAMS * n_blocks)).to(gl.int64)
    strips = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [STRIPS, BN, 16], shared)
    n = n0 + gl.arange(0, BN, gl.SliceLayout(1, copy))
    pixel = gl.arange(0, 16, gl.SliceLayout(0, copy))
    x_ptrs = x_ptr + ((n.to(gl.int64) * x_stride_n_A + c * x_stride_c_A) * A)[:, None] \
        + (pixel // S * WIDTH + pixel % S)[None, :]
    for i in gl.static_range(STRIPS):
        inside = (n < N)[:, None] & ((pixel % S < WIDTH) & (i * ROWS + pixel // S < HEIGHT))[None, :]
        if A > 1:
            _async_load(strips.index(i), x_ptrs + i * (ROWS * WIDTH), mask=inside)
        else:                                   # no copies of 2 bytes
            strips.index(i).store(gl.load(x_ptrs + i * (ROWS * WIDTH), mask=inside, other=0.))
    async_copy.commit_group()

    # A warp's operand for a strip of x is the matrix (s, t) of w between their pixels. Strips beyond y repeat the last.
    warp = gl.arange(0, R, gl.SliceLayout(1, gl.SliceLayout(2, fragment)))[:, None, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, fragment)))[None, :, None]
    item = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, fragment)))[None, None, :]
    s = lane // 4 + item // 2 % 2 * 8
    t = lane % 4 * 2 + item // 4 * 8 + item % 2
    kh = KH // 2 + t // S - s // S - gl.minimum(top + warp, STRIPS - 1) * ROWS
    kw = KW // 2 + t % S - s % S
    w_ptrs = w_ptr + c * (KH * KW) + (KH * KW - 1 - kh * KW - kw if FLIPPED else kh * KW + kw)
    weights = ()
    for i in gl.static_range(STRIPS):
        real = (kw >= 0) & (kw < KW)
        if KH < 2 * STRIPS * ROWS - 1:          # otherwise every row sees every row
            real = real & (kh + i * ROWS >= 0) & (kh + i * ROWS < KH)
        offset = -i * (ROWS * KW) if FLIPPED else i * (ROWS * KW)
        weights = weights + (_load_fragment(w_ptrs + offset, operand, real),)       # type: ignore[assignment]

    async_copy.wait_group(0)
    fence_async_shared()
    _barrier()
    acc = gl.zeros([R * 16, BN], gl.float32, accumulator)
    for i in gl.static_range(STRIPS):
        acc = warpgroup_mma(weights[i], strips.index(i).permute((1, 0)), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    if HAS_BIAS:
        acc += gl.load(bias_ptr + c).to(gl.float32)
    rs = gl.arange(0, R * 16, gl.SliceLayout(1, pixels))
    n = n0 + gl.arange(0, BN, gl.SliceLayout(0, pixels))
    row = top * ROWS + rs // S
    y_ptrs = y_ptr + ((n.to(gl.int64) * C + c) * (HEIGHT * WIDTH))[None, :] + (row * WIDTH + rs % S)[:, None]
    acc = gl.convert_layout(acc.to(y_ptr.dtype.element_ty), pixels)
    gl.store(y_ptrs, acc, mask=(n < N)[None, :] & ((row < HEIGHT) & (rs % S < WIDTH))[:, None])


@gluon.constexpr_function
def _map_operand_layout(BN):
    """Return the registers of a left operand (64, BN) of wgmma, whose rows are split as (4, 16, BN)."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 8, 0]] + [[0, 0, 8 << bit] for bit in range(BN.bit_length() - 4)],
        lane_bases=[[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]], warp_bases=[[1, 0, 0], [2, 0, 0]],
        block_bases=[], shape=[4, 16, BN])


@jit
def hopper_map_weight_grad(
        g_ptr, x_ptr, dw_ptr, N, g_stride_n_A, g_stride_c_A, x_stride_n_A, x_stride_c_A, A: gl.constexpr,
        HEIGHT: gl.constexpr, WIDTH: gl.constexpr, KH: gl.constexpr, KW: gl.constexpr, BN: gl.constexpr):
    """Compute a channel per program, for maps of at most 16 rows and columns; elements of dw that reach further stay.

    A product is four input rows by an output row, ``E[(d, iw), ow] = sum over n of x[n, m + 4 d, iw] g[n, oh, ow]``.
    Products of equal m - oh belong to the same rows of dw, m - oh + 4 d, and are summed in the same registers.
    """
    SUMS: gl.constexpr = HEIGHT + 3                  # values of m - oh
    accumulator: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, 16, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, accumulator, 2)
    split_operand: gl.constexpr = _map_operand_layout(BN)
    copy: gl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [4, 1], [1, 0])
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2)
    shared_rows: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=3)

    c = gl.program_id(0).to(gl.int64)
    x_smem = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [16, BN, 16], shared)
    g_smem = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [HEIGHT, BN, 16], shared)
    if _RENAMED:
        x_rows = x_smem.reinterpret(x_ptr.dtype.element_ty, [4, 4, BN, 16], shared_rows)
    else:
        x_rows = x_smem._reinterpret(x_ptr.dtype.element_ty, [4, 4, BN, 16], shared_rows)

    n = gl.arange(0, BN, gl.SliceLayout(1, copy))
    column = gl.arange(0, 16, gl.SliceLayout(0, copy))
    x_ptrs = x_ptr + (c * x_stride_c_A * A + n.to(gl.int64) * x_stride_n_A * A)[:, None] + column[None, :]
    g_ptrs = g_ptr + (c * g_stride_c_A * A + n.to(gl.int64) * g_stride_n_A * A)[:, None] + column[None, :]

    sums = ()
    for _ in gl.static_range(SUMS):
        sums = sums + (gl.zeros([64, 16], gl.float32, accumulator),)        # type: ignore[assignment]
    for n0 in range(0, N, BN):
        _barrier()      # the products with the images before are done
        inside = (n < N - n0)[:, None] & (column < WIDTH)[None, :]
        for i in gl.static_range(16):
            row = i // 4 + i % 4 * 4            # m, d
            _async_load(x_smem.index(i), x_ptrs + row * WIDTH, mask=inside & (row < HEIGHT))
        for row in gl.static_range(HEIGHT):
            _async_load(g_smem.index(row), g_ptrs + row * WIDTH, mask=inside)
        async_copy.commit_group()
        x_ptrs += x_stride_n_A.to(gl.int64) * (A * BN)
        g_ptrs += g_stride_n_A.to(gl.int64) * (A * BN)
        async_copy.wait_group(0)
        fence_async_shared()
        _barrier()
        for m in gl.static_range(4):
            x = x_rows.index(m).permute((0, 2, 1)).load(split_operand).reshape([64, BN])
            x = gl.convert_layout(x, operand, assert_trivial=True)
            started = ()
            for i in gl.static_range(SUMS):
                acc = sums[i]       # type: ignore[var-annotated]
                if m + HEIGHT - 1 - i >= 0 and m + HEIGHT - 1 - i < HEIGHT:
                    acc = warpgroup_mma(x, g_smem.index(m + HEIGHT - 1 - i), acc, is_async=True)
                started = started + (acc,)      # type: ignore[assignment]
            sums = warpgroup_mma_wait(0, deps=started)

    # Column ow, rotated by ow in iw and by (m - oh) // 4 in d, has the terms of an element of dw in one row.
    row = gl.arange(0, 64, gl.SliceLayout(1, accumulator))
    d = row // 16
    kw = row % 16
    ow = gl.arange(0, 16, gl.SliceLayout(0, accumulator))
    rotated = kw[:, None] + ow[None, :]
    for rest in gl.static_range(4):
        below = gl.zeros([64, 16], gl.float32, accumulator)
        above = gl.zeros([64, 16], gl.float32, accumulator)
        for i in gl.static_range(SUMS):
            if (i - HEIGHT + 1 - rest) % 4 == 0:
                turned = d - (i - HEIGHT + 1 - rest) // 4        # 0 to 7
                terms = gl.gather(sums[i], (turned % 4 * 16)[:, None] + rotated % 16, 0)
                below += gl.where((turned < 4)[:, None], terms, 0.)
                above += gl.where((turned < 4)[:, None], 0., terms)
        for is_above in gl.static_range(2):
            total = above if is_above else below
            kh = 4 * d + rest - 16 * is_above + KH // 2
            for is_left in gl.static_range(2):
                value = gl.sum(gl.where((rotated >= 16) == (is_left == 1), total, 0.), 1)
                column = kw - 16 * is_left + KW // 2
                inside = (kh >= 0) & (kh < KH) & (column >= 0) & (column < KW)
                gl.store(dw_ptr + c * (KH * KW) + kh * KW + column, value.to(dw_ptr.dtype.element_ty), mask=inside)


@jit
def hopper_block_weight_grad(
        g_ptr, x_ptr, parts_ptr, N, C, H, W_A, g_stride_n_A, g_stride_c_A, x_stride_n_A, x_stride_c_A, A: gl.constexpr,
        KH: gl.constexpr, KW: gl.constexpr, J: gl.constexpr, BN: gl.constexpr, AHEAD: gl.constexpr):
    """Sum dw of a channel over BN images per program, to parts (splits, C, KH, KW), for J blocks of 16 columns.

    A step multiplies the input rows step - 3 + d by two tiles of output rows, step - 16 + 16 half + 4 e, with d and e
    from 0 to 3: ``E[half, chunk][(d, t), (e, s)] = sum over n of x[n, d, t] g[n, e, s]``. Their distances d + 13 -
    16 half - 4 e, from -15 to 16, are those of every step, and a pair of rows meets in one step. Chunks are the same
    block of columns, the one to the left and the one to the right. A tile of g is read twice, 16 steps apart.
    """
    K: gl.constexpr = J * BN                    # blocks and images, which the products sum
    X_RING: gl.constexpr = AHEAD + 2            # one more than are read or copied: some warps are a step behind
    G_RING: gl.constexpr = AHEAD + 18
    accumulator: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    copy: gl.constexpr = _copy_layout(A, J, BN, 4, 4)
    stored: gl.constexpr = gl.BlockedLayout([2, 1], [32, 1], [1, 4], [0, 1])
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2)

    W = W_A * A
    n_blocks = gl.cdiv(N, BN)
    program = gl.program_id(0)
    n0 = program % n_blocks * BN
    c = (program // n_blocks).to(gl.int64)
    # Four rows (K, 16), one after the other, are a matrix (K, 64) whose blocks of 16 columns are rows.
    x_rows = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [X_RING, 4 * K, 16], shared)
    g_rows = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [G_RING, 4 * K, 16], shared)
    if _RENAMED:
        x_tiles = x_rows.reinterpret(x_ptr.dtype.element_ty, [X_RING, K, 64], shared)
        g_tiles = g_rows.reinterpret(x_ptr.dtype.element_ty, [G_RING, K, 64], shared)
    else:
        x_tiles = x_rows._reinterpret(x_ptr.dtype.element_ty, [X_RING, K, 64], shared)
        g_tiles = g_rows._reinterpret(x_ptr.dtype.element_ty, [G_RING, K, 64], shared)

    position = gl.arange(0, 4 * K, gl.SliceLayout(1, copy))
    n = (n0 + position % BN).to(gl.int64)
    column = (position // BN % J * 16)[:, None] + gl.arange(0, 16, gl.SliceLayout(0, copy))[None, :]
    inside = (n < N)[:, None] & (column < W)
    x_row = position // K - 3
    g_row = position // K * 4 - 16
    x_ptrs = x_ptr + ((n * x_stride_n_A + c * x_stride_c_A) * A + x_row * W)[:, None] + column
    g_ptrs = g_ptr + ((n * g_stride_n_A + c * g_stride_c_A) * A + g_row * W)[:, None] + column
    for ahead in range(16 + AHEAD):
        _async_load(g_rows.index(ahead), g_ptrs, mask=inside & ((g_row >= 0) & (g_row < H))[:, None])
        g_row += 1
        g_ptrs += W
        if ahead >= 16:
            _async_load(x_rows.index(ahead - 16), x_ptrs, mask=inside & ((x_row >= 0) & (x_row < H))[:, None])
            x_row += 1
            x_ptrs += W
            async_copy.commit_group()

    sums = ()
    for _ in gl.static_range(6):
        sums = sums + (gl.zeros([64, 64], gl.float32, accumulator),)        # type: ignore[assignment]
    for step in range(H + 3):
        async_copy.wait_group(AHEAD - 1)
        fence_async_shared()
        _barrier()
        x = x_tiles.index(step % X_RING)
        started = ()
        for half in gl.static_range(2):
            g = g_tiles.index((step + 16 * half) % G_RING)
            right = sums[3 * half]      # type: ignore[var-annotated]
            middle = warpgroup_mma(x.permute((1, 0)), g, sums[3 * half + 1], is_async=True)
            left = sums[3 * half + 2]       # type: ignore[var-annotated]
            for j in gl.static_range(J - 1):
                left = warpgroup_mma(
                    x.slice(j * BN, BN, 0).permute((1, 0)), g.slice((j + 1) * BN, BN, 0), left, is_async=True)
                right = warpgroup_mma(
                    x.slice((j + 1) * BN, BN, 0).permute((1, 0)), g.slice(j * BN, BN, 0), right, is_async=True)
            started = started + (right, middle, left)      # type: ignore[assignment]
        sums = warpgroup_mma_wait(4 * J - 2, deps=started)
        _async_load(g_rows.index((step + 16 + AHEAD) % G_RING), g_ptrs, mask=inside & (g_row < H)[:, None])
        _async_load(x_rows.index((step + AHEAD) % X_RING), x_ptrs, mask=inside & ((x_row >= 0) & (x_row < H))[:, None])
        async_copy.commit_group()
        g_row += 1
        x_row += 1
        g_ptrs += W
        x_ptrs += W
    async_copy.wait_group(0)
    sums = warpgroup_mma_wait(0, deps=sums)

    # From a column of g, column kw of dw is kw - KW // 2 to the right: t - s, in chunks 16 to the left or right of it.
    # Each row (d, t), rotated by s in t, has the terms of two columns: t, and t - 16 of another chunk.
    row = gl.arange(0, 64, gl.SliceLayout(1, accumulator))
    t = (row % 16)[:, None]
    s = (gl.arange(0, 64, gl.SliceLayout(0, accumulator)) % 16)[None, :]
    turned = (row // 16 * 16)[:, None] + (t + s) % 16
    row = gl.arange(0, 64, gl.SliceLayout(1, stored))
    e = gl.arange(0, 4, gl.SliceLayout(0, stored))
    parts_ptr += (program % n_blocks * C + c) * (KH * KW)
    for half in gl.static_range(2):
        kh = (row // 16 + 13 - 16 * half + KH // 2)[:, None] - (4 * e)[None, :]
        for is_left in gl.static_range(2):
            terms = gl.where(t < s, sums[3 * half + is_left], sums[3 * half + is_left + 1])
            terms = gl.gather(terms, turned, 0).reshape([64, 4, 16])
            total = gl.convert_layout(gl.sum(terms, 2), stored)
            kw = (row % 16 - 16 * is_left + KW // 2)[:, None]
            inside = (kh >= 0) & (kh < KH) & (kw >= 0) & (kw < KW)
            gl.store(parts_ptr + kh * KW + kw, total, mask=inside)


@jit
def hopper_small_map_weight_grad(
        g_ptr, x_ptr, dw_ptr, N, g_stride_n_A, g_stride_c_A, x_stride_n_A, x_stride_c_A, A: gl.constexpr,
        HEIGHT: gl.constexpr, WIDTH: gl.constexpr, KH: gl.constexpr, KW: gl.constexpr, BN: gl.constexpr):
    """Compute a channel per program, for maps of at most 8 rows and columns; elements of dw that reach further stay.

    One product has all pixels of x and g, ``E[(ih, iw), (oh, ow)] = sum over n of x[n, ih, iw] g[n, oh, ow]``.
    """
    accumulator: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    copy: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])       # a row a thread
    summed: gl.constexpr = gl.BlockedLayout([1, 4], [16, 2], [4, 1], [1, 0])
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)

    c = gl.program_id(0).to(gl.int64)
    x_smem = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [BN, 64], shared)
    g_smem = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [BN, 64], shared)
    n = gl.arange(0, BN, gl.SliceLayout(1, copy))
    pixel = gl.arange(0, 64, gl.SliceLayout(0, copy))
    real = (pixel // 8 < HEIGHT) & (pixel % 8 < WIDTH)
    offset = (pixel // 8 * WIDTH + pixel % 8)[None, :]
    x_ptrs = x_ptr + ((c * x_stride_c_A + n.to(gl.int64) * x_stride_n_A) * A)[:, None] + offset
    g_ptrs = g_ptr + ((c * g_stride_c_A + n.to(gl.int64) * g_stride_n_A) * A)[:, None] + offset
    acc = gl.zeros([64, 64], gl.float32, accumulator)
    for n0 in range(0, N, BN):
        inside = (n < N - n0)[:, None] & real[None, :]
        x = gl.load(x_ptrs, mask=inside, other=0.)
        g = gl.load(g_ptrs, mask=inside, other=0.)
        _barrier()      # the product of the images before is done
        x_smem.store(x)
        g_smem.store(g)
        fence_async_shared()
        _barrier()
        acc = warpgroup_mma(x_smem.permute((1, 0)), g_smem, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        x_ptrs += x_stride_n_A.to(gl.int64) * (A * BN)
        g_ptrs += g_stride_n_A.to(gl.int64) * (A * BN)

    # Column (oh, ow), rotated by oh in ih and by ow in iw, has the terms of an element of dw in one row.
    row = gl.arange(0, 64, gl.SliceLayout(1, accumulator))
    column = gl.arange(0, 64, gl.SliceLayout(0, accumulator))[None, :]
    ih = (row // 8)[:, None] + column // 8
    iw = (row % 8)[:, None] + column % 8
    acc = gl.gather(acc, ih % 8 * 8 + iw % 8, 0)
    row = gl.arange(0, 64, gl.SliceLayout(1, summed))
    iw = (row % 8)[:, None] + gl.arange(0, 8, gl.SliceLayout(0, summed))[None, :]
    for is_above in gl.static_range(2):
        terms = gl.where((ih >= 8) == (is_above == 1), acc, 0.).reshape([64, 8, 8])
        terms = gl.convert_layout(gl.sum(terms, 1), summed)
        kh = row // 8 - 8 * is_above + KH // 2
        for is_left in gl.static_range(2):
            value = gl.sum(gl.where((iw >= 8) == (is_left == 1), terms, 0.), 1)
            kw = row % 8 - 8 * is_left + KW // 2
            inside = (kh >= 0) & (kh < KH) & (kw >= 0) & (kw < KW)
            gl.store(dw_ptr + c * (KH * KW) + kh * KW + kw, value.to(dw_ptr.dtype.element_ty), mask=inside)
