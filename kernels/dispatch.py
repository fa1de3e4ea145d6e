"""The one choice of backend: Triton kernels on CUDA where they exist, vectorised torch elsewhere."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import pairwise

import torch

from natsl.kernels.shape import CHUNK_SIZES, ELEMENT_BYTES

BACKENDS = ("auto", "triton", "torch")
COUNTERFACTUALS = ("none", "derivative", "insertion")
_DTYPES = tuple(getattr(torch, name) for name in ELEMENT_BYTES)
_TRITON_INSTALLED = find_spec("triton") is not None


def resolve(backend: str, op: str, device: torch.device) -> str:
    """Return ``"triton"`` or ``"torch"`` for one call of ``op``.

    ``auto`` takes the Triton kernels on CUDA if triton is installed, and torch everywhere else. On a CPU the kernels
    run only in Triton's interpreter (``TRITON_INTERPRET=1``). Raises ``ValueError`` for an unknown name and for a
    forced backend that is absent.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r} is not allowed: it must be one of {', '.join(BACKENDS)}")
    if backend == "torch":
        return "torch"
    if backend == "auto":
        return "triton" if _TRITON_INSTALLED and device.type == "cuda" else "torch"
    if not _TRITON_INSTALLED:
        raise ValueError(f"backend = 'triton' is not available for {op}: triton is not installed")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend = 'triton' is not available for {op} on {device.type}: it needs CUDA (or TRITON_INTERPRET=1)"
        )
    return "triton"


def check_tensors(op: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ``ValueError`` naming the argument that is no floating point tensor or not on the device of the first."""
    first, reference = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"{op}: {name} must be a floating point tensor, found {kind}")
        if tensor.device != reference.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, but {first} is on {reference.device}")


def check_heads(op: str, tensors: Mapping[str, torch.Tensor], chunk_size: int) -> None:
    """Raise ``ValueError`` unless all are [batch, tokens, heads, width] of one dtype, none but the batch empty, and
    ``chunk_size`` is an integer ≥ 1."""
    first, reference = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.dim() != 4 or 0 in tensor.shape[1:]:
            shape = tuple(tensor.shape)
            raise ValueError(f"{op}: {name} must be [batch, tokens, heads, width], each ≥ 1, found {shape}")
        if tensor.dtype != reference.dtype:
            raise ValueError(f"{op}: {name} is {tensor.dtype}, but {first} is {reference.dtype}")
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"{op}: chunk_size = {chunk_size!r} must be an integer ≥ 1")


def check_shape(op: str, name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless ``tensor`` has the ``expected`` shape."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {expected}")


def check_counterfactual(op: str, counterfactual: str, rate: float) -> None:
    """Raise ``ValueError`` for an unknown mode of the router gradient or a rate outside (0, 1]."""
    if counterfactual not in COUNTERFACTUALS:
        raise ValueError(f"{op}: counterfactual = {counterfactual!r} must be one of {', '.join(COUNTERFACTUALS)}")
    if not 0.0 < rate <= 1.0:
        raise ValueError(f"{op}: counterfactual_rate = {rate!r} must lie in (0, 1]")


def kernel_limit(
    dtype: torch.dtype, chunk_size: int | None, widths: Mapping[str, tuple[int, int]], delta_keys: int | None = None
) -> str | None:
    """Why the Triton kernels do not support something, or None if they do.

    ``widths``: name → (value, largest); ``delta_keys``: key width of the delta rule, whose kernels hold a chunk's keys
    on chip.
    """
    if dtype not in _DTYPES:
        return f"{dtype} is not supported by the triton backend: float32, float16 or bfloat16"
    if chunk_size is not None and chunk_size not in CHUNK_SIZES:
        allowed = ", ".join(map(str, CHUNK_SIZES))
        return f"chunk_size = {chunk_size} is not supported by the triton backend: {allowed}"
    for name, (value, largest) in widths.items():
        if not 1 <= value <= largest:
            bound = f"at most {largest}" if value > largest else "at least 1"
            return f"{name} = {value} is not supported by the triton backend: {bound}"
    if delta_keys is not None and chunk_size is not None:
        area = chunk_size * (1 << max(4, (delta_keys - 1).bit_length()))
        if area > (8192 if dtype == torch.float32 else 16384) or (dtype == torch.float32 and chunk_size > 64):
            return (
                f"K = {delta_keys} with chunk_size = {chunk_size} in {dtype} is not supported by the triton backend: "
                "chunk_size · K is at most 16384, in float32 8192 and chunk_size 64 (K rounded up to a power of two)"
            )
    return None


@dataclass(frozen=True)
class Limits:
    """Sizes that the Triton kernels of one op take: the largest of each, by the name that errors use.

    ``chunk_keys``: the kernels hold the keys of a chunk on chip, so chunk_size · K is limited as well.
    """

    largest: Mapping[str, int]
    chunk_keys: bool = False

    def reason(self, dtype: torch.dtype, chunk_size: int | None, sizes: Mapping[str, int]) -> str | None:
        """Why the kernels do not take these sizes, or None if they do; ``chunk_size``: None for an op without one."""
        widths = {name: (sizes[name], largest) for name, largest in self.largest.items()}
        return kernel_limit(dtype, chunk_size, widths, delta_keys=sizes["K"] if self.chunk_keys else None)


def use_kernels(op: str, backend: str, device: torch.device, limit: str | None) -> bool:
    """Whether a call of ``op`` runs on the Triton kernels, which are beyond their ``limit`` if that is not None.

    There ``auto`` takes torch and says so once; a forced ``triton`` raises ``ValueError``.
    """
    if resolve(backend, op, device) == "torch":
        return False
    if limit is None:
        return True
    if backend == "triton":
        raise ValueError(f"{op}: {limit}")
    _say_once(f"{op}: {limit}; the slower torch backend takes over")
    return False


@cache
def _say_once(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def last_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x with neighbouring elements along its last dimension, copied only if it must be."""
    return x if x.stride(-1) == 1 else x.contiguous()


def split_values(v: torch.Tensor, heads: int) -> torch.Tensor:
    """v [B,T,R,V] as the values of ``heads`` softmax heads, [B,T,heads,·]: a view where the strides allow."""
    split: torch.Tensor = v.unflatten(3, (heads // v.shape[2], -1)).flatten(2, 3)
    return split


def _count_packed(op: str, cu_seqlens: torch.Tensor, q: torch.Tensor) -> int:
    """Number of sequences packed into q [1,T,…]; ``ValueError`` for what shows without reading ``cu_seqlens``."""
    if q.shape[0] != 1:
        raise ValueError(f"{op}: cu_seqlens packs sequences into batch 1, found batch {q.shape[0]}")
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dim() != 1:
        raise ValueError(f"{op}: cu_seqlens must be a 1-D integer tensor")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: cu_seqlens must be a 1-D integer tensor, int32 or int64, found {cu_seqlens.dtype}")
    if cu_seqlens.device != q.device:
        raise ValueError(f"{op}: cu_seqlens is on {cu_seqlens.device}, but q is on {q.device}")
    if cu_seqlens.shape[0] < 2:
        raise ValueError(f"{op}: cu_seqlens has {cu_seqlens.shape[0]} entries, it needs sequences + 1")
    return cu_seqlens.shape[0] - 1


def check_routes(
    op: str,
    routes: Mapping[str, torch.Tensor],
    q: torch.Tensor,
    heads: int,
    cu_seqlens: torch.Tensor | None,
    chunk_size: int,
) -> int:
    """Number of sequences in q [B,T,…], whose routes must be [B,N,heads]: B, or those packed into B = 1.

    Raises ``ValueError`` for a route of another shape (packed, its N must be one that T tokens of so many sequences can
    have) and for what is wrong with ``cu_seqlens`` and shows without reading it.
    """
    B, T = q.shape[:2]
    fewest = -(-T // chunk_size)
    if cu_seqlens is None:
        for name, route in routes.items():
            check_shape(op, name, route, (B, fewest, heads))
        return B
    sequences = _count_packed(op, cu_seqlens, q)
    most = T // chunk_size + sequences
    for name, route in routes.items():
        shape = tuple(route.shape)
        if len(shape) != 3 or (shape[0], shape[2]) != (1, heads) or not fewest <= shape[1] <= most:
            raise ValueError(f"{op}: {name} has shape {shape}, expected (1, {fewest} to {most} chunks, {heads})")
    return sequences


def packed_lengths(
    op: str, routes: Mapping[str, torch.Tensor], tokens: int, cu_seqlens: torch.Tensor, chunk_size: int
) -> tuple[list[int], list[int]]:
    """Tokens and chunks of each packed sequence, a partial chunk counted.

    Raises ``ValueError`` unless the borders go from 0, never falling, to ``tokens`` and all routes [1,N,R] have their
    chunks. Waits for the device.
    """
    bounds: list[int] = cu_seqlens.tolist()
    lengths = [b - a for a, b in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != tokens or min(lengths) < 0:
        raise ValueError(f"{op}: cu_seqlens = {bounds} must rise from 0 to the number of tokens, {tokens}")
    chunks = [-(-length // chunk_size) for length in lengths]
    for name, route in routes.items():
        check_shape(op, name, route, (1, sum(chunks), route.shape[2]))
    return lengths, chunks
