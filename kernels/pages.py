"""``paged_softmax``: attention over the own chunk and the kept chunks of a cache, and the cache's pages.

A page holds the keys and values of one chunk for one routing head. Shapes: B batch, T new tokens, C chunk size, R
routing heads, G softmax heads per routing head (softmax head r·G + j is the j-th of head r), Hs = R·G, M pages per row
and head, N = ``touched_chunks(T, C)`` chunks from the open one on. Inference only: nothing here has a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from natsl.kernels import reference
from natsl.kernels.dispatch import check_heads, check_shape, check_tensors
from natsl.kernels.segment import check_counts, closed_chunks, ends, real_tokens, slots, touched_chunks


class KeyPages(NamedTuple):
    """Keys and values that the softmax memory keeps: pages 0…kept − 1 in order, then the one of the open chunk.

    The open page holds the tokens of the open chunk so far. Later pages, and later slots of the open one, are free:
    whatever they hold, NaN included, is in no result.
    """

    keys: Tensor  # [B,R,M,C,G,Ks]
    values: Tensor  # [B,R,M,C,G,Vs]
    kept: Tensor  # [B,R] int64, complete chunks that are kept

    @classmethod
    def empty(cls, k: Tensor, v: Tensor, heads: int, pages: int, chunk_size: int) -> KeyPages:
        """Free pages for keys and values such as k [B,T,Hs,Ks] and v [B,T,Hs,Vs], of R = ``heads`` routing heads."""
        B, _, Hs, _ = k.shape
        shape = (B, heads, pages, chunk_size, Hs // heads)
        kept = k.new_zeros(B, heads, dtype=torch.int64)
        return cls(k.new_zeros(*shape, k.shape[3]), v.new_zeros(*shape, v.shape[3]), kept)


def grow(pages: KeyPages, pages_needed: int) -> KeyPages:
    """The same pages with room for at least ``pages_needed`` per row and head; a copy if they have to grow."""
    more = pages_needed - pages.keys.shape[2]
    if more <= 0:
        return pages
    keys, values = (
        torch.cat((x, x.new_zeros(*x.shape[:2], more, *x.shape[3:])), 2) for x in (pages.keys, pages.values)
    )
    return KeyPages(keys, values, pages.kept)


@torch.no_grad()
def paged_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    route: Tensor,
    pages: KeyPages,
    start: Tensor,
    *,
    chunk_size: int,
    lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend to {s ≤ t in the own chunk} ∪ {s in a kept page} ∪ {s in earlier chunks of this call with route 1}.

    q, k [B,T,Hs,Ks], v [B,T,Hs,Vs]: new tokens, any floating dtype, that of the pages. start [B] int64: tokens of the
    open chunk in its page. lengths [B] int64: new tokens of each row that are real (right-padded; default all). route
    [B,N,R] of 0 and 1: that of a chunk that is not complete after the call is not read. ``scale`` defaults to Ks^-½.
    Call ``write_chunks`` with the same arguments afterwards.

    Returns o [B,T,Hs,Vs] in q's dtype, 0 for padding. Raises ``ValueError`` naming the argument. Source: arXiv
    2602.03681, section 3.
    """
    op = "paged_softmax"
    check_tensors(op, {"q": q, "k": k, "v": v})
    check_heads(op, {"q": q, "k": k, "v": v}, chunk_size)
    check_shape(op, "k", k, tuple(q.shape))
    _check_pages(op, k, v, route, pages, start, chunk_size, lengths)
    B, T = q.shape[:2]
    R, M, G = pages.keys.shape[1], pages.keys.shape[2], pages.keys.shape[4]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32

    chunk = slots(start, T) // chunk_size  # of each new token [B,T]
    row = torch.arange(B, device=q.device)[:, None]
    routed = (route > 0.5) & closed_chunks(start, T, chunk_size, lengths)[..., None]  # [B,N,R]
    token_kept = routed[row, chunk].transpose(1, 2)  # [B,R,T]
    page = torch.arange(M, device=q.device)[:, None]
    kept, filled = pages.kept[..., None, None], torch.arange(chunk_size, device=q.device) < start[:, None, None, None]
    full, open_ = page < kept, (page == kept) & filled  # [B,R,M,1], [B,R,M,C]
    used = (full | open_).flatten(2)  # seen from the open chunk [B,R,M·C]
    later = (full | (open_ & routed[:, 0, :, None, None])).flatten(2)  # seen from the chunks after it

    def sees_page(lo: int, hi: int) -> Tensor:  # [B,R,hi − lo,M·C], from queries lo to hi
        return torch.where((chunk[:, lo:hi] == 0)[:, None, :, None], used[:, :, None], later[:, :, None])

    def sees_token(lo: int, hi: int) -> Tensor:  # [B,R,hi − lo,hi]; every token sees itself, padding too
        same = chunk[:, None, lo:hi, None] == chunk[:, None, None, :hi]
        place = torch.arange(hi, device=q.device)
        return (same | token_kept[:, :, None, :hi]) & (place <= place[lo:, None])

    real = None if lengths is None else real_tokens(T, lengths)[..., None, None]
    if real is not None:
        q, k, v = (torch.where(real, x, 0.0) for x in (q, k, v))
    q_, k_, v_ = (x.to(dtype).unflatten(2, (R, G)).permute(3, 0, 2, 1, 4) for x in (q, k, v))  # [G,B,R,T,·]
    q_ = q_ * scale
    out = q_.new_empty(*q_.shape[:4], v.shape[3])
    columns = max(1, B * R * (M * chunk_size + T))
    rows = max(1, reference.SCORE_BLOCK // (columns * chunk_size)) * chunk_size
    for j in range(G):
        keys = pages.keys[..., j, :].to(dtype).flatten(2, 3).transpose(-1, -2)
        # what is free may be NaN, and 0 · NaN is NaN
        values = pages.values[..., j, :].to(dtype, copy=True).flatten(2, 3).masked_fill_(~used[..., None], 0.0)
        for lo in range(0, T, rows):
            hi = min(lo + rows, T)
            past = torch.matmul(q_[j, :, :, lo:hi], keys).masked_fill(~sees_page(lo, hi), float("-inf"))
            new = torch.matmul(q_[j, :, :, lo:hi], k_[j, :, :, :hi].transpose(-1, -2))
            new = new.masked_fill(~sees_token(lo, hi), float("-inf"))
            p = torch.cat((past, new), -1).softmax(-1)
            past, new = p.split((M * chunk_size, hi), -1)
            out[j, :, :, lo:hi] = torch.matmul(past, values) + torch.matmul(new, v_[j, :, :, :hi])
    o: Tensor = out.permute(1, 3, 2, 0, 4).flatten(2, 3).to(q.dtype)
    return o if real is None else torch.where(real, o, 0.0)


@torch.no_grad()
def write_chunks(
    pages: KeyPages,
    k: Tensor,
    v: Tensor,
    route: Tensor,
    start: Tensor,
    *,
    chunk_size: int,
    lengths: Tensor | None = None,
) -> KeyPages:
    """Keep the new tokens of complete chunks with route 1 and of the chunk that stays open.

    Arguments as in ``paged_softmax``. Complete chunks with route 1 follow the kept ones in order, those with route 0
    give their page back, and the chunk that stays open is on page ``kept``. Keys and values are written in place; the
    pages returned share them and have a new ``kept``. Pages must be enough, which is not checked as it would wait for
    the device: kept + N always are. Raises ``ValueError`` naming the argument.
    """
    op = "write_chunks"
    check_tensors(op, {"k": k, "v": v})
    check_heads(op, {"k": k, "v": v}, chunk_size)
    _check_pages(op, k, v, route, pages, start, chunk_size, lengths)
    B, T = k.shape[:2]
    R, M, G = pages.keys.shape[1], pages.keys.shape[2], pages.keys.shape[4]
    if M == 0:
        raise ValueError(f"{op}: there is no page to write to")
    N = touched_chunks(T, chunk_size)
    n = torch.arange(N, device=k.device)
    routed = (route > 0.5) & closed_chunks(start, T, chunk_size, lengths)[..., None]  # [B,N,R]
    stays_open = n == (ends(start, T, lengths) // chunk_size)[:, None]
    # Which chunk each of the pages from ``kept`` on is written from, N if from none. So many that no two are the same.
    place = torch.where(routed | stays_open[..., None], routed.cumsum(1) - routed.long(), N)
    source = place.new_full((B, N + 1, R), N).scatter_(1, place, n[:, None].expand(B, N, R))[:, : min(N, M)]
    page = pages.kept[:, None] + n[: min(N, M), None]
    token = source[..., None] * chunk_size + torch.arange(chunk_size, device=k.device) - start[:, None, None, None]
    new = (token >= 0) & (token < (T if lengths is None else lengths[:, None, None, None]))
    new = (new & ((source < N) & (page < M))[..., None])[..., None, None]  # [B,pages,R,C,1,1]
    token, page = token.clamp(0, T - 1), page % M
    row, head = torch.arange(B, device=k.device)[:, None, None], torch.arange(R, device=k.device)
    for memory, x in ((pages.keys, k), (pages.values, v)):
        tokens = x.unflatten(2, (R, G))[row[..., None], token, head[:, None]]
        memory[row, head, page] = torch.where(new, tokens, memory[row, head, page])
    return pages._replace(kept=pages.kept + routed.sum(1))


def _check_pages(
    op: str,
    k: Tensor,
    v: Tensor,
    route: Tensor,
    pages: KeyPages,
    start: Tensor,
    chunk_size: int,
    lengths: Tensor | None,
) -> None:
    """Raise ``ValueError`` naming what does not fit the new tokens k [B,T,Hs,Ks] and v [B,T,Hs,Vs]."""
    B, T, Hs, Ks = k.shape
    check_shape(op, "v", v, (B, T, Hs, v.shape[3]))
    check_tensors(op, {"k": k, "route": route, "pages.keys": pages.keys, "pages.values": pages.values})
    if route.dim() != 3 or Hs % max(route.shape[2], 1):
        raise ValueError(
            f"{op}: route {tuple(route.shape)} must be [batch, chunks, routing heads], heads dividing {Hs}"
        )
    R = route.shape[2]
    check_shape(op, "route", route, (B, touched_chunks(T, chunk_size), R))
    M = pages.keys.shape[2] if pages.keys.dim() == 6 else 0
    check_shape(op, "pages.keys", pages.keys, (B, R, M, chunk_size, Hs // R, Ks))
    check_shape(op, "pages.values", pages.values, (B, R, M, chunk_size, Hs // R, v.shape[3]))
    for name, memory in (("pages.keys", pages.keys), ("pages.values", pages.values)):
        if memory.dtype != k.dtype:
            raise ValueError(f"{op}: {name} is {memory.dtype}, but k is {k.dtype}")
    check_counts(op, {"pages.kept": pages.kept}, k.device, (B, R))
    check_counts(op, {"start": start, "lengths": lengths}, k.device, (B,))
