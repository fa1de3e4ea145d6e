"""Workers without torch, which start in half a second: answers from a hash, and faults on request."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from natsl.search.question import Question
from natsl.search.worker.process import Job
from natsl.space.policy import Op, RoutingPolicy


def evaluation(policy: RoutingPolicy, share: float) -> dict[str, Any]:
    """The plain evaluation of a policy: better the more it keeps, and a little noise."""
    digits = hashlib.sha256(f"{policy.digest()} {share}".encode()).hexdigest()
    kept = [1.0 if layer.op is Op.softmax else layer.mean_budget() or 0.0 for layer in policy.layers]
    mean = sum(kept) / len(kept)
    error = (1 - mean) ** 2 * (0.9 + 0.1 * int(digits[:4], 16) / 2**16)
    heads = [[fraction, fraction] for fraction in kept]
    measured = {"kept_fraction": mean, "kept_by_layer": kept, "kept_by_head": heads}
    return {"val_loss": 1.0 + error, "bits_per_byte": 2.0, "recall_error": error, "needle_error": None, **measured}


def import_ahead(device: str) -> None:
    """Fails on the device ``none``, ends the process on ``broken``, and takes a minute on ``slow``."""
    print("importing")
    if device == "slow":
        time.sleep(60)
    if device == "none":
        raise ImportError(device)
    if device == "broken":
        os._exit(3)


class FakeAnswers:
    """Answers questions about the search split.

    Of the configuration: ``folder``, where every evaluation leaves a line in ``calls``; ``seconds`` of one; ``fault``,
    which happens at the policy with the digest ``policy`` (default: any), the first ``times``.
    """

    def __init__(self, job: Job) -> None:
        self._config = job.config
        self._folder = Path(job.config["folder"])
        if job.config.get("broken"):
            print("the text has changed", file=sys.stderr)
            os._exit(2)

    def __call__(self, question: Question) -> Any:
        (policy,) = question.policies
        with (self._folder / "calls").open("a") as file:
            file.write(f"{policy.digest()} {question.arguments[0]} {os.getpid()}\n")
        if policy.digest() == self._config.get("policy", policy.digest()) and self._due():
            self._fail(self._config["fault"])
        time.sleep(self._config.get("seconds", 0.01))
        return evaluation(policy, question.arguments[0])

    def recover(self) -> bool:
        return not self._config.get("device lost")

    def _due(self) -> bool:
        for i in range(self._config.get("times", 0)):
            try:
                (self._folder / f"fault-{i}").touch(exist_ok=False)
            except FileExistsError:
                continue
            return True
        return False

    def _fail(self, fault: str) -> None:
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault == "exit":
            print("out of luck", file=sys.stderr, flush=True)
            os._exit(7)
        elif fault == "segfault":
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.kill(os.getpid(), signal.SIGSEGV)
        elif fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault == "hang":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            (self._folder / "child").write_text(str(child.pid))
            time.sleep(600)
        elif fault == "oom":
            out_of_memory = type("OutOfMemoryError", (RuntimeError,), {})  # torch's, by its name
            raise out_of_memory("CUDA out of memory. Tried to allocate 2.00 GiB")
        elif fault == "nan":
            raise FloatingPointError("val_loss is nan")
