"""Torch implementation of the routed ops: vectorised over chunks, every dtype, exact gradients, real-valued routes.

The ground truth for the Triton kernels and the backend where there is none. Shapes: B batch, T tokens, C chunk size,
N chunks, R routing heads, Hs softmax heads, J query heads per softmax head, K key width, V value width.
Source: arXiv 2602.03681, section 3; the gradients with respect to the routes are derived in docs/method.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from natsl.kernels.segment import align, closed_chunks, ends, unalign

# Scores held at once by the softmax branch: keeps a block of rows in cache and long sequences in memory.
SCORE_BLOCK = 1 << 19
# exp(80) is finite in float32 with room for a sum over a chunk; beyond it a derivative at route 0 is meaningless.
MAX_EXPONENT = 80.0


def _accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sample(like: Tensor, rate: float) -> Tensor:
    """An unbiased sample of all entries, in the shape and dtype of ``like``: 1 / rate at that probability, else 0."""
    return (torch.rand_like(like) < rate).to(like.dtype) / rate if rate < 1.0 else torch.ones_like(like)


def sampling_weight(route: Tensor, unchosen: Tensor, counterfactual: str, rate: float) -> Tensor:
    """Weight of the route gradient per entry: 1 on the chosen side; on the other 0 (none) or an unbiased sample."""
    if counterfactual == "none":
        return (~unchosen).to(route.dtype)
    return torch.where(unchosen, sample(route, rate), 1.0) if rate < 1.0 else torch.ones_like(route)


class _RoutedSoftmax(torch.autograd.Function):
    """Softmax in which the keys of an earlier chunk c weigh route[c] · exp(score) and the own chunk weighs 1."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,  # [B,Hs,J,T,K]
        k: Tensor,  # [B,Hs,T,K]
        v: Tensor,  # [B,Hs,T,V]
        route: Tensor,  # [B,Hs,N]
        chunk_size: int,
        scale: float,
        counterfactual: str,
    ) -> Tensor:
        T = q.shape[3]
        out = q.new_empty(*q.shape[:4], v.shape[-1])
        lse = q.new_empty(q.shape[:4])
        log_route = route.log()
        for lo, hi, end in _row_blocks(q, T, chunk_size):
            n = end // chunk_size
            own, earlier, _ = _block_masks(lo, hi, end, chunk_size, q.device)
            score = torch.matmul(q[:, :, :, lo:hi] * scale, _keys(k, end)[:, :, None].transpose(-1, -2))
            bias = log_route[:, :, None, :n].repeat_interleave(chunk_size, -1)  # [B,Hs,1,end]
            score = score + torch.where(earlier, bias[:, :, :, None], torch.where(own, 0.0, float("-inf")))
            top = score.amax(-1, keepdim=True)
            weight = (score - top).exp_()
            total = weight.sum(-1, keepdim=True)
            out[:, :, :, lo:hi] = torch.matmul(weight, _keys(v, end)[:, :, None]) / total
            lse[:, :, :, lo:hi] = (top + total.log())[..., 0]
        ctx.save_for_backward(q, k, v, route, out, lse)
        ctx.options = (chunk_size, scale, counterfactual)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (do,) = grads
        q, k, v, route, out, lse = ctx.saved_tensors
        chunk_size, scale, counterfactual = ctx.options
        T = q.shape[3]
        delta = (do * out).sum(-1, keepdim=True)
        dq = torch.empty_like(q)
        dk = k.new_zeros(*k.shape[:2], -(-T // chunk_size) * chunk_size, k.shape[-1])
        dv = v.new_zeros(*v.shape[:2], dk.shape[2], v.shape[-1])
        droute = torch.zeros_like(route)
        want_route = ctx.needs_input_grad[3]
        for lo, hi, end in _row_blocks(q, T, chunk_size):
            n = end // chunk_size
            own, earlier, earlier_chunk = _block_masks(lo, hi, end, chunk_size, q.device)
            qb, dob = q[:, :, :, lo:hi], do[:, :, :, lo:hi]
            keys, values = _keys(k, end)[:, :, None], _keys(v, end)[:, :, None]
            x = torch.matmul(qb * scale, keys.transpose(-1, -2)) - lse[:, :, :, lo:hi, None]
            x = x.masked_fill(~(own | earlier), float("-inf")).unflatten(-1, (n, chunk_size))
            weight = torch.where(earlier_chunk, route[:, :, None, None, :n], 1.0)  # [B,Hs,1,rows,n]
            # An unchosen chunk may hold scores far above the row's lse: shift each such chunk by its own maximum.
            unchosen = weight == 0
            shift = torch.where(unchosen, x.amax(-1), 0.0).clamp(min=0.0)
            e = (x - shift[..., None]).exp_()
            dp = torch.matmul(dob, values.transpose(-1, -2)) - delta[:, :, :, lo:hi]
            edp = e * dp.unflatten(-1, (n, chunk_size))
            if want_route:
                gain = edp.sum(-1)
                if counterfactual == "insertion":
                    effect = gain / ((-shift).exp() + e.sum(-1))
                    gain = torch.where(unchosen, effect, gain)
                else:
                    gain = gain * shift.clamp(max=MAX_EXPONENT).exp()
                droute[:, :, :n] += (gain * earlier_chunk).sum((2, 3))
            p = (e * weight[..., None]).flatten(-2)
            ds = (edp * weight[..., None]).flatten(-2)
            dq[:, :, :, lo:hi] = torch.matmul(ds, keys) * scale
            dk[:, :, :end] += torch.matmul(ds.transpose(-1, -2), qb).sum(2) * scale
            dv[:, :, :end] += torch.matmul(p.transpose(-1, -2), dob).sum(2)
        return dq, dk[:, :, :T], dv[:, :, :T], (droute if want_route else None), None, None, None


def _row_blocks(q: Tensor, tokens: int, chunk_size: int) -> list[tuple[int, int, int]]:
    """Blocks of query rows (first, last, end of their keys), whole chunks, about SCORE_BLOCK scores each."""
    columns = max(1, q.shape[0] * q.shape[1] * q.shape[2] * tokens)
    rows = max(1, SCORE_BLOCK // (columns * chunk_size)) * chunk_size
    return [
        (lo, min(lo + rows, tokens), min(lo + rows, -(-tokens // chunk_size) * chunk_size))
        for lo in range(0, tokens, rows)
    ]


def _keys(x: Tensor, end: int) -> Tensor:
    """The first ``end`` tokens of x [B,H,T,·], zeros past its last one."""
    return x[:, :, :end] if end <= x.shape[2] else F.pad(x, (0, 0, 0, end - x.shape[2]))


def _block_masks(lo: int, hi: int, end: int, chunk_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Masks of a block of rows: own chunk (causal) and earlier chunks [rows,end]; earlier chunks [rows,end/C]."""
    row = torch.arange(lo, hi, device=device)[:, None]
    key = torch.arange(end, device=device)[None, :]
    own = (row // chunk_size == key // chunk_size) & (key <= row)
    earlier_chunk = torch.arange(end // chunk_size, device=device)[None, :] < row // chunk_size
    return own, earlier_chunk.repeat_interleave(chunk_size, 1), earlier_chunk


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grads[0] * weight, None


def scale_gradient(x: Tensor, weight: Tensor) -> Tensor:
    """x, its gradient multiplied by a weight of its shape."""
    return _ScaleGradient.apply(x, weight)  # type: ignore[no-any-return, no-untyped-call]


def weighted_route(route: Tensor, unchosen: Tensor, counterfactual: str, rate: float) -> Tensor:
    """The routes, their gradient restricted to the chosen side (none) or sampled on the other (rate < 1)."""
    if not route.requires_grad or (counterfactual != "none" and rate >= 1.0):
        return route
    weight = sampling_weight(route.detach(), unchosen, counterfactual, rate)
    return scale_gradient(route, weight)


def routed_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    route: Tensor,
    *,
    chunk_size: int,
    scale: float,
    counterfactual: str,
    counterfactual_rate: float,
) -> Tensor:
    """Softmax branch of one batch of sequences; arguments as in ``natsl.kernels.softmax.routed_softmax``."""
    B, T, Hq, _ = q.shape
    Hs, R = k.shape[2], route.shape[2]
    dtype = _accumulate_dtype(q)
    route = weighted_route(route.to(dtype), route.detach() <= 0, counterfactual, counterfactual_rate)
    per_head = route.transpose(1, 2).repeat_interleave(Hs // R, 1)
    queries = q.to(dtype).unflatten(2, (Hs, Hq // Hs)).permute(0, 2, 3, 1, 4)
    keys, values = (x.to(dtype).transpose(1, 2) for x in (k, v))
    out = _RoutedSoftmax.apply(queries, keys, values, per_head, chunk_size, scale, counterfactual)  # type: ignore[no-untyped-call]
    return out.permute(0, 3, 1, 2, 4).reshape(B, T, Hq, v.shape[-1]).to(q.dtype)  # type: ignore[no-any-return]


def l2_normalise(x: Tensor) -> Tensor:
    """x / sqrt(sum of squares + 1e-6) over the last dimension."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


class _DeltaProducts(NamedTuple):
    """What the chunks of the delta rule need apart from the state: [B,R,N,…]."""

    query: Tensor  # diag(e^G) Q scale [C,K]
    inside: Tensor  # lower(Q Kᵀ) ∘ D scale [C,C]
    w: Tensor  # [C,K]
    u: Tensor  # [C,V]
    erase: Tensor  # Ktᵀ W [K,K]
    update: Tensor  # Ktᵀ U [K,V]
    carry: Tensor  # e^{G_last} [1,1]

    def outputs(self, starts: Tensor) -> Tensor:
        """Outputs [B,N·C,R,V] for the states [B,R,N,K,V] at the starts of the chunks."""
        fresh = self.u - torch.matmul(self.w, starts)  # Vn
        out = torch.matmul(self.query, starts) + torch.matmul(self.inside, fresh)
        merged: Tensor = out.permute(0, 2, 3, 1, 4).flatten(1, 2)
        return merged


def _delta_products(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, qk_l2norm: bool
) -> _DeltaProducts:
    """Products of whole chunks; all arguments [B,N,C,R,·], g and beta [B,N,C,R], of the dtype to compute in."""
    q, k, v = (x.permute(0, 3, 1, 2, 4) for x in (q, k, v))  # [B,R,N,C,·]
    gate, beta = g.permute(0, 3, 1, 2), beta.permute(0, 3, 1, 2)[..., None]
    if qk_l2norm:
        q, k = l2_normalise(q), l2_normalise(k)
    q = q * scale

    # log D_ij = sum of g over (j, i], by summation and never by a difference, so that g = −inf is exact
    C = gate.shape[-1]
    lower = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    spread = gate[..., :, None].expand(*gate.shape, C).masked_fill(~lower.tril(-1), 0.0)
    decay = spread.cumsum(-2).masked_fill(~lower, float("-inf")).exp()  # D, lower triangle with unit diagonal
    from_start = gate.cumsum(-1).exp()[..., None]  # e^{G_i}
    to_end = decay[..., -1, :, None]  # e^{G_last − G_i}

    interaction = (torch.matmul(k * beta, k.transpose(-1, -2)) * decay).tril(-1)  # L; the solver reads I + L
    right = torch.cat((k * beta * from_start, v * beta), -1)
    solved = torch.linalg.solve_triangular(interaction, right, upper=False, unitriangular=True)
    w, u = solved.split((k.shape[-1], v.shape[-1]), -1)
    k_end = (k * to_end).transpose(-1, -2)
    inside = (torch.matmul(q, k.transpose(-1, -2)) * decay).tril()
    return _DeltaProducts(
        q * from_start, inside, w, u, torch.matmul(k_end, w), torch.matmul(k_end, u), from_start[..., -1:, :]
    )


def _delta_scan(first: Tensor, keeps: Sequence[Tensor], writes: Sequence[Tensor]) -> Tensor:
    """States S' = keep S + write before every chunk and after the last, [B,R,N+1,K,V], from the first one [B,R,K,V].

    ``keeps`` and ``writes``: one [B·R,K,K] and [B·R,K,V] for each chunk.
    """
    states = [first.flatten(0, 1)]
    for keep, write in zip(keeps, writes, strict=True):
        states.append(torch.baddbmm(write, keep, states[-1]))
    return torch.stack(states, 1).view(*first.shape[:2], len(states), *first.shape[2:])


def routed_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    route: Tensor,
    *,
    chunk_size: int,
    scale: float,
    initial_state: Tensor | None,
    qk_l2norm: bool,
    counterfactual: str,
    counterfactual_rate: float,
) -> tuple[Tensor, Tensor]:
    """Gated DeltaNet branch in chunk form; arguments as in ``natsl.kernels.delta.routed_delta_rule``.

    Only the state recursion S' = (e^{G_last} − r Kt'W) S + r Kt'U runs chunk by chunk; all else is one batched product.
    """
    B, T, R, K = q.shape
    C, V = chunk_size, v.shape[-1]
    N = -(-T // C)
    dtype = _accumulate_dtype(q)
    route = weighted_route(route.to(dtype), route.detach() >= 1, counterfactual, counterfactual_rate)

    def chunked(x: Tensor) -> Tensor:  # [B,T,R,·] → [B,N,C,R,·]
        return F.pad(x.to(dtype), (*(0, 0) * (x.dim() - 2), 0, N * C - T)).view(B, N, C, *x.shape[2:])

    q, k, v_, g, beta = (chunked(x) for x in (q, k, v, g, beta))
    chunks = _delta_products(q, k, v_, g, beta, scale, qk_l2norm)
    written = (1.0 - route.transpose(1, 2))[..., None, None]  # r [B,R,N,1,1]
    keep = chunks.carry * torch.eye(K, dtype=dtype, device=q.device) - written * chunks.erase
    # unbind, not indexing: the gradient of an index is a whole tensor of zeros per step
    keeps, writes = (x.flatten(0, 1).unbind(1) for x in (keep, written * chunks.update))
    first = q.new_zeros(B, R, K, V) if initial_state is None else initial_state.to(dtype)
    states = _delta_scan(first, keeps, writes)
    return chunks.outputs(states[:, :, :-1])[:, :T].to(v.dtype), states[:, :, -1]


def continued_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    route: Tensor,
    *,
    chunk_size: int,
    scale: float,
    state: tuple[Tensor, Tensor, Tensor, Tensor],
    lengths: Tensor | None,
    qk_l2norm: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """``routed_delta_rule`` from a state inside a chunk; ``state`` and the second result: fields of ``DeltaState``.

    The open chunk starts from its working state H instead of the state S at its border, so it ends with
    S' = r (e^{G_last} − Kt'W) H + r Kt'U + (1 − r) e^{decay + G_last} S. Slots without a new token are null tokens.
    """
    B, T, _, K = q.shape
    dtype = _accumulate_dtype(q)
    border, working, decay = (x.to(dtype) for x in state[:3])
    start = state[3]
    route = weighted_route(route.to(dtype), route.detach() >= 1, "none", 1.0)
    closed = closed_chunks(start, T, chunk_size, lengths)
    written = torch.where(closed[..., None], 1.0 - route, 0.0)  # r [B,N,R]; the open chunk has no route yet
    end = ends(start, T, lengths)
    if T == 1:
        token = [x[:, 0].to(dtype) for x in (q, k, v, g, beta)]
        if lengths is not None:
            token = [torch.where((lengths > 0).view(B, *(1,) * (x.dim() - 1)), x, 0.0) for x in token]
        if qk_l2norm:
            token[:2] = [l2_normalise(x) for x in token[:2]]
        o, after = _delta_token((border, working, decay), *token, written=written[:, 0], closed=closed)
        return (scale * o)[:, None].to(v.dtype), (*after, end % chunk_size)

    q, k, v_, g, beta = (align(x.to(dtype), start, chunk_size, lengths) for x in (q, k, v, g, beta))
    chunks = _delta_products(q, k, v_, g, beta, scale, qk_l2norm)
    written = written.transpose(1, 2)[..., None, None]
    eye = torch.eye(K, dtype=dtype, device=q.device)
    carried = chunks.carry * eye
    keep = carried - written * chunks.erase
    keeps, writes = (list(x.flatten(0, 1).unbind(1)) for x in (keep, written * chunks.update))
    r = written[:, :, 0]
    dropped = (1.0 - r) * chunks.carry[:, :, 0] * decay.exp()[..., None, None] * border
    keeps[0] = (r * (carried[:, :, 0] - chunks.erase[:, :, 0])).flatten(0, 1)
    writes[0] = writes[0] + dropped.flatten(0, 1)
    states = _delta_scan(working, keeps, writes)
    N = closed.shape[1]
    out = unalign(chunks.outputs(states[:, :, :-1]).unflatten(1, (N, chunk_size)), start, T)

    # The chunk n that is open after the call may be past the last touched one; it is then empty.
    row = torch.arange(B, device=q.device)
    n = end // chunk_size
    last = n.clamp(max=N - 1)
    stays, empty = (n == 0)[:, None], (n == N)[:, None]
    at_start = states[row, :, n]
    carry, erase, update = (x[row, :, last] for x in (chunks.carry, chunks.erase, chunks.update))
    working = torch.matmul(carry * eye - erase, at_start) + update
    total = g.sum(2)[row, last]  # [B,R]
    return out.to(v.dtype), (
        torch.where(stays[..., None, None], border, at_start),
        torch.where(empty[..., None, None], at_start, working),
        torch.where(empty, 0.0, torch.where(stays, decay + total, total)),
        end % chunk_size,
    )


def _delta_token(
    state: tuple[Tensor, Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    written: Tensor,
    closed: Tensor,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Token form of ``continued_delta_rule``: o [B,R,V] before its scale, and border, working and decay after it.

    q, k [B,R,K], normalised, v [B,R,V], g, beta [B,R]: one token, or a null token; written [B,R]: r; closed bool [B,1].
    """
    border, working, decay = state
    working = g.exp()[..., None, None] * working
    error = beta[..., None] * (v - torch.matmul(k[..., None, :], working)[..., 0, :])
    working = working + k[..., None] * error[..., None, :]
    decay = decay + g
    r = written[..., None, None]
    at_end = r * working + (1.0 - r) * decay.exp()[..., None, None] * border
    at_border = closed[..., None, None]
    border, after = (torch.where(at_border, at_end, x) for x in (border, working))
    o = torch.matmul(q[..., None, :], working)[..., 0, :]
    return o, (border, after, torch.where(closed, 0.0, decay))


def rms_normalise(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean of squares + eps) over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """SiLU(gate) · weight · RMS(x): the output of a layer with a single memory. x, gate [B,T,Hs,Vs], weight [Vs]."""
    dtype = _accumulate_dtype(x)
    return (F.silu(gate.to(dtype)) * weight.to(dtype) * rms_normalise(x.to(dtype), eps)).to(x.dtype)


def routed_mix(
    o_delta: Tensor,
    o_softmax: Tensor,
    gate: Tensor,
    mix_logits: Tensor,
    weight_delta: Tensor,
    weight_softmax: Tensor,
    eps: float,
) -> Tensor:
    """Combination of the two branches; arguments as in ``natsl.kernels.mix.routed_mix``."""
    dtype = _accumulate_dtype(o_delta)
    w_delta, w_softmax = mix_logits.to(dtype).softmax(-1)[..., None].unbind(-2)
    mixed = w_delta * (rms_normalise(o_delta.to(dtype), eps) * weight_delta.to(dtype))
    mixed = mixed + w_softmax * (rms_normalise(o_softmax.to(dtype), eps) * weight_softmax.to(dtype))
    return (F.silu(gate.to(dtype)) * mixed).to(o_delta.dtype)
