"""``routed_delta_rule``: Gated DeltaNet whose state is written only by the chunks that the router sends to it."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from natsl.kernels import reference
from natsl.kernels.dispatch import (
    Limits,
    check_counterfactual,
    check_heads,
    check_routes,
    check_shape,
    check_tensors,
    packed_lengths,
    use_kernels,
)
from natsl.kernels.segment import Part, Split, check_counts, ends, split, touched_chunks
from natsl.kernels.shape import LARGEST_GRID, LARGEST_KEY_DIM, LARGEST_VALUE_DIM

LIMITS = Limits({"K": LARGEST_KEY_DIM, "V": LARGEST_VALUE_DIM, "sequences · heads": LARGEST_GRID}, chunk_keys=True)


class DeltaState(NamedTuple):
    """State of sequences that each stand somewhere inside a chunk; float32, float64 for float64 inputs.

    Immutable: each call returns a new one. At a border ``working`` equals ``border`` and ``decay`` is 0.
    """

    border: Tensor  # [B,R,K,V] at the last border between chunks
    working: Tensor  # [B,R,K,V] after the last token, as if the open chunk were written
    decay: Tensor  # [B,R] sum of g since the border
    start: Tensor  # [B] int64, tokens since the border, 0 ≤ start < chunk_size

    @classmethod
    def zeros(
        cls,
        batch: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> DeltaState:
        """The state before the first token."""
        state = torch.zeros(batch, heads, key_dim, value_dim, device=device, dtype=dtype)
        return cls(state, state.clone(), state.new_zeros(batch, heads), state.new_zeros(batch, dtype=torch.int64))


def routed_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    route: Tensor,
    *,
    chunk_size: int,
    scale: float | None = None,
    initial_state: Tensor | DeltaState | None = None,
    output_final_state: bool = False,
    qk_l2norm: bool = True,
    cu_seqlens: Tensor | None = None,
    counterfactual: str = "none",
    counterfactual_rate: float = 1.0,
    backend: str = "auto",
    lengths: Tensor | None = None,
    parts: Split | None = None,
) -> tuple[Tensor, Tensor | DeltaState | None]:
    """Run the gated delta rule within every chunk and write only chunks with route 0 into the state.

    q, k [B,T,R,K], v [B,T,R,V] of one floating dtype; g (log decay, ≤ 0) and beta [B,T,R]; route [B,N,R], 1 = softmax
    keeps the chunk and its write to the state is dropped (the decay stays), 0 = it is written; reals in [0, 1] on the
    torch backend. ``scale`` defaults to K^-½; ``qk_l2norm`` divides q and k by sqrt(sum of squares + 1e-6).
    ``initial_state`` [B,R,K,V] float32 ([sequences,R,K,V] with ``cu_seqlens``). ``counterfactual`` and its rate as in
    ``routed_softmax``; for the delta rule insertion and derivative are the same.

    With a ``DeltaState`` as initial state the call continues inside the open chunk of each sequence, and the final
    state is one too. ``route`` is then [B,N,R] for the N = ``touched_chunks(T, chunk_size)`` chunks from the open one
    on; that of a chunk that is not complete after the call is not read. ``lengths`` [B] int64: real tokens of each row,
    right-padded (default T); outputs of padding are finite. Without ``cu_seqlens``, with counterfactual none; one token
    and what has a gradient run on torch. The Triton backend must know on the host where the tokens are in their chunks:
    ``parts``, what ``split`` makes of the starts and lengths (None: it reads them, which waits for the device).

    On Triton: float32, float16 or bfloat16, chunk_size 16, 32, 64 or 128, K ≤ 256, V ≤ 512, chunk_size · K ≤ 16384
    (float32: 8192), at most 65535 sequences times heads (beyond any of these ``auto`` takes torch and warns), g is
    bounded below by −50, routes are 0 or 1, the states between chunks and their gradients are held in v's dtype, and
    ``cu_seqlens`` is trusted, as reading it would wait for the device.

    Returns o [B,T,R,V] in v's dtype and the final state (float32; float64 for float64 inputs) or None. Raises
    ``ValueError`` naming the argument. Source: Gated DeltaNet, arXiv 2412.06464; routing, arXiv 2602.03681, section 3.
    """
    op = "routed_delta_rule"
    heads = {"q": q, "k": k, "v": v}
    check_tensors(op, {**heads, "g": g, "beta": beta, "route": route})
    check_heads(op, heads, chunk_size)
    B, T, R, K = q.shape
    V = v.shape[3]
    check_shape(op, "k", k, (B, T, R, K))
    check_shape(op, "v", v, (B, T, R, V))
    check_shape(op, "g", g, (B, T, R))
    check_shape(op, "beta", beta, (B, T, R))
    check_counterfactual(op, counterfactual, counterfactual_rate)
    scale = K**-0.5 if scale is None else scale
    if isinstance(initial_state, DeltaState):
        if cu_seqlens is not None:
            raise ValueError(f"{op}: cu_seqlens cannot be combined with a DeltaState")
        if counterfactual != "none":
            raise ValueError(f"{op}: counterfactual = {counterfactual!r} with a DeltaState, it must be 'none'")
        _check_state(op, initial_state, q, V)
        check_counts(op, {"lengths": lengths}, q.device, (B,))
        check_shape(op, "route", route, (B, touched_chunks(T, chunk_size), R))
        limit = LIMITS.reason(q.dtype, chunk_size, {"K": K, "V": V, "sequences · heads": max(1, B * R)})
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, g, beta, route))
        wanted = "torch" if backend == "auto" and (T == 1 or learns) else backend
        if use_kernels(op, wanted, q.device, limit) and B:
            if parts is None:
                count = [T] * B if lengths is None else lengths.tolist()
                parts = split(initial_state.start.tolist(), count, T, chunk_size, q.device)
            o, after = _continue_on_kernels(
                (q, k, v, g, beta),
                route,
                initial_state,
                lengths,
                parts,
                chunk_size=chunk_size,
                scale=scale,
                qk_l2norm=qk_l2norm,
            )
        else:
            o, continued = reference.continued_delta_rule(
                q,
                k,
                v,
                g,
                beta,
                route,
                chunk_size=chunk_size,
                scale=scale,
                state=initial_state,
                lengths=lengths,
                qk_l2norm=qk_l2norm,
            )
            after = DeltaState(*(x.contiguous() for x in continued))
        return o, after if output_final_state else None
    if lengths is not None:
        raise ValueError(f"{op}: lengths needs a DeltaState as initial_state")
    sequences = check_routes(op, {"route": route}, q, R, cu_seqlens, chunk_size)
    sizes = {"K": K, "V": V, "sequences · heads": max(1, sequences * R)}
    on_kernels = use_kernels(op, backend, q.device, LIMITS.reason(q.dtype, chunk_size, sizes))
    if initial_state is not None:
        check_tensors(op, {"q": q, "initial_state": initial_state})
        check_shape(op, "initial_state", initial_state, (sequences, R, K, V))

    if on_kernels:
        from natsl.kernels._triton import delta as delta_triton

        left = route.detach() > 0.5  # as the kernels read it
        weighted = reference.weighted_route(route.float(), left, counterfactual, counterfactual_rate)
        inputs = delta_triton.DeltaInputs(q, k, v, g, beta, weighted)
        options = delta_triton.DeltaOptions(chunk_size, scale, qk_l2norm)
        return delta_triton.routed_delta_rule(inputs, initial_state, cu_seqlens, options, output_final_state)

    run = partial(
        reference.routed_delta_rule,
        chunk_size=chunk_size,
        scale=scale,
        qk_l2norm=qk_l2norm,
        counterfactual=counterfactual,
        counterfactual_rate=counterfactual_rate,
    )
    if cu_seqlens is None:
        o, state = run(q, k, v, g, beta, route, initial_state=initial_state)
        return o, state if output_final_state else None

    tokens, chunks = packed_lengths(op, {"route": route}, T, cu_seqlens, chunk_size)
    outputs, states = [], []
    pieces = zip(*(x.split(tokens, 1) for x in (q, k, v, g, beta)), route.split(chunks, 1), strict=True)
    for i, piece in enumerate(pieces):
        start = None if initial_state is None else initial_state[i : i + 1]
        if piece[0].shape[1] == 0:  # an empty sequence hands its state on
            states.append(q.new_zeros(1, R, K, V, dtype=torch.float32) if start is None else start)
            continue
        o, state = run(*piece, initial_state=start)
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, 1), torch.cat(states, 0) if output_final_state else None


@torch.no_grad()
def _continue_on_kernels(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    route: Tensor,
    state: DeltaState,
    lengths: Tensor | None,
    parts: Split,
    *,
    chunk_size: int,
    scale: float,
    qk_l2norm: bool,
) -> tuple[Tensor, DeltaState]:
    """``routed_delta_rule`` from a state inside a chunk, on the kernels for plain sequences.

    Where all rows begin at a border, they run once. Else up to three times: over the rest of the open chunk from its
    working state, as if it were written; over complete chunks from the state at their border; over the chunk that stays
    open, again as if it were written.
    """
    from natsl.kernels._triton.delta import DeltaInputs, DeltaOptions, continued_delta_rule
    from natsl.kernels._triton.delta import routed_delta_rule as run

    q, k, v, g, beta = inputs
    T, options = v.shape[1], DeltaOptions(chunk_size, scale, qk_l2norm)
    route = route.float()
    outputs: list[tuple[Part, Tensor]] = []

    def run_part(part: Part, routes: Tensor, initial: Tensor) -> Tensor:
        q_, k_, v_, g_, beta_ = (part.take(x) for x in (q, k, v, g, beta))
        o, final = run(DeltaInputs(q_, k_, v_, g_, beta_, routes), initial, part.cu_seqlens, options, True)
        outputs.append((part, o))
        assert final is not None
        return final

    if parts.at_border and lengths is None:  # one call, so that the host keeps up with short prompts
        route, tail = route[:, : -(-T // chunk_size)], parts.tail
        if tail is not None:
            route = route.clone()
            route[:, -1] = 0.0
        o, working, border = continued_delta_rule(
            DeltaInputs(q, k, v, g, beta, route), state.border, options, tail is not None
        )
        decay = torch.zeros_like(state.decay) if tail is None else tail.sums(g.float())
        working = working.clone() if tail is None else working
        return o, DeltaState(border, working, decay, torch.full_like(state.start, T % chunk_size))

    border, working, decay = (x.clone() for x in state[:3])
    if parts.head is not None:
        assert parts.completes is not None
        rows = parts.head.of_rows
        routes = parts.head.take_chunks(route)
        written = run_part(parts.head, torch.zeros_like(routes), working[rows])
        total = decay[rows] + parts.head.sums(g.float())
        skipped = (route[rows, 0] > 0.5)[..., None, None]  # what softmax keeps is not written
        completes = parts.completes[:, None, None, None]
        at_end = torch.where(skipped, total.exp()[..., None, None] * border[rows], written)
        border[rows] = torch.where(completes, at_end, border[rows])
        working[rows] = torch.where(completes, at_end, written)
        decay[rows] = torch.where(completes[..., 0, 0], 0.0, total)
    if parts.body is not None:
        rows = parts.body.of_rows
        border[rows] = run_part(parts.body, parts.body.take_chunks(route), border[rows])
        working[rows] = border[rows]
    if parts.tail is not None:
        rows = parts.tail.of_rows
        working[rows] = run_part(parts.tail, torch.zeros_like(parts.tail.take_chunks(route)), border[rows])
        decay[rows] = parts.tail.sums(g.float())
    part, o = outputs[0] if outputs else (None, v)
    if part is None or o.shape != v.shape or part.cu_seqlens is not None:  # else it is all there is
        o = v.new_empty(v.shape) if lengths is None else v.new_zeros(v.shape)
        for part, out in outputs:
            part.put(o, out)
    return o, DeltaState(border, working, decay, ends(state.start, T, lengths) % chunk_size)


def _check_state(op: str, state: DeltaState, q: Tensor, value_dim: int) -> None:
    B, _, R, K = q.shape
    tensors = {f"initial_state.{name}": x for name, x in zip(state._fields, state, strict=True)}
    start = tensors.pop("initial_state.start")
    check_tensors(op, {"q": q, **tensors})
    for name, x in tensors.items():
        check_shape(op, name, x, (B, R) if name.endswith("decay") else (B, R, K, value_dim))
    check_counts(op, {"initial_state.start": start}, q.device, (B,))
