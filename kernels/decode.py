"""``decode_step``: everything that a layer does with one new token of every sequence between its projections.

Shapes: B batch, D width, C chunk size, R routing heads, G softmax heads per routing head, Hs = R·G, K and V key and
value width of a routing head, Ks = K/G and Vs = V/G of a softmax head, W width of the convolution, channels = R·(2K+V).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from natsl.kernels.delta import DeltaState
from natsl.kernels.dispatch import Limits, check_shape, check_tensors, resolve
from natsl.kernels.pages import KeyPages
from natsl.kernels.shape import LARGEST_KEY_DIM, LARGEST_VALUE_DIM

LARGEST_HEADS = 8192  # B·Hs, whose pages every program of the kernels counts
LIMITS = Limits({"K": LARGEST_KEY_DIM, "V": LARGEST_VALUE_DIM, "sequences · softmax heads": LARGEST_HEADS})


class DecodeWeights(NamedTuple):
    """Weights of a layer that has softmax, the delta rule or both; what it has no use for is None.

    The router is that of margins, of a chunk's mean input as it is: what standardises it is in ``router``, and its
    bias. ``mix_bias`` and ``count_bias``: logits of the mix without earlier chunks, and what 1 / (1 + earlier kept
    chunks) is multiplied with.
    """

    conv: Tensor  # [channels,W]
    query_norm: Tensor | None  # [Ks]
    key_norm: Tensor | None  # [Ks]
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
    rope_theta: float | None = None,
) -> Tensor:
    """Mix the next token of every sequence: convolution, norms, gates, both memories, their mix and the router.

    x [B,D]: what the projections read. inputs [B, channels + R·V + 2R]: q, k, v before the convolution, the gate of the
    output before SiLU, then for a layer with the delta rule what its log decay and its write strength are made of,
    without their biases. ``heads``: R; ``softmax_per_head``: G. ``eps`` of the norms. ``rope_theta``: base of rotary
    positions of softmax (None: no positions).

    ``state`` is updated in place, for chunks that end here under ``policy``: those that are kept take a new page. There
    must be enough of them, as for ``write_chunks``: 1 + B·R + the sum of the new ``kept``, and its largest + 1 places;
    a page that is missing is not written. Add ``state.live`` to ``state.read`` after the last layer. On Triton only, in
    three launches that wait for nothing and can be captured in a CUDA graph: float32, float16 or bfloat16, chunk_size
    16, 32, 64 or 128, K ≤ 256, V ≤ 512, B·Hs ≤ 8192. The torch way is that of ``RoutedLM.forward``.

    Returns y [B,R·V] in the dtype of ``inputs``, anything in rows that have no token. Raises ``ValueError`` naming the
    argument. Source: arXiv 2602.03681, section 3.
    """
    op = "decode_step"
    has_delta, has_softmax = state.delta is not None, state.pages is not None
    if not (has_delta or has_softmax):
        raise ValueError(f"{op}: state has neither memory")
    check_tensors(op, {"x": x, "inputs": inputs, "weights.conv": weights.conv, "state.tail": state.tail})
    (B, D), R, G = x.shape, heads, softmax_per_head
    (channels, W), shape = weights.conv.shape, inputs.shape
    values = shape[1] - channels - (2 * R if has_delta else 0)  # R·V
    keys = (channels - values) // 2  # R·K
    if values < 1 or values % (R * G) or keys < 1 or keys % (R * G) or shape[0] != B:
        raise ValueError(
            f"{op}: inputs {tuple(shape)} must be [{B}, channels + R·V + {2 * R if has_delta else 0}], with {channels} "
            f"channels and widths that {R * G} softmax heads divide"
        )
    check_shape(op, "state.tail", state.tail, (B, W - 1, channels))
    K, V = keys // R, values // R
    reason = LIMITS.reason(inputs.dtype, chunk_size, {"K": K, "V": V, "sequences · softmax heads": B * R * G})
    if reason is not None:
        raise ValueError(f"{op}: {reason}")
    resolve("triton", op, x.device)
    _check_state(op, inputs, state, (B, D, R, G, K, V, chunk_size))
    if B == 0:
        return inputs.new_empty(0, values)
    from natsl.kernels._triton.decode import Sizes, launch

    sizes = Sizes(R, G, K // G, V // G, W, chunk_size)
    y: Tensor = launch(x.contiguous(), inputs, weights, state, policy, sizes, eps, rope_theta)
    return y


def _check_state(op: str, inputs: Tensor, state: DecodeState, sizes: tuple[int, ...]) -> None:
    """Raise ``ValueError`` naming a tensor of the state of the wrong shape or dtype, or one that is not contiguous."""
    B, D, R, G, K, V, C = sizes
    tensors: dict[str, tuple[Tensor, tuple[int, ...], torch.dtype]] = {
        "read": (state.read, (B,), torch.int64),
        "live": (state.live, (B,), torch.bool),
        "tail": (state.tail, tuple(state.tail.shape), inputs.dtype),
    }
    if state.delta is not None:
        for name, x in zip(state.delta._fields, state.delta, strict=True):
            shape = {"decay": (B, R), "start": (B,)}.get(name, (B, R, K, V))
            tensors[f"delta.{name}"] = (x, shape, torch.int64 if name == "start" else torch.float32)
    if state.pages is not None:
        pages = state.pages
        P, M = pages.keys.shape[0], pages.table.shape[-1]
        tensors["pages.keys"] = (pages.keys, (P, C, G, K // G), inputs.dtype)
        tensors["pages.values"] = (pages.values, (P, C, G, V // G), inputs.dtype)
        tensors["pages.table"] = (pages.table, (B, R, M), torch.int64)
        tensors["pages.kept"] = (pages.kept, (B, R), torch.int64)
        if state.delta is not None:
            if state.total is None:
                raise ValueError(f"{op}: state.total is None, but the layer has a router")
            tensors["total"] = (state.total, (B, D), torch.float32)
    for name, (x, shape, dtype) in tensors.items():
        check_shape(op, f"state.{name}", x, shape)
        if x.dtype != dtype or x.device != inputs.device or not x.is_contiguous():
            form = f"{x.dtype} on {x.device}" + ("" if x.is_contiguous() else ", not contiguous")
            raise ValueError(f"{op}: state.{name} is {form}: it must be contiguous {dtype} on {inputs.device}")
