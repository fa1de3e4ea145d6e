"""What a routing policy costs, by arithmetic: memory held and moved, operations done. Times: ``natsl.space.latency``.

Shapes per layer (``LayerShape``): D model width, R heads, K and V key and value width per head, G softmax heads per
head (so Hs = R·G), M width of the SwiGLU, W taps of the convolution. C tokens per chunk, L context in tokens, f the
fraction of a layer's complete chunks that softmax keeps, b bytes per stored element.

Every function takes one shape, one layer policy and one kept fraction per layer, in order. ``kept`` is read only
where the policy's op is ``routed``: ``softmax`` keeps 1, ``delta`` 0. All count one sequence. Errors:
``ValueError`` if the policy does not fit the shapes or a number is out of range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from natsl.space.check import check, check_choice, check_count, check_number
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy

STATE_BYTES = 4  # the state of the delta rule is float32, whatever the model's dtype
COUNT_BYTES = 8  # lengths, counts and the numbers of pages are int64


@dataclass(frozen=True)
class LayerShape:
    """Shape of one layer: its kind and widths (per routing head where ``ModelConfig`` has them so)."""

    kind: Op
    width: int
    heads: int
    key_dim: int
    value_dim: int
    softmax_per_head: int
    mlp_width: int
    conv_width: int

    def __post_init__(self) -> None:
        check_choice("shape.kind", self.kind, Op)
        for item in fields(self)[1:]:
            check_count(f"shape.{item.name}", getattr(self, item.name), 1)


def kv_token_bytes(shape: LayerShape, bytes_per_element: int = 2) -> int:
    """Bytes of key and value of one kept token in one layer: b·R·(K + V)."""
    return bytes_per_element * shape.heads * (shape.key_dim + shape.value_dim)


def state_bytes(shape: LayerShape) -> int:
    """Bytes of the delta rule's float32 state in one layer: 4·R·K·V; 0 for a layer of kind softmax."""
    return 0 if shape.kind is Op.softmax else STATE_BYTES * shape.heads * shape.key_dim * shape.value_dim


def kv_bytes(
    shapes: Sequence[LayerShape],
    policy: RoutingPolicy,
    kept: Sequence[float],
    context: int,
    bytes_per_element: int = 2,
) -> float:
    """Bytes of KV cache: Σ over layers of b·R·(K + V)·(f·L + C/2); nothing for op delta.

    L = ``context`` counts the tokens in complete earlier chunks; the own chunk is always visible and on average half
    full, C/2 tokens. This is what one decoded token reads; what a cache holds besides is in ``cache_bytes``.
    """
    layers = layers_of(shapes, policy, kept, context, bytes_per_element)
    half = policy.chunk_size / 2
    return sum(
        (kv_token_bytes(shape, bytes_per_element) * (f * context + half))
        for shape, layer, f in layers
        if layer.op is not Op.delta
    )


def kv_bytes_per_token(
    shapes: Sequence[LayerShape],
    policy: RoutingPolicy,
    kept: Sequence[float],
    context: int,
    bytes_per_element: int = 2,
) -> float:
    """Bytes of KV cache per token of text: ``kv_bytes`` / (L + C/2).

    The divisor counts the same tokens as ``kv_bytes``, so all-softmax costs b·R·(K + V) per layer at every length. The
    state of the delta rule is left out: its size does not depend on the length.
    """
    total = kv_bytes(shapes, policy, kept, context, bytes_per_element)
    return total / (context + policy.chunk_size / 2)


def decode_bytes(
    shapes: Sequence[LayerShape],
    policy: RoutingPolicy,
    kept: Sequence[float],
    context: int,
    bytes_per_element: int = 2,
) -> float:
    """Bytes moved to decode one token: ``kv_bytes`` + Σ over layers with a delta branch of 2 · 4·R·K·V.

    The float32 state is read and written at each token, under op softmax too (the delta rule serves the own chunk).
    Left out: weights (the same under every policy), and per layer the write of one token's key and value, the cache of
    the convolution and the copy of the state at the end of a chunk (all far below the rest).
    """
    state = sum(2 * state_bytes(shape) for shape in shapes)
    return kv_bytes(shapes, policy, kept, context, bytes_per_element) + state


def cache_bytes(
    shapes: Sequence[LayerShape],
    policy: RoutingPolicy,
    kept: Sequence[float],
    context: int,
    bytes_per_element: int = 2,
) -> float:
    """Bytes that the cache of one sequence of T = ``context`` tokens holds, the pages that it has in reserve left out.

    8, the sequence's length, and per layer the sum of
        convolution  b·(W − 1)·R·(2K + V)                       the last inputs
        router       max(b, 4)·D                                kind routed: the sum over the open chunk
        delta rule   2 · 4·R·K·V + 4·R + 8                      unless of kind softmax: two states, decay, place
        pages        (n + 1) · b·C·(K + V) + 8·(n + R)          unless of kind delta
    A page holds a chunk of a head. There are n = R·(f·⌊T/C⌋ + 1), those that are kept and the open ones, with an entry
    of the table each, one that is nobody's, and R numbers kept. Under op delta f = 0, and the open ones are there, but
    not in an export (``exported``).
    """
    C, total = policy.chunk_size, float(COUNT_BYTES)
    for shape, _, f in layers_of(shapes, policy, kept, context, bytes_per_element):
        R, K, V = shape.heads, shape.key_dim, shape.value_dim
        total += bytes_per_element * (shape.conv_width - 1) * R * (2 * K + V)
        if shape.kind is Op.routed:
            total += max(bytes_per_element, STATE_BYTES) * shape.width
        if shape.kind is not Op.softmax:
            total += 2 * state_bytes(shape) + STATE_BYTES * R + COUNT_BYTES
        if shape.kind is not Op.delta:
            pages = R * (f * (context // C) + 1)
            total += (pages + 1) * C * bytes_per_element * (K + V) + COUNT_BYTES * (pages + R)
    return total


def exported(shapes: Sequence[LayerShape], policy: RoutingPolicy) -> list[LayerShape]:
    """The shapes of an export: a layer of op delta is of kind delta there, without router and pages."""
    pairs = zip(shapes, policy.layers, strict=True)
    return [replace(shape, kind=Op.delta) if layer.op is Op.delta else shape for shape, layer in pairs]


def visible_keys(kept: float, tokens: int, chunk_size: int) -> float:
    """Number of (query, key) pairs that softmax computes over ``tokens`` tokens, kept chunks spread evenly.

    With N = ⌊T/C⌋ complete chunks and ρ = T mod C left over: own chunks N·C(C+1)/2 + ρ(ρ+1)/2, and f times the
    earlier complete chunks C²·N(N−1)/2 + ρ·N·C. f = 1 gives T(T+1)/2.
    """
    full, rest = divmod(tokens, chunk_size)
    own = full * (chunk_size * (chunk_size + 1) // 2) + rest * (rest + 1) // 2
    earlier = chunk_size * chunk_size * (full * (full - 1) // 2) + rest * full * chunk_size
    return own + kept * earlier


def prefill_flops(shapes: Sequence[LayerShape], policy: RoutingPolicy, kept: Sequence[float], context: int) -> float:
    """Floating-point operations (a multiply-add is 2) of the layers over a prompt of T = ``context`` tokens.

    Per layer, the sum of
        projections  T · 2·D·R·(2K + 3V)                    q, k, v, gate, output
        convolution  T · 2·W·R·(2K + V)
        SwiGLU       T · 6·D·M
        delta rule   T · R·(6·K·V + 6·C·K + 4·C·V + 2/3·C²) + T · 4·D·R       unless of kind softmax
                     (chunk form of the paper: K Kᵀ, W, Q Kᵀ of C×C×K; U and the output of C×C×V; W S, Q S and the
                     update of C×K×V; the inverse of a triangle of C; gates a and b)
        softmax      2·R·(K + V) · ``visible_keys``         unless op delta
        mixing       T · 4·R·K·R·G                          kind routed, unless op delta
        router       ⌈T/C⌉ · 4·D·R                          op routed
    Left out: embedding and output head (the same under every policy), norms and other element-wise work.
    """
    C, T = policy.chunk_size, context
    total = 0.0
    for shape, layer, f in layers_of(shapes, policy, kept, context, 1):
        D, R, K, V = shape.width, shape.heads, shape.key_dim, shape.value_dim
        total += T * (2 * D * R * (2 * K + 3 * V) + 2 * shape.conv_width * R * (2 * K + V) + 6 * D * shape.mlp_width)
        if shape.kind is not Op.softmax:
            total += T * (R * (6 * K * V + 6 * C * K + 4 * C * V + 2 * C * C / 3) + 4 * D * R)
        if layer.op is not Op.delta:
            total += 2 * R * (K + V) * visible_keys(f, T, C)
            if shape.kind is Op.routed:
                total += T * 4 * R * K * R * shape.softmax_per_head
        if layer.op is Op.routed:
            total += -(-T // C) * 4 * D * R
    return total


def layers_of(
    shapes: Sequence[LayerShape],
    policy: RoutingPolicy,
    kept: Sequence[float],
    context: int,
    bytes_per_element: int,
) -> list[tuple[LayerShape, LayerPolicy, float]]:
    """Shape, policy and kept fraction of each layer, all checked; the fraction of op softmax is 1, of delta 0."""
    policy.check([shape.kind for shape in shapes], policy.chunk_size)
    check(len(kept) == len(shapes), "number of kept fractions", len(kept), f"the model has {len(shapes)} layers")
    check_count("context", context, 1)
    check_count("bytes_per_element", bytes_per_element, 1)
    layers = []
    for i, (shape, layer) in enumerate(zip(shapes, policy.layers, strict=True)):
        if layer.op is Op.routed:
            f = check_number(f"kept[{i}]", kept[i], 0, 1)
        else:
            f = 1.0 if layer.op is Op.softmax else 0.0
        layers.append((shape, layer, f))
    return layers
