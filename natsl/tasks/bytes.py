"""Plain text, every next byte scored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from natsl.tasks.task import Request, Task

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from natsl.tasks.sequences import Batch


class BytesTask(Task[None]):
    """Windows of the text, of any length."""

    name = "bytes"

    def make(self, text: Tensor, request: Request, generator: torch.Generator) -> Batch:
        """Windows at random places."""
        import torch

        from natsl.tasks.sequences import Batch, draw_windows

        window = draw_windows(text, request.count, request.length + 1, generator)  # [B, T + 1]
        tokens, targets = window[:, :-1].contiguous(), window[:, 1:].contiguous()
        return Batch(tokens, targets, torch.zeros_like(tokens, dtype=torch.bool))
