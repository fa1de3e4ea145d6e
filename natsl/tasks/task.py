"""What a task is: a name, the sequences it makes, and the error that is reported for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from natsl.tasks.sequences import Batch

C = TypeVar("C")


@dataclass(frozen=True)
class Request:
    """A batch to make: ``count`` sequences of ``length`` tokens, for training or held out.

    ``depth``: where everything to be recalled is planted, a share in [0, 1] of the text (None: as configured). Only
    tasks with ``has_depth`` are sent one. ``grow``: what is to be recalled grows with the length (``Task.planted``)
    instead of being as much as in ``data.seq_len`` tokens.
    """

    count: int
    length: int
    training: bool
    depth: float | None = None
    grow: bool = False


@dataclass(frozen=True)
class Task(ABC, Generic[C]):
    """How the sequences of one task are made.

    ``config``: the task's own options, the field of ``DataConfig`` that has the task's name (None: it has no options).
    ``seq_len`` and ``keys`` are those of ``DataConfig``. Importing a task loads no torch; ``make`` may.
    """

    name: ClassVar[str]
    metric: ClassVar[str | None] = None  # name of the share of wrong answers; None: only the loss of its text counts
    needs_pairs: ClassVar[bool] = False  # uses key and value tokens
    has_depth: ClassVar[bool] = False

    config: C
    seq_len: int
    keys: int

    def check(self, length: int) -> None:
        """Raise ``ValueError`` if sequences of ``length`` tokens cannot be made."""

    def uses_pairs(self) -> bool:
        """Whether key and value tokens are used under these options."""
        return self.needs_pairs

    def planted(self, length: int) -> tuple[int, int]:
        """How much a sequence holds that grows with the length, and how much it would hold with keys enough.

        (0, 0) if nothing is planted.
        """
        return 0, 0

    def places(self, batch: Batch) -> Tensor | None:
        """Where in its sequence the key of each question was planted, int64 [B, T]; −1 where nothing is asked.

        None: the task does not say.
        """
        return None

    @abstractmethod
    def make(self, text: Tensor, request: Request, generator: torch.Generator) -> Batch:
        """Sequences from ``text``, at least ``length + 1`` tokens; ``generator`` is the only randomness.

        ``text``: uint8 [bytes], or ids of a tokenizer, int16 or int32 [tokens], which leave keys and values free.
        """
