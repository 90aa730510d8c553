"""The kernel of one_shot_all_reduce: a small sum over ranks, the residual behind it and the norm behind that, in one launch.

Each rank stores what it has in the memory of every other, and reads what came to its own: one way over the link, where a ring
needs as many as there are ranks, twice. It needs no NVLink multicast, no fence and no handshake, because every eight bytes that
are stored at once are four of data and the number of the call, as in NCCL's protocol LL (Hu et al. 2025, arXiv:2507.04786): who
finds the number of this call has the data of this call. Larger sums are for NCCL: this way all of each rank goes to all others,
and twice the bytes.

Why nothing is overwritten before it is read. Calls are numbered on each rank, by a counter in its memory that the kernel itself
advances, so that CUDA graphs may be replayed in any order, if all ranks replay the same. Odd and even calls have memory of
their own. A rank that begins call n + 2 has ended n + 1, so it got what every other rank stored in n + 1, so every other one
had begun n + 1 by then. The kernels of one rank run one after the other, so it had ended n, with all that it read from the
memory of n. The memory is zeroed before any rank knows its address, and the first call has number 1. Numbers have 32 bits: a
place that was not written for exactly 2³² calls could be taken for new.

Why nobody waits forever. A program stores all that it has before it waits, and no more programs are launched than a GPU has
room for. What goes to which place depends on the size and the dtype alone. So ranks need not share the work alike, and one may
have the norm from here and another from elsewhere. If another rank does not come for about ten minutes, the kernel ends with an
error.

All ranks add up in the order of ranks, in float32, so all get the same bits. The sum, the residual sum and the norm are each
rounded once, as they are when they are computed apart.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gdnfuse import compat
from gdnfuse.kernels.launch.implementation import kernel_of, overlap_options
from gdnfuse.kernels.one_shot_all_reduce import HEADER_NUMBERS, PACKETS, WORD, Home

gdc_launch_dependents, gdc_wait = compat.dependent_launch()

BLOCK, MAX_WARPS = 256, 32  # words of a program, which has a thread for each or two: they wait for one word after the other
PROGRAMS = 64  # at most, but for a norm, which has one for each row; both are fewer than multiprocessors
CALL, READ, PEERS, HEADER = (tl.constexpr(n) for n in HEADER_NUMBERS)
MOST = tl.constexpr(PACKETS)


@triton.jit
def send(address, word, number, live):
    """Store words of 8 bytes, each half with a number beside it, at the addresses of those that are live."""
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred live;
            .reg .b32 low, high;
            .reg .b64 first, second;
            setp.ne.b32 live, $4, 0;
            mov.b64 {low, high}, $2;
            mov.b64 first, {low, $3};
            mov.b64 second, {high, $3};
            @live st.relaxed.sys.global.v2.b64 [$1], {first, second};
            mov.b32 $0, 0;
        }
        """,
        "=r,l,l,r,r", [address, word, number, live.to(tl.int32)], tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def receive(address, number, live):
    """The words at the addresses of those that are live, once their numbers are there; others are 0."""
    return tl.inline_asm_elementwise(
        """
        {
            .reg .pred dead, there, over;
            .reg .b32 low, high, one, other, polls;
            .reg .b64 first, second;
            mov.b32 low, 0;
            mov.b32 high, 0;
            mov.b32 polls, 0;
            setp.eq.b32 dead, $3, 0;
            @dead bra have;
        again:
            ld.relaxed.sys.global.v2.b64 {first, second}, [$1];
            mov.b64 {low, one}, first;
            mov.b64 {high, other}, second;
            setp.eq.b32 there, one, $2;
            setp.eq.and.b32 there, other, $2, there;
            @there bra have;
            add.u32 polls, polls, 1;
            setp.eq.u32 over, polls, 0x40000000;
            @over trap;
            bra again;
        have:
            mov.b64 $0, {low, high};
        }
        """,
        "=l,l,r,r", [address, number, live.to(tl.int32)], tl.int64, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def loaded(ptr, at, live, stride_p, dtype: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr):
    """The numbers of words [B], added up from their parts and rounded, in float32: four tensors, of which the last two are the
    first again where a word has two numbers."""
    a = _lane(ptr + at * LANES, live, stride_p, dtype, PARTS)
    b = _lane(ptr + at * LANES + 1, live, stride_p, dtype, PARTS)
    if LANES == 4:
        c = _lane(ptr + at * LANES + 2, live, stride_p, dtype, PARTS)
        d = _lane(ptr + at * LANES + 3, live, stride_p, dtype, PARTS)
        return a, b, c, d
    else:
        return a, b, a, b


@triton.jit
def _lane(ptr, live, stride_p, dtype: tl.constexpr, PARTS: tl.constexpr):
    x = tl.load(ptr, mask=live, other=0.0).to(tl.float32)
    for p in tl.static_range(1, PARTS):
        x += tl.load(ptr + p * stride_p, mask=live, other=0.0)
    return x.to(dtype).to(tl.float32)


@triton.jit
def numbers(word, dtype: tl.constexpr, LANES: tl.constexpr):
    """Those of words [B], as `loaded` has them."""
    if LANES == 4:
        a = word.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        b = (word >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        c = (word >> 32).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        d = (word >> 48).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        return a, b, c, d
    else:
        a = word.to(tl.int32).to(dtype, bitcast=True)
        b = (word >> 32).to(tl.int32).to(dtype, bitcast=True)
        return a, b, a, b


@triton.jit
def words_of(a, b, c, d, dtype: tl.constexpr, LANES: tl.constexpr):
    """The words [B] of such numbers, rounded."""
    if LANES == 4:
        low = _bits(a, dtype, tl.int16) | (_bits(b, dtype, tl.int16) << 16)
        return low | (_bits(c, dtype, tl.int16) << 32) | (_bits(d, dtype, tl.int16) << 48)
    else:
        return _bits(a, dtype, tl.int32) | (_bits(b, dtype, tl.int32) << 32)


@triton.jit
def _bits(x, dtype: tl.constexpr, kind: tl.constexpr):
    mask: tl.constexpr = (1 << kind.primitive_bitwidth) - 1
    return x.to(dtype).to(kind, bitcast=True).to(tl.int64) & mask


@triton.jit(do_not_specialize_on_alignment=["hidden_ptr", "out_ptr"])
def one_shot_all_reduce_kernel(
    x_ptr, residual_ptr, weight_ptr, hidden_ptr, out_ptr, home_ptr, eps, offset, words, stride_xp,
    RANK: tl.constexpr, RANKS: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr,
    TURNS: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """hidden = [residual +] the sum of x over ranks, and its norm, EACH words of LANES numbers a program and turn.

    All is done word by word, so that each thread sends and receives its own.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    i = tl.arange(0, BLOCK)  # [BLOCK]
    call = tl.load(home_ptr + CALL) + 1
    number = call.to(tl.int32)
    first = HEADER // 2 + (call & 1) * (RANKS * MOST)  # packet

    for turn in range(TURNS):
        at = (turn * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * EACH + i  # [BLOCK]
        live = (i < EACH) & (at < words)
        a, b, c, d = loaded(x_ptr, at, live, stride_xp, dtype, LANES, PARTS)
        word = words_of(a, b, c, d, dtype, LANES)
        for r in tl.static_range(RANKS):
            if r != RANK:
                send(tl.load(home_ptr + PEERS + r) + (first + RANK * MOST + at) * 16, word, number, live)

    # The last program to have read the number of the last call says that of this one.
    tl.debug_barrier()
    if tl.atomic_add(home_ptr + READ, 1) == tl.num_programs(0) - 1:
        tl.store(home_ptr + READ, 0)
        tl.store(home_ptr + CALL, call)

    here = tl.load(home_ptr + PEERS + RANK)
    for turn in range(TURNS):
        at = (turn * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * EACH + i  # [BLOCK]
        live = (i < EACH) & (at < words)
        if RESIDUAL:
            ra, rb, rc, rd = loaded(residual_ptr, at, live, 0, dtype, LANES, 1)
        if NORM:
            wa, wb, wc, wd = loaded(weight_ptr, i, live, 0, weight_ptr.dtype.element_ty, LANES, 1)
        ta = tl.zeros((BLOCK,), tl.float32)
        tb, tc, td = ta, ta, ta
        for r in tl.static_range(RANKS):
            if r == RANK:
                a, b, c, d = loaded(x_ptr, at, live, stride_xp, dtype, LANES, PARTS)
            else:
                word = receive(here + (first + r * MOST + at) * 16, number, live)  # [BLOCK]
                a, b, c, d = numbers(word, dtype, LANES)
            ta, tb, tc, td = ta + a, tb + b, tc + c, td + d
        if RESIDUAL:
            ta = ra + ta.to(dtype).to(tl.float32)
            tb = rb + tb.to(dtype).to(tl.float32)
            tc = rc + tc.to(dtype).to(tl.float32)
            td = rd + td.to(dtype).to(tl.float32)
        hidden = words_of(ta, tb, tc, td, dtype, LANES)
        tl.store(hidden_ptr.to(tl.pointer_type(tl.int64)) + at, hidden, mask=live)
        if NORM:
            a, b, c, d = numbers(hidden, dtype, LANES)
            squares = a * a + b * b
            if LANES == 4:
                squares += c * c + d * d
            factor = tl.rsqrt(tl.sum(squares, 0) / (EACH * LANES) + tl.cast(eps, tl.float32))
            more = tl.cast(offset, tl.float32)
            a, b = a * factor * (more + wa), b * factor * (more + wb)
            c, d = c * factor * (more + wc), d * factor * (more + wd)
            tl.store(out_ptr.to(tl.pointer_type(tl.int64)) + at, words_of(a, b, c, d, dtype, LANES), mask=live)


def launch(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, eps: float, offset: float, home: Home
) -> tuple[torch.Tensor, torch.Tensor]:
    """one_shot_add_rms_norm, or without a weight one_shot_all_reduce.

    Args:
        x, residual, weight, eps, offset: as of these.
        home: the group's.

    Returns:
        hidden and its norm, contiguous; without a weight hidden twice.
    """
    like = x if residual is None else residual
    parts = x.shape[0] if x.dim() > like.dim() else 1
    x = x.contiguous()
    hidden = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    out = hidden if weight is None else torch.empty_like(hidden)
    words, lanes = hidden.nbytes // WORD, WORD // hidden.itemsize
    if weight is None:
        programs = min(triton.cdiv(words, BLOCK), PROGRAMS)
        each, block, turns = BLOCK, BLOCK, triton.cdiv(words, programs * BLOCK)
    else:
        each, turns = hidden.shape[-1] // lanes, 1
        programs, block = words // each, triton.next_power_of_2(each)
    options = overlap_options(x)
    kernel_of(one_shot_all_reduce_kernel)[(programs,)](
        x, hidden if residual is None else residual.contiguous(), hidden if weight is None else weight.contiguous(),
        hidden, out, home.memory, eps, offset, words, x.stride(0) if parts > 1 else 0,
        RANK=home.rank, RANKS=home.ranks, LANES=lanes, PARTS=parts, EACH=each, BLOCK=block, TURNS=turns,
        RESIDUAL=residual is not None, NORM=weight is not None, OVERLAP=bool(options),
        num_warps=max(min(block // 32, MAX_WARPS), 1), **options,
    )  # fmt: skip
    return hidden, out
