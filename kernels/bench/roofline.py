"""The least time a routed layer can take: its work against what a GPU reaches in operations and bytes per second.

Letters as in ``natsl.kernels.shape``. Nothing here imports torch before it is called.
"""

from __future__ import annotations

from dataclasses import dataclass

from natsl.kernels.shape import Case, Shape, Work, delta_work, softmax_work


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
    """Ceilings of half precision, in ``dtype``: TF32 runs at half that rate and float32 takes three products."""
    return Ceilings(ceilings.flops / 6, ceilings.bandwidth, ceilings.source) if dtype == "float32" else ceilings


def op_work(op: str, shape: Shape, case: Case) -> tuple[Work, Work]:
    """Least work of one op, forward and backward; ``op``: a name of ``natsl.kernels.registry.OPS`` that has one.

    Raises ``KeyError`` for any other name.
    """
    from natsl.kernels.registry import OPS

    work = OPS[op].work
    if work is None:
        raise KeyError(op)
    return work.forward(shape, case), work.backward(shape, case)


def kernel_work(shape: Shape, case: Case) -> dict[str, Work]:
    """Work of each Triton kernel as the layer is split: its products, its inputs and outputs once each.

    Left out: scalars per token (gates, statistics) and lists of chunks.
    """
    from natsl.kernels.registry import kernels

    return {kernel.name: kernel.work(shape, case) for kernel in kernels() if kernel.work is not None}


def softmax_backward_split(shape: Shape, case: Case) -> Work:
    """The backward pass of the softmax branch in two kernels, dq and dk with dv, each with S and dP of its own."""
    return softmax_work(shape, case, (4, 3), (4, 4))


def delta_forward_split(shape: Shape, case: Case) -> Work:
    """The usual chain of kernels with its intermediates in memory.

    Norms (q, k → q̂, k̂), inverse (k̂ → A), W and U (k̂, v, A → W, U), scan (k̂, W, U → S, Vn), output (q̂, k̂, Vn, S → o).
    """
    return delta_work(shape, case, (3, 2, 4, 2), (4 + 1 + 2 + 2 + 2, 2 + 2 + 2, 1 + 1, 1 + 1))


def delta_backward_split(shape: Shape, case: Case) -> Work:
    """The usual chain of kernels with its intermediates in memory.

    W and U again (k̂, v, A → W, U), states again (k̂, W, U → S, Vn), local dVn (q̂, k̂, dO → dVn), scan (q̂, k̂, W, dO, dVn →
    dS, dVn), queries and keys (q̂, k̂, W, Vn, dO, S, dS, dVn → dq, dk, dW), through W and U (k̂, v, A, dW, dVn → dk, dv),
    sum of the two dk, norms (q, k, dq, dk → dq, dk).
    """
    keys = 2 + 2 + 2 + 3 + 6 + 3 + 3 + 6
    values = 2 + 2 + 2 + 3 + 3 + 3
    return delta_work(shape, case, (8, 5, 10, 4), (keys, values, 2, 1 + 1 + 2))
