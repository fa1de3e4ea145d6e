"""``natsl evaluate``: its options, what it measures, and where the results go."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from natsl import __version__
from natsl.cli.commands import Choosing
from natsl.device import resolve_device
from natsl.errors import UserError
from natsl.files import child_folder, read_json, to_plain, user_path, write_bytes, write_json
from natsl.load import load_choice, read_manifest
from natsl.progress import Progress
from natsl.run import Run
from natsl.secrets import redact, redact_text
from natsl.space.check import check, check_counts
from natsl.tasks import OtherTextConfig

if TYPE_CHECKING:  # torch is imported where it is used, so that --help stays fast
    from natsl.answers import Answers, Grid
    from natsl.evaluate import Evaluation
    from natsl.footprint import Footprint
    from natsl.heldout import HeldOut
    from natsl.model import RoutedLM
    from natsl.space.policy import RoutingPolicy

RESULT = "evaluation.json"
MOST_DEPTHS = 100  # at which answers are asked for: the rows of a picture
CACHES = 2  # sequences of each task that caches are measured on
AGREEMENT = 0.02  # of measured bytes and the cost model
_LONGEST = 40  # characters of a policy in a title


@dataclass
class EvaluateRunConfig(Choosing):
    """Score a point of a run's front, any other policy, or an exported model on held-out data.

    Either ``run`` (below ``root``) or ``export`` (a folder made by natsl export). Of a run: ``pick`` (``knee``, an id
    of the front or its beginning; null: the knee), or else ``policy`` (a JSON file) or ``budget`` (the same in every
    routed layer; 0 and 1 are the ops delta and softmax), which need no front; of an export, these two replace the
    policy that it holds. ``calibration``: a table made by natsl calibrate instead of the run's own. ``split``: search
    or test. The text is what the run was judged on, or what ``data.path`` names; where it has changed,
    ``allow_other_data`` scores it all the same. Any result on other text says so in ``other_data``.

    ``lengths``: answers by depth and bytes of the cache are measured at so many times the trained length ([]: not at
    all), at so many ``depths``, on ``sequences`` of each length, and of each depth of needles (null: about as many
    tokens at every length as the test part of a task has). ``out``: the folder of ``evaluation.json``, ``answers.png``,
    ``kept.png`` and ``cache.png`` (null: one for these settings below ``root/run/evaluation``, of an export below
    ``root/evaluation``). What is there already is shown again, not measured again.
    """

    run: str | None = None
    root: str = "runs"
    pick: str | None = None
    export: str | None = None
    policy: str | None = None
    budget: float | None = None
    calibration: str | None = None
    data: OtherTextConfig = field(default_factory=OtherTextConfig)
    allow_other_data: bool = False
    split: str = "test"
    lengths: list[int] = field(default_factory=lambda: [1, 2, 4])
    depths: int = 5
    sequences: int | None = None
    device: str = "auto"
    batch_size: int = 32
    out: str | None = None

    def __post_init__(self) -> None:
        self.choice()
        check(self.split in ("search", "test"), "split", self.split, "it must be search or test")
        check_counts(1, {"batch_size": self.batch_size, "depths": self.depths})
        check(self.depths <= MOST_DEPTHS, "depths", self.depths, f"it must be at most {MOST_DEPTHS}")
        check_counts(1, {f"lengths[{i}]": factor for i, factor in enumerate(self.lengths)})
        if self.sequences is not None:
            check_counts(1, {"sequences": self.sequences})


def evaluate_choice(config: EvaluateRunConfig) -> Evaluation:
    """Score what the configuration names on the held-out data of its run; see ``EvaluateRunConfig``."""
    return _Subject.load(config).evaluation()


@dataclass(frozen=True)
class Stored:
    """The content of ``evaluation.json``, its folder, and whether it was there already."""

    folder: Path
    result: dict[str, Any]
    old: bool


def evaluate(config: EvaluateRunConfig) -> Stored:
    """Measure what the configuration names and write it, unless that was done before.

    ``UserError`` for an ``out`` that cannot be written or holds the result of other options.
    """
    subject = _Subject.load(config)
    settings = redact(to_plain(subject.settings()))
    folder = subject.folder(settings)
    stored = _stored(folder, settings)
    if stored is not None:
        return Stored(folder, stored, True)
    measured, pngs = subject.measure()
    result = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "settings": settings,
        **redact(to_plain(measured)),
    }
    for name, png in pngs.items():
        write_bytes(folder / name, png)
    write_json(folder / RESULT, result)  # the last one: where it is, the others are
    return Stored(folder, result, False)


def run_evaluation(config: EvaluateRunConfig) -> None:
    """Print the values of ``evaluate`` as JSON, with the text that they are of, and where all that is measured went."""
    began = time.monotonic()
    stored = evaluate(config)
    folder, result = stored.folder, stored.result
    note = f"measured in {time.monotonic() - began:.0f} s"
    if stored.old:
        note = f"measured on {result['date']} with these settings"
    print(json.dumps(result["values"], indent=1))
    pictures = ", ".join(sorted(path.name for path in folder.glob("*.png")))
    print(f"note: {note}: {folder / RESULT}, {pictures}", file=sys.stderr)
    for line in (*_table(result), *(f"note: {line}" for line in _notes(result))):
        print(line, file=sys.stderr)


@dataclass(frozen=True)
class _Subject:
    """What is evaluated: a model under a policy, on held-out data. ``record``: as ``load_choice`` gives it."""

    config: EvaluateRunConfig
    model: RoutedLM
    policy: RoutingPolicy
    record: Mapping[str, Any]
    held: HeldOut

    @classmethod
    def load(cls, config: EvaluateRunConfig) -> _Subject:
        from natsl.heldout import held_out

        model, policy, record = load_choice(config.choice())
        held = held_out(config.choice(), config.data, model.config.vocab_size, config.allow_other_data)
        return cls(config, model.to(resolve_device(config.device)), policy, record, held)

    @property
    def grid(self) -> Grid:
        from natsl.answers import Grid
        from natsl.data import Split

        config, own = self.config, self.held.data.config.seq_len
        lengths = tuple(sorted({factor * own for factor in config.lengths}))
        return Grid(Split(config.split), lengths, config.depths, config.sequences, config.batch_size)

    def settings(self) -> dict[str, Any]:
        """All that the results depend on, JSON-ready but for secrets."""
        config, data, grid = self.config, self.held.data, self.grid
        of: dict[str, Any] = {"run": config.run, "pick": self.record.get("id")}
        if config.export is not None:
            sums = read_manifest(user_path(config.export, "export"))["files"]
            of = {"export": user_path(config.export, "export").absolute().name, "sha256": sums["model.safetensors"]}
        return {
            "natsl": __version__,
            **{name: value for name, value in of.items() if value is not None},
            "checkpoint": self.record.get("checkpoint"),
            "calibration": self.record.get("calibration"),
            "policy": self.policy.to_dict(),
            "digest": self.policy.digest(),
            "data": data.fingerprint,
            "tasks": data.tasks,
            "split": grid.split,
            "trained_at": data.config.seq_len,
            "lengths": grid.lengths,
            "depths": grid.depths,
            "sequences": grid.sequences,
            "precision": self.model.precision,
            "device": self.model.embed.weight.device.type,
        }

    def folder(self, settings: Mapping[str, Any]) -> Path:
        """The folder of the results, which can be written."""
        if self.config.out is not None:
            folder = user_path(self.config.out, "out")
        else:
            digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
            name = f"{self.record.get('id', f'policy-{self.policy.digest()[:8]}')}-{digest[:8]}"
            root = user_path(self.config.root, "root")
            parent = root if self.config.run is None else Run.open(self.config.run, root, create=False).path
            folder = child_folder(child_folder(parent, "evaluation", "out"), name, "out")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as error:
            raise UserError(f"out: {folder} cannot be written: {error.strerror or error}") from None

    def evaluation(self) -> Evaluation:
        """The scores of the held-out sequences."""
        from natsl.data import Split
        from natsl.evaluate import evaluate

        sets = self.held.data.eval_sets(Split(self.config.split))
        return evaluate(self.model, self.policy, sets, batch_size=self.config.batch_size)

    def measure(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """All results, and their pictures by name."""
        from natsl.answers import answers, asking
        from natsl.search.report.evaluation import answers_png, cache_png, kept_png

        data, grid, title = self.held.data, self.grid, self.title()
        values = self.evaluation()
        asked: list[Answers] = []
        caches: list[Footprint] = []
        unread: dict[int, str] = {}
        if grid.lengths:
            total = len(grid.lengths) * grid.depths * len(asking()) + len(grid.lengths)
            with Progress("evaluate", total) as progress:
                asked = answers(
                    self.model,
                    self.policy,
                    data,
                    grid,
                    lambda cells: progress.update(progress.done + cells, "answers"),
                )
                caches, unread = self._caches()
                progress.update(total, "bytes of the cache")
        result = {
            "values": {**values.to_dict(), "text": data.corpus.description, "other_data": self.held.other},
            "answers": {item.task: item.to_dict() for item in asked},
            "cache": {
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "sequences": CACHES * len(data.tasks),
                "lengths": [item.to_dict() for item in caches],
                "left_out": unread,
            },
        }
        pictures = {"kept.png": kept_png(values, self.policy, f"{title}: chunks kept")}
        if asked:
            head = f"{title}: right answers by length and depth"
            pictures["answers.png"] = answers_png(asked, grid.lengths, data.config.seq_len, head)
        if caches:
            pictures["cache.png"] = cache_png(caches, f"{title}: cache of a sequence, {result['cache']['dtype']}")
        return result, pictures

    def title(self) -> str:
        """What was evaluated, in short."""
        name = self.config.run or user_path(str(self.config.export), "export").absolute().name
        name += f" {self.record['id']}" if "id" in self.record else ""
        policy = self.policy.describe()
        policy = policy if len(policy) <= _LONGEST else self.policy.digest()
        calibration = f", calibration {self.config.calibration}" if self.config.calibration else ""
        other = ", other text" if self.held.other else ""
        return redact_text(f"{name} ({policy}{calibration}), {self.config.split} split{other}")

    def _caches(self) -> tuple[list[Footprint], dict[int, str]]:
        """Bytes by length, on sequences of every task of the run, and why some lengths have none."""
        import torch

        from natsl.footprint import footprints

        data, grid = self.held.data, self.grid
        left_out: dict[int, str] = {}
        for longest in reversed(grid.lengths):
            try:
                parts = [data.batch(task, grid.split, CACHES, seed=0, length=longest).tokens for task in data.tasks]
                lengths = [tokens for tokens in grid.lengths if tokens <= longest]
                return footprints(self.model, self.policy, torch.cat(parts), lengths), left_out
            except (ValueError, MemoryError, torch.OutOfMemoryError) as error:
                left_out[longest] = str(error).partition("\n")[0]
        return [], left_out


def _stored(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result in a folder; ``UserError`` if it is of other settings."""
    path = folder / RESULT
    if not path.exists():
        return None
    stored = read_json(path)
    if not isinstance(stored, dict) or not {"settings", "values", "date"} <= stored.keys():
        raise UserError(f"out: {path} was not written by natsl evaluate: choose another folder")
    theirs = stored["settings"]
    names = [name for name in {**theirs, **settings} if theirs.get(name) != settings.get(name)]
    if names:
        raise UserError(f"out: {path} is the result of other settings ({', '.join(names)}): choose another folder")
    return stored


def _table(result: Mapping[str, Any]) -> list[str]:
    """The bytes of the cache of one sequence by length, as lines."""
    rows = result["cache"]["lengths"]
    names = {"used": "in use", "predicted": "cost model", "held": "held", "dense": "dense attention"}
    head = [f"{'tokens':>9}" + "".join(f"  {name:>15}" for name in names.values()) + "  bytes of a sequence's cache"]
    return [
        *(head if rows else []),
        *(f"{row['tokens']:>9,}" + "".join(f"  {row[name]:>15,.0f}" for name in names) for row in rows),
    ]


def _notes(result: Mapping[str, Any]) -> list[str]:
    """What was not measured, and where the cost model is off: a line for each."""
    left_out = {f"answers of {task}": item["left_out"] for task, item in result["answers"].items()}
    left_out["bytes of the cache"] = result["cache"]["left_out"]
    lines = [
        f"{what} at {', '.join(map(str, reasons))} tokens are left out: {list(reasons.values())[-1]}"
        for what, reasons in left_out.items()
        if reasons
    ]
    worst = max((abs(item["difference"]) for item in result["cache"]["lengths"]), default=0.0)
    if worst > AGREEMENT:
        lines.append(f"the cost model of the cache is off by {100 * worst:.1f} % of what was measured")
    return lines
