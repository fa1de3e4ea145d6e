"""What a model keeps of the tokens that it has read, so that a later call goes on where this one ended.

Shapes: B sequences, C chunk size, D width, R routing heads, G softmax heads per routing head, K, V key and value width
of a routing head, W width of the convolution, M pages. Source: docs/method.md, "Padding, packing, pieces".
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from natsl import __version__
from natsl.compiled import CompiledPolicy, most_kept
from natsl.config import ModelConfig
from natsl.errors import UserError
from natsl.files import to_plain, user_path, write_bytes
from natsl.kernels.delta import DeltaState
from natsl.kernels.pages import KeyPages
from natsl.recording import Recording
from natsl.space.policy import LayerPolicy, Op

if TYPE_CHECKING:
    from natsl.model import RoutedLM

FORMAT = 2  # of a stored cache; in 1 the pages were [P,C,G,·]
ALIGNED = 16  # bytes, which kernels want tensors to begin at
_HEADER = "natsl_state"  # its entry in the metadata of the file


@dataclass
class LayerCache:
    """State of one layer; what its kind has no use for is None.

    ``tail`` [B,W−1,channels]: the last inputs of the convolution. ``total`` [B,D], at least float32: sum of the
    router's inputs over the open chunk. ``delta``: the state of the delta rule. ``pages``: keys and values of the kept
    chunks and of the open one, with the number kept, which caps and the mix count on.

    A field is a tensor, or a named tuple of tensors, with the rows of the batch first unless the tuple has a ``select``
    of its own. Fields that begin with ``_`` have a default and are no part of the state: a copy begins without them.
    """

    tail: Tensor
    total: Tensor | None
    delta: DeltaState | None
    pages: KeyPages | None
    _free: int = 0  # chunks that can be completed before pages may run out
    _tokens: int = 0  # read one at a time since that was counted
    _reserved: bool = False  # whether there are pages enough for all that is to come

    def make_room(self, kept: Tensor, tokens: int, chunk_size: int) -> None:
        """Make sure that ``pages`` have room for the chunks that are ``kept`` [B,R] after a call of so many tokens.

        Waits for the device, for single tokens at most once in a chunk.
        """
        self._make_room(kept, 0, tokens, chunk_size)

    def reserve(self, chunk_size: int) -> None:
        """Make sure that ``pages`` have room for the chunks that end with a token more of every row.

        Waits for the device, at most once in a chunk.
        """
        if self.pages is not None:
            self._make_room(self.pages.kept, 1, 1, chunk_size)

    def set_aside(self, most: Sequence[Sequence[int]]) -> None:
        """Give ``pages`` room for so many kept chunks of each row and head, [B][R], which no later call exceeds."""
        if self.pages is not None:
            heads = [count for row in most for count in row]
            self.pages = self.pages.grow(1 + len(heads) + sum(heads), max(heads) + 1)
            self._reserved = True

    def release(self) -> None:
        """Take pages as they are needed from now on."""
        self._reserved, self._free = False, 0

    def _make_room(self, kept: Tensor, more: int, tokens: int, chunk_size: int) -> None:
        """Give ``pages`` what it needs for kept [B,R] chunks and ``more`` of each head, after a call of ``tokens``.

        Waits for the device, for single tokens at most once in a chunk.
        """
        assert self.pages is not None
        if self._reserved:
            return
        self._tokens += tokens
        if tokens == 1 and -(-self._tokens // chunk_size) <= self._free:
            return
        counts = [count + more for count in kept.flatten().tolist()]
        heads, pages, places = len(counts), self.pages.keys.shape[0], self.pages.table.shape[2]
        used, most = 1 + heads + sum(counts), 1 + max(counts)
        # room for one more chunk of every head, and a fourth of all there is: what has to grow is copied
        if pages < used + heads:
            pages = max(used + heads, pages + pages // 4)
        if places < most + 1:
            places = max(most + 1, 2 * places)
        self.pages = self.pages.grow(pages, places)
        self._free, self._tokens = min((pages - used) // heads, places - most), 0

    def select(self, rows: Tensor) -> LayerCache:
        """Copies of these rows, int64 [n]."""

        def selected(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[rows]
            if hasattr(value, "select"):
                return value.select(rows)
            return type(value)(*map(selected, value)) if hasattr(value, "_fields") else value

        return LayerCache(**{name: selected(value) for name, value in self._state().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the state by name, such as ``tail`` and ``delta.border``."""
        found: dict[str, Tensor] = {}
        for name, value in self._state().items():
            parts = {f"{name}.{part}": x for part, x in value._asdict().items()} if hasattr(value, "_fields") else {}
            found |= {key: x for key, x in (parts or {name: value}).items() if isinstance(x, Tensor)}
        return found

    def replaced(self, tensors: Mapping[str, Tensor]) -> LayerCache:
        """The state with other ``tensors``, by the names that ``tensors()`` gives them."""

        def built(name: str, value: Any) -> Any:
            if hasattr(value, "_fields"):
                return type(value)(*(built(f"{name}.{part}", x) for part, x in value._asdict().items()))
            return tensors.get(name, value)

        return LayerCache(**{name: built(name, value) for name, value in self._state().items()})

    def _state(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self) if not item.name.startswith("_")}


def _new_layers(
    config: ModelConfig, kind: Op, batch: int, device: torch.device, dtype: torch.dtype
) -> Iterator[LayerCache]:
    """The states before the first token of all layers of a kind.

    Each tensor is made for all of them at once: the host would take longer for the many small ones of each layer than
    the device for a short prompt.
    """
    c, G, precise = config, config.softmax_per_head, torch.promote_types(dtype, torch.float32)

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(batch, *shape, device=device, dtype=dtype)

    def copies(x: Tensor) -> Iterator[Tensor]:
        aligned = -(-x.numel() * x.element_size() // ALIGNED) * ALIGNED // x.element_size()
        made = x.new_empty(count, aligned)[:, : x.numel()].unflatten(1, x.shape)
        return iter(made.copy_(x.expand_as(made)).unbind())

    count = c.layers.count(kind)
    tails = copies(zeros(c.conv_width - 1, c.heads * (2 * c.key_dim + c.value_dim)))
    totals: Iterator[Tensor | None] = itertools.repeat(None)
    if kind is Op.routed:
        totals = copies(zeros(c.width, dtype=precise))
    states: Iterator[DeltaState | None] = itertools.repeat(None)
    if kind is not Op.softmax:
        state = DeltaState.zeros(batch, c.heads, c.key_dim, c.value_dim, device=device, dtype=precise)
        states = map(DeltaState, *map(copies, state))
    pages: Iterator[KeyPages | None] = itertools.repeat(None)
    if kind is not Op.delta:
        keys, values = (zeros(1, c.softmax_heads, width // G) for width in (c.key_dim, c.value_dim))
        first = KeyPages.empty(keys, values, c.heads, c.chunk_size)
        # pools are replaced when they grow: one of a layer that keeps nothing must not hold the memory of all
        pools = ([x.clone() for _ in range(count)] for x in first[:2])
        pages = map(KeyPages, *pools, *map(copies, first[2:]))
    return map(LayerCache, tails, totals, states, pages)


class Cache:
    """State of sequences under one model, made by ``RoutedLM.new_cache``; ``forward`` goes on from it and updates it.

    ``lengths`` int64 [B]: tokens read of each sequence. ``layers``: the state of each layer. ``unread``: of each
    sequence the token that ``generate`` has drawn last, which no layer has read yet, or None; ``generate`` reads it
    first, and after any other call of ``forward`` there is none. Keys and values are in pages of a chunk: each head of
    a row has those that it keeps and one for the open chunk, and a layer up to one more for each and a fourth more in
    all. They are written in place: ``select`` and ``copy.deepcopy`` make a cache that goes its own way. A call that
    fails leaves a cache that no call takes. After ``reserve`` all tensors keep their shapes. ``recording``: what
    ``crop`` needs to take tokens back, None before ``record``, and again if set so.
    """

    def __init__(self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        if batch < 1:
            raise ValueError(f"batch = {batch} is not allowed: it must be ≥ 1")
        self.config = config
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.unread: list[int | None] = [None] * batch
        new = {kind: _new_layers(config, kind, batch, device, dtype) for kind in dict.fromkeys(config.layers)}
        self.layers = [next(new[kind]) for kind in config.layers]
        self.recording: Recording | None = None
        self._usable = True
        self._read = 0  # at most, of any row
        self._reserved: tuple[list[tuple[LayerPolicy, ...]], int] | None = None

    def check(self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        """Raise ``ValueError`` unless it can go on with a batch of this size on this device."""
        self._check_usable()
        if self.config != config:
            raise ValueError("the cache is of a model of another shape")
        if self.layers[0].tail.dtype != dtype:
            raise ValueError(f"the cache is in {self.layers[0].tail.dtype}, but the model computes in {dtype}")
        if len(self.lengths) != batch:
            raise ValueError(f"the cache holds {len(self.lengths)} sequences, not {batch}")
        if self.lengths.device != device:
            raise ValueError(f"the cache is on {self.lengths.device}, but tokens are on {device}")

    def reserve(self, policy: CompiledPolicy, max_tokens: int) -> None:
        """Take all the memory that ``max_tokens`` tokens of every row may need under a policy, whatever they are.

        Until then no tensor changes its shape and no call waits for the device because of pages. Columns count, padding
        included. A call beyond, under another policy or with fixed routes, and ``crop``, end that: pages are then taken
        as needed, as in any other cache. ``ValueError`` for a cache that has read tokens.
        """
        if self._read > 0:
            raise ValueError("memory can be reserved only for a cache that has not read anything")
        chunks = max_tokens // policy.fit.chunk_size
        for i, layer in enumerate(self.layers):
            kind, heads = policy.fit.kinds[i], policy.fit.heads
            layer.set_aside(most_kept(policy.plans[i], kind, heads, policy.batch, chunks))
        self._reserved = ([plan.policies for plan in policy.plans], max_tokens)

    def expect(self, policy: CompiledPolicy, tokens: int, fixed: bool = False) -> None:
        """Note that at most ``tokens`` tokens of each row are to be read under a policy, or ``fixed`` routes."""
        self._read += tokens
        if self._reserved is not None:
            policies, most = self._reserved
            if fixed or self._read > most or policies != [plan.policies for plan in policy.plans]:
                self._reserved = None
                for layer in self.layers:
                    layer.release()

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors, free pages included, a recording not."""
        found = [self.lengths, *(x for layer in self.layers for x in layer.tensors().values())]
        return sum(x.numel() * x.element_size() for x in found)

    def _check_usable(self) -> None:
        if not self._usable:
            raise ValueError("the cache is unusable: the last call with it failed")

    def select(self, rows: Sequence[int]) -> Cache:
        """A new cache of these rows, in any order and any number of times; it shares nothing with this one.

        It does not record. Waits for the device. ``ValueError`` for no row, one that there is not, and an unusable
        cache.
        """
        self._check_usable()
        batch = len(self.lengths)
        if not rows or not all(0 <= row < batch for row in rows):
            raise ValueError(f"rows = {list(rows)} must have at least one entry, each in 0–{batch - 1}")
        with torch.inference_mode(False), torch.no_grad():
            index = torch.tensor(rows, device=self.lengths.device)
            chosen = copy.copy(self)
            chosen.lengths = self.lengths[index]
            chosen.layers = [layer.select(index) for layer in self.layers]
            chosen.unread = [self.unread[row] for row in rows]
            chosen._reserved = None
            chosen.recording = None
        return chosen

    def record(self) -> None:
        """Keep from now on what ``crop`` needs to come back to here or to any token that is read later.

        That is a copy of the state without the kept pages, and token ids and routes of every call since. Called again,
        it begins anew. ``ValueError`` for an unusable cache.
        """
        self._check_usable()
        with torch.inference_mode(False), torch.no_grad():
            self.recording = Recording(self)

    def crop(self, lengths: Sequence[int], model: RoutedLM) -> None:
        """Take tokens back: each sequence has only its first ``lengths[row]`` ones then, and is recorded from there on.

        The state is the one that ``model``, whose the cache is, makes of these tokens alone: what it has read since
        ``record`` or the last ``crop`` is read again as far as it stays, in one pass for each policy, and complete
        chunks keep the routes they had. No sequence can go back to before that, where nothing is known any more.
        ``unread`` is None then. Waits for the device. ``ValueError`` for such lengths, and for a cache that does not
        record, does not fit the model or is unusable.
        """
        batch, recording = len(self.lengths), self.recording
        self.check(model.config, batch, self.lengths.device, model.dtype)
        if recording is None:
            raise ValueError("the cache has nothing to go back to: call record() before the tokens that may be cropped")
        if len(lengths) != batch:
            raise ValueError(f"the cache holds {batch} sequences, but lengths = {list(lengths)}")
        bounds = zip(lengths, recording.lengths.tolist(), self.lengths.tolist(), strict=True)
        for row, (length, first, last) in enumerate(bounds):
            if not first <= length <= last:
                raise ValueError(
                    f"lengths[{row}] = {length} is not allowed: it must lie in {first}–{last}, from what was read when "
                    "record() or crop() was last called to what has been read"
                )
        with torch.inference_mode(False), torch.no_grad():
            wanted = torch.tensor(lengths, device=self.lengths.device)
            if not torch.equal(wanted, self.lengths):
                self.recording = None
                recording.restore(self)
                recording.replay(self, model, wanted)
        self.unread = [None] * batch
        self.record()

    def save(self, path: str | Path, model: RoutedLM) -> None:
        """Write the state to a file from which ``load`` goes on, in another process or on another device.

        ``model``: the one that it is of. safetensors without free pages, with a header that has a sha256 of everything.
        The file is the old one or the new one, nothing between. ``ValueError`` for a cache that does not fit the model
        or is unusable.
        """
        file, lengths = user_path(path, "state"), self.lengths.tolist()
        self.check(model.config, len(lengths), self.lengths.device, model.dtype)
        tensors = {
            f"{i}.{name}": x.cpu().contiguous()
            for i, layer in enumerate(self.select(range(len(lengths))).layers)
            for name, x in layer.tensors().items()
        }
        header = {"format": FORMAT, "natsl": __version__, **_made_for(model), "lengths": lengths, "unread": self.unread}
        header["sha256"] = _digest(header, tensors)
        write_bytes(file, safetensors.torch.save(tensors, {_HEADER: json.dumps(header)}))

    @staticmethod
    def load(path: str | Path, model: RoutedLM) -> Cache:
        """The state that ``save`` has written, on the device of ``model``.

        ``UserError`` for a file that cannot be read, is damaged or of a newer format, and for a state of another model:
        one of another shape, precision or other weights.
        """
        file = user_path(path, "state")
        header, tensors = _read(file)
        for name, value in _made_for(model).items():
            stored = header.get(name)
            if stored != value:
                differs = {"config": "another shape", "dtype": f"{stored}, not {value}", "weights": "other weights"}
                raise UserError(f"state: {file} is of another model: {differs[name]}")
        cache = model.new_cache(len(header["lengths"]))
        expected = {f"{i}.{name}" for i, layer in enumerate(cache.layers) for name in layer.tensors()}
        if tensors.keys() != expected:
            raise UserError(f"state: {file} has other tensors than this natsl reads: use natsl {header['natsl']}")
        if header["format"] == 1:
            tensors = {name: x.transpose(1, 2) if name.endswith(_POOLS) else x for name, x in tensors.items()}
        for i, layer in enumerate(cache.layers):
            for name, x in layer.tensors().items():
                found = tensors[f"{i}.{name}"]
                if not _fits(name, found, x):
                    form = f"{found.dtype} {list(found.shape)}"
                    raise UserError(f"state: {file} has {i}.{name} as {form}, which does not fit the model")
        device, cache._read = cache.lengths.device, max(header["lengths"])
        with torch.inference_mode(False):  # else no call outside it could use the cache
            cache.lengths = torch.tensor(header["lengths"], device=device)
            cache.unread = header["unread"]
            for i, layer in enumerate(cache.layers):
                parts = {name: tensors[f"{i}.{name}"].to(device, copy=True).contiguous() for name in layer.tensors()}
                cache.layers[i] = layer.replaced(parts)
        return cache

    @contextmanager
    def advancing(self, tokens: Tensor | int | None) -> Iterator[None]:
        """While layers update their states; afterwards each sequence has read ``tokens`` (int64 [B] or a number).

        None: ``lengths`` is counted up in place meanwhile, and what is read is not recorded (``ValueError`` if it had
        to be).
        """
        if tokens is None and self.recording is not None:
            raise ValueError("the cache records, which single steps do not: set its recording to None, or use forward")
        self._usable = False
        yield
        if tokens is not None:
            self.lengths = self.lengths + tokens
        self.unread = [None] * len(self.unread)
        self._usable = True


_POOLS = ("pages.keys", "pages.values")
_FREE = {**dict.fromkeys(_POOLS, 0), "pages.table": 2}  # dimensions that grow with what is kept


def _fits(name: str, x: Tensor, new: Tensor) -> bool:
    """Whether a stored tensor has the dtype and the shape of that of a new cache."""
    free = _FREE.get(name)
    sizes = [list(y.shape[:free]) + list(y.shape[free + 1 :]) if free is not None else list(y.shape) for y in (x, new)]
    return x.dtype is new.dtype and x.dim() == new.dim() and sizes[0] == sizes[1]


def _made_for(model: RoutedLM) -> dict[str, str]:
    """What a model must have in common with the one that made a state: shape, weights (a sample of each), dtype."""
    config = json.dumps(to_plain(model.config), sort_keys=True)
    weights = hashlib.sha256()
    buffers = (item for item in model.named_buffers() if not item[0].startswith("calibration."))  # which makes no state
    for name, x in (*model.named_parameters(), *buffers):
        few = x.detach().flatten()[:: max(1, x.numel() // 256)]
        weights.update(name.encode() + _content(few.cpu()))
    return {
        "config": hashlib.sha256(config.encode()).hexdigest(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": weights.hexdigest(),
    }


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Hex sha256 of a header and of all tensors, on the CPU."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(_content(x))
    return digest.hexdigest()


def _content(x: Tensor) -> bytes:
    return x.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a stored cache, once they are known to be what was written."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"state: {file} cannot be read: {error.strerror or error}") from None
    try:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][_HEADER])
        newer, natsl, written = header["format"] > FORMAT, header["natsl"], header.pop("sha256")
        tensors = {} if newer else safetensors.torch.load(data)
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise UserError(f"state: {file} is not a state written by natsl, or it is damaged") from None
    if newer:
        number = header["format"]
        raise UserError(f"state: {file} has the format {number}, this natsl reads {FORMAT}: use natsl {natsl}")
    if _digest(header, tensors) != written:
        raise UserError(f"checksum error: state: {file} has changed since it was written")
    return header, tensors
