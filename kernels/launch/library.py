"""Registration of the Triton ops with torch: opaque to ``torch.compile`` and cheap to call.

``torch.library.custom_op`` would do the same in fewer words, but costs the host several times as much per call, which
counts where a layer takes a millisecond. The gradients are in ``torch.autograd.Function`` classes that call these ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("natsl", "FRAGMENT")


def on_own_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, run while the device of its first argument, a tensor, is the current one: Triton launches there.

    The caller's device is current again afterwards.
    """

    def run(*arguments: Any) -> Any:
        x = arguments[0]
        if not x.is_cuda or x.get_device() == torch._C._cuda_getDevice():
            return function(*arguments)
        with torch.cuda.device(x.device):
            return function(*arguments)

    return run


def register(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define ``natsl::name``: ``run`` computes it, ``fake`` gives its outputs' shapes; returns what to call.

    The first argument is a tensor, on whose device ``run`` runs. The op itself records no gradient.
    """
    _LIBRARY.define(f"{name}{schema}")
    _LIBRARY.impl(name, on_own_device(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"natsl::{name}", fake, lib=_LIBRARY)
    op: Callable[..., Any] = getattr(torch.ops.natsl, name).default
    return op
