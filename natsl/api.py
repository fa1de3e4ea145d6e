"""The commands as functions, for notebooks and scripts: ``from natsl import api``, ``front = api.search(name="mine")``.

Each takes the options of its command under the same names and with the same checks: as keyword arguments, where a
mapping holds the options of a section, ``api.search(name="mine", experiment="smoke", search={"n_trials": 20})``, or as
they are typed in a shell, ``api.search("name=mine", "search.n_trials=20")``. Keyword arguments come last. What a user
has to fix raises ``UserError`` with one line. Nothing of Hydra's own state changes.

The functions have a module of their own because ``natsl.search``, ``natsl.train`` and most other verbs are modules.
Importing it loads nothing heavy.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from natsl.cli.main import composed, user_line
from natsl.cli.verbs import VERBS
from natsl.cli.verbs import load as imported
from natsl.errors import UserError
from natsl.threads import choose_threads

if TYPE_CHECKING:
    from natsl.model import RoutedLM
    from natsl.run import Run
    from natsl.search.outer.report import OuterResult
    from natsl.search.plan import Plan
    from natsl.search.result import SearchResult
    from natsl.space.policy import RoutingPolicy
    from natsl.verify import Result

__all__ = ["calibrate", "evaluate", "export", "front", "generate", "load", "outer", "plan", "search", "train", "verify"]


def search(*overrides: str, **options: object) -> SearchResult:
    """Train a supernet, search its policies, and return the front; the same name again resumes. As ``natsl search``.

    ``UserError`` where this process has evaluated for the search of another one, whose front is not here (yet).
    """
    with _one_line():
        lines, config = _configured("search", overrides, options)
        from natsl.cli.commands import make_search
        from natsl.run import Run
        from natsl.search.stopwatch import Stopwatch

        made, hours = make_search(config, lines), config.search.max_hours
        from natsl.search.pipeline import trials_reported  # with torch, which workers import at the same time

        run = Run.open(config.name, config.root, create=False)
        wanted = Stopwatch(run.hours, hours).wanted(config.search.n_trials)
        if made is None and trials_reported(run) < wanted:  # else it was finished before
            raise UserError(
                f"this process has evaluated for the search {config.name!r} of another one, whose run folder has the "
                "front: natsl.api.front reads it there once it is written"
            )
        return front(config.name, config.root)


def front(run: str, root: str | Path = "runs") -> SearchResult:
    """The front of a search that is finished."""
    with _one_line():
        from natsl.run import Run
        from natsl.search.result import SearchResult

        return SearchResult.read(Run.open(run, root, create=False))


def plan(*overrides: str, **options: object) -> Plan:
    """What a search with these options will take: time by stage, memory, disk. As ``natsl plan``."""
    with _one_line():
        from natsl.cli.plan import plan

        return plan(_configured("plan", overrides, options)[1])


def train(*overrides: str, **options: object) -> Run:
    """Train a supernet, or specialise one, and return its run; the same name again resumes. As ``natsl train``."""
    with _one_line():
        from natsl.cli.commands import run_training
        from natsl.run import Run

        lines, config = _configured("train", overrides, options)
        run_training(config, lines)
        return Run.open(config.name, config.root, create=False)


def outer(*overrides: str, **options: object) -> OuterResult:
    """Search settings of the training and return the trials; the same name again resumes. As ``natsl outer``."""
    with _one_line():
        from natsl.search.outer.command import search_settings

        return search_settings(_configured("outer", overrides, options)[1])


def export(*overrides: str, **options: object) -> Path:
    """Write a point, or any policy, as a verified model of its own, and return its folder. As ``natsl export``."""
    with _one_line():
        from natsl.cli.commands import export

        return export(_configured("export", overrides, options)[1])


def verify(*overrides: str, **options: object) -> list[Result]:
    """What each check of an exported folder finds: ``fault`` is None where all is well. As ``natsl verify``."""
    with _one_line():
        from natsl.files import user_path
        from natsl.verify import checks

        config = _configured("verify", overrides, options)[1]
        return list(checks(user_path(config.export, "export")))


def generate(*overrides: str, **options: object) -> list[str]:
    """The continuations of prompts, one of each, without the prompts. As ``natsl generate``."""
    with _one_line():
        from natsl.cli.generation import Continuation

        return Continuation.load(_configured("generate", overrides, options)[1]).texts()


def evaluate(*overrides: str, **options: object) -> dict[str, Any]:
    """The content of ``evaluation.json``: ``values``, ``answers``, ``cache``, ``settings``. As ``natsl evaluate``.

    The pictures are in the folder of the result, ``folder``.
    """
    with _one_line():
        from natsl.cli.evaluation import evaluate

        stored = evaluate(_configured("evaluate", overrides, options)[1])
        return {"folder": stored.folder, **stored.result}


def calibrate(*overrides: str, **options: object) -> Path:
    """Make a table that turns budgets into thresholds on other text, and return its file. As ``natsl calibrate``."""
    with _one_line():
        from natsl.cli.commands import calibrate

        return calibrate(_configured("calibrate", overrides, options)[1]).path


def load(**options: object) -> tuple[RoutedLM, RoutingPolicy]:
    """The model (eval mode, CPU) and the policy that options name, those of ``natsl.load.Choice``.

    Such as ``run="mine"`` with ``pick="knee"``, ``policy="mine.json"`` or ``budget=0.1``, or ``export="<folder>"``.
    """
    with _one_line():
        from natsl.load import Choice, load_choice

        known = [item.name for item in fields(Choice)]
        for name in set(options) - set(known):
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            raise UserError(f"unknown option {name!r}{f'; did you mean {close[0]}?' if close else ''}")
        choice = {name: value if name == "budget" or value is None else str(value) for name, value in options.items()}
        choose_threads()
        model, policy, _ = load_choice(Choice(**choice))  # type: ignore[arg-type]
        return model, policy


def _configured(verb: str, overrides: tuple[str, ...], options: Mapping[str, object]) -> tuple[list[str], Any]:
    """The options of a command as lines, and the object that they make; nothing that loads torch comes before."""
    from natsl.cli.options import override_lines

    config = imported(str(VERBS[verb].config))
    lines = [*overrides, *override_lines(config, options)]
    made = composed(verb, config, lines)
    choose_threads()
    return lines, made


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """What a command reports in one line is a ``UserError`` with that line; a defect stays as it is."""
    try:
        yield
    except Exception as error:
        line = user_line(error)
        if line is None or (isinstance(error, UserError) and line == str(error)):
            raise
        raise UserError(line) from None
