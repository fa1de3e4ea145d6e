"""Text from a model under a routing policy: tokens one after another, each from the cache of those before it."""

from __future__ import annotations

import codecs
import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from natsl.errors import UserError
from natsl.files import user_path
from natsl.space.check import check, check_at_least, check_counts, check_number

if TYPE_CHECKING:  # torch is imported where it is used, so that --help stays fast
    import torch
    from torch import Tensor

    from natsl.cache import Cache
    from natsl.compiled import CompiledPolicy
    from natsl.model import Policies, RoutedLM
    from natsl.space.policy import RoutingPolicy

_SPECIAL = re.compile(r"⟨([kv]?)(\d+)⟩")


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: ``temperature`` 0 takes the likeliest, ``seed`` fixes the draws.

    Only the ``top_k`` likeliest tokens are drawn from (0: all), and of these, at this temperature, the fewest whose
    probabilities come to ``top_p`` (nucleus sampling, arXiv 1904.09751). Of equally likely ones at the end ``top_k``
    takes all, ``top_p`` those with the lowest ids.
    """

    temperature: float = 0.8
    top_k: int = 0
    seed: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_at_least(0, {"temperature": self.temperature})
        check_counts(0, {"top_k": self.top_k, "seed": self.seed})
        check(0 < check_number("top_p", self.top_p) <= 1, "top_p", self.top_p, "it must lie in (0, 1]")

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """A token of finite ``logits`` [V], float64 on the CPU."""
        import torch

        if self.temperature == 0:
            return int(logits.argmax())
        if 0 < self.top_k < len(logits):
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[-1], -torch.inf)
        weights = torch.softmax((logits - logits.max()) / self.temperature, -1)
        if self.top_p < 1:
            ordered, place = weights.sort(descending=True, stable=True)
            more = ordered.cumsum(0) - ordered >= self.top_p  # those before it are enough
            weights = weights.index_fill(0, place[more], 0.0)
        return int(torch.multinomial(weights, 1, generator=generator))


def read_prompt(path: str, option: str = "prompt_file") -> str:
    """The text of a file, or of standard input for ``-``; bytes that are not UTF-8 are kept as ``encode`` takes them.

    ``UserError`` naming ``option`` for a file that cannot be read or is empty.
    """
    try:
        data = sys.stdin.buffer.read() if path == "-" else user_path(path, option).read_bytes()
    except OSError as error:
        raise UserError(f"{option} = {path!r} cannot be read: {error.strerror or error}") from None
    if not data:
        raise UserError(f"{option} = {path!r} is empty: give at least one character")
    return data.decode(errors="surrogateescape")


def read_prompts(path: str) -> list[str]:
    """The prompts of a file, or of standard input for ``-``: one a line, with escapes as in ``unescape``.

    ``UserError`` for a file that cannot be read and for an empty line.
    """
    lines = read_prompt(path, "prompts_file").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        if line in ("", "\r"):
            raise UserError(f"prompts_file = {path!r}: line {number} is empty: give at least one character")
    return [unescape(line.removesuffix("\r")) for line in lines]


def unescape(text: str) -> str:
    """A text of one line with the line breaks that it cannot have: ``\\n`` is one, and two backslashes are one."""
    return re.sub(r"\\([\\n])", lambda m: "\n" if m[1] == "n" else m[1], text)


def encode(text: str, vocab_size: int) -> list[int]:
    """Token ids of a prompt: its UTF-8 bytes; ``⟨k3⟩``, ``⟨v3⟩`` and ``⟨n⟩`` are a key, a value and any id.

    Keys beyond the 64 of the smallest vocabulary (``data.keys``) go by their ids, from ``⟨384⟩`` on.
    ``ValueError`` for an empty prompt and for ids outside the vocabulary.
    """
    from natsl.tasks.sequences import KEYS, VALUES

    check(len(text) > 0, "prompt", text, "it must not be empty")
    tokens: list[int] = []
    end = 0
    for match in _SPECIAL.finditer(text):
        tokens += text[end : match.start()].encode(errors="surrogateescape")
        kind, number = match[1], int(match[2])
        names = {"k": KEYS, "v": VALUES, "": range(vocab_size)}[kind]
        check(number < len(names), "prompt", match[0], f"it must be below ⟨{kind}{len(names)}⟩")
        tokens.append(names[number])
        end = match.end()
    tokens += text[end:].encode(errors="surrogateescape")
    check(max(tokens) < vocab_size, "prompt", max(tokens), f"the model's vocabulary has {vocab_size} tokens")
    return tokens


def decode(tokens: Sequence[int]) -> str:
    """Text of token ids: bytes as UTF-8, recall keys and values as ``⟨k3⟩`` and ``⟨v3⟩``, other ids as ``⟨n⟩``."""
    return "".join(stream(tokens))


def stream(tokens: Iterable[int]) -> Iterator[str]:
    """``decode`` piece by piece: a character appears once its last byte is there."""
    transcript = Transcript()
    for token in tokens:
        if piece := transcript.add(token):
            yield piece
    if rest := transcript.close():
        yield rest


class Transcript:
    """Text of tokens that come one by one, up to the one of the texts ``stop`` that is complete first.

    A character appears once its last byte is there. The stop is left out, and what may be the beginning of one is held
    back until it is known. ``ended``: whether one is complete; what comes later is left out too.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.ended = False
        self._stop = stop
        self._held = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """The text that is certain with this token and was not before."""
        from natsl.tasks.sequences import BYTES, KEYS, VALUES

        if token in BYTES:
            return self._until(self._decoder.decode(bytes([token])))
        name = f"k{token - KEYS.start}" if token in KEYS else f"v{token - VALUES.start}" if token in VALUES else token
        piece = self._decoder.decode(b"", final=True) + f"⟨{name}⟩"
        self._decoder.reset()
        return self._until(piece)

    def close(self) -> str:
        """What was held back, once no token follows."""
        piece = self._until(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return piece

    def _until(self, piece: str) -> str:
        if self.ended:
            return ""
        held = self._held + piece
        ends = [(place + len(text), place) for text in self._stop if (place := held.find(text)) >= 0]
        if ends:
            self.ended, self._held = True, ""
            return held[: min(ends)[1]]
        unsure = max((n for text in self._stop for n in range(1, len(text)) if held.endswith(text[:n])), default=0)
        self._held = held[len(held) - unsure :]
        return held[: len(held) - unsure]


def generate(
    model: RoutedLM,
    policy: RoutingPolicy,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    cache: Cache | None = None,
) -> Iterator[int]:
    """Draw ``max_new_tokens`` ids that continue ``prompt`` (ids), one by one: ``generate_batch`` of one prompt."""
    steps = generate_batch(model, policy, [prompt], max_new_tokens, sampling, cache)
    return (token for (token,) in steps if token is not None)


def generate_batch(
    model: RoutedLM,
    policy: Policies,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    cache: Cache | None = None,
    ends: Callable[[int, int], bool] | None = None,
) -> Iterator[list[int | None]]:
    """Draw up to ``max_new_tokens`` ids that continue each of ``prompts`` (ids, of any lengths): a list per step.

    ``policy``: one for all rows, or several, each for an equal consecutive slice of them, such as one for each.
    ``ends(row, token)``: whether the row ends with this token that was just drawn (None: none does); it gets None in
    later steps, and when all have ended there are no more. A row gets the tokens that its prompt gets by itself, but
    for rounding, which is not the same in a batch of another size. Row i draws with ``sampling.seed`` + i, so row 0
    gets what a single prompt gets. What is drawn depends on the seed and the number of tokens before it, not on how
    many calls they came in.

    The prompts are read in one pass; each further token costs a pass over itself, which reads the cache of those
    before. ``cache``: the state of as many sequences to go on from (None: new ones). It is updated, has the token that
    each drew last in ``unread``, and may go on under another policy, which decides the chunks that are completed later.
    A prompt may then be empty: ``unread`` is read before it. ``ValueError`` for a policy or a cache that does not fit,
    a row without tokens to read and ids outside the vocabulary; ``UserError`` for logits that are not finite.
    """
    check(len(prompts) > 0, "prompts", [], "there must be at least one")
    size, batch = model.config.vocab_size, len(prompts)
    for prompt in prompts:
        ids = [min(prompt, default=0), max(prompt, default=0)]
        check(ids[0] >= 0 and ids[1] < size, "prompt", ids, f"ids must lie in 0–{size - 1}")
    check_counts(1, {"max_new_tokens": max_new_tokens})
    compiled = model.compile_policy(policy, batch)
    cache = model.new_cache(batch) if cache is None else cache
    if len(cache.unread) != batch:
        raise ValueError(f"the cache holds {len(cache.unread)} sequences, not {batch}")
    unread = [[*([] if last is None else [last]), *prompt] for last, prompt in zip(cache.unread, prompts, strict=True)]
    check(min(map(len, unread)) > 0, "prompt", [], "it must have at least one token")
    return _steps(model.eval(), policy, compiled, unread, max_new_tokens, sampling, cache, ends)


def _steps(
    model: RoutedLM,
    policy: Policies,
    compiled: CompiledPolicy,
    unread: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    cache: Cache,
    ends: Callable[[int, int], bool] | None,
) -> Iterator[list[int | None]]:
    import torch

    from natsl.decode import Decoder, step_limit, steps_on
    from natsl.layout import Layout

    device = model.embed.weight.device
    generator = torch.Generator()  # on the CPU: the same draws on every device
    read, last = cache.lengths.tolist(), cache.unread
    decoder: Decoder | None = None  # on a GPU, once the prompts are read
    decodes = steps_on(device) and cache.recording is None and step_limit(model, len(unread)) is None
    for step in range(max_new_tokens):
        lengths = [len(row) for row in unread]
        tokens = torch.tensor([row + [0] * (max(lengths) - len(row)) for row in unread], device=device)
        if decodes and step > 0:
            decoder = Decoder(model, policy, cache) if decoder is None else decoder
            live = torch.tensor(lengths, device=device) > 0
            logits = decoder.step(tokens[:, 0], None if min(lengths) else live).double().cpu()
        else:
            layout = None if min(lengths) == max(lengths) else Layout(torch.tensor(lengths, device=device))
            output = model(tokens, compiled, layout=layout, cache=cache, logits_to_keep=1).logits
            logits = output[:, -1].double().cpu()
        read = [before + new for before, new in zip(read, lengths, strict=True)]
        drawn: list[int | None] = [None] * len(unread)
        for row in (row for row, length in enumerate(lengths) if length):
            if not bool(logits[row].isfinite().all()):
                raise UserError("the model's logits are not finite: it cannot be used")
            seed = hashlib.sha256(f"{sampling.seed + row} {read[row]}".encode()).digest()
            generator.manual_seed(int.from_bytes(seed[:4], "big"))
            drawn[row] = sampling.draw(logits[row], generator)
        last = cache.unread = [old if new is None else new for old, new in zip(last, drawn, strict=True)]
        yield drawn
        unread = [
            [] if token is None or (ends is not None and ends(row, token)) else [token]
            for row, token in enumerate(drawn)
        ]
        if not any(unread):
            return


if __name__ == "__main__":
    from natsl.cli.main import run_verb

    run_verb("generate")
