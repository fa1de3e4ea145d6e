"""Caches that are copied row by row or stored in a file, and how many pages a cap leaves in use."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import pickle
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from natsl import cache as cache_module
from natsl import files
from natsl.cache import Cache
from natsl.config import Precision
from natsl.errors import UserError
from natsl.kernels.pages import NULL
from natsl.model import RoutedLM
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from tests.oracles import tiny_model

C = 8
POLICIES = [  # for layers of kinds r, s, d, r
    RoutingPolicy((first, LayerPolicy(Op.softmax), LayerPolicy(Op.delta), last), C)
    for first, last in (
        (LayerPolicy(threshold=0.0), LayerPolicy(threshold=(-0.3, 0.3))),
        (LayerPolicy(Op.softmax), LayerPolicy(threshold=-9.0, cap=0.4, burst=1)),
        (LayerPolicy(Op.delta), LayerPolicy(threshold=0.2)),
    )
]


def make_model(**options: Any) -> RoutedLM:
    torch.manual_seed(0)
    return tiny_model("rsdr", **{"rope": True, "softmax_per_head": 2, **options}).double()


def filled(model: RoutedLM, tokens: int = 45) -> Cache:
    """Three rows under three policies, inside a chunk; the later of two calls leaves free pages."""
    cache = model.new_cache(3)
    for first, last in ((0, 20), (20, tokens)):
        model(text()[:, first:last], POLICIES, cache=cache)
    cache.unread = [7, None, 9]
    return cache


def text() -> Tensor:
    return torch.randint(384, (3, 80), generator=torch.Generator().manual_seed(1))


def logits(model: RoutedLM, cache: Cache, rows: list[int], policies: list[RoutingPolicy]) -> Tensor:
    """Of tokens 45 to 80 of these rows of ``text()``, single ones among them."""
    found = []
    for first, last in ((45, 46), (46, 47), (47, 70), (70, 80)):
        found.append(model(text()[rows, first:last], policies, cache=cache).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0], [1], [2, 2, 0, 1, 2]], ids=str)
def test_selected_rows_go_on_as_they_were(rows: list[int]) -> None:
    model = make_model()
    cache = filled(model)
    before = copy.deepcopy(cache)
    chosen = cache.select(rows)
    assert (chosen.lengths.tolist(), chosen.unread) == ([45] * len(rows), [cache.unread[row] for row in rows])
    for layer, source in zip(chosen.layers, cache.layers, strict=True):
        tensors, sources = layer.tensors(), source.tensors()
        assert tensors.keys() == sources.keys()
        shared = {x.untyped_storage().data_ptr() for x in sources.values() if x.numel()}
        assert not shared & {x.untyped_storage().data_ptr() for x in tensors.values()}, "nothing is shared"
        if layer.pages is not None:
            used = int(layer.pages.kept.sum()) + layer.pages.kept.numel()
            assert layer.pages.keys.shape[0] == 1 + used, "free pages are left out"
            assert sorted(layer.pages.table[layer.pages.table != NULL].tolist()) == [*range(1, 1 + used)]
    expected = logits(model, copy.deepcopy(cache), [0, 1, 2], POLICIES)
    found = logits(model, chosen, rows, [POLICIES[row] for row in rows])
    torch.testing.assert_close(found, expected[rows], rtol=0, atol=1e-10)
    for layer, was in zip(cache.layers, before.layers, strict=True):
        for name, x in layer.tensors().items():
            assert torch.equal(x, was.tensors()[name]), f"{name}: the source is as it was"


@pytest.mark.parametrize("rows", [[], [3], [-1], [0, 5]], ids=str)
def test_rows_that_there_are_not(rows: list[int]) -> None:
    with pytest.raises(ValueError, match=r"rows = \[.*\] must have at least one entry, each in 0–2"):
        make_model().new_cache(3).select(rows)


def test_a_cache_that_failed_is_neither_copied_nor_stored(tmp_path: Path) -> None:
    model = make_model()
    cache = model.new_cache(1)
    with pytest.raises(RuntimeError), cache.advancing(1):
        raise RuntimeError
    for call in (lambda: cache.select([0]), lambda: cache.save(tmp_path / "x", model)):
        with pytest.raises(ValueError, match="the cache is unusable"):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "model",
    [
        lambda: make_model(),
        lambda: make_model(conv_width=1),
        lambda: tiny_model("rsdr"),
        lambda: tiny_model("rsdr", Precision.bfloat16),
    ],
    ids=["float64", "no convolution", "float32", "bfloat16"],
)
def test_a_stored_cache_goes_on_exactly(model: Callable[[], RoutedLM], tmp_path: Path) -> None:
    net = model()
    cache = filled(net)
    cache.save(tmp_path / "s", net)
    loaded = Cache.load(tmp_path / "s", net)
    assert (loaded.lengths.tolist(), loaded.unread) == ([45] * 3, [7, None, 9])
    assert torch.equal(logits(net, loaded, [0, 1, 2], POLICIES), logits(net, cache, [0, 1, 2], POLICIES))
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_new_cache_and_one_at_a_border_are_stored(tmp_path: Path) -> None:
    model = make_model()
    for tokens in (0, C, 2 * C):
        cache = model.new_cache(1)
        if tokens:
            model(text()[:1, :tokens], POLICIES[0], cache=cache)
        cache.save(tmp_path / "s", model)
        loaded, more = Cache.load(tmp_path / "s", model), text()[:1, tokens : tokens + 30]
        with torch.no_grad():
            whole = model(text()[:1, : tokens + 30], POLICIES[0]).logits[:, tokens:]
        found = model(more, POLICIES[0], cache=loaded).logits
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-10)


def test_the_file_holds_what_is_used_and_has_the_modes_of_any_other(tmp_path: Path) -> None:
    model, umask = make_model(), os.umask(0o022)
    os.umask(umask)
    cache = filled(model)
    cache.save(tmp_path / "s", model)
    assert (tmp_path / "s").stat().st_size < cache.nbytes + 10_000
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o666 & ~umask
    header = json.loads(read_header(tmp_path / "s")["natsl_state"])
    assert (header["format"], header["dtype"], header["lengths"]) == (2, "float64", [45] * 3)


def test_a_full_disk_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    filled(model).save(tmp_path / "s", model)
    before = (tmp_path / "s").read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        filled(model, 30).save(tmp_path / "s", model)
    assert (tmp_path / "s").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def read_header(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    header: dict[str, str] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    return header


def rewritten(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """A state with another header whose checksum is right."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["natsl_state"])
    tensors = safetensors.torch.load(data)
    header.pop("sha256")
    change(header)
    header["sha256"] = cache_module._digest(header, tensors)
    return safetensors.torch.save(tensors, {"natsl_state": json.dumps(header)})


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "is not a state written by natsl, or it is damaged"),
    "cut off": (lambda data: data[:-9], "is not a state written by natsl, or it is damaged"),
    "half": (lambda data: data[: len(data) // 2], "is not a state written by natsl, or it is damaged"),
    "longer": (lambda data: data + b"x", "is not a state written by natsl, or it is damaged"),
    "a bit of a tensor": (lambda data: flipped(data, len(data) - 5), "checksum error"),
    "a bit of the lengths": (lambda data: data.replace(b"[45, 45", b"[45, 44"), "checksum error"),
    "a bit of the unread": (lambda data: data.replace(b"[7, null", b"[6, null"), "checksum error"),
    "text": (lambda _: b"hello, this is no state at all", "is not a state written by natsl"),
    "pickle": (lambda _: pickle.dumps({"layers": []}), "is not a state written by natsl"),
    "other tensors": (lambda _: safetensors.torch.save({"x": torch.ones(3)}), "is not a state written by natsl"),
    "no list": (lambda _: safetensors.torch.save({}, {"natsl_state": "[1]"}), "is not a state written by natsl"),
    "newer": (
        lambda data: rewritten(data, lambda header: header.update(format=3, natsl="9.1")),
        "has the format 3, this natsl reads 2: use natsl 9.1",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_file_that_is_no_whole_state_is_refused(
    damage: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    model, path = make_model(), tmp_path / "s"
    filled(model).save(path, model)
    path.write_bytes(damage(path.read_bytes()))
    before = path.read_bytes()
    with pytest.raises(UserError, match=message) as raised:
        Cache.load(path, model)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert path.read_bytes() == before


def test_every_byte_of_a_state_counts(tmp_path: Path) -> None:
    model, path = tiny_model("d"), tmp_path / "s"
    cache = model.new_cache(1)
    model(text()[:1, :5], RoutingPolicy((LayerPolicy(Op.delta),), C), cache=cache)
    cache.save(path, model)
    data = path.read_bytes()
    for place in range(0, len(data), 97):
        path.write_bytes(flipped(data, place))
        with pytest.raises(UserError):
            Cache.load(path, model)


def test_states_of_other_models_are_refused(tmp_path: Path) -> None:
    model, path = make_model(), tmp_path / "s"
    filled(model).save(path, model)
    other = make_model()
    with torch.no_grad():
        dict(other.named_parameters())["blocks.2.mixer.qkv_proj.weight"].mul_(1.01)
    for wrong, message in (
        (make_model(width=24), "is of another model: another shape"),
        (make_model().float(), "is of another model: float64, not float32"),
        (other, "is of another model: other weights"),
    ):
        with pytest.raises(UserError, match=message):
            Cache.load(path, wrong)
        with pytest.raises(UserError, match="cannot be read: No such file or directory"):
            Cache.load(tmp_path / "none", wrong)
    with pytest.raises(ValueError, match="the cache is of a model of another shape"):
        filled(model).save(path, make_model(width=24))
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        Cache.load(tmp_path, model)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("0.tail", lambda x: x[..., 1:]),
        ("0.tail", lambda x: x.float()),
        ("0.pages.keys", lambda x: x[:, 1:]),
        ("0.pages.table", lambda x: x.int()),
        ("0.pages.table", lambda x: x[:, :1]),
        ("0.pages.kept", lambda x: x[..., None]),
    ],
    ids=["width", "dtype", "chunk", "integers", "heads", "dimensions"],
)
def test_tensors_of_another_form_are_refused(name: str, change: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    model, path = make_model(), tmp_path / "x.state"
    filled(model).save(path, model)
    header, tensors = cache_module._read(path)
    tensors[name] = change(tensors[name]).contiguous()
    header["sha256"] = cache_module._digest(header, tensors)
    path.write_bytes(safetensors.torch.save(tensors, {"natsl_state": json.dumps(header)}))
    with pytest.raises(UserError, match=rf"state: .*x\.state has {re.escape(name)} as torch\.") as error:
        Cache.load(path, model)
    assert "does not fit the model" in str(error.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_state_goes_to_another_device(tmp_path: Path) -> None:
    """Angles of the rotary embedding are float32 in a float64 model too: a rate that differs by an ulp moves them by an
    ulp for every position, and the logits in proportion."""
    model = make_model()
    cache = filled(model)
    cache.save(tmp_path / "s", model)
    expected = logits(model, cache, [0, 1, 2], POLICIES)
    model.cuda()
    loaded = Cache.load(tmp_path / "s", model)
    found = model(text()[:, 45:].cuda(), POLICIES, cache=loaded).logits
    assert found.is_cuda
    tolerance = torch.finfo(torch.float32).eps * text().shape[1] * float(expected.abs().max())
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("cap", "burst"), [(0.02, 3), (0.02, 0), (0.0, 2), (0.0, 0)])
def test_a_cap_bounds_the_pages_of_any_text(cap: float, burst: int) -> None:
    """Every chunk wants to be kept, in 20,000 tokens that come in pieces and one by one."""
    model, length = tiny_model("r", width=8, key_dim=4, value_dim=4), 20_000
    policy = model.compile_policy(RoutingPolicy((LayerPolicy(threshold=-math.inf, cap=cap, burst=burst),), C), 1)
    tokens = torch.randint(384, (1, length))
    cache, read, most = model.new_cache(1), 0, 0
    generator = torch.Generator().manual_seed(0)
    while read < length:
        alone = read % 4000 < 3 * C  # from here one by one, past several borders
        size = 1 if alone else int(torch.randint(1, 15 * C, (1,), generator=generator))
        size = min(size, length - read)
        model(tokens[:, read : read + size], policy, cache=cache, logits_to_keep=0)
        read += size
        pages = cache.layers[0].pages
        assert pages is not None
        bound = math.ceil(cap * (read // C) - 1e-9) + burst
        in_use = (pages.table != NULL).sum(2)  # [1,R]
        assert in_use.max() <= bound + 1, read
        most = max(most, int(in_use.max()))
        assert pages.keys.shape[0] <= (1 + 2 * (bound + 1) + 2) * 5 // 4, "free pages are used again"
        assert int(cache.lengths) == read
    assert most == math.ceil(cap * (length // C)) + burst + 1, "the bound is reached"


def test_a_loaded_state_is_not_reserved_for(tmp_path: Path) -> None:
    model, path = make_model(), tmp_path / "x.state"
    filled(model).save(path, model)
    cache = Cache.load(path, model)
    policy = RoutingPolicy.uniform(model.kinds, model.config.chunk_size, 1.0)
    with pytest.raises(ValueError, match="has not read anything"):
        cache.reserve(model.compile_policy(policy, len(cache.lengths)), 1000)
