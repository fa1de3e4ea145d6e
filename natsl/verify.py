"""Does an exported folder still give what its supernet gave: checks that need nothing but the folder.

Each is made with natsl's own loader and, where transformers is installed, with ``AutoModelForCausalLM``.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from natsl.errors import UserError
from natsl.files import read_json, write_json
from natsl.hf import transformers_version
from natsl.load import file_faults, load_exported

if TYPE_CHECKING:  # torch is imported where it is used, so that --help stays fast
    from torch import Tensor

    from natsl.model import RoutedLM
    from natsl.space.policy import RoutingPolicy
    from natsl.tasks.sequences import Batch

# Largest difference of logits, relative to the largest of them: of float32 and of bfloat16 models.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.03}
# Largest difference of a loss in nats, and of an error or a kept fraction.
SCORE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.02}
LAST = 8  # so many logits of the probe are stored
SAMPLE = "verification.safetensors"
SCORES = "verification.json"
_TENSORS = ("tokens", "targets", "recall", "relevant")  # of a batch


@dataclass(frozen=True)
class Result:
    """What one check found. ``loader``: natsl or transformers with its version. ``fault``: None if all is well."""

    loader: str
    check: str
    detail: str
    fault: str | None = None

    def line(self) -> str:
        """One line for a terminal."""
        state = "ok    " if self.fault is None else "FAILED"
        return f"{state} {self.loader}: {self.check}: {self.fault or self.detail}"


@dataclass(frozen=True)
class _Loaded:
    """An export in memory. ``run`` gives logits [B,T,V] of tokens [B,T], of which ``mask`` [B,T] says what is real, in
    pieces of so many tokens from one cache, or all at once (0). ``extend``: a prompt and greedy tokens after it.
    """

    loader: str
    model: RoutedLM
    policy: RoutingPolicy
    run: Callable[[Tensor, Tensor | None, int], Tensor]
    extend: Callable[[Tensor, int], list[int]]


@dataclass(frozen=True)
class _Sample:
    """What the checks of a folder compare with: a probe [2,T], its last logits, and sequences of tasks with scores."""

    probe: Tensor
    logits: Tensor
    sets: Mapping[str, Batch]
    scores: Mapping[str, Any] | None

    @classmethod
    def read(cls, folder: Path) -> _Sample:
        """The sample of a folder; ``UserError`` for files that hold something else."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from natsl.tasks.sequences import Batch

        record = read_json(folder / SCORES)
        try:
            stored = load_file(folder / SAMPLE)
            sets = {
                str(task): Batch(*(stored[f"{task}.{name}"] for name in _TENSORS), in_bytes=bool(record["in_bytes"]))
                for task in record["tasks"]
            }
            return cls(stored["probe"], stored["logits"], sets, record["scores"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{SAMPLE} and {SCORES} cannot be compared with: {_reason(error)}") from None


def write_sample(folder: Path, model: RoutedLM, policy: RoutingPolicy, sets: Mapping[str, Batch]) -> None:
    """Store in an export what its checks compare with: the model's logits for a probe, ``sets`` and their scores."""
    import torch

    from natsl.checkpoint import write_tensors
    from natsl.evaluate import evaluate

    tokens = _probe(model)
    with torch.no_grad():
        logits = model(tokens, policy, logits_to_keep=LAST).logits.float()
    tensors = {"probe": tokens, "logits": logits}
    for task, batch in sets.items():
        for name in _TENSORS:
            tensors[f"{task}.{name}"] = getattr(batch, name)
    write_tensors(folder / SAMPLE, tensors)
    scores = evaluate(model, policy, sets).to_dict() if sets else None
    in_bytes = all(batch.in_bytes for batch in sets.values())
    write_json(folder / SCORES, {"tasks": list(sets), "in_bytes": in_bytes, "scores": scores})


def _probe(model: RoutedLM) -> Tensor:
    """Tokens [2,T] over complete chunks and a partial one."""
    import torch

    shape = (2, 3 * model.config.chunk_size + model.config.chunk_size // 2)
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def verify(folder: Path) -> list[Result]:
    """Run ``checks`` of a folder in a fresh process, elsewhere; ``UserError`` if one fails or the process does."""
    import torch

    code = "import sys; from natsl.verify import answer; answer(sys.argv[1], int(sys.argv[2]))"
    paths = [str(Path(__file__).absolute().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder.absolute()), str(torch.get_num_threads())],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    results = None
    with contextlib.suppress(ValueError, IndexError, TypeError):
        results = [Result(**plain) for plain in json.loads(done.stdout.splitlines()[-1])]
    if done.returncode or not results:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"the exported model cannot be loaded in a fresh process: {last}")
    for result in results:
        if result.fault is not None:
            raise UserError(
                f"the exported model is not the supernet's in a fresh process: {result.loader}: {result.check}: "
                f"{result.fault}: nothing was exported"
            )
    return results


def answer(folder: str, threads: int) -> None:
    """The fresh process of ``verify``: print the results as JSON."""
    import torch

    torch.set_num_threads(threads)  # another number of threads may add in another order
    load_exported(folder)  # what is wrong with the folder itself is said as it is
    results = list(checks(Path(folder)))
    print(json.dumps([vars(result) for result in results]))


def checks(folder: Path) -> Iterator[Result]:
    """All checks of a folder, one after another; ``UserError`` for a folder that is no export at all.

    What cannot be loaded ends them.
    """
    faults = file_faults(folder)
    for fault in faults:
        yield Result("natsl", "files", "", fault)
    if faults:
        return
    yield Result("natsl", "files", "as they were exported")
    if not (folder / SAMPLE).is_file() or not (folder / SCORES).is_file():
        yield Result("natsl", "sample", "", "the folder has nothing to compare with: it was made by an older natsl")
        return
    try:
        sample = _Sample.read(folder)
    except UserError as error:
        yield Result("natsl", "sample", "", str(error))
        return
    version = transformers_version()
    for loader, load in (("natsl", _load), (f"transformers {version}", _load_with_transformers)):
        if load is _load_with_transformers and version is None:
            continue
        stage = "loading"
        try:
            loaded = load(loader, folder)
            stage = "comparing"
            yield from _compare(loaded, sample)
        except Exception as error:  # whatever a library raises for a damaged folder
            yield Result(loader, stage, "", _reason(error))


def _reason(error: Exception) -> str:
    """An error on one line, with its type unless it is made for users."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _compare(loaded: _Loaded, sample: _Sample) -> Iterator[Result]:
    import torch

    precision = loaded.model.precision.value
    probe, expected = sample.probe, sample.logits
    bound = TOLERANCE[precision] * max(1.0, float(expected.abs().max()))

    def same(check: str, what: str, found: Tensor, other: Tensor) -> Result:
        difference = float((found.float() - other.float()).abs().max())
        text = f"{what} differ by {difference:.2g}, {bound:.2g} is allowed"
        good = difference <= bound  # NaN is not
        return Result(loaded.loader, check, text, None if good else text)

    T, C = probe.shape[1], loaded.model.config.chunk_size
    with torch.no_grad():
        once = loaded.run(probe, None, 0)
        yield same("logits", "the supernet's", once[:, -LAST:], expected)
        yield same("cache", "tokens in one pass and in pieces", loaded.run(probe, None, C // 2 + 1), once)
        yield same("batch", "a row alone and in a batch", loaded.run(probe[:1], None, 0), once[:1])
        mask = torch.ones_like(probe, dtype=torch.bool)
        mask[0, : C // 2 + 1] = False
        padded = probe.clone()
        padded[0, C // 2 + 1 :] = probe[0, : T - C // 2 - 1]
        found = loaded.run(padded, mask, 0)
        yield same(
            "padding", "a row with padding on its left and without", found[0, C // 2 + 1 :], once[0, : T - C // 2 - 1]
        )
        yield same("padding", "a row beside one with padding and by itself", found[1], once[1])
    if precision == "float32":
        yield _same_text(loaded, probe[:1, :C])
    if sample.scores is not None:
        yield from _same_scores(loaded, sample.sets, sample.scores, SCORE_TOLERANCE[precision])


def _same_text(loaded: _Loaded, prompt: Tensor) -> Result:
    """Whether ``generate`` continues a prompt as natsl does."""
    from natsl.generate import Sampling, generate

    count = prompt.shape[1] + 2  # past the end of a chunk
    own = list(generate(loaded.model, loaded.policy, prompt[0].tolist(), count, Sampling(0)))
    found = loaded.extend(prompt, count)
    fault = None if found == own else f"{found} instead of {own}"
    return Result(loaded.loader, "generation", f"{count} greedy tokens are the same", fault)


def _same_scores(
    loaded: _Loaded, sets: Mapping[str, Batch], expected: Mapping[str, Any], tolerance: float
) -> Iterator[Result]:
    from natsl.evaluate import evaluate

    found = evaluate(loaded.model, loaded.policy, sets).to_dict()
    for name, value in expected.items():
        if isinstance(value, float):
            text = f"{found[name]:.6g}, {value:.6g} when it was exported, {tolerance:.2g} more or less is allowed"
            good = abs(found[name] - value) <= tolerance
            yield Result(loaded.loader, name, text, None if good else text)


def _load(loader: str, folder: Path) -> _Loaded:
    import torch

    from natsl.generate import Sampling, generate
    from natsl.layout import Layout

    model, policy = load_exported(folder)

    def run(tokens: Tensor, mask: Tensor | None, pieces: int) -> Tensor:
        if not pieces:
            logits = model(tokens, policy, layout=None if mask is None else Layout.padded(mask)).logits
        else:
            cache = model.new_cache(len(tokens))
            logits = torch.cat([model(part, policy, cache=cache).logits for part in tokens.split(pieces, 1)], 1)
        assert isinstance(logits, torch.Tensor)
        return logits

    def extend(prompt: Tensor, count: int) -> list[int]:
        """With no cache between the tokens."""
        tokens: list[int] = prompt[0].tolist()
        for _ in range(count):
            tokens += generate(model, policy, tokens, 1, Sampling(0))
        return tokens[prompt.shape[1] :]

    return _Loaded(loader, model, policy, run, extend)


def _load_with_transformers(loader: str, folder: Path) -> _Loaded:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    lm: Any = AutoModelForCausalLM.from_pretrained(folder)

    def run(tokens: Tensor, mask: Tensor | None, pieces: int) -> Tensor:
        if not pieces:
            logits: Tensor = lm(tokens, attention_mask=mask, use_cache=False).logits
            return logits
        cache, parts = lm.new_cache(), []
        for part in tokens.split(pieces, 1):
            parts.append(lm(part, past_key_values=cache).logits)
        return torch.cat(parts, 1)

    def extend(prompt: Tensor, count: int) -> list[int]:
        text = lm.generate(prompt, max_new_tokens=count, do_sample=False)
        return [int(token) for token in text[0, prompt.shape[1] :]]

    return _Loaded(loader, lm.model, lm.config.policy, run, extend)
