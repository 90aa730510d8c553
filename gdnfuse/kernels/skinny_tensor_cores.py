"""skinny_linear for e4m3 and four bits with a scale per block of columns, on tensor cores, in Gluon.

With one row and one byte or half a byte per weight, the instructions per weight take longer than loading it: unpack, widen and
multiply each. Tensor cores multiply float16, which takes one instruction for two weights of e4m3 or of int4. The row is one or
two of the eight columns of the product. The other columns repeat it.

A tile is 16 rows, or with SwiGLU 8 of gate and the 8 of up that belong to them, or twice as many. The warps of a program share
the columns of a tile, 64 bytes of each row per step. A sum does not depend on which columns a product takes. So each thread's 16
bytes of a row, as they were loaded, are its operands of four or eight products. Only the row itself goes through shared memory.

The four bits of an int4 are used where they are: as the lowest bits of a float16 they are 2^-24 times the number plus 8, and four
places higher 2^-20 times it. Tensor cores take such subnormal numbers. The row's odd columns are divided by 16. The 8, or the
zero point, times the sum of the row over a group is where the sum of products starts. nf4 and fp4 choose float16 from a table
(four_bit.py).

If groups are smaller than the 128 columns of a warp's step, each group has its own columns of the product: there the row is zero
outside the group.

For the product the row is float16, times a power of two for which its largest element is about 2^14. That is eight times as close
as bfloat16, to which the result is rounded. If the result is more precise, the row is the sum of two float16, with 22 bits
together. Sums are float32. The product of each step is multiplied with its scale and added to the sum.

Layout: as for skinny_linear; data at multiples of 16 bytes, with as many columns as fill 16 bytes; scales [⌈M/ROWS⌉,
⌈N/COLUMNS⌉]; zero points [⌈M/8⌉, N/COLUMNS].
"""

from __future__ import annotations

import torch

from gdnfuse import compat
from gdnfuse.kernels import quantized
from gdnfuse.kernels.four_bit import FACTORS, FP4_F16, NF4_F16
from gdnfuse.kernels.launch.implementation import kernel_of, launching, overlap_options

gluon, gl, *_ = compat.gluon()  # callers check that it exists
mma_v2 = compat.mma_v2()
gdc_launch_dependents, gdc_wait = compat.dependent_launch()

# Kinds of data of which a program also loads the rest of its tile into the L2 before it waits. Chosen on an H200 in a chain of a
# 4B model's layers; e4m3 is slower with it.
FETCHED = ("int4",)
PLAIN_ROWS = gl.constexpr(4)  # rows per program, for rows that are not quantised
ROW = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 2, order=[1, 0]))  # so that both float16 of a column come from different banks
SUMS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0]))
OFFSET = gl.constexpr(8)  # that is added to integers of four bits where they are stored
SMALLEST = gl.constexpr(2.0**-24)  # of float16: the value of its lowest bit
# The eight integers in a word, times SMALLEST or, in odd columns, 16 times that: columns 0, 4, 2, 6 and 1, 5, 3, 7.
INT4 = gl.constexpr(
    "{\n.reg .b32 low, high;\nmov.b32 low, $4;\nshr.u32 high, low, 8;\n"
    "and.b32 $0, low, 0x000F000F;\nand.b32 $1, high, 0x000F000F;\n"
    "and.b32 $2, low, 0x00F000F0;\nand.b32 $3, high, 0x00F000F0;\n}"
)


@gluon.jit
def _sum_and_most(sum_a, most_a, sum_b, most_b):
    return sum_a + sum_b, gl.maximum(most_a, most_b)


@gluon.jit
def _sigmoid(x):
    return 1.0 / (1.0 + gl.exp(-x))


@gluon.jit
def _load_row(ptr, N: gl.constexpr, PART: gl.constexpr, layout: gl.constexpr):
    """A row in parts with so many elements: a tuple of [PART], float32."""
    column = gl.arange(0, PART, layout=layout)
    parts = ()
    for start in gl.static_range(0, N, PART):
        if start + PART <= N:
            parts = parts + (gl.load(ptr + start + column),)
        else:
            parts = parts + (gl.load(ptr + start + column, mask=column < N - start, other=0.0),)
    return parts


@gluon.jit
def _gated(o, z, weight, eps, V: gl.constexpr, SILU: gl.constexpr, PART: gl.constexpr, layout: gl.constexpr):
    """The gated RMSNorm of the heads in a part."""
    heads = gl.reshape(o * o, (PART // V, V))
    squares = gl.sum(heads, 1)
    mean_square = gl.expand_dims(squares, 1) / V + gl.zeros_like(heads)
    mean_square = gl.convert_layout(gl.reshape(mean_square, (PART,)), layout)
    gate = _sigmoid(z)
    if SILU:
        gate = z * gate
    return weight * (o * gl.rsqrt(mean_square + eps)) * gate


@gluon.jit
def _prepared(
    x_ptr, norm_weight, gate_ptr, weight_ptr, norm_eps, norm_offset,
    N: gl.constexpr, V: gl.constexpr, GATE_SILU: gl.constexpr, PART: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """The row before the product, in parts, the factor for the result, and the largest magnitude of the row.

    norm_weight: in parts, or None.
    """
    loaded = _load_row(x_ptr, N, PART, layout)
    x = ()
    square = gl.zeros([PART], gl.float32, layout)
    most = gl.zeros([PART], gl.float32, layout)
    if gate_ptr is not None:
        gates = _load_row(gate_ptr, N, PART, layout)
        weight = gl.load(weight_ptr + gl.arange(0, PART, layout=layout) % V).to(gl.float32)
    for i in gl.static_range(len(loaded)):
        step = loaded[i].to(gl.float32)
        if gate_ptr is not None:
            step = _gated(step, gates[i].to(gl.float32), weight, norm_eps, V, GATE_SILU, PART, layout)
        elif norm_weight is not None:
            square += step * step
            step = step * (norm_offset + norm_weight[i].to(gl.float32))
        most = gl.maximum(most, gl.abs(step))
        x = x + (step,)
    total, largest = gl.reduce((square, most), 0, _sum_and_most)
    factor = gl.full([], 1.0, gl.float32)
    if norm_weight is not None and gate_ptr is None:
        factor = gl.rsqrt(total / N + norm_eps)
    return x, factor, largest


@gluon.jit
def _even_and_odd(x):
    """The even and the odd elements of x [C]: [C / 2] each."""
    return gl.split(gl.reshape(x, (x.shape[0] // 2, 2)))


@gluon.jit
def _as_taken(x, KIND: gl.constexpr, WARPS: gl.constexpr):
    """Columns of two steps in the order in which the products of four bits take them.

    Words are in the order step, word of a thread, warp, thread, so that threads read from different banks. In a word, two columns
    of one register are adjacent.
    """
    x = gl.reshape(x, (2, WARPS, 4, 4, 2, 2, 2))
    return gl.reshape(gl.permute(x, (0, 3, 1, 2, 5, 6, 4) if KIND == "int4" else (0, 3, 1, 2, 4, 6, 5)), (256 * WARPS,))


@gluon.jit
def _sums(x, COLUMNS: gl.constexpr, GROUPS: gl.constexpr):
    """Sums over groups of C columns, for the sums of even and odd ones, [C / 2]: [C / 128, GROUPS].

    They are repeated if 128 columns have fewer groups.
    """
    OF: gl.constexpr = COLUMNS if COLUMNS < 128 else 128
    STEPS: gl.constexpr = x.shape[0] // 64
    sums = gl.sum(gl.reshape(x, (STEPS * 128 // OF, OF // 2)), 1)
    sums = gl.reshape(sums, (STEPS, 128 // OF, 1))
    if GROUPS * OF > 128:
        layout: gl.constexpr = sums.type.layout
        sums, _ = gl.broadcast(sums, gl.zeros([STEPS, 128 // OF, GROUPS * OF // 128], gl.float32, layout))
    return gl.reshape(sums, (STEPS, GROUPS))


@gluon.jit
def _operand(
    parts, largest, PART: gl.constexpr, HALVES: gl.constexpr, KIND: gl.constexpr, COLUMNS: gl.constexpr, GROUPS: gl.constexpr,
    WARPS: gl.constexpr, OFF: gl.constexpr,
):  # fmt: skip
    """The row times a power of two in shared memory, in parts [HALVES, PART]: its float16, and the float16 of the rest.

    Also returns the sums of groups of columns times OFF, for int4, and the factor that undoes the power of two.
    """
    exponent = gl.maximum((largest.to(gl.int32, bitcast=True) >> 23) & 255, 15)
    up = ((268 - exponent) << 23).to(gl.float32, bitcast=True)
    shared = ()
    sums = ()
    for i in gl.static_range(len(parts)):
        if KIND == "int4":
            even, odd = _even_and_odd(parts[i])
            whole = gl.reshape(gl.join(even * up, odd * (up * (1 / 16))), (PART,))
        else:
            whole = parts[i] * up
        high = whole.to(gl.float16)
        if HALVES == 2:
            low = (whole - high.to(gl.float32)).to(gl.float16)
        if KIND == "int4":
            even, odd = _even_and_odd(high)
            both = even.to(gl.float32) + odd.to(gl.float32) * 16
            if HALVES == 2:
                even, odd = _even_and_odd(low)
                both += even.to(gl.float32) + odd.to(gl.float32) * 16
            of_groups = _sums(both, COLUMNS, GROUPS) * OFF
            sums = sums + (gl.allocate_shared_memory(gl.float32, [2 * WARPS, GROUPS], SUMS, of_groups),)
        if KIND != "e4m3":
            high = _as_taken(high, KIND, WARPS)
            if HALVES == 2:
                low = _as_taken(low, KIND, WARPS)
        if HALVES == 2:
            stored = gl.permute(gl.join(high, low), (1, 0))
        else:
            stored = gl.reshape(high, (1, PART))
        # Each part has its own memory. Otherwise it would wait for the part before.
        shared = shared + (gl.allocate_shared_memory(gl.float16, [HALVES, PART], ROW, stored),)
    return shared, sums, ((exponent - 14) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _row_operand(
    part, KIND: gl.constexpr, COPIES: gl.constexpr, HALVES: gl.constexpr, WARPS: gl.constexpr, COLUMNS: gl.constexpr,
    GROUPS: gl.constexpr, repeated: gl.constexpr,
):  # fmt: skip
    """The columns of a step of the row as a product takes them: [WARPS, columns, 8]. part is [HALVES, STEP]."""
    STEP: gl.constexpr = part.shape[1]
    b, _ = gl.broadcast(gl.expand_dims(part, 0), gl.zeros([COPIES, HALVES, STEP], gl.float16, repeated))
    if KIND == "e4m3":
        b = gl.permute(gl.reshape(b, (COPIES, HALVES, WARPS, 4, 4, 2, 2)), (2, 4, 5, 3, 6, 0, 1))
    else:
        if GROUPS > 1:
            # A thread's columns are all of one group. It keeps them for the columns of the product that are for this group.
            c = gl.arange(0, COPIES, layout=gl.SliceLayout(1, gl.SliceLayout(2, repeated)))
            of_copy = gl.expand_dims(gl.expand_dims(c * HALVES // 2, 1), 2)
            k = gl.arange(0, STEP, layout=gl.SliceLayout(0, gl.SliceLayout(0, repeated)))
            of_column = gl.expand_dims(gl.expand_dims(k // 8 % 4, 0), 0)
            same = (of_copy * 32 // COLUMNS) == (of_column * 32 // COLUMNS)
            mask, _ = gl.broadcast(gl.where(same, -1, 0).to(gl.int16), b)
            b = gl.inline_asm_elementwise("and.b32 $0, $1, $2;", "=r,r,r", [b, mask], gl.float16, is_pure=True, pack=2)
        b = gl.permute(gl.reshape(b, (COPIES, HALVES, 4, WARPS, 4, 2, 2, 2)), (3, 2, 5, 6, 4, 7, 0, 1))
    return gl.reshape(b, (WARPS, STEP // WARPS, 8))


@gluon.jit
def _weights_operand(w, KIND: gl.constexpr, WARPS: gl.constexpr):
    """The bytes of a step as a product takes them: [WARPS, rows, columns], float16."""
    TILE: gl.constexpr = w.shape[0]
    if KIND == "e4m3":
        a = w.to(gl.float8e4nv, bitcast=True).to(gl.float16)
        a = gl.permute(gl.reshape(a, (TILE, WARPS, 4, 4, 2, 2)), (1, 0, 3, 4, 2, 5))
    else:
        TAKE: gl.constexpr = INT4 if KIND == "int4" else NF4_F16 if KIND == "nf4" else FP4_F16
        even, odd = gl.inline_asm_elementwise(
            TAKE, "=r,=r,=r,=r,r", [w], (gl.float16, gl.float16), is_pure=True, pack=4
        )  # fmt: skip
        a = gl.permute(gl.reshape(gl.join(even, odd), (TILE, WARPS, 4, 4, 2, 2, 2)), (1, 0, 3, 4, 6, 2, 5))
    return gl.reshape(a, (WARPS, TILE, w.shape[1] // WARPS * (1 if KIND == "e4m3" else 2)))


@gluon.jit
def _load_weights(w_ptrs, step, live, column, N: gl.constexpr, STEP: gl.constexpr):
    if (step + 1) * STEP <= N:
        w = gl.load(w_ptrs + step * STEP, mask=live, other=0)
    else:
        w = gl.load(w_ptrs + step * STEP, mask=live & (column < N - step * STEP), other=0)
    return w


@gluon.jit
def _load_scales(scale_ptrs, column, step, N: gl.constexpr, STEP: gl.constexpr, COLUMNS: gl.constexpr):
    return gl.load(scale_ptrs + gl.minimum(step * STEP + column, N - 1) // COLUMNS)


@gluon.jit
def _spread(values, GROUPS: gl.constexpr, layout: gl.constexpr):
    """Values for rows, or for rows and groups, as values for the columns of the product: [WARPS, rows, 1 or 8]."""
    if GROUPS > 1:
        both = gl.join(values, values)
        values = gl.convert_layout(gl.reshape(both, (both.shape[0], both.shape[1], 8)), layout)
    else:
        values = gl.expand_dims(values, 2)
    return values


@gluon.jit
def _fetch(
    weight_ptr, index, M, stride_wm,
    BEGIN: gl.constexpr, END: gl.constexpr, TILE: gl.constexpr, LIVE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Load the bytes from BEGIN to END of each row of a tile into the L2, in lines of 128 bytes. Nothing waits for them."""
    COUNT: gl.constexpr = (END - BEGIN + 127) // 128
    LINES: gl.constexpr = 1 << (COUNT - 1).bit_length()
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [32 // min(LINES, 32), min(LINES, 32)], [WARPS, 1], [1, 0])
    r = gl.arange(0, TILE, layout=gl.SliceLayout(1, layout))
    row = gl.minimum(index * LIVE + r % LIVE, M - 1)
    if LIVE < TILE:
        row = row + gl.where(r < LIVE, 0, M)
    line = gl.minimum(gl.arange(0, LINES, layout=gl.SliceLayout(0, layout)), COUNT - 1)
    address = (weight_ptr + (row.to(gl.int64)[:, None] * stride_wm + (BEGIN + 128 * line)[None, :])).to(gl.int64)
    gl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], gl.int32, is_pure=False, pack=1)


@gluon.jit
def skinny_tensor_cores_kernel(
    x_ptr, weight_ptr, scale_ptr, zero_ptr, plain_ptr, norm_weight_ptr, gate_ptr, residual_ptr,
    conv_state_ptr, conv_weight_ptr, conv_bias_ptr, out_ptr,
    norm_eps, norm_offset, M, stored, plain_programs, conv_offset, D,
    stride_wm, stride_pm, stride_sm, stride_zm, stride_sd, stride_ss, stride_cd, stride_cw,
    N: gl.constexpr, V: gl.constexpr, S: gl.constexpr, W: gl.constexpr, SILU: gl.constexpr, SWIGLU: gl.constexpr,
    GATE_SILU: gl.constexpr, AHEAD: gl.constexpr, HALVES: gl.constexpr, OVERLAP: gl.constexpr,
    PARTS: gl.constexpr, HEADS: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
    KIND: gl.constexpr, PACKED: gl.constexpr, TILE: gl.constexpr, FACTOR: gl.constexpr,
    FETCH: gl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    WARPS: gl.constexpr = gl.num_warps()
    BYTES: gl.constexpr = 64 * WARPS  # of a row in a step
    STEP: gl.constexpr = PACKED * BYTES
    STEPS: gl.constexpr = (N + STEP - 1) // STEP
    PART: gl.constexpr = 2 * STEP
    COUNT: gl.constexpr = (N + PART - 1) // PART
    loaded: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [1, WARPS], [1, 0])  # of [rows, BYTES]: 16 bytes a thread
    COPIES: gl.constexpr = 8 // HALVES
    # [COPIES, HALVES, STEP]
    repeated: gl.constexpr = gl.BlockedLayout([1, 1, 16 // PACKED], [COPIES, HALVES, 4], [1, 1, WARPS], [2, 1, 0])
    of_row: gl.constexpr = gl.BlockedLayout([4 * PACKED], [32], [WARPS], [0])
    GROUPS: gl.constexpr = 4 if PACKED > 1 and COLUMNS < 128 else 1  # per warp and step, which may repeat
    products: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    first_operand: gl.constexpr = gl.DotOperandLayout(0, products, 2)
    second_operand: gl.constexpr = gl.DotOperandLayout(1, products, 2)
    of_sums: gl.constexpr = gl.SliceLayout(2, products)  # [WARPS, TILE]
    of_tile: gl.constexpr = gl.SliceLayout(0, of_sums)  # [TILE]
    pairs = gl.reshape(gl.zeros([WARPS, TILE, 8], gl.float32, products), (WARPS, TILE, 4, 2))
    of_groups: gl.constexpr = gl.split(pairs)[0].type.layout  # [WARPS, TILE, GROUPS], if there are several
    eps = gl.to_tensor(norm_eps).to(gl.float32)
    offset = gl.to_tensor(norm_offset).to(gl.float32)

    index = gl.program_id(0) - plain_programs
    if plain_ptr is not None:
        if index < 0:
            i = (index + plain_programs) * PLAIN_ROWS
            w = ()
            for r in gl.static_range(PLAIN_ROWS):
                w = w + (_load_row(plain_ptr + gl.minimum(i + r, M - stored - 1).to(gl.int64) * stride_pm, N, PART, of_row),)
            norm_weight = None
            if norm_weight_ptr is not None:
                norm_weight = _load_row(norm_weight_ptr, N, PART, of_row)
            if OVERLAP:
                gdc_wait()
            x, factor, _ = _prepared(x_ptr, norm_weight, None, None, eps, offset, N, V, GATE_SILU, PART, of_row)
            for r in gl.static_range(PLAIN_ROWS):
                acc = gl.zeros([PART], gl.float32, of_row)
                for n in gl.static_range(COUNT):
                    acc += w[r][n].to(gl.float32) * x[n]
                row = stored + i + r
                place = row
                if PARTS is not None:
                    place = _regrouped(row, PARTS, HEADS)
                gl.store(out_ptr + place, (gl.sum(acc, 0) * factor).to(out_ptr.dtype.element_ty), mask=(row < M) & (place >= 0))
            return

    # Each four of a thread's 16 bytes of e4m3 go to one of four products: column t·16 + j·4 + h·2 + i to product j as
    # h·8 + t·2 + i. Of four bits, each four bytes go to two of eight products.
    HALF: gl.constexpr = TILE // 2
    LIVE: gl.constexpr = HALF if SWIGLU else TILE
    r = gl.arange(0, TILE, layout=gl.SliceLayout(1, loaded))
    column = gl.arange(0, BYTES, layout=gl.SliceLayout(0, loaded))
    taken = index * LIVE + r % LIVE
    live = (taken < stored)[:, None]
    w_row = gl.minimum(taken, stored - 1)
    if SWIGLU:
        w_row = w_row + gl.where(r < HALF, 0, stored)
    w_ptrs = weight_ptr + w_row.to(gl.int64)[:, None] * stride_wm + column[None, :]
    weights = ()
    for s in gl.static_range(AHEAD if AHEAD < STEPS else STEPS):
        weights = weights + (_load_weights(w_ptrs, s, live, column[None, :], N // PACKED, BYTES),)

    t = gl.arange(0, TILE, layout=of_tile)
    row = index * LIVE + t % LIVE
    there = row < stored
    s_row = gl.minimum(row, stored - 1)
    if SWIGLU:
        s_row = s_row + gl.where(t < HALF, 0, stored)
    if GROUPS > 1:
        s_row = gl.expand_dims(gl.convert_layout(s_row, gl.SliceLayout(1, gl.SliceLayout(0, of_groups))), 1)  # [TILE, 1]
        warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, of_groups)))
        group = gl.arange(0, GROUPS, layout=gl.SliceLayout(0, gl.SliceLayout(0, of_groups)))
        first = gl.expand_dims(gl.expand_dims(warp * 128, 1), 2) + gl.expand_dims(gl.expand_dims(group * 32, 0), 0)
    else:
        warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, of_sums))
        first = gl.expand_dims(warp * (64 * PACKED), 1)  # [WARPS, 1], the first columns of scales
    scale_ptrs = gl.expand_dims(scale_ptr + (s_row // ROWS).to(gl.int64) * stride_sm, 0)  # [1, TILE]
    if zero_ptr is not None:
        zero_ptrs = gl.expand_dims(zero_ptr + (s_row // 8).to(gl.int64) * stride_zm, 0)
        shift = gl.expand_dims(s_row % 8 * 4, 0)
    scales = ()
    zeros = ()
    for s in gl.static_range(AHEAD if AHEAD < STEPS else STEPS):
        scales = scales + (_load_scales(scale_ptrs, first, s, N, STEP, COLUMNS),)
        if zero_ptr is not None:
            zeros = zeros + (_load_scales(zero_ptrs, first, s, N, STEP, COLUMNS),)

    norm_weight = None
    if norm_weight_ptr is not None and gate_ptr is None:
        norm_weight = _load_row(norm_weight_ptr, N, PART, of_row)
    place = row
    if PARTS is not None:
        place = _regrouped(row, PARTS, HEADS)
    if conv_state_ptr is not None:
        channel = (place - conv_offset).to(gl.int64)
        convolved = there & (channel >= 0) & (channel < D)
        taps = ()
        for j in gl.static_range(W):
            taps = taps + (gl.load(conv_weight_ptr + channel * stride_cd + j * stride_cw, mask=convolved, other=0.0),)
        if conv_bias_ptr is not None:
            bias = gl.load(conv_bias_ptr + channel, mask=convolved, other=0.0)
    if OVERLAP:
        if FETCH and AHEAD < STEPS:
            _fetch(weight_ptr, index, stored, stride_wm, AHEAD * BYTES, N // PACKED, TILE, LIVE, WARPS)
        gdc_wait()

    if conv_state_ptr is not None:
        states = ()
        for j in gl.static_range(S):
            states = states + (gl.load(conv_state_ptr + channel * stride_sd + j * stride_ss, mask=convolved, other=0.0),)
    if residual_ptr is not None:
        residual = gl.load(residual_ptr + row, mask=there, other=0.0)

    x, factor, largest = _prepared(x_ptr, norm_weight, gate_ptr, norm_weight_ptr, eps, offset, N, V, GATE_SILU, PART, of_row)
    OFF: gl.constexpr = -SMALLEST / HALVES if zero_ptr is not None else -OFFSET * SMALLEST / HALVES
    shared, sums, undone = _operand(x, largest, PART, HALVES, KIND, COLUMNS, GROUPS, WARPS, OFF)
    undone *= factor
    acc = gl.zeros([WARPS, TILE, 8], gl.float32, products)
    for s in gl.static_range(STEPS):
        part = shared[s // 2].slice(s % 2 * STEP, STEP, dim=1).load(gl.SliceLayout(0, repeated))
        b = _row_operand(part, KIND, COPIES, HALVES, WARPS, COLUMNS, GROUPS, repeated)
        a = _weights_operand(weights[s], KIND, WARPS)
        if s + AHEAD < STEPS:
            weights = weights + (_load_weights(w_ptrs, s + AHEAD, live, column[None, :], N // PACKED, BYTES),)
            scales = scales + (_load_scales(scale_ptrs, first, s + AHEAD, N, STEP, COLUMNS),)
            if zero_ptr is not None:
                zeros = zeros + (_load_scales(zero_ptrs, first, s + AHEAD, N, STEP, COLUMNS),)
        product = gl.zeros([WARPS, TILE, 8], gl.float32, products)
        if KIND == "int4":
            off = sums[s // 2].slice(s % 2 * WARPS, WARPS, dim=0)
            if GROUPS > 1:
                off = gl.expand_dims(off.load(gl.SliceLayout(1, of_groups)), 1)  # [WARPS, 1, GROUPS]
            else:
                off = off.load(of_sums)  # [WARPS, 1]
            if zero_ptr is not None:
                off = off * ((zeros[s] >> shift) & 15).to(gl.float32)
            product, _ = gl.broadcast(_spread(off, GROUPS, products), product)
        product = mma_v2(gl.convert_layout(a, first_operand), gl.convert_layout(b, second_operand), product)
        acc += product * _spread(scales[s].to(gl.float32), GROUPS, products)
    # The sum has the product of the row's float16 exactly so many times: a thread has two columns, and others have the same.
    TIMES: gl.constexpr = COPIES if GROUPS == 1 else COLUMNS // 16 // HALVES
    y = gl.sum(gl.sum(acc, 2) * (FACTOR / TIMES), 0) * undone  # [TILE]

    if SWIGLU:
        both = gl.permute(gl.reshape(y, (2, HALF)), (1, 0))
        gate, up = gl.split(both)
        y = gate * _sigmoid(gate) * up
        out_row = index * HALF + gl.arange(0, HALF, layout=y.type.layout)
        gl.store(out_ptr + out_row, y.to(out_ptr.dtype.element_ty), mask=out_row < stored)
    else:
        if residual_ptr is not None:
            y += residual.to(gl.float32)
        if conv_state_ptr is not None:
            mixed = y * taps[W - 1].to(gl.float32)
            if conv_bias_ptr is not None:
                mixed += bias.to(gl.float32)
            for j in gl.static_range(W - 1):
                mixed += states[S + 1 - W + j].to(gl.float32) * taps[j].to(gl.float32)
            if SILU:
                mixed = mixed * _sigmoid(mixed)
            # The sum over warps has a barrier. So all threads that hold a channel have read it before one writes.
            for j in gl.static_range(S - 1):
                gl.store(conv_state_ptr + channel * stride_sd + j * stride_ss, states[j + 1], mask=convolved)
            newest = conv_state_ptr + channel * stride_sd + (S - 1) * stride_ss
            gl.store(newest, y.to(conv_state_ptr.dtype.element_ty), mask=convolved)
            y = gl.where(convolved, mixed, y)
        gl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=there & (place >= 0))


@gluon.jit
def _regrouped(row, PARTS: gl.constexpr, HEADS: gl.constexpr):
    """As in skinny_linear."""
    column = row * 0 - 1
    for i in gl.static_range(len(PARTS)):
        e = row - PARTS[i][2]
        head, inner = e // PARTS[i][3], e % PARTS[i][3]
        inside = (e >= 0) & (head < HEADS) & (inner < PARTS[i][1])
        column = gl.where(inside, PARTS[i][0] + head * PARTS[i][1] + inner, column)
    return column


def supports_here(x: torch.Tensor, weight: torch.Tensor, format: str, head: int, warps: int, dtype: torch.dtype) -> bool:
    """Whether this kernel supports a row x [..., N].

    It needs e4m3 in blocks of at least 64 columns on a GPU that unpacks it, or four bits in blocks of at least 32 on NVIDIA's,
    and rows that can be loaded 16 bytes at a time. Under a gate, heads must fill the parts of a row. Values of a table are
    rounded to float16, and sums of int4 start with what is subtracted from all of them. So for four bits the result's dtype must
    be half precision.
    """
    how = quantized.stored(format)
    data = quantized.octets(weight, how)
    return (
        x.is_cuda
        and torch.version.hip is None
        and quantized.converts(x.device, how)
        and how.columns > 0
        and (how.columns % 64 == 0 if how.kind == "e4m3" else how.columns % 128 == 0 or how.columns in (32, 64))
        and (how.kind == "e4m3" or how.packed > 1 and dtype != torch.float32)
        and data.shape[1] % 16 == 0
        and (256 if how.packed > 1 else 128) * warps % head == 0
        and data.stride(0) % 16 == 0
        and (not launching() or data.data_ptr() % 16 == 0)
    )


def launch_with(
    chosen, x, weight, norm_weight=None, norm_eps=0.0, norm_offset=0.0, gate=None, swiglu=False, residual=None,
    gate_activation="silu", conv=None, parts=None, heads=1, scale=None, format="", zero=None, plain=None, dtype=None,
    overlap=False,
) -> torch.Tensor:  # fmt: skip
    """As skinny_linear.launch_with. `chosen` is a TensorCoresConfig."""
    num_warps, ahead, tile = chosen
    N = quantized.width(weight, format)
    stored = weight.shape[0] // (2 if swiglu else 1)
    M = stored + (0 if plain is None else plain.shape[0])
    how = quantized.stored(format)
    data = quantized.octets(weight, how)
    factor = {"int4": 1 / SMALLEST.value}.get(how.kind) or 1 / FACTORS.get((how.kind, torch.float16), 1.0)
    plain_programs = -(-(M - stored) // PLAIN_ROWS.value)
    programs = -(-stored // (tile // 2 if swiglu else tile))
    state, taps, bias, conv_offset, activation = (None, None, None, 0, "none") if conv is None else conv
    columns = M if parts is None else heads * sum(width for _, width, *_ in parts)
    out = torch.empty((*x.shape[:-1], columns), dtype=dtype if conv is None else torch.float32, device=x.device)
    options = overlap_options(x, norm_weight, bias) if overlap else {}
    kernel_of(skinny_tensor_cores_kernel)[(plain_programs + programs,)](
        x, data, scale, zero, plain,
        None if norm_weight is None else norm_weight.contiguous(), gate, residual, state, taps,
        None if bias is None else bias.contiguous(), out,
        norm_eps, norm_offset, M, stored, plain_programs, conv_offset, 0 if state is None else state.shape[1],
        data.stride(0), 0 if plain is None else plain.stride(0), scale.stride(0), 0 if zero is None else zero.stride(0),
        *((0, 0, 0, 0) if conv is None else (*state.stride()[1:], taps.stride(0), taps.stride(2))),
        N=N, V=1 if gate is None else norm_weight.shape[0], S=1 if state is None else state.shape[2],
        W=1 if taps is None else taps.shape[2], SILU=activation == "silu", SWIGLU=swiglu,
        GATE_SILU=gate_activation == "silu", AHEAD=ahead, HALVES=1 if out.dtype == torch.bfloat16 else 2, OVERLAP=bool(options),
        PARTS=parts, HEADS=heads, ROWS=how.rows, COLUMNS=how.columns, KIND=how.kind, PACKED=2 if how.packed > 1 else 1,
        TILE=tile, FACTOR=factor, FETCH=how.kind in FETCHED, num_warps=num_warps, **options,
    )  # fmt: skip
    return out
