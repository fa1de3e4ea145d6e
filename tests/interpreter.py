"""Triton's interpreter without what it does again in every call and for every intermediate tensor: a third of the time.

What a kernel computes stays the same. The names are private to Triton; a version without them is left as it is.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any


def speed_up() -> None:
    """Patch the interpreter of this process; TRITON_INTERPRET=1 must have been set before triton was imported."""
    from triton.language import core
    from triton.runtime import interpreter

    names = ("_LangPatchScope", "_patch_lang", "_get_np_dtype", "interpreter_builder")
    if not all(hasattr(interpreter, name) for name in names):
        return

    # The functions of triton.language are replaced by interpreted ones once, not around every launch and nested call.
    interpreter._LangPatchScope.restore = lambda scope: None
    interpreter._patch_lang = functools.cache(interpreter._patch_lang)

    # Every integer sum and product is computed a second time in int64, to be reported only with debug=True.
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)

    # Types and shapes are few and never change: they are checked and wrapped once.
    numpy_dtypes = functools.cache(interpreter._get_np_dtype)
    uint64 = numpy_dtypes(core.uint64)

    def numpy_dtype(dtype: Any) -> Any:
        return uint64 if dtype.scalar.is_ptr() else numpy_dtypes(dtype.scalar)

    interpreter._get_np_dtype = numpy_dtype

    @functools.cache
    def tensor_shape(sizes: tuple[int, ...]) -> tuple[Any, Any]:
        return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))

    def tensor_init(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = tensor_shape(tuple(type.shape) if type.is_block() else ())

    core.tensor.__init__ = tensor_init

    block_type = core.block_type.__init__

    @functools.cache
    def block_shape(sizes: tuple[int, ...]) -> tuple[Any, int]:
        block = object.__new__(core.block_type)
        block_type(block, core.int32, list(sizes))
        return block.shape, block.numel

    def block_init(self: Any, element_ty: Any, shape: Any) -> None:
        self.element_ty = element_ty
        self.shape, self.numel = block_shape(tuple([getattr(size, "value", size) for size in shape]))
        self.name = f"<{self.shape}, {element_ty}>"

    core.block_type.__init__ = block_init
