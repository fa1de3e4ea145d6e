"""The Triton kernels share one dialect: their names, which profiles and tables use, and those of their arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")

from natsl.kernels._triton import convolution, decode, delta_kernels, mix, pages, routing, softmax_kernels
from natsl.kernels.launch import parameters
from natsl.kernels.launch.launcher import Launcher

PREFIXES = {
    softmax_kernels: "softmax",
    delta_kernels: "delta",
    mix: "mix",
    routing: "routing",
    decode: "decode",
    pages: "pages",
    convolution: "convolution",
}
KERNELS = {name: x for module in PREFIXES for name, x in vars(module).items() if isinstance(x, Launcher)}


def source(kernel: Launcher) -> Callable[..., Any]:
    """The Python function of a kernel, compiled or interpreted."""
    function: Callable[..., Any] = kernel.function.fn
    return function


def test_every_kernel_is_named_after_its_op() -> None:
    assert len(KERNELS) == 23
    for module, op in PREFIXES.items():
        names = [name for name, x in vars(module).items() if isinstance(x, Launcher)]
        assert names
        assert all(re.fullmatch(rf"{op}_[a-z_]+_kernel", name) for name in names)
        assert all(source(KERNELS[name]).__name__ == name for name in names)


def test_launch_parameters_are_those_of_a_kernel() -> None:
    for table in parameters.read_table(parameters.SHIPPED).values():
        assert {f"{name}_kernel" for name in table} <= set(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_arguments_are_pointers_then_numbers_then_constants(name: str) -> None:
    parameters = inspect.signature(source(KERNELS[name])).parameters
    kinds = []
    for argument, parameter in parameters.items():
        constant = "constexpr" in str(parameter.annotation)
        if re.fullmatch(r"p_[a-z_]+", argument):
            kinds.append("pointer")
        elif re.fullmatch(r"s_[a-z_]+_[bthnr]", argument):  # a stride may be a constant
            kinds.append("number")
        else:
            assert constant == (re.fullmatch(r"[A-Z][A-Z_]*|[HKV]s", argument) is not None) or argument in set("TNMRJG")
            kinds.append("constant" if constant else "number")
    assert kinds == sorted(kinds, key=["pointer", "number", "constant"].index)
