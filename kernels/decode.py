"""``decode_step``: everything that a layer does with one new token of every sequence between its projections.

Shapes: B batch, D width, C chunk size, R routing heads, G softmax heads per routing head, Hs = R·G, K and V key and
value width of a routing head, Ks = K/G and Vs = V/G of a softmax head, W width of the convolution, channels = R·(2K+V).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from natsl.kernels.delta import DeltaState
from natsl.kernels.dispatch import Limits, check_shape, check_tensors, last_contiguous, resolve
from natsl.kernels.pages import KeyPages
from natsl.kernels.shape import LARGEST_KEY_DIM, LARGEST_VALUE_DIM

LARGEST_HEADS = 8192  # B·Hs, whose pages every program of the kernels counts
LIMITS = Limits({"K": LARGEST_KEY_DIM, "V": LARGEST_VALUE_DIM, "sequences · softmax heads": LARGEST_HEADS})


class DecodeWeights(NamedTuple):
    """Weights of a layer that has softmax, the delta rule or both; what it has no use for is None.

    The router is that of margins, of a chunk's mean input as it is: what standardises it is in ``router``, and its
    bias. ``mix_bias`` and ``count_bias``: logits of the mix without earlier chunks, and what 1 / (1 + earlier kept
    chunks) is multiplied with. ``rotation``: radians per position of softmax's rotary embedding (None: no positions).
    """

    conv: Tensor  # [channels,W]
    query_norm: Tensor | None  # [Ks]
    key_norm: Tensor | None  # [Ks]
    rotation: Tensor | None  # [Ks/2] float32
    rate: Tensor | None  # [R] float32, exp(A_log)
    gate_bias: Tensor | None  # [2,R] float32: of the log decay before softplus, of the write strength before sigmoid
    mix: Tensor | None  # [2·Hs,R·K]
    mix_bias: Tensor | None  # [2·Hs]
    count_bias: Tensor | None  # [2·Hs]
    router: Tensor | None  # [R,D] float32
    router_bias: Tensor | None  # [R] float32
    delta_norm: Tensor | None  # [Vs]
    softmax_norm: Tensor | None  # [Vs]


class DecodeState(NamedTuple):
    """State of a layer, which ``decode_step`` updates in place, and what it does not: which tokens there are."""

    tail: Tensor  # [B,W−1,channels], the last inputs of the convolution
    total: Tensor | None  # [B,D] float32, sum of the router's inputs over the open chunk
    delta: DeltaState | None
    pages: KeyPages | None
    read: Tensor  # [B] int64
    live: Tensor  # [B] bool: the rows that have a token; the others stay as they are


class DecodePolicy(NamedTuple):
    """Policy of a layer for each row."""

    threshold: Tensor  # [B,R] float32
    cap: Tensor  # [B] float64
    burst: Tensor  # [B] int64
    temperature: Tensor  # [B] float32
    delta_only: Tensor  # [B] bool


@torch.no_grad()
def decode_step(
    x: Tensor,
    inputs: Tensor,
    weights: DecodeWeights,
    state: DecodeState,
    *,
    policy: DecodePolicy,
    heads: int,
    softmax_per_head: int,
    chunk_size: int,
    eps: float,
) -> Tensor:
    """Mix the next token of every sequence: convolution, norms, gates, both memories, their mix and the router.

    x [B,D]: what the projections read. inputs [B, channels + R·V + 2R]: q, k, v before the convolution, the gate of the
    output before SiLU, then for a layer with the delta rule what its log decay and its write strength are made of,
    without their biases. ``heads``: R; ``softmax_per_head``: G. ``eps`` of the norms.

    ``state`` is updated in place, for chunks that end here under ``policy``: those that are kept take a new page. There
    must be enough of them, as for ``write_chunks``: 1 + B·R + the sum of the new ``kept``, and its largest + 1 places;
    a chunk for which there is none is lost. Add ``state.live`` to ``state.read`` after the last layer. On Triton only,
    in three launches that wait for nothing and can be captured in a CUDA graph: float32, float16 or bfloat16,
    chunk_size 16, 32, 64 or 128, K ≤ 256, V ≤ 512, B·Hs ≤ 8192. The torch way is that of ``RoutedLM.forward``.

    Returns y [B,R·V] in the dtype of ``inputs``, anything in rows that have no token. Raises ``ValueError`` naming the
    argument. Source: arXiv 2602.03681, section 3.
    """
    op = "decode_step"
    if state.delta is None and state.pages is None:
        raise ValueError(f"{op}: state has neither memory")
    if heads < 1 or softmax_per_head < 1:
        raise ValueError(f"{op}: heads = {heads} and softmax_per_head = {softmax_per_head} must be ≥ 1")
    check_tensors(op, {"x": x, "inputs": inputs, "weights.conv": weights.conv})
    for name, tensor in (("x", x), ("inputs", inputs), ("weights.conv", weights.conv)):
        if tensor.dim() != 2:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, it must have two dimensions")
    (B, D), R, G = x.shape, heads, softmax_per_head
    (channels, W), columns = weights.conv.shape, inputs.shape[1]
    values = columns - channels - (2 * R if state.delta is not None else 0)  # R·V
    keys = (channels - values) // 2  # R·K
    if values < 1 or values % (R * G) or keys < 1 or keys % (R * G) or channels != 2 * keys + values:
        raise ValueError(
            f"{op}: inputs {tuple(inputs.shape)} and weights.conv {tuple(weights.conv.shape)} do not go together: they "
            f"must be [B, channels + R·V{' + 2·R' if state.delta is not None else ''}] and [channels, W], channels = "
            f"R·(2K + V), with R = {R} and K and V that {G} divides"
        )
    K, V = keys // R, values // R
    reason = LIMITS.reason(inputs.dtype, chunk_size, {"K": K, "V": V, "sequences · softmax heads": B * R * G})
    if reason is not None:
        raise ValueError(f"{op}: {reason}")
    resolve("triton", op, x.device)
    sizes = _Sizes(B, D, R, G, K, V, W, chunk_size)
    _check(op, inputs, _expected_state(sizes, state, inputs.dtype))
    _check(op, inputs, _expected_weights(sizes, weights, state))
    _check(op, inputs, _expected_policy(sizes, policy))
    check_shape(op, "inputs", inputs, (B, columns))
    if B == 0:
        return inputs.new_empty(0, values)
    from natsl.kernels._triton.decode import Sizes, launch

    inputs = last_contiguous(inputs)
    y: Tensor = launch(x.contiguous(), inputs, weights, state, policy, Sizes(R, G, K // G, V // G, W, chunk_size), eps)
    return y


class _Sizes(NamedTuple):
    B: int
    D: int
    R: int
    G: int
    K: int
    V: int
    W: int
    C: int


# by name: a tensor, its shape, and its dtype (None: any floating one)
_Expected = dict[str, tuple[Tensor | None, tuple[int, ...], torch.dtype | None]]


def _check(op: str, inputs: Tensor, expected: _Expected) -> None:
    """Raise ``ValueError`` naming a tensor that is missing, of another kind, elsewhere or not contiguous."""
    for name, (x, shape, dtype) in expected.items():
        if x is None:
            raise ValueError(f"{op}: {name} is None, but the layer needs it")
        check_shape(op, name, x, shape)
        right = x.dtype.is_floating_point if dtype is None else x.dtype is dtype
        if not right or x.device != inputs.device or not x.is_contiguous():
            form = f"{x.dtype} on {x.device}" + ("" if x.is_contiguous() else ", not contiguous")
            kind = "of a floating dtype" if dtype is None else dtype
            raise ValueError(f"{op}: {name} is {form}: it must be contiguous, {kind}, on {inputs.device}")


def _expected_state(sizes: _Sizes, state: DecodeState, dtype: torch.dtype) -> _Expected:
    B, D, R, G, K, V, W, C = sizes
    expected: _Expected = {
        "state.read": (state.read, (B,), torch.int64),
        "state.live": (state.live, (B,), torch.bool),
        "state.tail": (state.tail, (B, W - 1, R * (2 * K + V)), dtype),
    }
    if state.delta is not None:
        for name, x in zip(state.delta._fields, state.delta, strict=True):
            shape = {"decay": (B, R), "start": (B,)}.get(name, (B, R, K, V))
            expected[f"state.delta.{name}"] = (x, shape, torch.int64 if name == "start" else torch.float32)
    if state.pages is not None:
        pages = state.pages
        P, M = pages.keys.shape[0], pages.table.shape[-1]
        expected["state.pages.keys"] = (pages.keys, (P, G, C, K // G), dtype)
        expected["state.pages.values"] = (pages.values, (P, G, C, V // G), dtype)
        expected["state.pages.table"] = (pages.table, (B, R, M), torch.int64)
        expected["state.pages.kept"] = (pages.kept, (B, R), torch.int64)
    if state.delta is not None and state.pages is not None:
        expected["state.total"] = (state.total, (B, D), torch.float32)
    return expected


def _expected_weights(sizes: _Sizes, weights: DecodeWeights, state: DecodeState) -> _Expected:
    _, D, R, G, K, V, W, _ = sizes
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {"conv": ((R * (2 * K + V), W), None)}
    if state.pages is not None:
        shapes |= {"query_norm": ((K // G,), None), "key_norm": ((K // G,), None), "softmax_norm": ((V // G,), None)}
        if weights.rotation is not None:
            shapes["rotation"] = (K // G // 2,), torch.float32
    if state.delta is not None:
        shapes |= {"rate": ((R,), torch.float32), "gate_bias": ((2, R), torch.float32), "delta_norm": ((V // G,), None)}
    if state.delta is not None and state.pages is not None:
        shapes |= dict.fromkeys(("mix_bias", "count_bias"), ((2 * R * G,), None))
        shapes |= {"mix": ((2 * R * G, R * K), None), "router": ((R, D), torch.float32)}
        shapes["router_bias"] = (R,), torch.float32
    return {f"weights.{name}": (getattr(weights, name), *kind) for name, kind in shapes.items()}


def _expected_policy(sizes: _Sizes, policy: DecodePolicy) -> _Expected:
    B, R = sizes.B, sizes.R
    return {
        "policy.threshold": (policy.threshold, (B, R), torch.float32),
        "policy.cap": (policy.cap, (B,), torch.float64),
        "policy.burst": (policy.burst, (B,), torch.int64),
        "policy.temperature": (policy.temperature, (B,), torch.float32),
        "policy.delta_only": (policy.delta_only, (B,), torch.bool),
    }
