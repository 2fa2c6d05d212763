"""Vectors for compiled kernels: one float32 of each head, as long as a processor's vector where there are 4, 8 or 16.

Compilers make vectors of loops only where they can show that no array overlaps another, and keep what is summed in
memory where they cannot. Kernels that say vectors themselves leave it no choice. In numba code, `Lanes` are read by
`load`, written by `store`, and added, subtracted and multiplied with each other and with numbers.
"""

import math
import operator
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic as numba_intrinsic
from numba.extending import lower_builtin, models, register_model

intrinsic: Any = numba_intrinsic  # to a type checker, callers would give the typing context, too
_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
#: Values are finite. Not among these is `reassoc`: sums are in the order in which they are written.
_FLAGS = ("contract", "nnan", "ninf", "nsz")
_LOG2_E, _LN_2 = 1 / math.log(2), math.log(2)
_LOWEST = -87.0  # of what exp is taken: below, float32 ends
_BIAS, _MANTISSA = 127, 23  # of the exponent of a float32, and the place where it begins
_TERMS = 7  # of the series of exp; its error is 5e-9 at ln(2) / 2


class Lanes(types.Type):
    """The type of such a vector."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(name=f"Lanes({number})")


@register_model(Lanes)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Lanes) -> None:
        super().__init__(manager, kind, ir.VectorType(_FLOAT, kind.number))


def _all(builder: ir.IRBuilder, value: Any, number: int) -> Any:
    """A number in every lane."""
    one = builder.insert_element(ir.Constant(ir.VectorType(_FLOAT, number), ir.Undefined), value, ir.Constant(_INT, 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_INT, number), [0] * number))


def _constant(value: float, number: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(_FLOAT, number), [float(np.float32(value))] * number)


class _Arithmetic(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        lanes = next((part for part in args if isinstance(part, Lanes)), None)
        if lanes is None or len(args) != 2:
            return None
        return signature(lanes, *(part if isinstance(part, Lanes) else types.float32 for part in args))


def _define(operation: Any, name: str) -> None:
    infer_global(operation)(type(f"_{name}", (_Arithmetic,), {}))

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        number = sig.return_type.number
        both = [
            value if isinstance(kind, Lanes) else _all(builder, value, number)
            for value, kind in zip(args, sig.args, strict=True)
        ]
        return getattr(builder, name)(*both, flags=_FLAGS)

    for kinds in ((Lanes, Lanes), (Lanes, types.Float), (types.Float, Lanes)):
        lower_builtin(operation, *kinds)(lower)


_define(operator.add, "fadd")
_define(operator.sub, "fsub")
_define(operator.mul, "fmul")


def _place(context: Any, builder: Any, kind: Any, array: Any, offset: Any, number: int) -> Any:
    data = context.make_array(kind)(context, builder, value=array).data
    start = builder.gep(data, [offset])
    return builder.bitcast(start, ir.VectorType(_FLOAT, number).as_pointer())


@intrinsic
def load(typing_context, array, offset, number):
    """The lanes that stand in a contiguous float32 array from a place on, counted without regard to its shape."""
    if not isinstance(number, types.IntegerLiteral):
        return None
    lanes = Lanes(number.literal_value)

    def emit(context, builder, sig, args):
        return builder.load(_place(context, builder, sig.args[0], args[0], args[1], lanes.number), align=4)

    return lanes(array, types.intp, number), emit


@intrinsic
def store(typing_context, array, offset, value):
    """Write lanes into a contiguous float32 array."""

    def emit(context, builder, sig, args):
        place = _place(context, builder, sig.args[0], args[0], args[1], sig.args[2].number)
        builder.store(args[2], place, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), emit


@intrinsic
def everywhere(typing_context, value, number):
    """A number in every lane."""
    if not isinstance(number, types.IntegerLiteral):
        return None
    lanes = Lanes(number.literal_value)

    def emit(context, builder, sig, args):
        return _all(builder, args[0], lanes.number)

    return lanes(types.float32, number), emit


@intrinsic
def larger(typing_context, a, b):
    """The larger of each two."""

    def emit(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return a(a, a), emit


@intrinsic
def where_positive(typing_context, sign, a, b):
    """`a` where `sign` is above 0, else `b`."""

    def emit(context, builder, sig, args):
        zero = _constant(0.0, sig.return_type.number)
        return builder.select(builder.fcmp_ordered(">", args[0], zero), args[1], args[2])

    return a(sign, a, a), emit


@intrinsic
def over(typing_context, value):
    """1 over each."""

    def emit(context, builder, sig, args):
        return builder.fdiv(_constant(1.0, sig.return_type.number), args[0])

    return value(value), emit


@intrinsic
def total(typing_context, value):
    """The sum over the lanes."""

    def emit(context, builder, sig, args):
        out = builder.extract_element(args[0], ir.Constant(_INT, 0))
        for lane in range(1, sig.args[0].number):
            out = builder.fadd(out, builder.extract_element(args[0], ir.Constant(_INT, lane)))
        return out

    return types.float32(value), emit


@intrinsic
def exponential(typing_context, value):
    """The exponential of each, none above 88; to 1e-7 of it, below -87 to 1e-37."""

    def emit(context, builder, sig, args):
        number = sig.return_type.number
        floats, ints = ir.VectorType(_FLOAT, number), ir.VectorType(_INT, number)
        lowest = _constant(_LOWEST, number)
        x = builder.select(builder.fcmp_ordered(">", args[0], lowest), args[0], lowest)
        # exp(x) = 2^n exp(x - n ln 2), with n the nearest whole number of x / ln 2, and the rest by its series.
        kind = ir.FunctionType(floats, [floats])
        nearest = cgutils.get_or_insert_function(builder.module, kind, f"llvm.rint.v{number}f32")
        n = builder.call(nearest, [builder.fmul(x, _constant(_LOG2_E, number), flags=_FLAGS)])
        rest = builder.fadd(x, builder.fmul(n, _constant(-_LN_2, number), flags=_FLAGS), flags=_FLAGS)
        series = _constant(1 / math.factorial(_TERMS), number)
        for term in range(_TERMS - 1, -1, -1):
            scaled = builder.fmul(series, rest, flags=_FLAGS)
            series = builder.fadd(scaled, _constant(1 / math.factorial(term), number), flags=_FLAGS)
        exponent = builder.add(builder.fptosi(n, ints), ir.Constant(ints, [_BIAS] * number))
        power = builder.bitcast(builder.shl(exponent, ir.Constant(ints, [_MANTISSA] * number)), floats)
        return builder.fmul(series, power, flags=_FLAGS)

    return value(value), emit
