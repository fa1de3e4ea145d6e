"""Text from a model under a routing policy: tokens one after another, each from the cache of those before it."""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from natsl.errors import UserError
from natsl.files import user_path
from natsl.space.check import check, check_at_least, check_counts, check_number

if TYPE_CHECKING:  # torch is imported where it is used, so that --help stays fast
    import torch
    from torch import Tensor

    from natsl.cache import Cache
    from natsl.model import RoutedLM
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


def read_prompt(path: str) -> str:
    """The text of a file, or of standard input for ``-``; bytes that are not UTF-8 are kept as ``encode`` takes them.

    ``UserError`` for a file that cannot be read or is empty.
    """
    try:
        data = sys.stdin.buffer.read() if path == "-" else user_path(path, "prompt_file").read_bytes()
    except OSError as error:
        raise UserError(f"prompt_file = {path!r} cannot be read: {error.strerror or error}") from None
    if not data:
        raise UserError(f"prompt_file = {path!r} is empty: give at least one character")
    return data.decode(errors="surrogateescape")


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


def stream(tokens: Iterator[int] | Sequence[int]) -> Iterator[str]:
    """``decode`` piece by piece: a character appears once its last byte is there."""
    from natsl.tasks.sequences import BYTES, KEYS, VALUES

    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if token in BYTES:
            piece = decoder.decode(bytes([token]))
        else:
            name = (
                f"k{token - KEYS.start}" if token in KEYS else f"v{token - VALUES.start}" if token in VALUES else token
            )
            piece = decoder.decode(b"", final=True) + f"⟨{name}⟩"
            decoder.reset()
        if piece:
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


def until(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """The pieces up to the one of the texts ``stop`` that is complete first, which is left out; nothing is asked for
    after it. What may be the beginning of one is held back until it is known.
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [(place + len(text), place) for text in stop if (place := held.find(text)) >= 0]
        if found:
            if end := min(found)[1]:
                yield held[:end]
            return
        longest = max((n for text in stop for n in range(1, len(text)) if held.endswith(text[:n])), default=0)
        if safe := held[: len(held) - longest]:
            yield safe
        held = held[len(safe) :]
    if held:
        yield held


def generate(
    model: RoutedLM,
    policy: RoutingPolicy,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    cache: Cache | None = None,
) -> Iterator[int]:
    """Draw ``max_new_tokens`` ids that continue ``prompt`` (ids, at least one), one by one.

    The prompt is read in one pass; each further token costs a pass over itself, which reads the cache of those before.
    ``cache``: the state of one sequence to go on from (None: a new one); it is updated, and has not read the last token
    that was drawn. The same arguments, with the cache in the same state, give the same tokens. ``ValueError`` for a
    policy that does not fit, ids outside the vocabulary and, with the first token, a cache that does not fit;
    ``UserError`` for logits that are not finite.
    """
    check(len(prompt) > 0, "prompt", list(prompt), "it must have at least one token")
    size = model.config.vocab_size
    check(
        min(prompt) >= 0 and max(prompt) < size, "prompt", [min(prompt), max(prompt)], f"ids must lie in 0–{size - 1}"
    )
    check_counts(1, {"max_new_tokens": max_new_tokens})
    policy.check(model.kinds, model.config.chunk_size, model.config.heads)
    cache = model.new_cache(1) if cache is None else cache
    return _tokens(model.eval(), policy, list(prompt), max_new_tokens, sampling, cache)


def _tokens(
    model: RoutedLM,
    policy: RoutingPolicy,
    unread: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    cache: Cache,
) -> Iterator[int]:
    import torch

    device = model.embed.weight.device
    generator = torch.Generator().manual_seed(sampling.seed)  # on the CPU: the same draws on every device
    compiled = model.compile_policy(policy, 1)
    for _ in range(max_new_tokens):
        tokens = torch.tensor([unread], device=device)
        logits = model(tokens, compiled, cache=cache, logits_to_keep=1).logits[0, -1].double().cpu()
        if not bool(logits.isfinite().all()):
            raise UserError("the model's logits are not finite: it cannot be used")
        unread = [sampling.draw(logits, generator)]
        yield unread[0]


if __name__ == "__main__":
    from natsl.cli.main import run_verb

    run_verb("generate")
