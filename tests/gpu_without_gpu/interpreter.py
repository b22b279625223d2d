"""Mends Triton's interpreter (TRITON_INTERPRET=1), which is silently wrong for bfloat16 and float8 and out of bounds.

Mended, bfloat16 and float8 are computed in float32 and rounded once, to nearest even (float8 saturates, as on the GPU);
`tl.fma` is fused; minima and maxima treat NaN as compiled code does; and loads and stores outside of the tensors passed
to the kernel are refused.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from gpu_without_gpu.errors import GpuError
from gpu_without_gpu.formats import E4M3, E5M2, Array, bf16_to_f32, f32_to_bf16, fused_multiply_add, to_odd_f32
from gpu_without_gpu.memory import GlobalMemory

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

DECODE: dict[Any, Callable[[Array], Array]] = {
    tl.bfloat16: bf16_to_f32,
    tl.float8e4nv: E4M3.decode,
    tl.float8e5: E5M2.decode,
}
ENCODE: dict[Any, Callable[[Array], Array]] = {
    tl.bfloat16: f32_to_bf16,
    tl.float8e4nv: E4M3.encode,
    tl.float8e5: E5M2.encode,
}
COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}
BITWISE = {np.bitwise_and, np.bitwise_or, np.bitwise_xor}


def _numbers(handle: Any) -> Array:
    """What a handle holds, small floats as float32."""
    decode = DECODE.get(handle.dtype.scalar)
    return decode(np.ascontiguousarray(handle.data)) if decode else handle.data


def _handle(values: Array, kind: Any) -> Any:
    encode = ENCODE.get(kind.scalar)
    if encode is None:
        return Handle(np.asarray(values).astype(interpreter._get_np_dtype(kind), copy=False), kind.scalar)
    if values.dtype == np.float64:
        values = to_odd_f32(values)
    return Handle(encode(values.astype(np.float32, copy=False)).reshape(values.shape), kind.scalar)


def _small(*handles: Any) -> bool:
    return any(handle.dtype.scalar in DECODE for handle in handles)


def _binary_op(plain: Callable[..., Any]) -> Callable[..., Any]:
    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not _small(left) or op in BITWISE:
            return plain(self, left, right, op)
        result = op(_numbers(left), _numbers(right))
        return Handle(result, left.dtype.scalar) if op in COMPARISONS else _handle(result, left.dtype)

    return binary_op


def _unary_op(plain: Callable[..., Any]) -> Callable[..., Any]:
    def unary_op(self: Any, operand: Any, op: Any) -> Any:
        return _handle(op(_numbers(operand)), operand.dtype) if _small(operand) else plain(self, operand, op)

    return unary_op


def _cast(plain: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: Any, origin: Any, kind: Any, rounding: Any = None) -> Any:
        if origin.dtype.scalar == kind.scalar:
            return origin
        if rounding is not None and rounding != interpreter._ir.ROUNDING_MODE.RTNE:
            raise NotImplementedError(f"rounding {rounding} without a GPU")
        if kind.scalar in ENCODE or _small(origin):
            return _handle(_numbers(origin), kind)
        return plain(self, origin, kind) if rounding is None else plain(self, origin, kind, rounding)

    return cast


def _dot(plain: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, precision: Any, max_imprecise: Any) -> Any:
        if not accumulator.dtype.scalar.is_floating():
            return plain(self, a, b, accumulator, precision, max_imprecise)
        product = _numbers(a).astype(np.float64) @ _numbers(b).astype(np.float64)
        return _handle(product + _numbers(accumulator), accumulator.dtype)

    return create_dot


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    if z.dtype.scalar == tl.float64:
        raise NotImplementedError("tl.fma of float64 without a GPU")
    return _handle(fused_multiply_add(_numbers(x), _numbers(y), _numbers(z)), z.dtype)


def _clamp(self: Any, x: Any, low: Any, high: Any, propagate_nans: Any) -> Any:
    return _handle(np.clip(_numbers(x), _numbers(low), _numbers(high)), x.dtype)


def _reduce(plain: Callable[..., Any]) -> Callable[..., Any]:
    extremes = {tl.standard._elementwise_max: np.fmax, tl.standard._elementwise_min: np.fmin}

    def apply_impl(self: Any, operands: Any) -> Any:
        kind = operands[0].dtype
        if len(operands) != 1 or not kind.is_floating():
            return plain(self, operands)
        if (extreme := extremes.get(self.combine_fn)) is not None:  # NaN only where all are NaN, without a warning
            values = extreme.reduce(_numbers(operands[0].handle), axis=self.axis, keepdims=self.keep_dims)
        elif kind.scalar in DECODE:
            wide = self.to_tensor(_numbers(operands[0].handle), tl.float32)
            result = plain(self, (wide,))
            result = result[0] if isinstance(result, (list, tuple)) else result
            values = result.handle.data if result.type.is_block() else result.handle.data.item()
        else:
            return plain(self, operands)
        return self.to_tensor(_handle(np.asarray(values, np.float64), kind).data, kind)

    return apply_impl


class _Checked:
    """Triton's native loads and stores, with a check of bounds before each."""

    memory = GlobalMemory()

    def __init__(self, native: Any) -> None:
        self._native = native

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def _check(self, pointers: Array, mask: Array, itemsize: int) -> None:
        addresses = np.broadcast_to(pointers, np.broadcast_shapes(pointers.shape, mask.shape))
        if (chosen := addresses[np.broadcast_to(mask.astype(bool), addresses.shape)]).size:
            self.memory.check(chosen.astype(np.int64), itemsize)

    def load(self, pointers: Array, mask: Array, other: Array, kind: Any) -> Any:
        self._check(pointers, mask, np.dtype(kind).itemsize)
        return self._native.load(pointers, mask, other, kind)

    def store(self, pointers: Array, values: Array, mask: Array) -> Any:
        self._check(pointers, mask, values.itemsize)
        return self._native.store(pointers, values, mask)

    def atomic_rmw(self, operation: Any, pointers: Array, values: Array, mask: Array, order: Any) -> Any:
        self._check(pointers, mask, values.itemsize)
        return self._native.atomic_rmw(operation, pointers, values, mask, order)

    def atomic_cas(self, pointers: Array, expected: Array, values: Array, order: Any) -> Any:
        self._check(pointers, np.ones(1, bool), values.itemsize)
        return self._native.atomic_cas(pointers, expected, values, order)


def _init_arguments(plain: Callable[..., Any]) -> Callable[..., Any]:
    def init(self: Any, arguments: Any, keywords: Any) -> Any:
        result = plain(self, arguments, keywords)
        memory = _Checked.memory = GlobalMemory()

        def add(value: Any, name: str) -> None:
            if isinstance(value, tuple):
                for i, each in enumerate(value):
                    add(each, f"{name}[{i}]")
            elif hasattr(value, "base"):
                add(value.base, name)
            elif hasattr(value, "data_ptr"):
                memory.add_tensor(value, name)

        for name, value in [*zip(self.arg_names, result[0], strict=False), *result[1].items()]:
            add(value, name)
        memory.seal()
        return result

    return init


def _call(plain: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *arguments: Any, **keywords: Any) -> None:
        try:
            with np.errstate(all="ignore"):
                plain(self, *arguments, **keywords)
        except interpreter.InterpreterError as error:  # show what it wraps, as when compiled
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, GpuError):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause from None

    return call


def mend() -> None:
    """Replace what is wrong. Does nothing the second time."""
    if isinstance(interpreter._interpreter, _Checked):
        return
    Builder.binary_op = _binary_op(Builder.binary_op)
    Builder.unary_op = _unary_op(Builder.unary_op)
    Builder.cast_impl = _cast(Builder.cast_impl)
    Builder.create_fp_to_fp = _cast(Builder.create_fp_to_fp)
    Builder.create_dot = _dot(Builder.create_dot)
    Builder.create_fma = _fma
    Builder.create_clampf = _clamp
    Builder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, np.fmax)
    Builder.create_minnumf = lambda self, x, y: self.binary_op(x, y, np.fmin)
    interpreter.ReduceOps.apply_impl = _reduce(interpreter.ReduceOps.apply_impl)
    interpreter._interpreter = _Checked(interpreter._interpreter)
    interpreter.GridExecutor._init_args_hst = _init_arguments(interpreter.GridExecutor._init_args_hst)
    interpreter.GridExecutor.__call__ = _call(interpreter.GridExecutor.__call__)
