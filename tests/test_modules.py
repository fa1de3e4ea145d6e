"""The parts around the routed ops against their formulas, and the choice of who computes them."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from natsl import modules
from natsl.modules import causal_attention, linear_cross_entropy, rms_norm, short_convolution, swiglu
from tests.oracles import assert_compiles, assert_near

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
CUDA = torch.device("cuda")


@pytest.fixture(params=["eager", "compiled"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both sides of what is chosen by whether the compiler is tracing."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: request.param == "compiled")
    return str(request.param)


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for tap in range(min(weight.shape[1], t + 1)):
            out[:, t] = out[:, t] + weight[:, weight.shape[1] - 1 - tap] * x[:, t - tap]
    return out * torch.sigmoid(out)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    T = q.shape[1]
    scores = torch.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum("bhts,bshv->bthv", scores.masked_fill(later, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_causal_attention(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 9, 3, width, dtype=dtype) for width in (8, 8, 5))
    assert_near(causal_attention(q, k, v), attended(q.double(), k.double(), v.double()), dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("key_dim", "value_dim"), [(32, 128), (64, 128), (96, 192)])
def test_causal_attention_on_a_gpu(key_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    inputs = [torch.randn(2, 200, 3, width, dtype=dtype, device=CUDA) for width in (key_dim, key_dim, value_dim)]
    ours, exact = ([x.to(kind).requires_grad_() for x in inputs] for kind in (dtype, torch.float64))
    o, expected = causal_attention(*ours), attended(*exact)
    assert_near(o, expected, dtype)
    upstream = torch.randn_like(o)
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    for actual, other in zip(torch.autograd.grad(o, ours, upstream), wanted, strict=True):
        assert_near(actual, other, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "width"), [(1, 4), (3, 4), (21, 4), (9, 1)])
def test_short_convolution(T: int, width: int, dtype: torch.dtype, mode: str) -> None:
    x, weight = torch.randn(2, T, 6, dtype=dtype), torch.randn(6, width)
    y = short_convolution(x, weight)
    assert y.dtype is dtype
    assert_near(y, convolved(x.double(), weight.to(dtype).double()), dtype)


def test_short_convolution_gradients(mode: str) -> None:
    x, weight = torch.randn(2, 7, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(short_convolution, (x.requires_grad_(), weight.requires_grad_()))


def differentiated(x: Tensor, dy: Tensor, _: None, weight: Tensor, activation: str) -> tuple[Tensor, ...]:
    """The gradients of ``convolved`` by hand."""
    taps = range(weight.shape[1])
    shifted = torch.stack([F.pad(x, (0, 0, i, 0))[:, : x.shape[1]] for i in reversed(taps)], -1)
    y = (shifted * weight).sum(-1)
    dy = dy * torch.sigmoid(y) * (1 + y * torch.sigmoid(-y))
    dx = torch.stack([F.pad(dy, (0, 0, 0, i))[:, i:] * weight[:, -1 - i] for i in taps]).sum(0)
    return torch.empty_like(x).copy_(dx), (shifted * dy[..., None]).sum((0, 1)), torch.empty(0)


def test_the_opaque_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops around the library's convolution, in which a formula stands for the library."""
    library = SimpleNamespace(
        convolution=lambda x, weight, *_, activation: (convolved(x, weight).contiguous(), None),
        convolution_backward=differentiated,
    )
    monkeypatch.setattr(modules, "_load", lambda: library)
    x, weight = torch.randn(2, 9, 6).double(), torch.randn(6, 4).double()
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    test_utils = ("test_schema", "test_faketensor")
    for case in (x, strided):
        ops, dy = torch.ops.natsl, torch.randn_like(x)
        torch.library.opcheck(ops.short_convolution.default, (case, weight), test_utils=test_utils)
        torch.library.opcheck(ops.short_convolution_backward.default, (dy, case, weight), test_utils=test_utils)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = modules._Convolution.apply(x, weight)  # type: ignore[no-untyped-call]
        return y

    assert_near(run(strided, weight), convolved(x, weight))
    assert torch.autograd.gradcheck(run, (x.requires_grad_(), weight.requires_grad_()))
    assert_compiles(lambda x, weight: run(x, weight).square().sum(), [x, weight])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm(dtype: torch.dtype) -> None:
    x, weight = 3 * torch.randn(2, 5, 3, 8, dtype=dtype), torch.rand(8) + 0.5
    wide, w = x.double(), weight.to(dtype).double()
    expected = w * wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert_near(rms_norm(x, weight, 1e-6), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 14, dtype=dtype)
    a, b = x.double().split(7, -1)
    assert_near(swiglu(x), a * torch.sigmoid(a) * b, dtype)


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_half_precision_stays_half_under_autocast(device: str, mode: str) -> None:
    """Autocast makes float32 of some functions' inputs; what comes after must not see two dtypes."""
    x, ones, taps, weight = (torch.rand(*s, device=device) for s in ((2, 5, 8), (8,), (8, 4), (11, 8)))
    x = x.bfloat16()
    with torch.autocast(device, dtype=torch.bfloat16):
        outputs = [
            rms_norm(x, ones, 1e-6),
            swiglu(x),
            short_convolution(x, taps),
            causal_attention(*[x[:, :, None]] * 3),
        ]
        loss, _ = linear_cross_entropy(x, weight, torch.zeros(2, 5, dtype=torch.int64, device=device))
    assert {y.dtype for y in outputs} == {torch.bfloat16}
    assert loss.dtype is torch.float32


def loss_case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(3, 7, 5, dtype=dtype), torch.randn(11, 5, dtype=dtype)
    targets = torch.randint(0, 11, (3, 7))
    targets[0, :4] = targets[2] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("parts", [1, 2, 21], ids=lambda n: f"{n} parts")
def test_linear_cross_entropy(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = loss_case()
    logits = hidden @ weight.T
    expected = torch.zeros(3, 7, dtype=torch.float64)
    for b in range(3):
        for t in range(7):
            if targets[b, t] >= 0:
                expected[b, t] = logits[b, t].logsumexp(0) - logits[b, t, targets[b, t]]
    upstream = torch.randn(3, 7, dtype=torch.float64)
    grads = torch.autograd.grad((expected * upstream).sum(), (hidden, weight))
    monkeypatch.setattr(modules, "LOGITS_AT_ONCE", 11 * -(-21 // parts))
    loss, right = linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype is torch.float64
    assert_near(loss, expected)
    assert torch.equal(right, logits.argmax(-1) == targets)
    for actual, wanted in zip(torch.autograd.grad((loss * upstream).sum(), (hidden, weight)), grads, strict=True):
        assert_near(actual, wanted, torch.float32)


def test_logits_are_made_in_parts_only_where_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        sizes.append(x.shape[0])
        return x @ weight.T

    monkeypatch.setattr(F, "linear", linear)
    hidden, weight, targets = loss_case(torch.float32)
    linear_cross_entropy(hidden, weight, targets)
    monkeypatch.setattr(modules, "LOGITS_AT_ONCE", 100)
    linear_cross_entropy(hidden, weight, targets)
    assert sizes == [21, 9, 9, 3]


# Who computes


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Counts how often the library is asked for."""
    asked: list[str] = []
    monkeypatch.setattr(modules, "_load", lambda: asked.append("library"))
    return asked


@pytest.mark.parametrize(
    ("device", "dtype", "compiling", "expected"),
    [
        ("cuda", torch.bfloat16, False, 1),
        ("cuda", torch.float32, False, 1),
        ("cuda", torch.float64, False, 0),
        ("cuda", torch.bfloat16, True, 0),
        ("cpu", torch.bfloat16, False, 0),
    ],
    ids=["half", "single", "double", "compiling", "cpu"],
)
def test_the_library_is_for_cuda_outside_the_compiler(
    device: str,
    dtype: torch.dtype,
    compiling: bool,
    expected: int,
    loads: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    x: Any = SimpleNamespace(device=torch.device(device), dtype=dtype)
    modules._library(x)
    assert len(loads) == expected


def test_a_missing_library_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["fla", *(name for name in sys.modules if name.startswith("fla."))]:  # an earlier test may have it
        monkeypatch.setitem(sys.modules, name, None)
    modules._load.cache_clear()
    with pytest.warns(UserWarning, match=r"fla-core cannot be used .* pip install 'natsl\[cuda\]' adds it"):
        assert modules._load() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert modules._load() is None
    modules._load.cache_clear()


def test_the_library_is_not_imported_on_a_cpu() -> None:
    code = """
import sys, torch
from natsl.config import ModelConfig
from natsl.model import RoutedLM
from natsl.space.policy import RoutingPolicy
model = RoutedLM(ModelConfig())
x = torch.zeros(1, 5, dtype=torch.int64)
model(x, RoutingPolicy.all_delta(model.kinds, 16), targets=x).loss.sum().backward()
print([name for name in ("fla", "einops") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_one_configuration_is_left_where_it_exists() -> None:
    def kernel() -> SimpleNamespace:
        configs = [SimpleNamespace(kwargs={"B": b}, num_warps=w) for b in (32, 64) for w in (4, 8)]
        return SimpleNamespace(fn=SimpleNamespace(configs=configs))

    known, unknown = kernel(), kernel()
    assert modules._settle(known, {"B": 64}, 4)
    assert [(c.kwargs, c.num_warps) for c in known.fn.configs] == [({"B": 64}, 4)]
    assert not modules._settle(unknown, {"B": 128}, 4)
    assert len(unknown.fn.configs) == 4
    assert not modules._settle(None, {"B": 64}, 4)
    assert not modules._settle(SimpleNamespace(), {"B": 64}, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_compiled_convolution_is_the_library_s() -> None:
    pytest.importorskip("fla")
    x, weight = torch.randn(2, 70, 64, device=CUDA), torch.randn(64, 4, device=CUDA)
    assert_compiles(lambda x, weight: short_convolution(x, weight).square().sum(), [x, weight])
    code = torch._inductor.utils.run_and_get_code(torch.compile(short_convolution), x.bfloat16(), weight)[1][0]
    assert "natsl.short_convolution" in code


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("part", ["convolution", "norm of heads", "norm of a row", "swiglu", "loss"])
def test_the_library_equals_torch_in_double_precision(part: str, dtype: torch.dtype) -> None:
    pytest.importorskip("fla")
    targets = torch.randint(0, 384, (2, 150), device=CUDA)
    targets[:, ::3] = -100

    def run(x: Tensor, weight: Tensor) -> Tensor:
        if part == "convolution":
            return short_convolution(x, weight)
        if part == "swiglu":
            return swiglu(x)
        if part == "loss":
            return linear_cross_entropy(x, weight.to(x.dtype), targets)[0]
        return rms_norm(x.unflatten(-1, (-1, weight.shape[0])), weight, 1e-6)

    shape = {"convolution": (192, 4), "norm of heads": (64,), "norm of a row": (192,), "loss": (384, 192)}.get(
        part, (1,)
    )
    x = torch.randn(2, 150, 192, device=CUDA, dtype=dtype)
    weight = torch.randn(shape, device=CUDA)
    if part == "loss":
        weight = weight.to(dtype).float() * 192**-0.5
    results = []
    for kind in (dtype, torch.float64):
        a, w = x.to(kind).requires_grad_(), weight.to(kind if kind is torch.float64 else torch.float32).requires_grad_()
        y = run(a, w)
        upstream = torch.linspace(-1, 1, y.numel(), device=CUDA, dtype=torch.float64).view_as(y)
        y.backward(upstream.to(y.dtype))
        results.append([y.detach(), a.grad, w.grad])
    for actual, expected in zip(*results, strict=True):
        if actual is not None and expected is not None:
            assert_near(actual.cpu(), expected.cpu(), dtype)


@pytest.mark.parametrize("length", [32, 37], ids=["whole chunks", "partial chunk"])
@pytest.mark.parametrize("at_once", [1, 1 << 24], ids=["chunk by chunk", "at once"])
def test_visible_attention_is_attention_under_the_token_mask(
    length: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules, "_MASK_AT_ONCE", at_once)
    B, N, R, G, C = 2, -(-length // 8), 2, 3, 8
    q, k, v = (torch.randn(B, length, R * G, width).double() for width in (4, 4, 5))
    visible = torch.rand(B, N, N, R) < 0.5  # also of later chunks and the own one, where it means nothing
    mask = torch.zeros(B, R * G, length, length, dtype=torch.bool)
    for b, h, t, s in itertools.product(range(B), range(R * G), range(length), range(length)):
        own = t // C == s // C and s <= t
        mask[b, h, t, s] = own or (s // C < t // C and bool(visible[b, t // C, s // C, h // G]))
    by_head = [x.transpose(1, 2) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(by_head[0], by_head[1], by_head[2], attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(modules.visible_attention(q, k, v, visible, C), expected)


def test_visible_attention_reads_a_long_text_in_parts() -> None:
    q = torch.randn(1, 4096, 4, 8)
    visible = torch.rand(1, 64, 64, 4) < 0.1
    assert modules.visible_attention(q, q, q, visible, 64).isfinite().all()


def test_the_compiler_takes_the_mark_of_a_constant() -> None:
    """``_is_loaded`` has the mark that torch would give it, without the import of the compiler."""

    def marked() -> bool:
        return True

    torch.compiler.assume_constant_result(marked)
    assert vars(marked) == vars(modules._is_loaded) != {}
