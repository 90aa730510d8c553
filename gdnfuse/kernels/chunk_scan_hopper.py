"""The scan of the chunked gated delta rule on Hopper (compute capability 9) for bfloat16 and K = V = 128, in Gluon.

It replaces chunk_delta_rule.py's `chunk_scan_kernel`, from the same A, P and factors of rows; chunk by chunk, transposed:

    Xᵀ = Vᵀ − Sᵀ·Kᵀ·diag(e^γ),  Uᵀ = Xᵀ·Aᵀ,  Oᵀ = Sᵀ·Qᵀ·diag(scale·e^γ) + Uᵀ·Pᵀ,  Sᵀ ← e^γ_C·Sᵀ + (Uᵀ·diag(e^(γ_C − γ)))·K

The accumulators of one product are then the left operand of the next (same threads, same elements). So nothing of the chain
S → X → U → S passes through shared memory. All right operands are there, as they come from memory. A warpgroup holds 64 value
columns of S. A producer warp copies K, Q, V, A, P and the factors of the next chunk into a ring of slots (TMA).

Products are asynchronous, in the order U, second half of QS, S, P·U, next KS, first half of next QS. After each product of the
chain there is one of the output, during which the chain's elementwise work runs. If a product were in flight at the end of the
loop, ptxas would wait for every single product (C7514). So the loop ends after X of the next chunk, when none is.

If states are kept on the way, the loop over chunks ends where one is due, and S is stored from registers to memory.

The results equal those of chunk_scan_kernel bit for bit. benchmarks/chunk.py measures the op. Without any loads it would take as
long, because each scheduler has one warp, which waits for itself. These were slower: a second warpgroup for the output, fed
through shared memory, and a warp for its copies.
"""

from __future__ import annotations

import torch

from gdnfuse import compat
from gdnfuse.kernels import devices
from gdnfuse.kernels.launch.implementation import kernel_of, launching

# Callers check that these exist before they import this file.
gluon, gl, _, hopper, TensorDescriptor, _ = compat.gluon()
reinterpret, load_tile, store_tile, store_wait = compat.gluon_tiles()
fence_async_shared, mbarrier = hopper.fence_async_shared, hopper.mbarrier
warpgroup_mma, warpgroup_mma_wait = hopper.warpgroup_mma, hopper.warpgroup_mma_wait

# Tiles in memory, [1, 1, tokens, columns] as descriptors, and in shared memory.
TILE_4D = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4))
TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
FACTORS_4D = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=4))
FACTORS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2))
SCALARS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0]))


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, inverse_desc, attention_desc, factors_desc,
    factors_ptr, plane, q_smem, k_smem, v_smem, inverse_smem, attention_smem, factors_smem, full, empty,
    batch, h, hv, start, T, column, HV: gl.constexpr, BV: gl.constexpr, STAGES: gl.constexpr, VARLEN: gl.constexpr,
):  # fmt: skip
    """Copy chunk after chunk into the ring. After the last token of a tensor, zeros are copied."""
    lanes: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, 1], [1, 0])
    i_factor = gl.arange(0, 4, layout=gl.SliceLayout(1, lanes))[:, None]
    r = gl.arange(0, 64, layout=gl.SliceLayout(0, lanes))[None, :]
    slot = 0
    phase = 1
    for chunk in range((T + 63) // 64):
        t = start + chunk * 64
        mbarrier.wait(empty.index(slot), phase)
        arrived = full.index(slot)
        mbarrier.expect(arrived, 2 * (2 * 64 * 128 + 64 * BV + 2 * 64 * 64) + (0 if VARLEN else 4 * 4 * 64))
        # In the order in which they are used.
        for half in gl.static_range(2):
            tile = reinterpret(k_smem.index(slot * 2 + half), gl.bfloat16, [1, 1, 64, 64], TILE_4D)
            load_tile(k_desc, [batch, h, t, 64 * half], arrived, tile)
        tile = reinterpret(v_smem.index(slot), gl.bfloat16, [1, 1, 64, BV], TILE_4D)
        load_tile(v_desc, [batch, hv, t, column], arrived, tile)
        if not VARLEN:
            tile = reinterpret(factors_smem.index(slot), gl.float32, [1, 1, 4, 64], FACTORS_4D)
            load_tile(factors_desc, [batch, hv, 0, t], arrived, tile)
        tile = reinterpret(inverse_smem.index(slot), gl.bfloat16, [1, 1, 64, 64], TILE_4D)
        load_tile(inverse_desc, [batch, hv, t, 0], arrived, tile)
        for half in gl.static_range(2):
            tile = reinterpret(q_smem.index(slot * 2 + half), gl.bfloat16, [1, 1, 64, 64], TILE_4D)
            load_tile(q_desc, [batch, h, t, 64 * half], arrived, tile)
        tile = reinterpret(attention_smem.index(slot), gl.bfloat16, [1, 1, 64, 64], TILE_4D)
        load_tile(attention_desc, [batch, hv, t, 0], arrived, tile)
        if VARLEN:
            # TMA needs rows of factors that start at multiples of 16 bytes.
            row = plane.to(gl.int64) // HV * hv + t
            factors = gl.load(factors_ptr + (plane.to(gl.int64) * i_factor + (row + r)), mask=chunk * 64 + r < T, other=0.0)
            factors_smem.index(slot).store(factors)
            mbarrier.arrive(arrived)
        slot += 1
        if slot == STAGES:
            slot = 0
            phase ^= 1


@gluon.jit
def _consumer(
    out_desc, out_ptr, factors_ptr, plane, state_ptr, last_ptr, checkpoint_ptr, stride_sb, stride_sh, stride_sk, stride_sv,
    q_smem, k_smem, v_smem, inverse_smem, attention_smem, factors_smem, out_smem, full, empty,
    n, batch, hv, start, T, column, checkpoint_every, checkpoints,
    HV: gl.constexpr, BV: gl.constexpr, STAGES: gl.constexpr, VARLEN: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    accumulator: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=accumulator, k_width=2)
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    K: gl.constexpr = 128
    V: gl.constexpr = 128
    chunks = (T + 63) // 64
    i_v = column + gl.arange(0, BV, layout=gl.SliceLayout(1, accumulator))
    r = gl.arange(0, 64, layout=gl.SliceLayout(0, accumulator))
    r_rows = gl.arange(0, 64, layout=gl.SliceLayout(1, rows))
    zero = gl.zeros([BV, 64], gl.float32, accumulator)

    # Sᵀ [BV, 128] in two halves. a0 and a1 are the same in bfloat16, as left operands.
    s0 = zero
    s1 = zero
    if state_ptr is not None:
        state_ptr += n.to(gl.int64) * stride_sb + hv.to(gl.int64) * stride_sh
        s0 += gl.load(state_ptr + (i_v[:, None] * stride_sv + r[None, :] * stride_sk)).to(gl.float32)
        s1 += gl.load(state_ptr + (i_v[:, None] * stride_sv + (r[None, :] + 64) * stride_sk)).to(gl.float32)
    a0 = gl.convert_layout(s0.to(gl.bfloat16), operand)
    a1 = gl.convert_layout(s1.to(gl.bfloat16), operand)

    if not VARLEN:
        # From memory, a chunk ahead. Reading from shared memory is slower: by the allocation of registers the warp that issues
        # the copy of the output waits for it (about 400 cycles), and the others wait for that warp.
        decay_ptr = factors_ptr + (
            plane.to(gl.int64) * 3 + (n * HV + hv).to(gl.int64) * (plane // (gl.num_programs(0) // (V // BV)))
        )
        decay = gl.load(decay_ptr + gl.minimum(T, 64) - 1)

    mbarrier.wait(full.index(0), 0, pred=chunks > 0)
    x = warpgroup_mma(a0, k_smem.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    x = warpgroup_mma(a1, k_smem.index(1).permute((1, 0)), x, is_async=True)
    o = warpgroup_mma(a0, q_smem.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    v = v_smem.index(0).permute((1, 0)).load(accumulator).to(gl.float32)
    of_ks = factors_smem.index(0).slice(0, 1, 0).load(accumulator)  # [1, 64]
    x, o = warpgroup_mma_wait(0, [x, o])
    x = v - x * of_ks
    if VARLEN:
        x = gl.where(r[None, :] < T, x, 0.0)
    x = gl.convert_layout(x.to(gl.bfloat16), operand)

    slot = 0
    phase = 0
    every = chunks
    pieces = 1
    if checkpoint_ptr is not None:
        every = checkpoint_every
        pieces = (chunks + every - 1) // every
    for piece in range(pieces):
        for chunk in range(piece * every, gl.minimum(piece * every + every, chunks)):
            # Nothing is in flight. x is that of this chunk, and o has the first half of QS.
            following = slot + 1
            wraps = following == STAGES
            following = gl.where(wraps, 0, following)
            phase = gl.where(wraps, phase ^ 1, phase)
            # With three slots an early wait is faster.
            if STAGES > 2:
                mbarrier.wait(full.index(following), phase, pred=chunk + 1 < chunks)
            if VARLEN:
                if chunk * 64 + 64 > T:
                    # Rows of the next sequence may not be finite.
                    for half in gl.static_range(2):
                        tile = k_smem.index(slot * 2 + half)
                        k = tile.load(rows)
                        tile.store(gl.where((chunk * 64 + r_rows < T)[:, None], k, gl.zeros_like(k)))
                    fence_async_shared()

            u = warpgroup_mma(x, inverse_smem.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
            o = warpgroup_mma(a1, q_smem.index(slot * 2 + 1).permute((1, 0)), o, is_async=True)
            of_qs = factors_smem.index(slot).slice(1, 1, 0).load(accumulator)
            of_k = factors_smem.index(slot).slice(2, 1, 0).load(accumulator)
            if VARLEN:
                row = gl.minimum(T - chunk * 64, 64) - 1
                decay = reinterpret(factors_smem.index(slot), gl.float32, [4 * 64, 1, 1], SCALARS).index(3 * 64 + row)
                decay = decay.load(accumulator)  # [1, 1]
            s0 = s0 * decay
            s1 = s1 * decay
            if not VARLEN:
                decay = gl.load(decay_ptr + gl.minimum(T, chunk * 64 + 128) - 1)
            u = warpgroup_mma_wait(1, [u])
            if VARLEN:
                u = gl.where(chunk * 64 + r[None, :] < T, u, 0.0)
            operand_p = gl.convert_layout(u.to(gl.bfloat16), operand)
            operand_k = gl.convert_layout((u * of_k).to(gl.bfloat16), operand)
            t0 = warpgroup_mma(operand_k, k_smem.index(slot * 2), s0, is_async=True)
            t1 = warpgroup_mma(operand_k, k_smem.index(slot * 2 + 1), s1, is_async=True)
            o = warpgroup_mma_wait(2, [o])
            o = warpgroup_mma(operand_p, attention_smem.index(slot).permute((1, 0)), o * of_qs, is_async=True)
            if STAGES <= 2:
                mbarrier.wait(full.index(following), phase, pred=chunk + 1 < chunks)
            s0, s1 = warpgroup_mma_wait(1, [t0, t1])

            # Those of the next chunk. After the last chunk the result is not used.
            a0 = gl.convert_layout(s0.to(gl.bfloat16), operand)
            a1 = gl.convert_layout(s1.to(gl.bfloat16), operand)
            x = warpgroup_mma(a0, k_smem.index(following * 2).permute((1, 0)), zero, use_acc=False, is_async=True)
            x = warpgroup_mma(a1, k_smem.index(following * 2 + 1).permute((1, 0)), x, is_async=True)
            v = v_smem.index(following).permute((1, 0)).load(accumulator).to(gl.float32)
            of_ks = factors_smem.index(following).slice(0, 1, 0).load(accumulator)
            o = warpgroup_mma_wait(2, [o])
            mbarrier.arrive(empty.index(slot))
            tile = out_smem.index(chunk % 2)
            tile.permute((1, 0)).store(o.to(gl.bfloat16))
            o = warpgroup_mma(a0, q_smem.index(following * 2).permute((1, 0)), zero, use_acc=False, is_async=True)
            fence_async_shared()
            store_wait(0)  # for the chunk before, so that the other tile is free
            tile = reinterpret(tile, gl.bfloat16, [1, 1, 64, BV], TILE_4D)
            if VARLEN:
                if chunk * 64 + 64 <= T:
                    store_tile(out_desc, [batch, hv, start + chunk * 64, column], tile)
            else:
                store_tile(out_desc, [batch, hv, chunk * 64, column], tile)
            x = warpgroup_mma_wait(1, [x])
            x = v - x * of_ks
            if VARLEN:
                x = gl.where((chunk * 64 + 64) + r[None, :] < T, x, 0.0)
            x = gl.convert_layout(x.to(gl.bfloat16), operand)
            o = warpgroup_mma_wait(0, [o])
            slot = following
        if checkpoint_ptr is not None:
            # Not in the inner loop, where a branch and a counter would spill registers. Offsets of all stores would spill too,
            # because LLVM computes them before the loops. Bits 1 and 2 of a row of S belong to the thread, and the others to each
            # store.
            if piece < checkpoints:
                of_thread = checkpoint_ptr + ((n * checkpoints + piece) * HV + hv).to(gl.int64) * (K * V)
                of_thread += i_v[:, None] + (r & 6)[None, :] * V
                gl.store(of_thread + (r & 57)[None, :] * V, s0)
                gl.store(of_thread + ((r & 57)[None, :] + 64) * V, s1)

    if VARLEN:
        if T % 64 != 0:
            # A copy of the whole tile would overwrite the next sequence.
            t = (chunks - 1) * 64 + r_rows[:, None]
            tail = out_smem.index((chunks - 1) % 2).load(rows)
            columns = hv * V + column + gl.arange(0, BV, layout=gl.SliceLayout(0, rows))[None, :]
            gl.store(out_ptr + ((start + t).to(gl.int64) * (HV * V) + columns), tail, mask=t < T)
    last_ptr += (n * HV + hv).to(gl.int64) * (K * V)
    gl.store(last_ptr + (i_v[:, None] + r[None, :] * V), s0)
    gl.store(last_ptr + (i_v[:, None] + (r[None, :] + 64) * V), s1)
    store_wait(0)


@gluon.jit(do_not_specialize=["T", "plane", "checkpoint_every", "checkpoints"])
def chunk_scan_hopper_kernel(
    q_desc, k_desc, v_desc, inverse_desc, attention_desc, factors_desc, out_desc,
    out_ptr, factors_ptr, state_ptr, last_ptr, checkpoint_ptr, cu_seqlens_ptr,
    T, plane, checkpoint_every, checkpoints, stride_sb, stride_sh, stride_sk, stride_sv,
    H: gl.constexpr, HV: gl.constexpr, BV: gl.constexpr, STAGES: gl.constexpr, VARLEN: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    head = gl.program_id(0) // (128 // BV)
    n = head // HV
    hv = head % HV
    h = hv // (HV // H)
    column = gl.program_id(0) % (128 // BV) * BV
    batch = n
    start = n * 0
    if VARLEN:
        batch = n * 0
        start = gl.load(cu_seqlens_ptr + n).to(gl.int32)
        T = gl.load(cu_seqlens_ptr + n + 1).to(gl.int32) - start
    k_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 2, 64, 64], TILE)
    q_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 2, 64, 64], TILE)
    v_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, BV], TILE)
    inverse_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, 64], TILE)
    attention_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, 64], TILE)
    factors_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 4, 64], FACTORS)
    out_smem = gl.allocate_shared_memory(gl.bfloat16, [2, 64, BV], TILE)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2 if VARLEN else 1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (
                out_desc, out_ptr, factors_ptr, plane, state_ptr, last_ptr, checkpoint_ptr,
                stride_sb, stride_sh, stride_sk, stride_sv,
                q_smem, k_smem, v_smem, inverse_smem, attention_smem, factors_smem, out_smem, full, empty,
                n, batch, hv, start, T, column, checkpoint_every, checkpoints, HV, BV, STAGES, VARLEN, num_warps,
            )),
            (_producer, (
                q_desc, k_desc, v_desc, inverse_desc, attention_desc, factors_desc,
                factors_ptr, plane, q_smem, k_smem, v_smem, inverse_smem, attention_smem, factors_smem, full, empty,
                batch, h, hv, start, T, column, HV, BV, STAGES, VARLEN,
            )),
        ],
        [1],
        [56 if VARLEN else 24],
    )  # fmt: skip


def padded(T: int) -> int:
    """Rows of A, P and the factors to allocate for T tokens (TOKENS of both kernels). TMA needs rows of whole 16 bytes."""
    return -(-T // 4) * 4


def supports_here(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether this kernel supports the scan: bfloat16, K = V = 128, a Hopper GPU, and addresses for TMA."""
    return (
        v.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(v.device)[0] == 9
        and not compat.interpreting()
        and launching()
        and q.dtype == k.dtype == v.dtype == torch.bfloat16
        and q.shape[-1] == v.shape[-1] == 128
        and all(_for_tma(x) for x in (q, k, v))
    )


def _for_tma(x: torch.Tensor) -> bool:
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    return x.data_ptr() % 16 == 0 and all(stride > 0 and stride % 8 == 0 for stride in strides) and x.stride(-1) == 1


def _descriptor(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    layout = (TILE_4D if x.dtype == torch.bfloat16 else FACTORS_4D).value
    # The stride of a dimension of size 1 may have any value.
    strides = [stride if size > 1 else 16 for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, columns], layout)


def _config(heads: int, varlen: bool, device: torch.device) -> tuple[int, int]:
    """Value columns per program (64 per warpgroup) and slots of the ring. One program runs on a multiprocessor."""
    sms = devices.of(device).multiprocessors
    # Twice the columns are slower if all programs run at once. With cu_seqlens they spill registers.
    return (64, 3) if varlen or -(-2 * heads // sms) < 2 * -(-heads // sms) else (128, 2)


def launch_scan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    inverse: torch.Tensor,
    attention: torch.Tensor,
    factors: torch.Tensor,
    state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    out: torch.Tensor,
    last: torch.Tensor,
    kept: torch.Tensor,
    checkpoint_every: int = 0,
    config: tuple[int, int] | None = None,
) -> None:
    """Fills `out`, `last` and `kept` as `chunk_scan_kernel` does.

    Args:
        q, k, v, state, cu_seqlens: as for `chunk_delta_rule.launch`; what `supports_here` took.
        inverse, attention: [B, HV, padded(T), 64] bfloat16, factors [4, B, HV, padded(T)] float32, from `chunk_prepare_kernel`
            with TOKENS = padded(T); rows from T on are not read.
        out: [B, T, HV, V], last: [N, HV, K, V] float32, contiguous, written.
        kept: [B, T // (64·checkpoint_every), HV, K, V] float32, contiguous, written with the states after every so many tokens.
            Not used if checkpoint_every is 0, as with cu_seqlens.
        config: value columns per program, 64 or 128, and slots of the ring.
    """
    _, T, HV, V = v.shape
    H, N = q.shape[2], last.shape[0]
    BV, stages = _config(N * HV, cu_seqlens is not None, v.device) if config is None else config
    by_head = [x.permute(0, 2, 1, 3) for x in (q, k, v, out)]  # [B, heads, T, columns]
    kernel_of(chunk_scan_hopper_kernel)[(V // BV * N * HV,)](
        _descriptor(by_head[0], 64, 64), _descriptor(by_head[1], 64, 64), _descriptor(by_head[2], 64, BV),
        _descriptor(inverse[:, :, :T], 64, 64), _descriptor(attention[:, :, :T], 64, 64),
        _descriptor(factors.permute(1, 2, 0, 3)[..., :T], 4, 64), _descriptor(by_head[3], 64, BV),
        out, factors, state, last, kept if checkpoint_every else None, cu_seqlens,
        T, factors[0].numel(), min(checkpoint_every, T), kept.shape[1],
        *((0,) * 4 if state is None else state.stride()),
        H=H, HV=HV, BV=BV, STAGES=stages, VARLEN=cu_seqlens is not None, num_warps=BV // 16,
    )  # fmt: skip
