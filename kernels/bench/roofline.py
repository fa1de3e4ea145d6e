"""The least time a routed layer can take: operations, bytes and what a GPU reaches of either.

B batch, T tokens, C chunk size, f kept fraction; R heads of key width K and value width V; G softmax heads per head, so
R·G of key width K/G and value width V/G; e bytes per element. A multiply-add is two operations. Nothing here imports
torch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
CHUNK_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class Shape:
    """Shape of one routed layer; the defaults are those of the 340M model."""

    heads: int = 6
    key_dim: int = 128
    value_dim: int = 256
    softmax_per_head: int = 2
    chunk_size: int = 64
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for item in fields(self)[:5]:
            value = getattr(self, item.name)
            if value < 1:
                raise ValueError(f"{item.name} = {value} is not allowed: it must be ≥ 1")
        if self.dtype not in ELEMENT_BYTES:
            raise ValueError(f"dtype = {self.dtype!r} is not allowed: it must be one of {', '.join(ELEMENT_BYTES)}")
        if self.chunk_size not in CHUNK_SIZES:
            allowed = ", ".join(map(str, CHUNK_SIZES))
            raise ValueError(f"chunk_size = {self.chunk_size} is not allowed: it must be one of {allowed}")
        for name, largest in (("key_dim", 256), ("value_dim", 512)):
            value = getattr(self, name)
            if value > largest or value % self.softmax_per_head:
                bound = f"it must be ≤ {largest} and a multiple of softmax_per_head = {self.softmax_per_head}"
                raise ValueError(f"{name} = {value} is not allowed: {bound}")

    @property
    def softmax_heads(self) -> int:
        return self.heads * self.softmax_per_head

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True)
class Case:
    """One point of a benchmark: B sequences of T tokens, a fraction f of whose chunks softmax keeps."""

    batch: int
    tokens: int
    fraction: float


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes that have to cross the memory bus."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Ceilings:
    """Operations and bytes per second that a device reaches, and where the numbers are from."""

    flops: float
    bandwidth: float
    source: str

    def floor_ms(self, work: Work) -> float:
        """Milliseconds below which ``work`` cannot be done."""
        return 1e3 * max(work.flops / self.flops, work.bytes / self.bandwidth)


# One H100 80GB (torch 2.11): a bfloat16 matrix product reached 767 TFLOP/s, a device copy 2.99 TB/s; rounded up.
H100 = Ceilings(800e12, 3e12, "H100 80GB: bfloat16 product 767 TFLOP/s, device copy 2.99 TB/s, rounded up")


def for_dtype(ceilings: Ceilings, dtype: str) -> Ceilings:
    """Ceilings given for half precision, in ``dtype``: TF32 runs at half that rate and float32 takes three products."""
    return Ceilings(ceilings.flops / 6, ceilings.bandwidth, ceilings.source) if dtype == "float32" else ceilings


def earlier_pairs(case: Case, chunk_size: int) -> float:
    """(query, key) pairs of one sequence and head whose key lies in an earlier chunk, kept or not."""
    full, rest = divmod(case.tokens, chunk_size)
    return chunk_size * chunk_size * (full * (full - 1) // 2) + rest * full * chunk_size


def visible_pairs(case: Case, chunk_size: int) -> float:
    """(query, key) pairs that softmax computes in one sequence and head: the own chunk and f of the earlier ones."""
    full, rest = divmod(case.tokens, chunk_size)
    own = full * (chunk_size * (chunk_size + 1) // 2) + rest * (rest + 1) // 2
    return own + case.fraction * earlier_pairs(case, chunk_size)


def _softmax(shape: Shape, case: Case, pairs: float, products: tuple[int, int], tensors: tuple[int, int]) -> Work:
    """``products`` and ``tensors`` of key width and of value width: matrix products, tensors read or written once."""
    Ks, Vs = shape.key_dim / shape.softmax_per_head, shape.value_dim / shape.softmax_per_head
    heads = case.batch * shape.softmax_heads
    flops = 2 * heads * pairs * (products[0] * Ks + products[1] * Vs)
    return Work(flops, shape.element_bytes * heads * case.tokens * (tensors[0] * Ks + tensors[1] * Vs))


def softmax_forward(shape: Shape, case: Case) -> Work:
    """Two products per visible pair; reads q, k, v, writes o."""
    return _softmax(shape, case, visible_pairs(case, shape.chunk_size), (1, 1), (2, 2))


def softmax_backward(shape: Shape, case: Case, fused: bool = True) -> Work:
    """Five products per visible pair (S, dP, dV, dK, dQ) in one kernel; ``fused=False``: S and dP in each of two.

    Reads q, k, v, o, dO and writes dq, dk, dv.
    """
    products = (3, 2) if fused else (4, 3)
    return _softmax(shape, case, visible_pairs(case, shape.chunk_size), products, (4, 4))


def _delta(shape: Shape, case: Case, products: tuple[float, ...], tensors: tuple[float, ...]) -> Work:
    """Per token and head: products of K·V, C·V, C·K and C² multiply-adds; tensors of K, V, C and K·V/C elements."""
    K, V, C = shape.key_dim, shape.value_dim, shape.chunk_size
    count = case.batch * case.tokens * shape.heads
    flops = sum(n * size for n, size in zip(products, (K * V, C * V, C * K, C * C), strict=True))
    elements = sum(n * size for n, size in zip(tensors, (K, V, C, K * V / C), strict=True))
    return Work(2 * count * flops, shape.element_bytes * count * elements)


def delta_forward(shape: Shape, case: Case) -> Work:
    """One kernel: reads q, k, v, writes o. Products: W S, Kᵀ Vn, Q S; A·v, P Vn; K Kᵀ, Q Kᵀ, W; two in the inverse."""
    return _delta(shape, case, (3, 2, 3, 2), (2, 2, 0, 0))


def delta_forward_split(shape: Shape, case: Case) -> Work:
    """The usual chain of kernels with its intermediates in memory.

    Norms (q, k → q̂, k̂), inverse (k̂ → A), W and U (k̂, v, A → W, U), scan (k̂, W, U → S, Vn), output (q̂, k̂, Vn, S → o).
    """
    return _delta(shape, case, (3, 2, 4, 2), (4 + 1 + 2 + 2 + 2, 2 + 2 + 2, 1 + 1, 1 + 1))


def delta_backward(shape: Shape, case: Case) -> Work:
    """One kernel with everything computed again: reads q, k, v, dO, writes dq, dk, dv.

    Products of K·V: W S, Kᵀ Vn, K dS, Qᵀ dO, Wᵀ dVn, and for dq, dW, dk; of C·V: A·v, Pᵀ dO, and for dP, dA, dv; of
    C·K: K Kᵀ, Q Kᵀ, W, two through P, two through W, two through L; four C² in the inverse and its gradient.
    """
    return _delta(shape, case, (8, 5, 9, 4), (4, 3, 0, 0))


def delta_backward_split(shape: Shape, case: Case) -> Work:
    """The usual chain of kernels with its intermediates in memory.

    W and U again (k̂, v, A → W, U), states again (k̂, W, U → S, Vn), local dVn (q̂, k̂, dO → dVn), scan (q̂, k̂, W, dO, dVn →
    dS, dVn), queries and keys (q̂, k̂, W, Vn, dO, S, dS, dVn → dq, dk, dW), through W and U (k̂, v, A, dW, dVn → dk, dv),
    sum of the two dk, norms (q, k, dq, dk → dq, dk).
    """
    keys = 2 + 2 + 2 + 3 + 6 + 3 + 3 + 6
    values = 2 + 2 + 2 + 3 + 3 + 3
    return _delta(shape, case, (8, 5, 10, 4), (keys, values, 2, 1 + 1 + 2))


def mix_forward(shape: Shape, case: Case) -> Work:
    """Bound by memory: o_delta, o_softmax and gate read, y written, two logits per head."""
    return _mix(shape, case, 4, 2)


def mix_backward(shape: Shape, case: Case) -> Work:
    """Bound by memory: dy and the three inputs read, three gradients written, logits and theirs."""
    return _mix(shape, case, 7, 4)


def _mix(shape: Shape, case: Case, tensors: int, logits: int) -> Work:
    count = case.batch * case.tokens * shape.heads
    elements = count * (tensors * shape.value_dim + logits * shape.softmax_per_head)
    return Work(0.0, shape.element_bytes * elements)


def op_work(op: str, shape: Shape, case: Case) -> tuple[Work, Work]:
    """Least work of one op, forward and backward; ``op``: a name of ``natsl.kernels.registry.OPS``."""
    parts = {
        "routed_softmax": (softmax_forward(shape, case), softmax_backward(shape, case)),
        "routed_delta_rule": (delta_forward(shape, case), delta_backward(shape, case)),
        "routed_mix": (mix_forward(shape, case), mix_backward(shape, case)),
    }
    (sf, sb), (df, db), (mf, mb) = parts.values()
    parts["branches"] = (sf + df, sb + db)
    parts["layer"] = (sf + df + mf, sb + db + mb)
    return parts[op]


def kernel_work(shape: Shape, case: Case, counterfactual: str = "none", rate: float = 1.0) -> dict[str, Work]:
    """Work of each Triton kernel as the layer is split: its products, its inputs and outputs once each.

    Left out: scalars per token (gates, statistics) and lists of chunks.
    """
    pairs = visible_pairs(case, shape.chunk_size)
    sampled = 0.0 if counterfactual == "none" else rate * (1.0 - case.fraction)
    written = 1.0 - case.fraction
    sample = earlier_pairs(case, shape.chunk_size) * sampled
    return {
        "softmax_forward": _softmax(shape, case, pairs, (1, 1), (2, 2)),
        "softmax_dq": _softmax(shape, case, pairs, (2, 1), (3, 3)),
        "softmax_dkv": _softmax(shape, case, pairs, (2, 2), (3, 3)),
        "softmax_counterfactual": _softmax(shape, case, sample, (1, 1), (2, 2) if sampled else (0, 0)),
        # q, k → W, Qe, A, P, PA
        "delta_prepare": _delta(shape, case, (0, 0, 4, 3), (4, 0, 3, 0)),
        # written chunks alone: k, W, v, A → S
        "delta_scan": _delta(shape, case, (2 * written, written, 0, 0), (2 * written, written, written, written)),
        # Qe, v, PA, S → o
        "delta_output": _delta(shape, case, (1, 1, 0, 0), (1, 2, 1, written)),
        # k, W, Qe, dO → dS
        "delta_backward_scan": _delta(shape, case, (3, 0, 0, 0), (3, 1, 0, 1)),
        # k, W, v, dO, A, P, S, dS → dv, dP, dA and what queries, W and keys get through the states
        "delta_backward": _delta(shape, case, (5, 5, 0, 0), (5, 3, 4, 1 + written)),
        # q, k, those three, A, P, dA, dP → dq, dk
        "delta_backward_finish": _delta(shape, case, (0, 0, 7, 2), (7, 0, 4, 0)),
        "mix_forward": mix_forward(shape, case),
        "mix_backward": mix_backward(shape, case),
    }
