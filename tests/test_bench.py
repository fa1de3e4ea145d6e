"""The benchmark: its floors against the figures they were derived from, its checks, its command line, its tables."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from natsl.kernels import warmup
from natsl.kernels.bench import __main__ as bench
from natsl.kernels.bench import rivals, run, timing, tune, verify
from natsl.kernels.bench.report import KernelRow, Row, draw, kernel_table, line
from natsl.kernels.bench.roofline import (
    H100,
    delta_backward_split,
    delta_forward_split,
    for_dtype,
    kernel_work,
    op_work,
    softmax_backward_split,
)
from natsl.kernels.dispatch import COUNTERFACTUALS, Limits, split_values
from natsl.kernels.launch import parameters
from natsl.kernels.launch.launcher import Launcher
from natsl.kernels.registry import OPS, KernelSpec, OpSpec, Options, OpWork, kernels, layer_inputs
from natsl.kernels.shape import (
    Case,
    Shape,
    Work,
    delta_backward,
    delta_forward,
    earlier_pairs,
    mix_backward,
    mix_forward,
    softmax_backward,
    softmax_forward,
    visible_pairs,
)
from natsl.kernels.softmax import routed_softmax
from natsl.kernels.warmup import run_all
from tests.oracles import assert_near, triton_modules

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
# Three chunks of a tiny layer; what Triton's interpreter does in a second.
TINY, TINY_TOKENS = bench.TINY, bench.TINY_TOKENS

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")

# Tokens → microseconds by kept fraction .1, .3, .5: softmax forward, its backward fused and split (operations alone);
# then the delta rule forward, minimum and several kernels, backward, minimum and several. One sequence of the 340M
# layer at 800 TFLOP/s and 3 TB/s.
FIGURES: dict[int, tuple[list[float], list[float], list[float], float, float, float, float]] = {
    4096: ([12.6, 15, 25], [13, 35, 57], [18, 50, 82], 12.6, 67, 27, 157),
    32768: ([315, 932, 1549], [735, 2175, 3615], [1049, 3107, 5164], 101, 537, 213, 1258),
    131072: ([4970, 14861, 24752], [11600, 34700, 57800], [16600, 49500, 82500], 403, 2147, 854, 5033),
}


def microseconds(work: Work) -> float:
    return 1e3 * H100.floor_ms(work)


@pytest.mark.parametrize("tokens", FIGURES)
def test_floors_are_those_of_the_figures(tokens: int) -> None:
    shape = Shape()
    forward, fused, split, *delta = FIGURES[tokens]
    for i, fraction in enumerate((0.1, 0.3, 0.5)):
        case = Case(1, tokens, fraction)
        assert microseconds(softmax_forward(shape, case)) == pytest.approx(forward[i], rel=0.05)
        for figure, work in ((fused[i], softmax_backward), (split[i], softmax_backward_split)):
            products = Work(work(shape, case).flops, 0.0)
            assert microseconds(products) == pytest.approx(figure, rel=0.05)
        functions = (delta_forward, delta_forward_split, delta_backward, delta_backward_split)
        assert [microseconds(f(shape, case)) for f in functions] == pytest.approx(delta, rel=0.05)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 50])
def test_pairs_are_counted_one_by_one(tokens: int, fraction: float) -> None:
    own = earlier = 0
    for t in range(tokens):
        for s in range(t + 1):
            own += s // 16 == t // 16
            earlier += s // 16 < t // 16
    case = Case(1, tokens, fraction)
    assert earlier_pairs(case, 16) == earlier
    assert visible_pairs(case, 16) == pytest.approx(own + fraction * earlier)


def test_work_grows_with_everything() -> None:
    shape, case = Shape(), Case(2, 4096, 0.3)
    for op in ("routed_softmax", "routed_delta_rule", "routed_mix", "branches", "layer"):
        for small, large in zip(op_work(op, shape, case), op_work(op, shape, replace(case, batch=4)), strict=True):
            assert large == Work(2 * small.flops, 2 * small.bytes)
    layer = op_work("layer", shape, case)
    parts = [op_work(op, shape, case) for op in ("routed_softmax", "routed_delta_rule", "routed_mix")]
    assert layer[1].flops == pytest.approx(sum(part[1].flops for part in parts))
    assert kernel_work(shape, case)["softmax_counterfactual"] == Work(0.0, 0.0)
    assert kernel_work(shape, replace(case, rate=0.1))["softmax_counterfactual"].flops > 0
    split = kernel_work(shape, case)
    both = split["softmax_dq"].flops + split["softmax_dkv"].flops
    assert both == pytest.approx(softmax_backward_split(shape, case).flops)
    assert for_dtype(H100, "float32").flops == pytest.approx(H100.flops / 6)
    assert for_dtype(H100, "float16") == H100


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"heads": 0}, "heads = 0"),
        ({"dtype": "float64"}, "dtype = 'float64'"),
        ({"chunk_size": 48}, "chunk_size = 48"),
        ({"key_dim": 264}, "key_dim = 264"),
        ({"value_dim": 130, "softmax_per_head": 4}, "value_dim = 130"),
    ],
    ids=str,
)
def test_shape_names_what_is_wrong(options: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        Shape(**options)  # type: ignore[arg-type]


def run_bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "natsl.kernels.bench", *arguments]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def test_help_shows_what_is_meant_for_users() -> None:
    result = run_bench("--help")
    assert result.returncode == 0, result.stderr
    assert "--first-call" in result.stdout
    assert "--first-call-child" not in result.stdout


@without_gpu
def test_without_cuda_one_line_and_exit_code_2() -> None:
    result = run_bench()
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("No CUDA device")
    assert len(result.stderr.splitlines()) == 1


@without_gpu
@pytest.mark.parametrize("option", ["--tune", "--first-call"])
def test_the_interpreter_times_nothing(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([option]) == 2
    assert "need one" in capsys.readouterr().err


@without_gpu
def test_the_interpreter_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^\d+ checks good; largest error", out)
    assert f"\nChecked: {', '.join(name for name, spec in OPS.items() if spec.checked)}\n" in out
    assert "No times" in out


def test_a_red_check_is_named_and_nothing_is_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "OPS", {"gated_norm": OPS["gated_norm"]})
    exact = OpSpec.differentiate

    def wrong(spec: OpSpec, tensors: dict[str, Tensor], options: Options, *gradients: object) -> object:
        outputs, results = exact(spec, tensors, options, *gradients)  # type: ignore[arg-type]
        if options.backend == "triton":
            results = {**results, "gate": results["gate"] + 0.5}
        return outputs, results

    monkeypatch.setattr(OpSpec, "differentiate", wrong)
    device = CPU if not torch.cuda.is_available() else torch.device("cuda", 0)
    assert not bench._check(TINY, verify.Scope(TINY_TOKENS, 0.5, ("none",)), device)
    first, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"WRONG gated_norm, any route: gradient of gate is off by \d\.\d+e-02, allowed 1.0e-05", first)
    assert last.startswith("1 of 5 checks failed: nothing is timed")


def test_difference_is_infinite_for_what_is_not_a_number() -> None:
    expected = torch.tensor([4.0, 1.0])
    assert verify.difference(torch.tensor([4.0, 1.4]), expected) == pytest.approx(0.1)
    assert verify.difference(torch.tensor([4.0, float("nan")]), expected) == float("inf")
    assert verify.difference(torch.ones(3), expected) == float("inf")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--lengths", "4096,x"], "'x' is not allowed: an integer ≥ 1"),
        (["--batch", "0"], "'0' is not allowed"),
        (["--fractions", "0.3,1.5"], "'1.5' is not allowed: a number in [0, 1]"),
        (["--rate", "0"], "'0' is not allowed: a number in (0, 1]"),
        (["--against", "sdpa,fla"], "'fla' is not allowed: sdpa, flex, torch or none"),
        (["--chunk", "48"], "invalid choice: 48"),
        (["--dtype", "float64"], "invalid choice: 'float64'"),
        (["--key-dim", "512"], "key_dim = 512 is not allowed: it must be ≤ 256"),
        (["--softmax-per-head", "3"], "key_dim = 128 is not allowed"),
        (["--ship", "table.json"], "--ship PATH is not allowed without --tune"),
        (["--tune", "--first-call"], "choose one"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_named(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        bench.main(arguments)
    assert exit_.value.code == 2
    assert named in capsys.readouterr().err


def test_which_cases_are_timed() -> None:
    def cases(*arguments: str) -> list[Case]:
        return list(bench._cases(bench.parser().parse_args(arguments)))

    assert len(cases()) == 21
    assert {case.tokens for case in cases() if case.batch == 8} == {4096}
    assert cases("--quick") == [Case(1, 4096, 0.3), Case(1, 32768, 0.3), Case(8, 4096, 0.3)]
    assert cases("--lengths", "100,200", "--batch", "3", "--fractions", "0.5") == [Case(3, 100, 0.5), Case(3, 200, 0.5)]
    assert {case.rate for case in cases("--rate", "0.2")} == {0.0}  # mode none samples nothing
    assert {case.rate for case in cases("--rate", "0.2", "--counterfactual", "insertion")} == {0.2}


def without_clock(monkeypatch: pytest.MonkeyPatch, symbols: dict[str, tuple[float, int]]) -> None:
    """What the benchmark measures is made up: every time and memory, and the kernels that the profiler sees."""
    monkeypatch.setattr(timing, "time_ms", lambda function, **options: 2.0)
    monkeypatch.setattr(timing, "peak_gib", lambda function, inputs: 0.5)
    monkeypatch.setattr(timing, "ceilings", lambda: H100)
    monkeypatch.setattr(timing, "kernel_times", lambda function: symbols)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")


@without_gpu
def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All of the benchmark but the clock, on the interpreter."""
    symbols = {"softmax_forward_kernel": (0.25, 1), "mix_forward_kernel": (0.125, 1), "add": (0.5, 3)}
    without_clock(monkeypatch, symbols)
    arguments = ["--lengths", "36", "--fractions", "0.5", "--against", "sdpa", "--out"]
    args = bench.parser().parse_args([*arguments, str(tmp_path / "new" / "folder")])
    run.bench(bench._plan(args, TINY), CPU)
    out = capsys.readouterr().out
    assert max(len(text) for text in out.splitlines() if not text.startswith("Written")) <= 120
    result = json.loads((tmp_path / "new" / "folder" / "bench.json").read_text())
    names = [row["name"] for row in result["rows"]]
    assert names == [
        "routed_softmax",
        "routed_delta_rule",
        "branches",
        "routed_mix",
        "layer",
        "layer, insertion 0.1",
        "dense, SDPA cuDNN",
    ]
    layer = result["rows"][4]
    assert (layer["forward_ms"], layer["both_ms"], layer["peak_gib"]) == (2.0, 2.0, 0.5)
    assert 0 < layer["floor_forward_ms"] < layer["floor_both_ms"]
    assert result["rows"][-1]["note"].startswith("skipped: ")  # no cuDNN here
    assert {row["kernel"] for row in result["kernels"]} >= {"softmax_forward", "mix_forward", "torch, in routed_mix"}
    assert (tmp_path / "new" / "folder" / "bench.png").read_bytes().startswith(b"\x89PNG")


@without_gpu
def test_an_op_is_entered_in_the_registry_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Checks, tuning, rows, profile, floors and warm-up know an op that nothing but the registry names."""
    calls: list[bool] = []

    def call(x: Mapping[str, Tensor], options: Options) -> tuple[Tensor, ...]:
        calls.append(x["route"].requires_grad)
        return (x["q"] * x["route"].sum(),)

    kernel = KernelSpec(
        "toy_backward", in_backward=True, work=mix_forward, candidates=({"num_warps": 4}, {"num_warps": 8})
    )
    spec = OpSpec(
        "toy",
        inputs=("q", "route"),
        call=call,
        limits=(Limits({"K": 64}),),
        kernels=(kernel,),
        work=OpWork(mix_forward, mix_backward),
        packs=True,
        fixed_routes=True,
    )
    monkeypatch.setitem(OPS, "toy", spec)
    shape, case = TINY, Case(1, TINY_TOKENS, 0.5)
    assert op_work("toy", shape, case) == (mix_forward(shape, case), mix_backward(shape, case))
    assert kernel_work(shape, case)["toy_backward"] == mix_forward(shape, case)

    names = [item.name for item in verify.settings(shape, verify.Scope(TINY_TOKENS), CPU) if item.spec is spec]
    assert names == [f"counterfactual {mode}{end}" for mode in COUNTERFACTUALS for end in ("", ", packed")]

    (step,) = [step for step in tune.steps() if step.spec is spec]
    assert step.kernel is kernel
    assert tune.candidates(kernel, {"num_warps": 4}, "bfloat16") == [{"num_warps": 8}]

    without_clock(monkeypatch, {"toy_backward_kernel": (0.25, 2)})
    plan = run.Plan(shape, (case,), Options(shape.chunk_size, "insertion", backend="torch"), (), 1.0, tmp_path)
    point = run.Point(plan, case, H100, CPU)
    assert [row.name for row in run.case_rows(point)][-1] == "toy"
    rows = [(row.kernel, row.ms, row.launches) for row in run.profile(point)]
    assert rows[-2:] == [("toy_backward", 0.25, 2), ("torch, in toy", 0.0, 0)]

    calls.clear()
    run_all([spec], layer_inputs(shape, case, CPU), Options(shape.chunk_size))
    assert calls == [True, False]
    assert spec.limit(shape, 1) is None
    assert spec.limit(Shape(1, 128, 32), 1) == "K = 128 is not supported by the triton backend: at most 64"


@without_gpu
def test_warm_up_runs_what_the_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op of the registry, but for those whose limits the shape exceeds."""
    names: list[str] = []

    def compile_ahead(function: Callable[[], None]) -> int:
        function()
        return 7

    def differentiate(spec: OpSpec, inputs: Mapping[str, Tensor], options: Options) -> None:
        names.append(f"{spec.name}{'' if inputs['route'].requires_grad else ', fixed routes'}")

    monkeypatch.setattr(warmup, "compile_ahead", compile_ahead)
    monkeypatch.setattr(warmup, "layer_inputs", lambda shape, case, device: layer_inputs(shape, case, CPU))
    monkeypatch.setattr(OpSpec, "differentiate", differentiate)
    cuda = torch.device("cuda", 0)
    assert warmup.warm_up(TINY, CPU) == 0
    assert warmup.warm_up(TINY, cuda, tokens=64) == 7
    assert names == [*OPS, "branches, fixed routes"]
    names.clear()
    warmup.warm_up(replace(TINY, chunk_size=128), cuda, tokens=64)  # too long for the delta rule in float32
    assert OPS.keys() - set(names) == {"routed_delta_rule", "branches", "layer"}


def test_kernels_are_named_as_in_profiles_and_tables() -> None:
    functions = {name for module in triton_modules() for name, x in vars(module).items() if isinstance(x, Launcher)}
    registered = {f"{kernel.name}_kernel" for kernel in kernels()}
    decode = {f"decode_{part}_kernel" for part in ("prepare", "memories", "mix")}  # timed by kernels/bench/decode.py
    # of no op that is timed there
    others = {
        "routing_capped_routes_kernel",
        "pages_plan_kernel",
        "pages_softmax_kernel",
        "pages_write_kernel",
        "convolution_continued_kernel",
        "mix_norm_kernel",
        "rows_linear_kernel",
    }
    assert functions == registered | decode | others
    names = [kernel.name for spec in OPS.values() for kernel in spec.kernels if spec.work is not None]
    assert len(names) == len(set(names))


def test_tables_fit_and_shares_are_right(tmp_path: Path) -> None:
    row = Row("dense, SDPA cuDNN", 1, 131072, None, 82.9, 300.6, 300.2, 41.45, 150.1, 12.25)
    text = line(row)
    assert len(text) <= 120
    assert re.findall(r"(\d+)%", text) == ["50", "50"]
    kernels = [KernelRow("softmax_forward", 1, tokens, 0.3, 2.0, 1, 1.0) for tokens in bench.LENGTHS]
    kernels.append(KernelRow("torch, in routed_softmax", 8, 4096, 0.3, 0.5, 4, None))
    table = kernel_table(kernels).splitlines()
    assert max(map(len, table)) <= 120
    assert "2.000 50%" in table[2]
    draw(tmp_path / "x.png", [row, replace(row, name="layer", fraction=0.3)], 0.3, "title")
    assert (tmp_path / "x.png").stat().st_size > 1000


@pytest.mark.parametrize("chunk_size", [32, 64, 128])
def test_block_mask_is_that_of_the_routes(chunk_size: int) -> None:
    tokens, heads = 640, 4
    route = (torch.rand(2, tokens // chunk_size, 2) < 0.6).float()
    ours = rivals.routed_block_mask(route, tokens, heads, chunk_size)
    assert ours.mask_mod is not None
    expected = create_block_mask(ours.mask_mod, 2, heads, tokens, tokens, device="cpu", BLOCK_SIZE=rivals.FLEX_BLOCK)
    assert torch.equal(ours.to_dense(), expected.to_dense())
    assert torch.equal(ours.kv_num_blocks, expected.kv_num_blocks)
    assert ours.full_kv_num_blocks is not None
    assert expected.full_kv_num_blocks is not None
    assert torch.equal(ours.full_kv_num_blocks, expected.full_kv_num_blocks)


@pytest.mark.parametrize("name", ["sdpa", "flex"])
def test_rivals_compute_what_they_are_said_to(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.cuda.is_available()
    if not gpu:  # the compiler, flex's gradient and cuDNN are for a GPU

        def flex(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Tensor:
            return flex_attention(q.detach(), k.detach(), v.detach(), block_mask=block_mask)

        monkeypatch.setattr(rivals, "_compiled_flex", lambda: flex)
        monkeypatch.setattr(rivals, "SDPBackend", SimpleNamespace(CUDNN_ATTENTION=SDPBackend.MATH))
    shape = Shape(2, 32, 64, 2, 64, "bfloat16" if gpu else "float32")
    tensors = layer_inputs(shape, Case(2, 256, 0.5), torch.device("cuda") if gpu else CPU)
    route = tensors["route"].detach()
    assert 0 < route[:, :-1].mean() < 1
    if name == "sdpa":
        route = torch.ones_like(route)
    q, k, v = (tensors[key].detach() for key in ("q_softmax", "k_softmax", "v"))
    expected = routed_softmax(q, k, split_values(v, shape.softmax_heads), route, chunk_size=64, backend="torch")
    attend, inputs = rivals.prepare(name, tensors, 64)
    o = attend()
    assert_near(o.transpose(1, 2), expected)
    assert [x.requires_grad for x in inputs] == [True] * 3
    if gpu:
        assert all(x.shape == y.shape for x, y in zip(torch.autograd.grad(o.sum(), inputs), inputs, strict=True))


def test_block_mask_needs_whole_blocks() -> None:
    with pytest.raises(ValueError, match="100 tokens"):
        rivals.routed_block_mask(torch.ones(1, 2, 1), 100, 1, 64)


def test_candidates_are_parameters_of_the_kernels() -> None:
    device = CPU if not torch.cuda.is_available() else torch.device("cuda", 0)
    inputs = layer_inputs(TINY, Case(1, TINY_TOKENS, 0.5), device)
    fixed = {"delta_scan"}  # its blocks follow from the number of heads and sequences
    tuned = set()
    for spec in OPS.values():
        if not spec.kernels:
            continue
        with parameters.observed() as picks:
            spec.differentiate(inputs, Options(TINY.chunk_size, "insertion", 1.0, "triton"))
        names = {step.kernel.name for step in tune.steps() if step.spec is spec}
        assert names <= set(picks) <= fixed | names
        tuned |= names
        for kernel in spec.kernels:
            for candidate in kernel.candidates:
                assert set(candidate) <= set(picks[kernel.name][1]), kernel.name
        for step in tune.steps():
            if step.spec is not spec:
                continue
            default = picks[step.kernel.name][1]
            for dtype in ("bfloat16", "float32"):
                items = tune.candidates(step.kernel, default, dtype)
                assert items
                assert default not in items
                assert all(list(item) == list(default) for item in items)
    assert tuned == {kernel.name for kernel in kernels() if kernel.candidates}
    assert tuned | fixed == set(kernel_work(Shape(), Case(1, 64, 0.5)))


@without_gpu
def test_tuning_keeps_the_fastest_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = OPS["gated_norm"]
    monkeypatch.setattr(tune, "steps", lambda: [tune.Step(spec, spec.kernels[0])])
    seconds = {1: 3.0, 2: 0.5, 8: 0.9, 16: 0.8}
    tried = [{"BLOCK_ROWS": rows} for rows in (2, 8, 16, 1, 3)]
    monkeypatch.setattr(tune, "candidates", lambda kernel, default, dtype: [default | item for item in tried])
    exact = OpSpec.differentiate

    def rows() -> int:
        return parameters._forced.get("mix_forward", {}).get("BLOCK_ROWS", 64)

    def differentiated(*arguments: object) -> object:
        outputs, gradients = exact(*arguments)  # type: ignore[arg-type]
        return ((outputs[0] + 0.1,), gradients) if rows() == 2 else (outputs, gradients)

    monkeypatch.setattr(OpSpec, "differentiate", differentiated)
    monkeypatch.setattr(tune, "_time", lambda *_: seconds.get(rows(), 1.0))
    reported: list[tune.Choice] = []
    results = tune.tune(TINY, CPU, reported.append, [Case(1, TINY_TOKENS, 0.5)])
    (choice,) = reported
    assert results == {"mix_forward": {choice.key: choice.best}}
    assert choice.best["BLOCK_ROWS"] == 16
    assert choice.share == pytest.approx(0.8)
    assert len(choice.skipped) == 2  # wrong by 0.1; not a power of two


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's table in a folder of the test, an H100 by name, nothing shipped."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(parameters, "SHIPPED", tmp_path / "shipped.json")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100 80GB HBM3")
    parameters.forget()
    yield parameters.stored_path()
    parameters.forget()


def picked() -> dict[str, int]:
    return parameters.pick("softmax_dq", "bfloat16 C64", torch.device("cuda", 0), {"BLOCK_M": 64, "num_warps": 4})


def test_what_is_forced_stored_or_shipped_is_picked(tables: Path) -> None:
    assert picked() == {"BLOCK_M": 64, "num_warps": 4}
    parameters.SHIPPED.write_text('{"H100": {}}')
    results = {"softmax_dq": {"bfloat16 C64": {"BLOCK_M": 128, "num_warps": 8, "RENAMED": 1}}}
    parameters.store(parameters.SHIPPED, "NVIDIA H100 80GB HBM3", results)
    assert json.loads(parameters.SHIPPED.read_text()) == {"H100": results}
    assert picked() == {"BLOCK_M": 128, "num_warps": 8}  # of the stored names, those that the kernel has
    parameters.store(tables, "NVIDIA H100 80GB HBM3", {"softmax_dq": {"bfloat16 C64": {"BLOCK_M": 32}}})
    parameters.store(tables, "NVIDIA H100 80GB HBM3", {"softmax_dq": {"bfloat16 C32": {"BLOCK_M": 16}}})
    assert picked() == {"BLOCK_M": 32, "num_warps": 4}
    assert set(json.loads(tables.read_text())["NVIDIA H100 80GB HBM3"]["softmax_dq"]) == {
        "bfloat16 C32",
        "bfloat16 C64",
    }
    with parameters.forced({"softmax_dq": {"num_warps": 2}}):
        assert picked() == {"BLOCK_M": 32, "num_warps": 2}
        with parameters.untuned():
            assert picked() == {"BLOCK_M": 64, "num_warps": 2}
    assert sorted(path.name for path in tables.parent.iterdir()) == ["tuned.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"H100": []}', '{"H100": {"a": {"b": {"BLOCK_M": "64"}}}}'])
def test_a_damaged_table_is_named(tables: Path, text: str) -> None:
    tables.parent.mkdir(parents=True)
    tables.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(tables))):
        picked()


def test_the_shipped_table_is_one() -> None:
    table = parameters.read_table(ROOT / "kernels" / "launch" / "tuned.json")
    assert "H100" in table
    names = {kernel.name for kernel in kernels() if kernel.candidates}
    for entries in table.values():
        assert set(entries) <= names


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class NoGPU:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(NoGPU())
from natsl.kernels._triton import mix as mix_triton
from natsl.kernels.launch.compilation import compile_ahead
from natsl.kernels.launch.parameters import forced
x, weight = torch.randn(1, 8, 2, 16, dtype=torch.bfloat16), torch.ones(16)
def run():
    y = mix_triton._forward(x, x, weight, 1e-6, [])
    mix_triton._backward(y, x, x, weight, 1e-6, [])
def failing():
    with forced({"mix_forward": {"BLOCK_ROWS": 3}}):
        run()
print(compile_ahead(run, 2), compile_ahead(run, 2), compile_ahead(failing, 2))
"""


def test_kernels_compile_ahead_without_being_launched(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["2", "0", "0"]  # forward and backward; both there; one that does not compile
