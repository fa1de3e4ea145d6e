"""``python -m tests.overhead``: how much longer a search takes than the evaluations of its batches, with fake workers.

The start and the end of the workers are included; they load no torch here.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections import Counter
from pathlib import Path

from natsl.search.config import SearchConfig
from tests.fake_search import fake_search


def overhead(folder: Path, trials: int, workers: int, batch: int, seconds: float) -> tuple[float, float]:
    """Seconds of a search, and of its evaluations, if the workers share those of each batch without a gap."""
    config = SearchConfig(n_trials=trials, rungs=[1.0], anchors=batch, batch=batch, workers=workers)
    began = time.monotonic()
    with fake_search(folder, config, seconds=seconds) as (study, judge, _):
        study.run(judge.search, queue=judge.queue)
    taken = time.monotonic() - began
    evaluated = Counter(record.index // batch for record in study.records if record.same_as is None)
    return taken, sum(math.ceil(count / workers) for count in evaluated.values()) * seconds


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Measure what a search takes beside its evaluations.")
    for name, default in (("trials", 140), ("workers", 2), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as folder:
        taken, needed = overhead(Path(folder), **options)
    print(f"{taken:.2f} s for {needed:.0f} s of evaluations: {taken / needed - 1:.1%} more")


if __name__ == "__main__":
    main()
