# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The delta rule on Triton: launches of the kernels in ``delta_kernels`` and the custom ops around them.

Shapes: B batch, T tokens, C chunk size, N chunks, R routing heads, K key width, V value width, S sequences (B, or the
packed ones), M slots of states per head (N + 1, or N + S).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from natsl.kernels._triton.delta_kernels import (
    delta_backward_finish_kernel,
    delta_backward_kernel,
    delta_backward_scan_kernel,
    delta_gaps_kernel,
    delta_output_kernel,
    delta_prepare_kernel,
    delta_scan_kernel,
)
from natsl.kernels._triton.routing import first_chunks, packed_blocks
from natsl.kernels.dispatch import last_contiguous
from natsl.kernels.launch import parameters
from natsl.kernels.launch.layout import Layout
from natsl.kernels.launch.library import on_own_device, register
from natsl.kernels.launch.replay import Replayed


class DeltaInputs(NamedTuple):
    """What the branch reads, but for initial states and packing; q, k, v of one dtype with neighbouring columns, the
    others contiguous float32."""

    q: Tensor  # [B,T,R,K]
    k: Tensor  # [B,T,R,K]
    v: Tensor  # [B,T,R,V]
    g: Tensor  # [B,T,R]
    beta: Tensor  # [B,T,R]
    route: Tensor  # [B,N,R] of 0 and 1


class DeltaOutputs(NamedTuple):
    """Results of the forward pass."""

    o: Tensor  # [B,T,R,V]
    final: Tensor  # state at the end of each sequence [S,R,K,V] float32, empty if unwanted
    saved: Tensor  # uint8, the ``_Saved`` tensors in one buffer


class DeltaGrads(NamedTuple):
    """Gradients of the inputs: of q, k, v in their dtype, of the others in float32."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dg: Tensor
    dbeta: Tensor
    droute: Tensor
    dinitial: Tensor  # of the initial state [S,R,K,V], empty without one


class DeltaOptions(NamedTuple):
    """How the branch is computed."""

    chunk_size: int
    scale: float
    normalise: bool


class _Saved(NamedTuple):
    """What the forward pass leaves for the backward pass; names as in ``delta_kernels``."""

    w: Tensor  # [B,N,R,C,K], as qe
    qe: Tensor
    a: Tensor  # [B,N,R,C,C], as p
    p: Tensor
    cum: Tensor  # G [B,N,R,C], float64 for float32 inputs
    rq: Tensor  # 1 / norm of the queries [B,N,R,C] float32, as rk of the keys
    rk: Tensor
    total: Tensor  # G at the end of each chunk [B,R,N], in the dtype of cum
    gap: Tensor  # [B,R,N] float32
    slot: Tensor  # [B,R,N] int32
    state: Tensor  # [B,R,M,K,V]


def _power(width: int) -> int:
    """Padded width of keys; Triton 3.6 miscompiles products of 64 rows and 16 columns."""
    return max(32, 1 << (width - 1).bit_length())


def _precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "tf32"


def _columns(q: Tensor, chunk_size: int, most: int) -> int:
    """Value columns per block by default: fewer where keys are wide or chunks long, or elements have four bytes."""
    wide = _power(q.shape[3]) * q.element_size() > 256 or chunk_size * q.element_size() > 128
    return (16 if q.element_size() == 4 else 32) if wide else most


def _stages(q: Tensor, chunk_size: int) -> int:
    """Depth of the pipeline of the scans by default: one where more do not fit shared memory."""
    tile = chunk_size * _power(q.shape[3]) * q.element_size()  # bytes
    if tile <= 1 << 14:
        return 3
    return 2 if tile <= 1 << 15 else 1


def _warps(q: Tensor, chunk_size: int) -> int:
    """8 where tiles are large. Triton 3.6 miscompiles products of 64 rows over 8 warps in float32 or with few columns,
    and over 4 warps with 32 columns."""
    large = chunk_size == 128 or chunk_size * _power(q.shape[3]) >= 64 * 128
    return 8 if q.element_size() == 2 and large else 4


def _column_blocks(q: Tensor, chunk_size: int) -> dict[str, int]:
    """Default parameters of the kernels that go through the key columns block by block."""
    warps = 8 if chunk_size == 128 and q.element_size() == 2 else 4
    return {"BK": min(_power(q.shape[3]), 64), "num_warps": warps, "num_stages": 1}


def _chunk_tables(
    cu_seqlens: Tensor | None, chunk_size: int, chunks: int, tokens: int, placeholder: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First token of each chunk, end of its sequence, its sequence, and first chunk of each sequence; ``placeholder``
    four times if nothing is packed."""
    if cu_seqlens is None:
        return placeholder, placeholder, placeholder, placeholder
    cu_seqlens = cu_seqlens.contiguous()
    sequence, start = packed_blocks(cu_seqlens, chunk_size, chunks)
    index = sequence.clamp(min=0)
    offset = first_chunks(cu_seqlens, chunk_size)
    torch._assert_async((cu_seqlens[0] == 0) & (offset[-1] == chunks) & (cu_seqlens[-1] == tokens))
    # until the assertion stops the device, the clamp and the empty range of a chunk too many stay inside the buffers
    offset = offset.clamp(max=chunks)
    ends = torch.where(sequence >= 0, cu_seqlens[index + 1], 0)
    return cu_seqlens[index] + start, ends, sequence, offset


def _sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _saved_layout(x: DeltaInputs, cu_seqlens: Tensor | None, C: int) -> Layout:
    """Where the ``_Saved`` tensors are in their buffer."""
    B, _, R, K = x.q.shape
    V, N, dtype = x.v.shape[3], x.route.shape[1], x.q.dtype
    M = N + (1 if cu_seqlens is None else _sequences(x.q, cu_seqlens))
    sums = torch.float64 if dtype == torch.float32 else torch.float32
    keys, pairs, rows, chunks = (B, N, R, C, K), (B, N, R, C, C), (B, N, R, C), (B, R, N)
    return Layout(
        (keys, dtype), (keys, dtype), (pairs, dtype), (pairs, dtype), (rows, sums), (rows, torch.float32),
        (rows, torch.float32), (chunks, sums), (chunks, torch.float32), (chunks, torch.int32),
        ((B, R, M, K, V), dtype),
    )  # fmt: skip


def empty_outputs(x: DeltaInputs, cu_seqlens: Tensor | None, chunk_size: int, finals: int) -> DeltaOutputs:
    """Outputs of the forward pass, unwritten, with so many states of each sequence."""
    B, T, R, K = x.q.shape
    V, S = x.v.shape[3], _sequences(x.q, cu_seqlens)
    device = x.q.device
    return DeltaOutputs(
        torch.empty((B, T, R, V), dtype=x.q.dtype, device=device),
        torch.empty((finals * S, R, K, V) if finals else (0,), dtype=torch.float32, device=device),
        torch.empty(_saved_layout(x, cu_seqlens, chunk_size).size, dtype=torch.uint8, device=device),
    )


def _empty_grads(q: Tensor, v: Tensor, route: Tensor, cu_seqlens: Tensor | None, has_initial: bool) -> DeltaGrads:
    """Gradients, unwritten."""
    B, T, R, K = q.shape
    state = (_sequences(q, cu_seqlens), R, K, v.shape[3]) if has_initial else (0,)
    dg, dbeta, droute, dinitial = (
        torch.empty(shape, dtype=torch.float32, device=q.device) for shape in ((B, T, R), (B, T, R), route.shape, state)
    )
    dq, dk, dv = (torch.empty(shape, dtype=q.dtype, device=q.device) for shape in (q.shape, q.shape, v.shape))
    return DeltaGrads(dq, dk, dv, dg, dbeta, droute, dinitial)


def delta_forward(
    x: DeltaInputs, initial_state: Tensor | None, cu_seqlens: Tensor | None, options: DeltaOptions, finals: int
) -> DeltaOutputs:
    """Forward pass of ``routed_delta_rule``; ``finals``: of each sequence no final state, or that, or after those of
    all sequences also the one that the last chunk starts from, which is then written."""
    q, k, v, g, beta, route = x
    C, scale, normalise = options
    B, T, R, K = q.shape
    V, N = v.shape[3], route.shape[1]
    BK, precision, key = _power(K), _precision(q.dtype), parameters.shape_key(q.dtype, C, K, V)
    outputs = empty_outputs(x, cu_seqlens, C, finals)
    saved = _Saved(*_saved_layout(x, cu_seqlens, C).split(outputs.saved))
    w, qe, a, p, cum, rq, rk, total, gap, slot, state = saved
    M, S = state.shape[2], _sequences(q, cu_seqlens)
    pa, written, count = torch.empty_like(p), torch.empty_like(slot), slot.new_empty(B, R, N + 1)
    if B == 0:
        return outputs
    starts, ends, sequence, offset = _chunk_tables(cu_seqlens, C, N, T, count)
    varlen = cu_seqlens is not None

    launch = parameters.pick("delta_prepare", key, q.device, _column_blocks(q, C))
    delta_prepare_kernel[(N, B * R)](
        q, k, g, beta, starts, ends, w, qe, a, p, pa, cum, rq, rk, total, T, N, scale, *q.stride()[:3], *k.stride()[:3],
        R=R, C=C, K=K, NORMALISE=normalise, VARLEN=varlen, PRECISION=precision, SOLVE=precision, **launch,
    )  # fmt: skip
    delta_gaps_kernel[(B * R,)](
        route, total, sequence, written, count, gap, slot, N,
        R=R, BLOCK=128 if N <= 128 else 1024, HAS_INITIAL=initial_state is not None, VARLEN=varlen,
    )  # fmt: skip
    columns = _columns(q, C, 64)
    while columns > 16 and 96 * columns > S * R * V:  # few heads: more blocks, each with less to do
        columns //= 2
    default = {"BV": columns, "num_warps": 4, "num_stages": _stages(q, C)}
    launch = parameters.pick("delta_scan", key, q.device, default)
    delta_scan_kernel[(-(-V // launch["BV"]), S * R)](
        k, v, w, a, beta, cum, rk, total, written, count, gap, starts, ends, offset,
        total if initial_state is None else initial_state, state, outputs.final, T, N, M,
        *k.stride()[:3], *v.stride()[:3],
        R=R, C=C, K=K, V=V, BK=BK, HAS_INITIAL=initial_state is not None, HAS_FINAL=finals > 0,
        HAS_BORDER=finals > 1, VARLEN=varlen, PRECISION=precision, **launch,
    )  # fmt: skip
    default = {"BV": _columns(q, C, 128), "num_warps": 4, "num_stages": 2}
    launch = parameters.pick("delta_output", key, q.device, default)
    delta_output_kernel[(N * -(-V // launch["BV"]), B * R)](
        v, qe, pa, beta, state, slot, gap, starts, ends, outputs.o, T, N, M, *v.stride()[:3],
        R=R, C=C, K=K, V=V, BK=BK, VARLEN=varlen, PRECISION=precision, **launch,
    )  # fmt: skip
    return outputs


def delta_backward(
    do: Tensor, dfinal: Tensor | None, x: DeltaInputs, has_initial: bool, cu_seqlens: Tensor | None, o: Tensor,
    buffer: Tensor, options: DeltaOptions,
) -> DeltaGrads:  # fmt: skip
    """Backward pass of ``routed_delta_rule``; o and ``buffer``: the first and the last of ``DeltaOutputs``."""
    q, k, v, g, beta, route = x
    C, scale, normalise = options
    B, T, R, K = q.shape
    V, N = v.shape[3], route.shape[1]
    S, BK = _sequences(q, cu_seqlens), _power(K)
    precision, key = _precision(q.dtype), parameters.shape_key(q.dtype, C, K, V)
    saved = _Saved(*_saved_layout(x, cu_seqlens, C).split(buffer))
    w, qe, a, p, cum, rq, rk, total, gap, slot, state = saved
    grads = _empty_grads(q, v, route, cu_seqlens, has_initial)
    dq, dk, dv, dg, dbeta, droute, dinitial = grads
    if B == 0:
        return grads
    starts, ends, _, offset = _chunk_tables(cu_seqlens, C, N, T, slot)
    varlen = cu_seqlens is not None
    ds = q.new_empty(B, N, R, K, V)

    default = {"BV": _columns(q, C, 32), "num_warps": 4, "num_stages": _stages(q, C)}
    launch = parameters.pick("delta_backward_scan", key, q.device, default)
    delta_backward_scan_kernel[(-(-V // launch["BV"]), S * R)](
        k, do, w, qe, cum, rk, total, route, starts, ends, offset, total if dfinal is None else dfinal, ds, dinitial,
        T, N, *k.stride()[:3], *do.stride()[:3],
        R=R, C=C, K=K, V=V, BK=BK, HAS_INITIAL=has_initial, HAS_FINAL=dfinal is not None, VARLEN=varlen,
        PRECISION=precision, **launch,
    )  # fmt: skip
    columns = _columns(q, C, 64)
    default = {"BV": columns, "num_warps": _warps(q, C), "num_stages": 1}
    default["FUSED"] = int(C * BK * q.element_size() <= 64 * 128 * 2)
    launch = parameters.pick("delta_backward", key, q.device, default)
    fused = bool(launch.pop("FUSED"))
    dp, da, dlast = torch.empty_like(p), torch.empty_like(p), torch.empty_like(droute)
    dqs, dw, dke = (torch.empty_like(w) for _ in range(3))
    doo, vdv = torch.empty_like(rk), torch.empty_like(rk)
    vn, dvn = (slot, slot) if fused else (q.new_empty(B, N, R, C, V), q.new_empty(B, N, R, C, V))
    for stage in (0,) if fused else (1, 2):
        delta_backward_kernel[(N, B * R)](
            k, v, o, do, beta, route, w, a, p, cum, rk, total, state, ds, slot, gap, starts, ends,
            vn, dvn, dp, da, dlast, doo, vdv, dqs, dw, dke, dv, droute, T, N, state.shape[2],
            *k.stride()[:3], *v.stride()[:3], *do.stride()[:3],
            R=R, C=C, K=K, V=V, BK=BK, STAGE=stage, RELOAD=q.element_size() == 4, VARLEN=varlen,
            PRECISION=precision, **launch,
        )  # fmt: skip
    launch = parameters.pick("delta_backward_finish", key, q.device, _column_blocks(q, C))
    delta_backward_finish_kernel[(N, B * R)](
        q, k, g, beta, a, cum, rq, rk, total, starts, ends, dp, da, dlast, doo, vdv, dqs, dw, dke, dq, dk, dg, dbeta,
        T, N, scale, *q.stride()[:3], *k.stride()[:3],
        R=R, C=C, K=K, NORMALISE=normalise, VARLEN=varlen, PRECISION=precision, **launch,
    )  # fmt: skip
    return grads


@Replayed
def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, route: Tensor, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, chunk_size: int, scale: float, normalise: bool, want_final: bool,
) -> list[Tensor]:  # fmt: skip
    x, options = DeltaInputs(q, k, v, g, beta, route), DeltaOptions(chunk_size, scale, normalise)
    return list(delta_forward(x, initial_state, cu_seqlens, options, int(want_final)))


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, route: Tensor, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, chunk_size: int, scale: float, normalise: bool, want_final: bool,
) -> list[Tensor]:  # fmt: skip
    return list(empty_outputs(DeltaInputs(q, k, v, g, beta, route), cu_seqlens, chunk_size, int(want_final)))


@Replayed
def _launch_backward(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, route: Tensor,
    has_initial: bool, cu_seqlens: Tensor | None, o: Tensor, saved: Tensor, chunk_size: int, scale: float,
    normalise: bool,
) -> list[Tensor]:  # fmt: skip
    x, options = DeltaInputs(q, k, v, g, beta, route), DeltaOptions(chunk_size, scale, normalise)
    return list(delta_backward(do, dfinal, x, has_initial, cu_seqlens, o, saved, options))


def _fake_backward(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, route: Tensor,
    has_initial: bool, cu_seqlens: Tensor | None, *rest: Any,
) -> list[Tensor]:  # fmt: skip
    return list(_empty_grads(q, v, route, cu_seqlens, has_initial))


_forward_op = register(
    "routed_delta_rule",
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor route, Tensor? initial_state, Tensor? cu_seqlens, "
    "int chunk_size, float scale, bool normalise, bool want_final) -> Tensor[]",
    _launch_forward,
    _fake_forward,
)
_backward_op = register(
    "routed_delta_rule_backward",
    "(Tensor do, Tensor? dfinal, Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor route, bool has_initial, "
    "Tensor? cu_seqlens, Tensor o, Tensor saved, int chunk_size, float scale, bool normalise) -> Tensor[]",
    _launch_backward,
    _fake_backward,
)


class _RoutedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, route: Tensor,
        initial_state: Tensor | None, cu_seqlens: Tensor | None, options: DeltaOptions, want_final: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        o, final, saved = _forward_op(q, k, v, g, beta, route, initial_state, cu_seqlens, *options, want_final)
        ctx.save_for_backward(q, k, v, g, beta, route, cu_seqlens, o, saved)
        ctx.options = options
        ctx.has_initial, ctx.has_final = initial_state is not None, want_final
        ctx.set_materialize_grads(False)
        if not want_final:
            ctx.mark_non_differentiable(final)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, g, beta, route, cu_seqlens, o, saved = ctx.saved_tensors
        do = torch.zeros_like(v) if do is None else last_contiguous(do)
        # torch.compile gives an empty gradient of an empty output, whatever set_materialize_grads says
        dfinal = dfinal.contiguous() if dfinal is not None and ctx.has_final else None
        dq, dk, dv, dg, dbeta, droute, dinitial = _backward_op(
            do, dfinal, q, k, v, g, beta, route, ctx.has_initial, cu_seqlens, o, saved, *ctx.options
        )
        return dq, dk, dv, dg, dbeta, droute, (dinitial if ctx.has_initial else None), None, None, None


@on_own_device
@Replayed
def _launch_continued(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, route: Tensor, initial_state: Tensor,
    chunk_size: int, scale: float, normalise: bool, finals: int,
) -> list[Tensor]:  # fmt: skip
    x, options = DeltaInputs(q, k, v, g, beta, route), DeltaOptions(chunk_size, scale, normalise)
    return list(delta_forward(x, initial_state, None, options, finals))[:2]


def continued_delta_rule(
    x: DeltaInputs, initial_state: Tensor, options: DeltaOptions, open_end: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs and, without gradients, two states of sequences that begin at a border of chunks: after the last token,
    and where the last chunk starts, if that is not complete (``open_end``; its route is then 0), else the same one."""
    o, states = _launch_continued(*_row_major(x), initial_state.float().contiguous(), *options, 1 + open_end)
    final, *border = states.split(x.q.shape[0])
    return o, final, border[0] if border else final


def _row_major(x: DeltaInputs) -> DeltaInputs:
    """The inputs as the kernels read them."""
    q, k, v = map(last_contiguous, x[:3])
    return DeltaInputs(q, k, v, *(y.float().contiguous() for y in x[3:]))


def routed_delta_rule(
    x: DeltaInputs, initial_state: Tensor | None, cu_seqlens: Tensor | None, options: DeltaOptions, want_final: bool
) -> tuple[Tensor, Tensor | None]:
    """Delta branch on Triton; arguments as in ``natsl.kernels.delta.routed_delta_rule``, of any strides and already
    checked.

    Routes are 0 or 1; route.grad holds both sides (``natsl.kernels.reference.weighted_route`` restricts it).
    """
    o, final = _RoutedDeltaRule.apply(
        *_row_major(x),
        None if initial_state is None else initial_state.float().contiguous(),
        cu_seqlens,
        options,
        want_final,
    )
    return o, final if want_final else None
