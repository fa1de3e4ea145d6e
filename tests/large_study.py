"""How long a search with thousands of trials takes to open and to report, and how much memory; no model is evaluated.

    python -m tests.large_study                                 # 10,000 trials, two objectives, three layers
    python -m tests.large_study --trials 2000 --layers 12 --objectives recall_error val_loss kept_fraction decode_bytes

The trials are written into the database directly, as Optuna would have stored them: policies drawn at random from the
space, with results of the synthetic supernet of ``tests/search_helpers.py``.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from natsl.files import write_bytes, write_json, write_text
from natsl.search.config import SearchConfig
from natsl.search.objective import measure
from natsl.search.report.html import render
from natsl.search.report.png import front_png
from natsl.search.stored import EVALUATION, INDEX, PARTS, POLICY
from natsl.search.study import PolicyStudy, Problem, open_policy_study
from natsl.space.policy import Op
from tests.search_helpers import built, problem, synthetic

_FLOAT = json.dumps({"name": "FloatDistribution", "attributes": {"step": None, "low": 0.0, "high": 1.0, "log": False}})


def opened(folder: Path, config: SearchConfig, asked: Problem) -> PolicyStudy:
    """The study in a folder."""
    return open_policy_study(folder / "study.db", "first", config, asked, 0, {"model": "m"})


def write_trials(path: Path, config: SearchConfig, asked: Problem, count: int) -> None:
    """Put ``count`` finished trials into an empty study: its first policies, then random ones."""
    rng = random.Random(0)
    names = [item.name for item in asked.objectives]
    tables: dict[str, list[tuple[object, ...]]] = {"trials": [], "params": [], "values": [], "attributes": []}
    for i in range(count):
        known = i < len(asked.first)
        params = {f"u.{layer}": rng.random() for layer in range(len(asked.kinds))}
        params = config.space.params(asked.first[i], asked.kinds) if known else params
        policy = config.space.from_params(params, asked.kinds, asked.chunk_size)
        evaluation = synthetic(policy)
        values = measure(names, evaluation, policy, asked.costs)
        own = [*values.values(), 0.0]
        stored: dict[str, object] = {POLICY: policy.to_dict(), EVALUATION: evaluation.to_dict(), PARTS: [own, own]}
        stored |= {INDEX: i} if known else {}
        at = "2026-01-01 00:00:00.000000"
        tables["trials"].append((i + 1, i, 1, "COMPLETE", at, at))
        tables["params"] += [(i + 1, name, value, _FLOAT) for name, value in params.items()]
        tables["values"] += [(i + 1, place, value, "FINITE") for place, value in enumerate(values.values())]
        tables["attributes"] += [(i + 1, key, json.dumps(value)) for key, value in stored.items()]
    with closing(sqlite3.connect(path)) as connection, connection:
        for statement, rows in zip(
            (
                "INSERT INTO trials VALUES (?, ?, ?, ?, ?, ?)",
                "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json) VALUES (?, ?, ?, ?)",
                "INSERT INTO trial_values (trial_id, objective, value, value_type) VALUES (?, ?, ?, ?)",
                'INSERT INTO trial_user_attributes (trial_id, "key", value_json) VALUES (?, ?, ?)',
            ),
            tables.values(),
            strict=True,
        ):
            connection.executemany(statement, rows)


@contextmanager
def timed(stage: str) -> Iterator[None]:
    """Print how long a stage took and the most memory that the process has had by then."""
    start, processor = time.perf_counter(), time.process_time()
    yield
    seconds, busy = time.perf_counter() - start, time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{stage:<38} {seconds:8.2f} s {busy:8.2f} s of CPU {peak:8.2f} GiB at most")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the study, open it, report it, and make a few more trials."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--objectives", nargs="+", default=["recall_error", "kept_fraction"])
    options = parser.parse_args(arguments)
    config = SearchConfig(n_trials=options.trials, anchors=20, objectives=options.objectives)
    asked = problem(config, [Op.routed] * options.layers)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        opened(folder, config, asked).close()
        write_trials(folder / "study.db", config, asked, options.trials)
        with timed("opening"):
            study = opened(folder, config, asked)
        assert (len(study.records), study.foreign, study.remaining) == (options.trials, [], 0)
        with timed("front, baselines, history"):
            front = built(study)
        print(f"{len(front.points)} points")
        with timed("front.json and front.csv"):
            write_json(folder / "front.json", front.to_dict())
            write_text(folder / "front.csv", front.to_csv())
        with timed("front.png"):
            write_bytes(folder / "front.png", front_png(front))
        with timed("report.html"):
            write_text(folder / "report.html", render(front))
        print({path.name: path.stat().st_size for path in sorted(folder.glob("*.*"))})
        study.close()
        del study, front  # else the trials are in memory twice
        config.n_trials += 10
        with closing(opened(folder, config, asked)) as study, timed("ten more trials"):
            study.run(synthetic)


if __name__ == "__main__":
    main()
