"""Shape of a routed layer, the sizes that its kernels take, and the least work of its ops. Nothing here imports torch.

B batch, T tokens, C chunk size, f kept fraction; R heads of key width K and value width V; G softmax heads per head, so
R·G of key width K/G and value width V/G; e bytes per element. A multiply-add is two operations.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

# What the kernels take: data types, chunk sizes, and the largest key and value width of one head.
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
CHUNK_SIZES = (16, 32, 64, 128)
LARGEST_KEY_DIM = 256
LARGEST_VALUE_DIM = 512
LARGEST_GRID = 65535  # blocks along the second and third axis of a CUDA grid


@dataclass(frozen=True)
class Shape:
    """Shape of one routed layer; the defaults are those of the 340M model.

    Raises ``ValueError`` naming a size that is < 1 or that the kernels do not take.
    """

    heads: int = 6
    key_dim: int = 128
    value_dim: int = 256
    softmax_per_head: int = 2
    chunk_size: int = 64
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in [item.name for item in fields(self) if item.name != "dtype"]:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} is not allowed: it must be ≥ 1")
        if self.dtype not in ELEMENT_BYTES:
            raise ValueError(f"dtype = {self.dtype!r} is not allowed: it must be one of {', '.join(ELEMENT_BYTES)}")
        if self.chunk_size not in CHUNK_SIZES:
            allowed = ", ".join(map(str, CHUNK_SIZES))
            raise ValueError(f"chunk_size = {self.chunk_size} is not allowed: it must be one of {allowed}")
        for name, largest in (("key_dim", LARGEST_KEY_DIM), ("value_dim", LARGEST_VALUE_DIM)):
            value = getattr(self, name)
            if value > largest or value % self.softmax_per_head:
                bound = f"it must be ≤ {largest} and a multiple of softmax_per_head = {self.softmax_per_head}"
                raise ValueError(f"{name} = {value} is not allowed: {bound}")

    @property
    def softmax_heads(self) -> int:
        return self.heads * self.softmax_per_head

    @property
    def softmax_key_dim(self) -> int:
        return self.key_dim // self.softmax_per_head

    @property
    def softmax_value_dim(self) -> int:
        return self.value_dim // self.softmax_per_head

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True)
class Case:
    """One point of a benchmark: B sequences of T tokens, a fraction f of whose chunks softmax keeps.

    ``rate``: share of the other chunks that the router gradient samples, 0 without a counterfactual.
    """

    batch: int
    tokens: int
    fraction: float
    rate: float = 0.0

    @property
    def written(self) -> float:
        """Fraction of the chunks that the delta rule writes into its state."""
        return 1.0 - self.fraction

    @property
    def sampled(self) -> float:
        """Fraction of the chunks that softmax leaves out and the router gradient samples."""
        return self.rate * (1.0 - self.fraction)


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes that have to cross the memory bus."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


def earlier_pairs(case: Case, chunk_size: int) -> float:
    """(query, key) pairs of one sequence and head whose key is in an earlier chunk, kept or not."""
    full, rest = divmod(case.tokens, chunk_size)
    return chunk_size * chunk_size * (full * (full - 1) // 2) + rest * full * chunk_size


def visible_pairs(case: Case, chunk_size: int) -> float:
    """(query, key) pairs that softmax computes in one sequence and head: the own chunk and f of the earlier ones."""
    full, rest = divmod(case.tokens, chunk_size)
    own = full * (chunk_size * (chunk_size + 1) // 2) + rest * (rest + 1) // 2
    return own + case.fraction * earlier_pairs(case, chunk_size)


def softmax_work(
    shape: Shape, case: Case, products: tuple[int, int], tensors: tuple[int, int], pairs: float | None = None
) -> Work:
    """Work of a kernel of the softmax branch on ``pairs`` (default: the visible ones) of each head.

    ``products`` and ``tensors`` of key width and of value width: matrix products, tensors read or written once.
    """
    pairs = visible_pairs(case, shape.chunk_size) if pairs is None else pairs
    Ks, Vs = shape.softmax_key_dim, shape.softmax_value_dim
    heads = case.batch * shape.softmax_heads
    flops = 2 * heads * pairs * (products[0] * Ks + products[1] * Vs)
    return Work(flops, shape.element_bytes * heads * case.tokens * (tensors[0] * Ks + tensors[1] * Vs))


def delta_work(shape: Shape, case: Case, products: tuple[float, ...], tensors: tuple[float, ...]) -> Work:
    """Work of a kernel of the delta rule.

    Per token and head: ``products`` of K·V, C·V, C·K and C² multiply-adds; ``tensors`` of K, V, C and K·V/C elements.
    """
    K, V, C = shape.key_dim, shape.value_dim, shape.chunk_size
    count = case.batch * case.tokens * shape.heads
    flops = sum(n * size for n, size in zip(products, (K * V, C * V, C * K, C * C), strict=True))
    elements = sum(n * size for n, size in zip(tensors, (K, V, C, K * V / C), strict=True))
    return Work(2 * count * flops, shape.element_bytes * count * elements)


def mix_work(shape: Shape, case: Case, tensors: int, logits: int) -> Work:
    """Work of a kernel that is bound by memory: ``tensors`` of V elements and ``logits`` of G per token and head."""
    count = case.batch * case.tokens * shape.heads
    elements = count * (tensors * shape.value_dim + logits * shape.softmax_per_head)
    return Work(0.0, shape.element_bytes * elements)


def softmax_forward(shape: Shape, case: Case) -> Work:
    """Two products per visible pair; reads q, k, v, writes o."""
    return softmax_work(shape, case, (1, 1), (2, 2))


def softmax_backward(shape: Shape, case: Case) -> Work:
    """Five products per visible pair (S, dP, dV, dK, dQ); reads q, k, v, o, dO and writes dq, dk, dv."""
    return softmax_work(shape, case, (3, 2), (4, 4))


def delta_forward(shape: Shape, case: Case) -> Work:
    """One kernel: reads q, k, v, writes o. Products: W S, Kᵀ Vn, Q S; A·v, P Vn; K Kᵀ, Q Kᵀ, W; two in the inverse."""
    return delta_work(shape, case, (3, 2, 3, 2), (2, 2, 0, 0))


def delta_backward(shape: Shape, case: Case) -> Work:
    """One kernel with everything computed again: reads q, k, v, dO, writes dq, dk, dv.

    Products of K·V: W S, Kᵀ Vn, K dS, Qᵀ dO, Wᵀ dVn, and for dq, dW, dk; of C·V: A·v, Pᵀ dO, and for dP, dA, dv; of
    C·K: K Kᵀ, Q Kᵀ, W, two through P, two through W, two through L; four C² in the inverse and its gradient.
    """
    return delta_work(shape, case, (8, 5, 9, 4), (4, 3, 0, 0))


def mix_forward(shape: Shape, case: Case) -> Work:
    """Bound by memory: o_delta, o_softmax and gate read, y written, two logits per head."""
    return mix_work(shape, case, 4, 2)


def mix_backward(shape: Shape, case: Case) -> Work:
    """Bound by memory: dy and the three inputs read, three gradients written, logits and theirs."""
    return mix_work(shape, case, 7, 4)
