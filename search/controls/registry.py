"""The controls by name. A new one is a function that makes routes, and an entry of ``CONTROLS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

from natsl.counts import Counts
from natsl.evaluate import Routing, count
from natsl.search.controls import hindsight, routes
from natsl.search.controls.comparison import Trained
from natsl.search.controls.learned import Learned, Subject, follow
from natsl.space.policy import RoutingPolicy
from natsl.tasks.sequences import Batch

_REMEMBERED = 6  # policies


@dataclass(frozen=True)
class Control:
    """One way to choose chunks instead of the router.

    ``routing`` takes what is evaluated, what the router did in it, and the number of the draw. ``trained``: whether the
    supernet knows such routes. ``passes``: what it costs, in evaluations. ``knows``: whether it can be made for the
    sequences of a task. ``in_hindsight``: it sees the answers, and is made for a few points only.
    """

    name: str
    label: str
    routing: Callable[[Subject, Learned, int], Routing]
    trained: Trained
    passes: int = 1
    knows: Callable[[Batch], bool] = lambda batch: True
    in_hindsight: bool = False


CONTROLS = {
    item.name: item
    for item in (
        Control("shuffled", "routes of another sequence", routes.shuffled, Trained.with_noise),
        Control("random_heads", "random, each head's own count", routes.random_heads, Trained.with_noise),
        Control("sink_window", "first and latest chunks", routes.sink_window, Trained.never),
        Control("window", "latest chunks", routes.window, Trained.never),
        Control("half_window", "half the latest chunks, half by margin", routes.half_window, Trained.never),
        Control("fixed_window", "latest chunks, a fixed number", routes.fixed_window, Trained.never),
        Control("fixed_half", "half latest, half by margin, a fixed number", routes.fixed_half, Trained.never),
        Control(
            "fixed_half_random", "half latest, half random, a fixed number", routes.fixed_half_random, Trained.never
        ),
        Control("drop", "chunks left out are in neither memory", routes.drop, Trained.never),
        Control("keep_and_write", "chunks kept are written too", routes.keep_and_write, Trained.never),
        Control(
            "oracle",
            "the chunks with the answers, at their own cost",
            routes.oracle,
            Trained.with_noise,
            knows=lambda batch: bool(batch.relevant.any()),
        ),
        Control(
            "hindsight",
            "chosen in hindsight, each head's own count",
            hindsight.hindsight,
            Trained.with_noise,
            passes=hindsight.PASSES,
            in_hindsight=True,
        ),
        Control(
            "hindsight_layer",
            "chosen in hindsight, free over the heads of a layer",
            hindsight.hindsight_layer,
            Trained.with_noise,
            passes=hindsight.PASSES,
            in_hindsight=True,
        ),
    )
}


class ControlRunner:
    """Evaluates controls; the learned routes that they are made from are remembered for a few policies."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._follow = lru_cache(_REMEMBERED)(partial(follow, subject))

    def __call__(self, policy: RoutingPolicy, name: str, draw: int) -> dict[str, Counts]:
        """Counts of each task under a control, for the tasks that it knows."""
        learned = self._follow(policy)
        control, subject = CONTROLS[name], self._subject
        sets = {task: batch for task, batch in subject.sets.items() if control.knows(batch)}
        routing = control.routing(subject, learned, draw)
        return count(subject.model, policy, sets, routing=routing, batch_size=subject.batch_size)
