"""``natsl generate``: its options, the prompts that it continues, and how they are printed."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from natsl.cli.commands import Choosing
from natsl.device import resolve_device
from natsl.errors import UserError
from natsl.files import user_path
from natsl.generate import Sampling, Transcript, encode, generate_batch, read_prompt, read_prompts, unescape
from natsl.load import load_choice
from natsl.space.check import check, check_counts
from natsl.space.policy import Op

if TYPE_CHECKING:  # torch is imported where it is used, so that --help stays fast
    from natsl.cache import Cache
    from natsl.model import RoutedLM
    from natsl.space.policy import RoutingPolicy

DEFAULT_PROMPT = "def "


@dataclass
class GenerateConfig(Choosing):
    """Continue prompts with a point of a run's front, any other policy, or an exported model.

    Either ``run`` (below ``root``) with ``pick`` (null: the knee), or with ``policy`` (a JSON file) or ``budget`` (the
    same in every routed layer; 0 and 1 are the ops delta and softmax), which need no front; or ``export`` (a folder
    made by natsl export), whose policy these two replace. ``calibration``: a table made by natsl calibrate instead of
    the run's own. ``prompt`` (null: ``def``) is text, or ``prompt_file`` names a file with it, or ``prompts_file`` one
    with a prompt in each line (-: standard input); ``⟨k3⟩`` and ``⟨v3⟩`` in it stand for the fourth key and value of
    the recall tasks. ``temperature`` 0 takes the most likely token; ``top_k`` draws from so many (0: all), ``top_p``
    from the fewest that come to this probability. ``stop``: texts that end it before ``max_new_tokens`` and are not
    printed; ``\\n`` in them, and in the lines of ``prompts_file``, is a line break and two backslashes are one. Of
    several prompts the i-th (from 0) draws with ``seed`` + i. ``state``: a file to go on from if there is one, and that
    is written once all is drawn; it holds all that was read and drawn, so that the same options go on as if nothing had
    ended. A prompt then follows what is there (null: none), and policy or budget may be others. The rate of the tokens
    after the first ones and the bytes of the cache go to standard error.
    """

    run: str | None = None
    root: str = "runs"
    pick: str | None = None
    export: str | None = None
    policy: str | None = None
    budget: float | None = None
    calibration: str | None = None
    prompt: str | None = None
    prompt_file: str | None = None
    prompts_file: str | None = None
    max_new_tokens: int = 64
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    stop: list[str] = field(default_factory=list)
    seed: int = 0
    state: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        self.choice()
        check("" not in self.stop, "stop", self.stop, "each must have at least one character")
        check(self.prompt != "", "prompt", self.prompt, "it must not be empty")
        sources = {name: getattr(self, name) for name in ("prompt", "prompt_file", "prompts_file")}
        sources = {name: value for name, value in sources.items() if value is not None}
        check(len(sources) < 2, ", ".join(sources), tuple(sources.values()), "give only one of them")
        check_counts(1, {"max_new_tokens": self.max_new_tokens})
        self.sampling()

    def stops(self) -> list[str]:
        """``stop`` with line breaks, which a command line cannot have."""
        return [unescape(text) for text in self.stop]

    def prompts(self) -> list[str] | None:
        """The prompts as text, None if there are none; ``UserError`` for a file that cannot be used."""
        if self.prompts_file is not None:
            return read_prompts(self.prompts_file)
        if self.prompt_file is not None:
            return [read_prompt(self.prompt_file)]
        return None if self.prompt is None else [self.prompt]

    def sampling(self) -> Sampling:
        """How tokens are drawn; ``ValueError`` naming the option."""
        return Sampling(self.temperature, self.top_k, self.seed, self.top_p)


@dataclass(frozen=True)
class Continuation:
    """Prompts that are being continued, and their token ``ids``.

    ``state``: where the cache is stored once all is drawn (null: nowhere).
    """

    config: GenerateConfig
    model: RoutedLM
    policy: RoutingPolicy
    prompts: list[str]
    ids: list[list[int]]
    cache: Cache
    state: Path | None
    transcripts: list[Transcript]

    @classmethod
    def load(cls, config: GenerateConfig) -> Continuation:
        """Model, policy, prompts and what was read before; ``UserError`` for what does not fit together."""
        device = resolve_device(config.device)
        from natsl.cache import Cache
        from natsl.heldout import trained_on_tokens

        texts, state = config.prompts(), None if config.state is None else _writable(config.state, "state")
        model, policy, _ = load_choice(config.choice())
        if config.budget is not None and Op.routed not in model.kinds:
            raise UserError(f"budget = {config.budget} has no effect: no layer of the model is routed")
        if trained_on_tokens(config.choice()):
            raise UserError(
                "the model was trained on token ids, and natsl has no tokenizer: generate continues text only"
            )
        model.to(device)
        cache = Cache.load(state, model) if state is not None and state.exists() else None
        if texts is None:
            texts = [DEFAULT_PROMPT] if cache is None else [""] * len(cache.unread)
        if cache is None:
            cache = model.new_cache(len(texts))
        if len(cache.unread) != len(texts):
            raise UserError(f"state: {state} holds {len(cache.unread)} sequences, but {len(texts)} are to be continued")
        ids = _encoded(config, texts, model.config.vocab_size)
        return cls(config, model, policy, texts, ids, cache, state, [Transcript(config.stops()) for _ in texts])

    def steps(self) -> Iterator[list[tuple[int, str, bool]]]:
        """Draw tokens: of each one in a step its row, the text that is certain with it, and whether a stop ended it."""
        config = self.config
        steps = generate_batch(
            self.model,
            self.policy,
            self.ids,
            config.max_new_tokens,
            config.sampling(),
            self.cache,
            ends=lambda row, _: self.transcripts[row].ended,
        )
        for step in steps:
            drawn = [(row, token) for row, token in enumerate(step) if token is not None]
            yield [(row, self.transcripts[row].add(token), self.transcripts[row].ended) for row, token in drawn]

    def rest(self) -> list[tuple[int, str, bool]]:
        """What was held back of the rows that no stop has ended, once all is drawn."""
        return [(row, item.close(), True) for row, item in enumerate(self.transcripts) if not item.ended]

    def save(self) -> None:
        """Store all that was read and drawn, if there is a file for it."""
        if self.state is not None:
            self.cache.save(self.state, self.model)

    def texts(self) -> list[str]:
        """Draw everything, store it, and return the continuation of each prompt."""
        texts = [""] * len(self.prompts)
        for row, piece, _ in (*chain.from_iterable(self.steps()), *self.rest()):
            texts[row] += piece
        self.save()
        return texts


def _encoded(config: GenerateConfig, texts: list[str], vocab_size: int) -> list[list[int]]:
    """Token ids of prompts; errors as ``encode``, with the line of a file."""
    ids = []
    for line, text in enumerate(texts, 1):
        try:
            ids.append(encode(text, vocab_size) if text else [])
        except ValueError as error:
            if config.prompts_file is None:
                raise
            raise UserError(f"prompts_file = {config.prompts_file!r}: line {line}: {error}") from None
    return ids


def run_generation(config: GenerateConfig) -> None:
    """Print prompts and their continuations, those of a single prompt as they are drawn."""
    job = Continuation.load(config)
    printer, times, drawn = _Printer(job.prompts), [], 0
    for step in job.steps():
        times.append(time.perf_counter())
        drawn += len(step)
        for row, piece, ended in step:
            printer.add(row, piece, ended)
    for row, piece, ended in job.rest():
        printer.add(row, piece, ended)
    job.save()
    count, seconds = len(job.prompts), times[-1] - times[0]
    rate = f", {(drawn - count) / seconds:,.1f} a second" if seconds > 0 else ""
    new, read = (f"{n} token{'s' * (n != 1)}" for n in (drawn, int(job.cache.lengths.sum())))
    several = f" of {count} prompts" if count > 1 else ""
    print(f"note: {new}{several}{rate}; a cache of {job.cache.nbytes:,} bytes for {read}", file=sys.stderr)


class _Printer:
    """Prints texts that grow side by side one after another, the first that is not finished as it grows."""

    def __init__(self, texts: list[str]) -> None:
        self._pieces = [[text.encode(errors="surrogateescape").decode(errors="replace")] for text in texts]
        if len(texts) > 1:
            for i, pieces in enumerate(self._pieces):
                pieces.insert(0, f"==> prompt {i + 1} of {len(texts)} <==\n")
        self._finished = [False] * len(texts)
        self._row = 0
        self._print()

    def add(self, row: int, piece: str, finished: bool = False) -> None:
        """Let the text of a row grow; after the last piece it is ``finished``."""
        self._pieces[row] += [piece, "\n"] if finished else [piece]
        self._finished[row] = finished
        self._print()

    def _print(self) -> None:
        while self._row < len(self._pieces):
            print(*self._pieces[self._row], sep="", end="", flush=True)
            self._pieces[self._row].clear()
            if not self._finished[self._row]:
                return
            self._row += 1


def _writable(text: str, option: str) -> Path:
    """A user's path of a file to write, links followed; ``UserError`` for what is no file or cannot be one."""
    path = user_path(text, option).resolve()
    if path.exists() and not path.is_file():
        raise UserError(f"{option}: {path} is no file")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be written: {error.strerror or error}") from None
