"""``natsl plan``: what a search, or an outer search, will take, before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import TYPE_CHECKING

from natsl.device import resolve_device
from natsl.files import output_folder, to_plain, write_json
from natsl.progress import duration
from natsl.search.config import SearchRunConfig
from natsl.search.outer.config import OuterConfig, OuterRunConfig
from natsl.space.check import check, check_choice

if TYPE_CHECKING:  # torch is imported where it is used, so that --help stays fast
    from natsl.search.plan import Plan


class Planned(Enum):
    """The command that is planned."""

    search = "search"
    outer = "outer"


@dataclass
class PlanConfig(SearchRunConfig):
    """What a search with these options will take: time, memory and disk, by stage.

    A few steps of the training and a few scores are made and timed on the device, which takes seconds; a step and a
    score of the search take as long whatever the weights are. Nothing is written unless ``out`` names a folder, for
    plan.json. ``of``: the command that takes these options, search or outer; ``outer`` has those of the latter only.
    """

    of: Planned = Planned.search
    outer: OuterConfig = field(default_factory=OuterConfig)
    out: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.of = check_choice("of", self.of, Planned)
        unused = self.of is Planned.search and self.outer != OuterConfig()
        check(not unused, "of", self.of.value, "options of outer are those of natsl outer: give of=outer")
        if self.of is Planned.outer:
            self.planned()

    def planned(self) -> SearchRunConfig:
        """The configuration of the command that is planned, which checks itself."""
        kind = OuterRunConfig if self.of is Planned.outer else SearchRunConfig
        own = {item.name: getattr(self, item.name) for item in fields(kind)}
        if kind is OuterRunConfig and self.name == SearchRunConfig.name:
            own["name"] = OuterRunConfig.name
        return kind(**own)


def plan(config: PlanConfig) -> Plan:
    """The plan of a search or an outer search, written into the folder ``out`` if there is one."""
    began = time.monotonic()
    device = resolve_device(config.device)
    from natsl.search.outer.command import prepare_outer
    from natsl.search.outer.plan import make_outer_plan
    from natsl.search.plan import Start, make_plan
    from natsl.search.prepare import prepare

    loaded = time.monotonic()
    folder = None if config.out is None else output_folder(config.out)
    search = config.planned()
    if isinstance(search, OuterRunConfig):
        parts = prepare_outer(search)
        made = make_outer_plan(search, parts, device, Start(loaded - began, time.monotonic() - loaded))
    else:
        search, problem, data, _ = prepare(search)
        made = make_plan(search, problem, data, device, Start(loaded - began, time.monotonic() - loaded))
    if folder is not None:
        write_json(folder / "plan.json", {"config": to_plain(search), **to_plain(made), "seconds": made.seconds})
    return made


def run_plan(config: PlanConfig) -> None:
    """Print the plan of a search, and where it was written."""
    made = plan(config)
    print(f"{'stage':<12} {'time':>8} {'number':>7} {'s each':>8}  of what")
    for stage in made.stages:
        each = f"{stage.count:>7,.0f} {stage.each:>8.3g}" if stage.count else " " * 16
        print(f"{stage.name:<12} {duration(stage.seconds):>8} {each}  {stage.work}")
    print(f"{'in all':<12} {duration(made.seconds):>8} {'':16}  on {made.device}, as busy as it is now")
    for title, amounts in (("memory", made.memory), ("disk", made.disk)):
        print(f"\n{title:<40} {'MB':>9}")
        for amount in amounts:
            print(f"{amount.name:<40} {amount.bytes / 1e6:>9,.1f}  {amount.source}".rstrip())
    for note in made.notes:
        print(f"note: {note}")
    if config.out is not None:
        print(f"Written: {output_folder(config.out) / 'plan.json'}")
