"""One supernet of an ablation: it is trained, or its training goes on, and it is judged. No torch at import."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from natsl.config import TRAINING_VERSION
from natsl.errors import UserError
from natsl.files import to_plain, write_json
from natsl.resume import is_free_on_resume
from natsl.run import Run
from natsl.search.ablation.config import AblationConfig
from natsl.search.ablation.record import FORMAT
from natsl.signals import TerminatedError, sigterm_raises
from natsl.tasks import TEXT_OPTIONS, drop_newer

if TYPE_CHECKING:
    from natsl.data import TaskData
    from natsl.model import RoutedLM


@dataclass(frozen=True)
class Job:
    """One supernet to train and judge. Its checkpoints and its result go to ``folder``.

    ``text``: fingerprint of the text to use.
    """

    config: AblationConfig
    variant: str
    seed: int
    folder: Path
    text: str

    @property
    def result(self) -> Path:
        """The file with the result."""
        return self.folder / "result.json"

    def has_supernet(self) -> bool:
        """Whether there are checkpoints of the supernet."""
        return any(Run(self.folder).supernet.glob("step-*.json"))

    def fingerprint(self) -> str:
        """What the result depends on beside the text: the variant, the seed and how it is judged."""
        c = self.config
        variant = to_plain(c.variant(self.variant))
        for name in TEXT_OPTIONS:
            del variant["data"][name]
        drop_newer(variant["data"])
        variant["train"] = {k: v for k, v in variant["train"].items() if not is_free_on_resume(f"train.{k}")}
        judging: list[Any] = [c.budgets, c.factors, c.random_draws, c.headroom_sequences]
        judging += (
            [] if c.hindsight else [{"hindsight": False}]
        )  # the default adds nothing: older results are still used
        text = json.dumps([variant, self.seed, judging], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_job(job: Job, device: str) -> dict[str, Any]:
    """Train the supernet of a job on a device, judge its router on the test split and write the result.

    A training that was cut off goes on from its last checkpoint. ``UserError`` if another process works on the job.
    """
    import torch

    from natsl.data import TaskData, load_text
    from natsl.search.ablation.judge import Judge
    from natsl.search.controls.comparer import Rules

    torch.set_num_threads(1)
    c, variant, folder = job.config, job.config.variant(job.variant), Run(job.folder)
    data = TaskData(
        variant.data, load_text(variant.data.path, variant.data.text_rules(c.root)), variant.model.vocab_size
    )
    if data.corpus.fingerprint != job.text:
        raise UserError(f"data.path = {variant.data.path!r} has changed since the command began: choose another name")
    folder.path.mkdir(parents=True, exist_ok=True)
    try:
        with sigterm_raises(), folder.lock():
            model = _trained(job, folder, data, device)
            rules = Rules(job.seed, c.random_draws, variant.supernet.route_noise)
            result = {
                "format": FORMAT,
                "variant": job.variant,
                "seed": job.seed,
                "fingerprint": job.fingerprint(),
                "version": TRAINING_VERSION,
                "text": data.corpus.fingerprint,
                **Judge(model, data, c, rules).judge(),
            }
            write_json(job.result, result)
            if not c.keep_supernets:
                shutil.rmtree(folder.supernet)
    except TerminatedError:
        os._exit(128 + signal.SIGTERM)  # as of a process that the signal ends: there is no result
    return result


def _trained(job: Job, folder: Run, data: TaskData, device: str) -> RoutedLM:
    import torch

    from natsl.device import resolve_device
    from natsl.model import RoutedLM
    from natsl.train import TrainRecipe, train_supernet

    variant = job.config.variant(job.variant)
    recipe = TrainRecipe(variant.train, variant.supernet, job.seed)
    torch.manual_seed(job.seed)
    model = RoutedLM(variant.model, variant.supernet.calibration_points, variant.train.precision)
    model.to(resolve_device(device))
    train_supernet(model, data, recipe, folder.supernet)
    return model
