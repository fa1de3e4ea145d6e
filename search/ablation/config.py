"""Configuration of an ablation: what is varied, and how the routers are judged. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from natsl.config import ModelConfig, SupernetConfig, TrainConfig
from natsl.errors import UserError
from natsl.files import check_name
from natsl.search.ablation.variant import Variant
from natsl.space.check import check, check_counts
from natsl.space.policy import Op
from natsl.tasks import DataConfig


@dataclass
class AblationConfig:
    """Variants of a supernet, each trained with every seed, whose routers are judged beside their controls.

    variants: name → options that differ, by section, such as {base: {}, noise: {supernet: {route_noise: 1}}}; the
        sections are model, data, supernet and train. The others are compared with the first one, and the last one that
        routes is drawn in loss.png. A result is found by the place of its variant: new ones go to the end.
    budgets: at each, the same budget in every routed layer and the same total in the best layers are judged on the
        test split.
    lengths: multiples of ``data.seq_len`` at which both are judged as well, with more to recall in proportion; 1 always
        is.
    headroom_sequences: sequences of training text on which predictors of what chunks gain are fitted, at each uniform
        budget; 0: none. The data needs the task ``bytes``.
    hindsight: whether chunks are chosen in hindsight too, which takes most of the time of judging; without it there is
        no selection share.
    random_draws: how often random routing is drawn. batch_size: sequences of a pass of judging, fewer of longer ones.
    workers: processes at a time, one thread each; device=cuda spreads them over all GPUs.
    keep_supernets: whether the checkpoints of a supernet stay after it was judged.
    """

    name: str = "ablation"
    root: str = "runs"
    device: str = "auto"
    workers: int = 2
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    budgets: list[float] = field(default_factory=lambda: [0.05, 0.12])
    lengths: list[int] = field(default_factory=lambda: [1])
    headroom_sequences: int = 0
    hindsight: bool = True
    random_draws: int = 5
    batch_size: int = 32
    keep_supernets: bool = False
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    supernet: SupernetConfig = field(default_factory=SupernetConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_name(self.name, "name")
        names = ("workers", "random_draws", "batch_size")
        check_counts(1, {name: getattr(self, name) for name in names})
        check_counts(0, {"headroom_sequences": self.headroom_sequences})
        check_counts(1, {f"lengths[{i}]": factor for i, factor in enumerate(self.lengths)})
        for name in ("seeds", "budgets"):
            values = getattr(self, name)
            check(len(values) > 0, name, values, "at least one is needed")
            check(len(set(values)) == len(values), name, values, "each must be there once")
        check(len(self.variants) > 0, "variants", self.variants, "at least one is needed, such as {base: {}}")
        for budget in self.budgets:
            check(0 < budget < 1, "budgets", budget, "each budget must lie in (0, 1)")
        for name in self.variants:
            self.variant(name)

    def variant(self, name: str) -> Variant:
        """A variant by name; ``UserError`` naming it, the option, the value and what is allowed."""
        base = Variant(self.model, self.data, self.supernet, self.train)
        try:
            variant = base.changed(self.variants[name])
            variant.check()
        except ValueError as error:
            raise UserError(f"variants.{name}: {error}") from None
        return variant

    @property
    def routed(self) -> list[str]:
        """The variants that have something to route, in order."""
        return [name for name in self.variants if Op.routed in self.variant(name).model.layers]

    @property
    def factors(self) -> list[int]:
        """The lengths that are judged, as multiples of ``data.seq_len``, ascending."""
        return sorted({1, *self.lengths})


def check_headroom(chunk_size: int, data: DataConfig) -> None:
    """Raise ``UserError`` unless headroom can be measured on sequences of this data."""
    check(data.tasks.get("bytes", 0) > 0, "data.tasks", data.tasks, "headroom_sequences needs the task bytes")
    what = f"with headroom_sequences it must be a multiple of model.chunk_size = {chunk_size}"
    check(data.seq_len % chunk_size == 0, "data.seq_len", data.seq_len, what)
    what = f"with headroom_sequences it must be at least two chunks of {chunk_size}: nothing comes after a single one"
    check(data.seq_len >= 2 * chunk_size, "data.seq_len", data.seq_len, what)
    what = "with headroom_sequences it must be ≥ 2: routes are taken from another sequence"
    check(data.test_sequences > 1, "data.test_sequences", data.test_sequences, what)
