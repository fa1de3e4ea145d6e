"""``paged_softmax``: attention over the own chunk and the kept chunks of a cache, and the cache's pages.

A page holds the keys and values of one chunk for one routing head. All rows and heads take theirs from one pool, so
that each has as many as it keeps. Shapes: B batch, T new tokens, C chunk size, R routing heads, G softmax heads per
routing head (softmax head r·G + j is the j-th of head r), Hs = R·G, P pages of the pool, M places of a head in the
table, N = ``touched_chunks(T, C)`` chunks from the open one on. Inference only: nothing here has a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from natsl.kernels import reference
from natsl.kernels.dispatch import (
    Limits,
    check_heads,
    check_shape,
    check_tensors,
    last_contiguous,
    use_kernels,
)
from natsl.kernels.segment import check_counts, closed_chunks, ends, real_tokens, running_sum, slots, touched_chunks
from natsl.kernels.shape import LARGEST_GRID, LARGEST_KEY_DIM, LARGEST_VALUE_DIM

LIMITS = Limits({"Ks": LARGEST_KEY_DIM, "Vs": LARGEST_VALUE_DIM, "sequences · heads": LARGEST_GRID})
NULL = 0  # the page of no head: what places of the table hold that are not in use


class KeyPages(NamedTuple):
    """Keys and values that the softmax memory keeps.

    ``table`` says which pages are a head's: at places 0…kept − 1 those of the kept chunks in order, then the one of the
    open chunk, ``NULL`` behind it. The open page holds the tokens of the open chunk so far. Pages are given out in the
    order of their numbers: the first free one is 1 + B·R + the sum of ``kept``. Free pages, the null page and later
    slots of an open one are in no result, whatever they hold, NaN included.
    """

    keys: Tensor  # [P,G,C,Ks], so that what a softmax head reads of a page is contiguous
    values: Tensor  # [P,G,C,Vs]
    table: Tensor  # [B,R,M] int64, pages
    kept: Tensor  # [B,R] int64, complete chunks that are kept

    @classmethod
    def empty(cls, k: Tensor, v: Tensor, heads: int, chunk_size: int) -> KeyPages:
        """A page for the open chunk of every row and head, for keys and values such as k [B,T,Hs,Ks] and v [B,T,Hs,Vs].

        R = ``heads`` routing heads.
        """
        B, _, Hs, _ = k.shape
        shape = (1 + B * heads, Hs // heads, chunk_size)
        table = 1 + torch.arange(B * heads, device=k.device).view(B, heads, 1)
        kept = k.new_zeros(B, heads, dtype=torch.int64)
        return cls(k.new_zeros(*shape, k.shape[3]), v.new_zeros(*shape, v.shape[3]), table, kept)

    @property
    def open(self) -> Tensor:
        """The pages of the open chunks, int64 [B,R]."""
        return self.table.gather(2, self.kept[..., None])[..., 0]

    def grow(self, pages: int, places: int) -> KeyPages:
        """The same with at least so many pages in the pool and places in the table; what has to grow is a copy."""

        def longer(x: Tensor, dim: int, size: int) -> Tensor:
            shape = list(x.shape)
            shape[dim] = size - shape[dim]
            return x if shape[dim] <= 0 else torch.cat((x, x.new_zeros(shape)), dim)

        if pages <= self.keys.shape[0] and places <= self.table.shape[2]:
            return self
        return KeyPages(
            longer(self.keys, 0, pages), longer(self.values, 0, pages), longer(self.table, 2, places), self.kept
        )

    def select(self, rows: Tensor) -> KeyPages:
        """Copies of what these rows use, int64 [n], in any order and any number of times: a pool without free pages.

        Waits for the device.
        """
        kept, places = self.kept[rows], torch.arange(self.table.shape[2], device=rows.device)
        used = places <= kept[..., None]  # the open page comes after the kept ones
        pages = torch.cat((rows.new_tensor([NULL]), self.table[rows][used]))
        table = used.new_zeros(used.shape, dtype=torch.int64).masked_scatter(
            used, torch.arange(1, len(pages), device=rows.device)
        )
        return self._replace(keys=self.keys[pages], values=self.values[pages], table=table, kept=kept)


class PagePlan(NamedTuple):
    """What the chunks of a call do to the pages of the heads; made by ``plan_pages``."""

    routed: Tensor  # [B,N,R] float32 0/1, chunks that end and are kept
    before: Tensor  # [B,N,R] integers, kept chunks of the head before each chunk, those of earlier calls included
    source: Tensor  # [B,R,N+1] int64, chunks that are written, in order, the open one last (N if that has no token)
    kept: Tensor  # [B,R] int64, afterwards


@torch.no_grad()
def plan_pages(
    route: Tensor,
    kept: Tensor,
    start: Tensor,
    *,
    tokens: int,
    chunk_size: int,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> PagePlan:
    """Plan a call of T = ``tokens`` columns; arguments as in ``paged_softmax``, kept [B,R] those of the pages.

    The first kept − kept[before] + 1 places of ``source`` count, the others hold anything. One kernel on Triton, and no
    wait for the device on either backend. Raises ``ValueError`` naming the argument.
    """
    op = "plan_pages"
    check_tensors(op, {"route": route})
    N = touched_chunks(tokens, chunk_size)
    if route.dim() != 3:
        raise ValueError(f"{op}: route {tuple(route.shape)} must be [batch, chunks, routing heads]")
    B, _, R = route.shape
    check_shape(op, "route", route, (B, N, R))
    check_counts(op, {"kept": kept}, route.device, (B, R))
    check_counts(op, {"start": start, "lengths": lengths}, route.device, (B,))
    # one token changes little, and a step of decoding has a kernel of its own
    if B and use_kernels(op, "torch" if backend == "auto" and tokens == 1 else backend, route.device, None):
        from natsl.kernels._triton import pages as on_triton

        plan: PagePlan = on_triton.plan(route, kept.contiguous(), start.contiguous(), tokens, chunk_size, lengths)
        return plan
    n = torch.arange(N, device=start.device)
    routed = (route > 0.5) & closed_chunks(start, tokens, chunk_size, lengths)[..., None]
    stays_open = n == (ends(start, tokens, lengths) // chunk_size)[:, None]
    before = running_sum(routed) - routed.long()
    place = torch.where(routed | stays_open[..., None], before, N + 1)
    source = place.new_full((B, N + 2, R), N).scatter_(1, place, n[:, None].expand(B, N, R))[:, : N + 1]
    source = source.transpose(1, 2).contiguous()
    return PagePlan(routed.float(), kept[:, None] + before, source, kept + routed.sum(1))


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
    plan: PagePlan | None = None,
    at_border: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, KeyPages]:
    """Attend to {s ≤ t in the own chunk} ∪ {s in a kept page} ∪ {s in earlier chunks of this call with route 1}.

    q, k [B,T,Hs,Ks], v [B,T,Hs,Vs]: new tokens, any floating dtype, that of the pages. start [B] int64: tokens of the
    open chunk in its page. lengths [B] int64: new tokens of each row that are real (right-padded; default all). route
    [B,N,R] of 0 and 1: that of a chunk that is not complete after the call is not read. ``plan``: what ``plan_pages``
    has made of these. ``at_border``: the caller knows that start is 0 everywhere. ``scale`` defaults to Ks^-½.

    Complete chunks with route 1 are then kept, see ``write_chunks``, for which there must be pages and places enough.
    On Triton: float32, float16 or bfloat16, chunk_size 16, 32, 64 or 128, Ks ≤ 256, Vs ≤ 512, at most 65535 sequences
    times heads; beyond these ``auto`` takes torch and warns. Neither backend waits for the device.

    Returns o [B,T,Hs,Vs] in q's dtype, 0 for padding, and the pages after the call. Raises ``ValueError`` naming the
    argument. Source: arXiv 2602.03681, section 3.
    """
    op = "paged_softmax"
    check_tensors(op, {"q": q, "k": k, "v": v})
    check_heads(op, {"q": q, "k": k, "v": v}, chunk_size)
    check_shape(op, "k", k, tuple(q.shape))
    _check_pages(op, k, v, route, pages, start, chunk_size, lengths)
    B, T, Hs, Ks = q.shape
    scale = Ks**-0.5 if scale is None else scale
    limit = LIMITS.reason(q.dtype, chunk_size, {"Ks": Ks, "Vs": v.shape[3], "sequences · heads": max(1, B * Hs)})
    on_kernels = use_kernels(op, backend, q.device, limit)
    if plan is None:
        plan = plan_pages(
            route,
            pages.kept,
            start,
            tokens=T,
            chunk_size=chunk_size,
            lengths=lengths,
            backend="triton" if on_kernels else "torch",
        )
    if not on_kernels:
        out = _attend(q, k, v, plan.routed > 0, pages, start, chunk_size, lengths, scale)
        return out, _write(pages, k, v, plan, start, chunk_size, lengths)
    if B == 0:
        return v.new_empty(v.shape), pages
    from natsl.kernels._triton import pages as on_triton

    opened_keys, opened_values = pages.keys, pages.values  # not read at a border
    if not at_border:  # else copies, as a chunk that ends may give its page back
        opened = pages.open
        opened_keys, opened_values = pages.keys[opened], pages.values[opened]
    start, count = start.contiguous(), None if lengths is None else lengths.contiguous()
    k, v = last_contiguous(k), last_contiguous(v)
    pages = on_triton.write(k, v, plan, start, count, pages, chunk_size)
    new = on_triton.NewTokens(k, v, plan.routed, plan.before, start, count)
    o: Tensor = on_triton.attend(last_contiguous(q), new, pages, opened_keys, opened_values, scale, chunk_size)
    return o, pages


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routed: Tensor,
    pages: KeyPages,
    start: Tensor,
    chunk_size: int,
    lengths: Tensor | None,
    scale: float,
) -> Tensor:
    """The output of ``paged_softmax`` on torch; routed bool [B,N,R]: chunks that end and are kept."""
    B, T = q.shape[:2]
    R, (G, _, Vs) = pages.table.shape[1], pages.values.shape[1:]
    if B == 0:
        return q.new_empty(0, T, R * G, Vs)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    chunk = slots(start, T) // chunk_size  # of each new token [B,T]
    row = torch.arange(B, device=q.device)[:, None]
    token_kept = routed[row, chunk].transpose(1, 2).flatten(0, 1)  # [B·R,T]
    owner, used, later = _page_masks(pages, start, routed[:, 0], chunk_size)
    table, row_of = pages.table.flatten(0, 1), owner // R
    of_open = chunk == 0

    real = None if lengths is None else real_tokens(T, lengths)[..., None, None]
    if real is not None:
        q, k, v = (torch.where(real, x, 0.0) for x in (q, k, v))
    q_, k_, v_ = (x.to(dtype).unflatten(2, (R, G)).permute(3, 0, 2, 1, 4).flatten(1, 2) for x in (q, k, v))
    q_ = q_ * scale  # [G,B·R,T,·]
    out = q_.new_empty(*q_.shape[:3], Vs)
    columns = max(used.shape[0] * max(chunk_size, Vs, q.shape[3]), table.numel()) + B * R * T
    rows = max(1, reference.SCORE_BLOCK // (columns * chunk_size)) * chunk_size
    place = torch.arange(T, device=q.device)
    for j in range(G):
        keys = pages.keys[:, j].to(dtype).transpose(1, 2)
        # what is free may be NaN, and 0 · NaN is NaN
        values = pages.values[:, j].to(dtype, copy=True).masked_fill_(~used[..., None], 0.0)
        for lo in range(0, T, rows):
            hi = min(lo + rows, T)
            sees_page = torch.where(of_open[row_of, lo:hi, None], used[:, None], later[:, None])  # [P,hi − lo,C]
            past = torch.matmul(q_[j, owner, lo:hi], keys).masked_fill(~sees_page, float("-inf"))
            same = (chunk[:, lo:hi, None] == chunk[:, None, :hi]).repeat_interleave(R, 0)
            sees_token = (same | token_kept[:, None, :hi]) & (place[:hi] <= place[lo:hi, None])  # itself, padding too
            new = torch.matmul(q_[j, :, lo:hi], k_[j, :, :hi].transpose(-1, -2)).masked_fill(~sees_token, float("-inf"))
            # every page by itself, then the pages of a head together
            top = torch.maximum(new.amax(-1), past.amax(-1)[table].amax(1))  # [B·R,hi − lo]
            past, new = (past - top[owner, :, None]).exp(), (new - top[..., None]).exp()
            past[NULL] = 0.0  # it has the owner 0, and what is not finite there must not reach other heads
            total = new.sum(-1) + past.sum(-1)[table].sum(1)
            weighed, of_page = torch.matmul(new, v_[j, :, :hi]), torch.matmul(past, values)
            for places in table.split(max(1, reference.SCORE_BLOCK // weighed.numel()), 1):
                weighed += of_page[places].sum(1)  # all places at once would pad every head to the one with most
            out[j, :, lo:hi] = weighed / total[..., None]
    o: Tensor = out.unflatten(1, (B, R)).permute(1, 3, 2, 0, 4).flatten(2, 3).to(q.dtype)
    return o if real is None else torch.where(real, o, 0.0)


def _page_masks(pages: KeyPages, start: Tensor, routed: Tensor, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of every page: the row and head b·R + r that it is of [P], and which slots the queries of the open chunk see, and
    those of later chunks, for which the open one has to be kept (``routed`` bool [B,R]): bool [P,C] each.
    """
    B, R, M = pages.table.shape
    P, device = pages.keys.shape[0], start.device
    place, table = torch.arange(M, device=device), pages.table.flatten()

    def of_page(x: Tensor) -> Tensor:  # [B,R,M] → [P]; no two places have the same page but the null one
        found = x.new_zeros(P).scatter_(0, table, x.flatten())
        found[NULL] = 0
        return found

    owner = of_page(torch.arange(B * R, device=device)[:, None].expand(-1, M))
    full = of_page(place < pages.kept[..., None])[:, None]
    open_ = of_page(place == pages.kept[..., None])[:, None]
    filled = torch.arange(chunk_size, device=device) < start[owner // R, None]
    used = full | (open_ & filled)
    return owner, used, full | (used & routed.flatten()[owner, None])


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
    give their page back, and the chunk that stays open is at place ``kept``. Keys and values are written in place; what
    is returned shares them and has a new ``table`` and ``kept``. Pages and places must be enough, which is not checked
    as it would wait for the device: 1 + B·R + the sum of the new ``kept``, and its largest + 1. Raises ``ValueError``
    naming the argument.
    """
    op = "write_chunks"
    check_tensors(op, {"k": k, "v": v})
    check_heads(op, {"k": k, "v": v}, chunk_size)
    _check_pages(op, k, v, route, pages, start, chunk_size, lengths)
    plan = plan_pages(
        route,
        pages.kept,
        start,
        tokens=k.shape[1],
        chunk_size=chunk_size,
        lengths=lengths,
        backend="torch",
    )
    return _write(pages, k, v, plan, start, chunk_size, lengths)


def _write(
    pages: KeyPages, k: Tensor, v: Tensor, plan: PagePlan, start: Tensor, chunk_size: int, lengths: Tensor | None
) -> KeyPages:
    """``write_chunks`` of what is planned, on torch."""
    B, T = k.shape[:2]
    (R, M), G, N = pages.table.shape[1:], pages.keys.shape[1], plan.routed.shape[1]
    i = torch.arange(min(N + 1, M), device=k.device)
    source, more = plan.source[..., : len(i)], plan.kept - pages.kept
    # the first is on the page of the open chunk, the others take new ones
    first = 1 + B * R + pages.kept.sum() + more.flatten().cumsum(0).view(B, R) - more
    place = pages.kept[..., None] + i
    page = torch.where(i == 0, pages.open[..., None], first[..., None] + i - 1)
    there = (i <= more[..., None]) & (place < M) & (page < pages.keys.shape[0])  # the caller sees to it
    page, place = torch.where(there, page, NULL), place % M  # so many places that no two are the same
    table = pages.table.scatter(2, place, torch.where(there, page, pages.table.gather(2, place)))
    source = torch.where(there, source, N)

    token = source[..., None] * chunk_size + torch.arange(chunk_size, device=k.device)
    token = token - start[:, None, None, None]
    new = (token >= 0) & (token < (T if lengths is None else lengths[:, None, None, None]))
    new = (new & (source < N)[..., None])[..., None, :, None]  # [B,R,i,1,C,1]
    token = token.clamp(0, T - 1)
    row, head = torch.arange(B, device=k.device)[:, None, None, None], torch.arange(R, device=k.device)[:, None, None]
    for memory, x in ((pages.keys, k), (pages.values, v)):
        tokens = x.unflatten(2, (R, G))[row, token, head].transpose(3, 4)  # [B,R,i,G,C,·]
        memory[page] = torch.where(new, tokens, memory[page])
    return pages._replace(table=table, kept=plan.kept)


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
    P = pages.keys.shape[0] if pages.keys.dim() == 4 else 0
    check_shape(op, "pages.keys", pages.keys, (P, Hs // R, chunk_size, Ks))
    check_shape(op, "pages.values", pages.values, (P, Hs // R, chunk_size, v.shape[3]))
    for name, memory in (("pages.keys", pages.keys), ("pages.values", pages.values)):
        if memory.dtype != k.dtype:
            raise ValueError(f"{op}: {name} is {memory.dtype}, but k is {k.dtype}")
    M = pages.table.shape[2] if pages.table.dim() == 3 else 1
    check_counts(op, {"pages.table": pages.table}, k.device, (B, R, M))
    check_counts(op, {"pages.kept": pages.kept}, k.device, (B, R))
    check_counts(op, {"start": start, "lengths": lengths}, k.device, (B,))
