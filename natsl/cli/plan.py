"""``natsl plan``: what a search will take, before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from natsl.device import resolve_device
from natsl.files import output_folder, to_plain, write_json
from natsl.progress import duration
from natsl.search.config import SearchRunConfig

if TYPE_CHECKING:  # torch is imported where it is used, so that --help stays fast
    from natsl.search.plan import Plan


@dataclass
class PlanConfig(SearchRunConfig):
    """What a search with these options will take: time, memory and disk, by stage.

    A few steps of the training and a few scores are made and timed on the device, which takes seconds; a step and a
    score of the search take as long whatever the weights are. Nothing is written unless ``out`` names a folder, for
    plan.json.
    """

    out: str | None = None


def plan(config: PlanConfig) -> Plan:
    """The plan of a search, written into the folder ``out`` if there is one."""
    began = time.monotonic()
    device = resolve_device(config.device)
    from natsl.search.plan import Start, make_plan
    from natsl.search.prepare import prepare

    loaded = time.monotonic()
    folder = None if config.out is None else output_folder(config.out)
    search, problem, data, _ = prepare(
        SearchRunConfig(**{f.name: getattr(config, f.name) for f in fields(SearchRunConfig)})
    )
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
