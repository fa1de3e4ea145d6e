"""Dense and block-sparse attention of torch on the softmax branch's inputs: what the routed ops are timed against."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from natsl.kernels.dispatch import split_values
from natsl.kernels.registry import Tensors

FLEX_BLOCK = 128


def prepare(name: str, tensors: Tensors, chunk_size: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """One call of a rival's attention, and its inputs [B,Hs,T,·], which collect gradients.

    ``sdpa`` is causal over all earlier tokens; ``flex`` sees what ``route`` keeps. Raises ``ValueError`` for a length
    that flex cannot take, and whatever torch raises.
    """
    q, k = tensors["q_softmax"], tensors["k_softmax"]
    v = split_values(tensors["v"], q.shape[2])
    q, k, v = (x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v))
    if name == "flex":
        mask = routed_block_mask(tensors["route"].detach(), q.shape[2], q.shape[1], chunk_size)
        return lambda: _compiled_flex()(q, k, v, block_mask=mask), [q, k, v]

    def attend() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend, [q, k, v]


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def routed_block_mask(route: Tensor, tokens: int, heads: int, chunk_size: int) -> BlockMask:
    """What each query of the softmax branch sees, from route [B,N,R], in blocks of 128 × 128 tokens.

    Made from the routes block by block, so without a mask of tokens × tokens.
    """
    if tokens % FLEX_BLOCK or FLEX_BLOCK % chunk_size:
        raise ValueError(f"{tokens} tokens in chunks of {chunk_size} do not fill blocks of {FLEX_BLOCK}")
    kept = (route > 0.5).transpose(1, 2).repeat_interleave(heads // route.shape[2], 1).contiguous()  # [B,Hs,N]
    per_block = kept.unflatten(2, (-1, FLEX_BLOCK // chunk_size))
    blocks = tokens // FLEX_BLOCK
    place = torch.arange(blocks, device=route.device)
    earlier = (place[:, None] > place[None])[None, None]
    some, full = per_block.any(3)[:, :, None], per_block.all(3)[:, :, None]
    partial = (earlier & some & ~full) | (place[:, None] == place[None])[None, None]
    visible_blocks = earlier & full

    def block_list(mask: Tensor) -> tuple[Tensor, Tensor]:
        order = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return mask.sum(-1, dtype=torch.int32), order.to(torch.int32)

    def visible(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (s <= t) & (kept[b, h, s // chunk_size] | (s // chunk_size == t // chunk_size))

    return BlockMask.from_kv_blocks(
        *block_list(partial), *block_list(visible_blocks), BLOCK_SIZE=FLEX_BLOCK, mask_mod=visible
    )
