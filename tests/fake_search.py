"""``python -m tests.fake_search '{"folder": ..., "n_trials": ...}'``: a search whose workers are fake ones."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from natsl.search.config import SearchConfig
from natsl.search.judge import Judge
from natsl.search.score_cache import ScoreCache
from natsl.search.study import PolicyStudy, open_policy_study
from natsl.search.worker.dispatch import Dispatcher
from natsl.search.worker.pool import Workers
from natsl.search.worker.process import Job
from natsl.search.worker.spare import Spares
from natsl.search.worker.table import TaskTable
from natsl.signals import drains
from tests.search_helpers import problem

FAKE = "tests.fake_answers:FakeAnswers"
MADE_FROM = {"model": "m"}


@contextlib.contextmanager
def fake_search(
    folder: Path, config: SearchConfig, spares: Spares | None = None, **answers: Any
) -> Iterator[tuple[PolicyStudy, Judge, Dispatcher]]:
    """A search in a folder: its study, its judge with stored results, what has the workers; ``answers``: see there."""
    workers = config.workers or 1
    study = open_policy_study(folder / "study.db", "first", config, problem(config), 0, MADE_FROM, workers)
    with contextlib.closing(study):
        table = TaskTable(study.engine, study.id)
        job = Job(
            path=str(folder / "study.db"),
            url=config.storage,
            study=study.id,
            lease_seconds=config.lease_seconds,
            answers=FAKE,
            run=str(folder),
            threads=1,
            config={"folder": str(folder), **answers},
            supernet="",
            text="",
        )

        def start(wanted: Callable[[str], bool]) -> Workers:
            return Workers(job, ["cpu"] * workers, folder / "workers", table, config.trial_timeout, wanted, spares)

        with contextlib.closing(Dispatcher(table, start, config.lease_seconds, study.beat)) as dispatcher:
            yield study, ScoreCache(folder / "scores.jsonl", MADE_FROM).judge(dispatcher.judge()), dispatcher


def search(folder: Path, config: SearchConfig, spares: Spares | None = None, **answers: Any) -> PolicyStudy:
    """Make the remaining trials; the study is closed."""
    with (
        fake_search(folder, config, spares, **answers) as (study, judge, _),
        drains(lambda: print("draining", flush=True)),
    ):
        study.run(judge.search, lambda record: print(record.id, flush=True), queue=judge.queue)
    return study


def main(plain: str) -> None:
    """A search as a command makes it, with its exit codes."""
    from natsl.cli.main import _guard

    options = json.loads(plain)
    answers = options.pop("answers", {})
    folder = Path(options.pop("folder"))

    def run() -> None:
        search(folder, SearchConfig(**options), **answers)

    _guard(run)


if __name__ == "__main__":
    main(sys.argv[1])
