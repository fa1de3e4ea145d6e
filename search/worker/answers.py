"""What a worker of a search answers with: the supernet of a run and its held-out text."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

from natsl import checkpoint
from natsl.device import probe_device, resolve_device
from natsl.errors import UserError
from natsl.files import from_plain
from natsl.modules import import_library
from natsl.run import Run
from natsl.search.config import SearchRunConfig
from natsl.search.judge import make_judge
from natsl.search.question import Method, Question, to_plain
from natsl.search.source import held_out_data
from natsl.search.worker.process import Job


def import_ahead(device: str) -> None:
    """Import what evaluations on a device need besides this module; ``device``: as the option."""
    if resolve_device(device).type == "cuda":
        import_library()


class SupernetAnswers:
    """Judges policies of the supernet in a run's folder.

    ``UserError`` if it, or the text, is not what the search was begun with.
    """

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        config = from_plain(SearchRunConfig, job.config)
        self._device = resolve_device(job.device)
        run = Run(Path(job.run))
        model, record = checkpoint.load_model(run.supernet)
        if record["sha256"] != job.supernet:
            raise UserError(f"the supernet in {run.supernet} is not the one that is searched")
        data, _ = held_out_data(config)
        if data.corpus.fingerprint != job.text:
            raise UserError(f"data.path = {config.data.path!r} has changed since the command began: run it again")
        self._judge = make_judge(model.to(self._device), data, config.search)

    def __call__(self, question: Question) -> Any:
        method, policies = question.method, question.policies
        first: Any = policies if method is Method.search_each else policies[0]
        return to_plain(method, getattr(self._judge, method.value)(first, *question.arguments))

    def recover(self) -> bool:
        """Free memory; False if the device does not compute any more."""
        gc.collect()
        try:
            probe_device(self._device)
        except RuntimeError:
            return False
        return True
