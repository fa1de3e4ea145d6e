"""Configuration of an outer search: which settings of a training are searched, and how. Imports no torch, no optuna."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, Protocol

from natsl.config import check_batch, check_chunks
from natsl.errors import UserError
from natsl.search.config import SearchRunConfig
from natsl.space.check import check, check_choice, check_counts
from natsl.space.policy import Op

# Searched setting → the section that it is in, and whether its logarithm is what is searched.
_RANGES = {
    "lr": ("train", True),
    "route_temperature": ("supernet", True),
    "route_noise": ("supernet", False),
    "counterfactual_rate": ("supernet", False),
    "distill": ("supernet", False),
}
_CHOICES = {"random_policies": "supernet", "chunk_size": "model", "layers": "model"}
_P = "outer.space."

Settings = Mapping[str, Any]  # option, such as train.lr → number; of model.layers the name of its kinds


class Trial(Protocol):
    """What proposes settings: a trial of Optuna."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


@dataclass
class OuterSpace:
    """Settings of a training that are searched; an empty one keeps the value that its own option has.

    Ranges [low, high]: ``lr`` (train) and ``route_temperature`` by their logarithm, ``route_noise``,
    ``counterfactual_rate`` and ``distill`` (supernet) as they are. Choices: ``random_policies`` (supernet),
    ``chunk_size`` (model), and ``layers`` (model), lists of kinds under names of yours.
    """

    lr: list[float] = field(default_factory=lambda: [2e-3, 2e-2])
    route_temperature: list[float] = field(default_factory=lambda: [0.125, 2.0])
    route_noise: list[float] = field(default_factory=list)
    counterfactual_rate: list[float] = field(default_factory=list)
    distill: list[float] = field(default_factory=list)
    random_policies: list[int] = field(default_factory=list)
    chunk_size: list[int] = field(default_factory=list)
    layers: dict[str, list[Op]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (_, log) in _RANGES.items():
            ends = getattr(self, name)
            ok = len(ends) in (0, 2) and all(map(math.isfinite, ends)) and (not ends or ends[0] < ends[1])
            check(ok, _P + name, ends, "it must be [low, high] with low < high, or [] to keep the config's value")
            check(
                not (log and ends) or ends[0] > 0, _P + name, ends, "it is searched by its logarithm: low must be > 0"
            )
        for name in ("random_policies", "chunk_size"):
            choices = getattr(self, name)
            check(len(set(choices)) == len(choices), _P + name, choices, "each may come once")
        self.layers = {
            name: [check_choice(f"{_P}layers.{name}[{i}]", kind, Op) for i, kind in enumerate(kinds)]
            for name, kinds in self.layers.items()
        }
        patterns = list(self.layers.values())
        check(
            all(kinds not in patterns[:i] for i, kinds in enumerate(patterns)),
            _P + "layers",
            {name: [kind.value for kind in kinds] for name, kinds in self.layers.items()},
            "each list may come once",
        )
        searched = any(getattr(self, item.name) for item in fields(self))
        check(searched, "outer.space", {}, f"at least one of {', '.join([*_RANGES, *_CHOICES])} must be searched")

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """The settings that a trial proposes, by option."""
        settings: dict[str, Any] = {}
        for option, ends, log in self._ranges():
            settings[option] = trial.suggest_float(option, *ends, log=log)
        for option, choices in self._choices():
            settings[option] = trial.suggest_categorical(option, choices)
        return settings

    def apply(self, config: SearchRunConfig, settings: Settings) -> SearchRunConfig:
        """The config with these settings; ``ValueError`` naming the option for what it does not allow."""
        changes: dict[str, dict[str, Any]] = {}
        for option, value in settings.items():
            section, name = option.split(".")
            changes.setdefault(section, {})[name] = list(self.layers[value]) if option == "model.layers" else value
        sections = {section: replace(getattr(config, section), **values) for section, values in changes.items()}
        return replace(config, **sections)

    def own(self, config: SearchRunConfig) -> dict[str, Any] | None:
        """The settings that the config itself has (null: the space does not hold them)."""
        settings: dict[str, Any] = {}
        for option, (low, high), _ in self._ranges():
            value = _value(config, option)
            if not low <= value <= high:
                return None
            settings[option] = value
        for option, choices in self._choices():
            value = _value(config, option)
            if option == "model.layers":
                value = next((name for name, kinds in self.layers.items() if kinds == value), None)
            if value not in choices:
                return None
            settings[option] = value
        return settings

    def structures(self) -> Iterator[dict[str, Any]]:
        """Every combination of the choices."""
        choices = self._choices()
        for values in itertools.product(*(own for _, own in choices)):
            yield {option: value for (option, _), value in zip(choices, values, strict=True)}

    def check_ends(self, config: SearchRunConfig) -> None:
        """Raise ``UserError`` unless every choice, and both ends of every range, make a training together."""
        ends = [(option, values) for option, values, _ in self.axes()]
        single = [{option: value} for option, values in ends for value in values]  # its error names one option only
        options = [option for option, _ in ends]
        both = (dict(zip(options, values, strict=True)) for values in itertools.product(*(own for _, own in ends)))
        for settings in itertools.chain(single, both):
            try:
                trial = self.apply(config, settings)
                check_batch(trial.model.layers, trial.train, trial.supernet)
                check_chunks(trial.model.chunk_size, trial.data.seq_len)
            except ValueError as error:
                raise UserError(f"outer.space with {shown_settings(settings)}: {error}") from None

    def axes(self) -> list[tuple[str, tuple[float, float] | tuple[Any, ...], bool | None]]:
        """Every searched option with its range and whether that is logarithmic, or its choices (then null)."""
        return [*self._ranges(), *((option, choices, None) for option, choices in self._choices())]

    def _ranges(self) -> list[tuple[str, tuple[float, float], bool]]:
        return [
            (f"{section}.{name}", (ends[0], ends[1]), log)
            for name, (section, log) in _RANGES.items()
            if (ends := getattr(self, name))
        ]

    def _choices(self) -> list[tuple[str, tuple[Any, ...]]]:
        return [
            (f"{section}.{name}", tuple(choices))
            for name, section in _CHOICES.items()
            if (choices := getattr(self, name))
        ]


@dataclass
class OuterConfig:
    """How settings are searched. ``n_trials``: how many supernets are begun.

    ``rungs``: shares of the steps after which a supernet is judged, on the schedule of all steps; ``keep``: the share
    of those judged at a rung that train on, by value, the others being stopped (1: none is).
    """

    n_trials: int = 16
    rungs: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0])
    keep: float = 0.5
    space: OuterSpace = field(default_factory=OuterSpace)

    def __post_init__(self) -> None:
        check_counts(1, {"outer.n_trials": self.n_trials})
        rising = all(a < b for a, b in pairwise([0.0, *self.rungs]))
        check(
            rising and self.rungs[-1:] == [1.0],
            "outer.rungs",
            self.rungs,
            "they must rise from above 0, and the last must be 1",
        )
        check(0 < self.keep <= 1, "outer.keep", self.keep, "it must lie in (0, 1]")


@dataclass
class OuterRunConfig(SearchRunConfig):
    """An outer search: each trial trains a supernet under other settings and is judged by the front of its policies.

    The trials are runs of their own in ``root/name/trials``, each with the other options here; the best one gets the
    policy search that ``search`` describes, a report and, with ``export``, its knee exported. ``search.storage`` is
    where the trials of the outer search are kept. The same command again resumes.
    """

    name: str = "outer"
    outer: OuterConfig = field(default_factory=OuterConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        none = "an outer search trains its own supernets"
        check(self.supernet_from is None, "supernet_from", self.supernet_from, none)
        hours = self.search.max_hours
        check(hours is None, "search.max_hours", hours, "an outer search ends after outer.n_trials")
        self.outer.space.check_ends(self.trial("t0000", "runs"))

    def trial(self, name: str, root: str, settings: Settings | None = None) -> SearchRunConfig:
        """The search config of one trial; errors as ``OuterSpace.apply``."""
        own = {item.name: getattr(self, item.name) for item in fields(SearchRunConfig)}
        base = SearchRunConfig(**own | {"name": name, "root": root, "search": replace(self.search, storage=None)})
        return base if settings is None else self.outer.space.apply(base, settings)


def shown_settings(settings: Settings) -> str:
    """Settings as a short text."""
    texts = (
        f"{option}={value:.4g}" if isinstance(value, float) else f"{option}={value}"
        for option, value in settings.items()
    )
    return " ".join(texts)


def _value(config: SearchRunConfig, option: str) -> Any:
    section, name = option.split(".")
    return getattr(getattr(config, section), name)
