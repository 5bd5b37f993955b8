"""Which operations act on each channel by itself.

A rule answers one question: if some operands of an equation were re-indexed along an axis (column k
of the new operand is column c(k) of the old), is the result the old result re-indexed the same way
along some axis, and which of the other operands must be re-indexed too? It gets the equation and
the axis of each re-indexed operand (None for the others) and returns

    (axis of the results, axis along which to re-index each other operand or None),

or None where the operation mixes channels. Shapes never change, so the operation itself, with all
its parameters, runs as the network's own: that is what keeps the bits.

A new rule is one function with `@_rule(primitive names)`, and a model in tests/test_conformance.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.extend import core

Axes = tuple[Any, ...]  # of each operand an int or None: where a rule needs an int, it asks first
Rule = Callable[[core.JaxprEqn, Axes], tuple[int, Axes] | None]

_ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp
    clz complex conj convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp
    exp2 expm1 floor ge gt igamma igammac imag integer_pow is_finite le lgamma log log1p logistic lt
    max min mul name ne neg nextafter not or polygamma population_count pow real reduce_precision
    regularized_incomplete_beta rem round rsqrt select_n shift_left shift_right_arithmetic
    shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta
    """.split()
_REDUCE = "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin".split()
_SCAN = "cumsum cumprod cummax cummin cumlogsumexp rev".split()
_RULES: dict[str, Rule] = {}


def shape_of(value: core.Var | core.Literal) -> tuple[int, ...]:
    """Of a jaxpr's value: JAX's type of it, AbstractValue, names neither shape nor dtype."""
    aval: Any = value.aval
    return aval.shape


def dtype_of(value: core.Var | core.Literal) -> Any:
    """NumPy's, or an extended one, such as of random keys."""
    aval: Any = value.aval
    return aval.dtype


def column_rule(equation: core.JaxprEqn, axes: Axes) -> tuple[int, Axes] | None:
    """The answer of the primitive's rule, None where it has none or mixes channels."""
    rule = _RULES.get(equation.primitive.name)
    return rule(equation, axes) if rule else None


def operand_axes(equation: core.JaxprEqn, axis: int) -> Axes | None:
    """The converse for chains of elementwise operations: operands' axes from the result's axis.

    None where it is not known; an axis of None says that the operand does not vary along it.
    """
    name = equation.primitive.name
    if name in _ELEMENTWISE:
        return tuple(axis if _varies(v, equation, axis) else None for v in equation.invars)
    if name == "broadcast_in_dim" and len(equation.invars) == 1:
        dimensions = equation.params["broadcast_dimensions"]
        if axis not in dimensions:
            return (None,)
        source = dimensions.index(axis)
        size = shape_of(equation.invars[0])[source]
        return (source if size == shape_of(equation.outvars[0])[axis] else None,)
    return None


def _rule(names: str | list[str]) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names.split() if isinstance(names, str) else names, rule))
        return rule

    return register


def _ndim(value: core.Var | core.Literal) -> int:
    return len(shape_of(value))


def _varies(value: core.Var | core.Literal, equation: core.JaxprEqn, axis: int) -> bool:
    """Whether an elementwise operand has the result's axis, rather than one value for all of it."""
    shape = shape_of(value)
    return bool(shape) and shape[axis] == shape_of(equation.outvars[0])[axis]


def _common_axis(axes: Axes) -> int | None:
    found = {axis for axis in axes if axis is not None}
    return found.pop() if len(found) == 1 else None


@_rule(_ELEMENTWISE)
def _elementwise(equation: core.JaxprEqn, axes: Axes) -> tuple[int, Axes] | None:
    axis = _common_axis(axes)
    operands = [v for v, a in zip(equation.invars, axes, strict=True) if a is not None]
    if axis is None or not all(_varies(v, equation, axis) for v in operands):
        return None
    others = zip(axes, equation.invars, strict=True)
    return axis, tuple(
        axis if a is None and _varies(v, equation, axis) else None for a, v in others
    )


@_rule("bitcast_convert_type")
def _bitcast(equation: core.JaxprEqn, axes: Axes) -> tuple[int, Axes] | None:
    # To words of another width it has an axis more or less.
    same = shape_of(equation.invars[0]) == shape_of(equation.outvars[0])
    return _elementwise(equation, axes) if same else None


@_rule("optimization_barrier")
def _barrier(equation: core.JaxprEqn, axes: Axes) -> tuple[int, Axes] | None:
    return _elementwise(equation, axes) if len(axes) == 1 else None


@_rule("concatenate")
def _concatenate(equation: core.JaxprEqn, axes: Axes) -> tuple[int, Axes] | None:
    # Joining other axes is per channel; joining channels moves them, and ends the columns.
    axis = _common_axis(axes)
    if axis is None or axis == equation.params["dimension"]:
        return None
    return axis, tuple(axis if a is None else None for a in axes)


@_rule("broadcast_in_dim")
def _broadcast_in_dim(equation: core.JaxprEqn, axes: Axes) -> tuple[int, Axes] | None:
    out = equation.params["broadcast_dimensions"][axes[0]]
    if shape_of(equation.invars[0])[axes[0]] != shape_of(equation.outvars[0])[out]:
        return None
    return out, (None,) * len(axes)


@_rule("reshape")
def _reshape(equation: core.JaxprEqn, axes: Axes) -> tuple[int, Axes] | None:
    # The axis survives if the same number of elements lies before it and within it.
    before, after = shape_of(equation.invars[0]), shape_of(equation.outvars[0])
    size, outer = before[axes[0]], np.prod(before[: axes[0]])
    for axis, length in enumerate(after):
        if length == size and np.prod(after[:axis]) == outer:
            return axis, (None,) * len(axes)
    return None


@_rule("transpose")
def _transpose(equation: core.JaxprEqn, axes: Axes) -> tuple[int, Axes]:
    return tuple(equation.params["permutation"]).index(axes[0]), (None,)


@_rule("squeeze")
def _squeeze(equation: core.JaxprEqn, axes: Axes) -> tuple[int, Axes] | None:
    return _drop_axes(axes[0], equation.params["dimensions"])


@_rule(_REDUCE)
def _reduce(equation: core.JaxprEqn, axes: Axes) -> tuple[int, Axes] | None:
    return _drop_axes(axes[0], equation.params["axes"])


def _drop_axes(axis: int, dropped: tuple[int, ...]) -> tuple[int, Axes] | None:
    if axis in dropped:
        return None
    return axis - sum(d < axis for d in dropped), (None,)


@_rule(_SCAN)
def _along_another_axis(equation: core.JaxprEqn, axes: Axes) -> tuple[int, Axes] | None:
    params = equation.params
    along = params.get("dimensions", (params.get("axis", params.get("dimension")),))
    if axes[0] in along or len(axes) != 1:
        return None
    return axes[0], (None,)


@_rule("sort")
def _sort(equation: core.JaxprEqn, axes: Axes) -> tuple[int, Axes] | None:
    axis = _common_axis(axes)
    if axis is None or axis == equation.params["dimension"]:
        return None
    return axis, tuple(axis if a is None else None for a in axes)


@_rule("top_k")
def _top_k(equation: core.JaxprEqn, axes: Axes) -> tuple[int, Axes] | None:
    along = equation.params.get("axis", _ndim(equation.invars[0]) - 1)
    return None if axes[0] in (None, along) else (axes[0], (None,) * len(axes))


@_rule("fft")
def _fft(equation: core.JaxprEqn, axes: Axes) -> tuple[int, Axes] | None:
    transformed = len(equation.params["fft_lengths"])
    return None if axes[0] >= _ndim(equation.invars[0]) - transformed else (axes[0], (None,))


@_rule("dynamic_slice")
def _dynamic_slice(equation: core.JaxprEqn, axes: Axes) -> tuple[int, Axes] | None:
    axis = axes[0]
    if axis is None or any(a is not None for a in axes[1:]):
        return None
    whole = shape_of(equation.invars[0])[axis] == shape_of(equation.outvars[0])[axis]
    return (axis, (None,) * len(axes)) if whole else None


@_rule("dynamic_update_slice")
def _dynamic_update_slice(equation: core.JaxprEqn, axes: Axes) -> tuple[int, Axes] | None:
    axis = _common_axis(axes[:2])
    if axis is None or any(a is not None for a in axes[2:]):
        return None
    sizes = {shape_of(value)[axis] for value in equation.invars[:2]}
    takes = tuple(axis if a is None else None for a in axes[:2])
    return (axis, takes + (None,) * len(axes[2:])) if len(sizes) == 1 else None


@_rule("tile")
def _tile(equation: core.JaxprEqn, axes: Axes) -> tuple[int, Axes] | None:
    return (axes[0], (None,)) if equation.params["reps"][axes[0]] == 1 else None


@_rule("scatter scatter-add scatter-mul scatter-min scatter-max")
def _scatter(equation: core.JaxprEqn, axes: Axes) -> tuple[int, Axes] | None:
    # Along an axis that every update covers.
    numbers = equation.params["dimension_numbers"]
    operand, indices, updates = axes
    picked = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    left = [a for a in range(_ndim(equation.invars[0])) if a not in picked]
    windows = dict(zip(left, numbers.update_window_dims, strict=True))
    if operand is None and updates is not None:
        operand = next((a for a, window in windows.items() if window == updates), None)
    if indices is not None or operand not in windows:
        return None
    if operand in numbers.scatter_dims_to_operand_dims or updates not in (None, windows[operand]):
        return None
    window = windows[operand]
    if shape_of(equation.invars[2])[window] != shape_of(equation.invars[0])[operand]:
        return None
    takes = (operand if axes[0] is None else None, None, window if updates is None else None)
    return operand, takes


@_rule("gather")
def _gather(equation: core.JaxprEqn, axes: Axes) -> tuple[int, Axes] | None:
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    operand, indices = axes
    of_batch = tuple(numbers.operand_batching_dims), tuple(numbers.start_indices_batching_dims)
    ahead = [a for a in range(_ndim(equation.outvars[0])) if a not in numbers.offset_dims]
    if operand in of_batch[0] or indices in of_batch[1]:  # both are picked along the same axis
        which = of_batch[0].index(operand) if operand is not None else of_batch[1].index(indices)
        both = (of_batch[0][which], of_batch[1][which])
        if any(a not in (None, b) for a, b in zip(axes, both, strict=True)):
            return None
        takes = tuple(b if a is None else None for a, b in zip(axes, both, strict=True))
        return ahead[both[1]], takes
    if operand is None:  # a row of results for each index
        return None if indices == _ndim(equation.invars[1]) - 1 else (ahead[indices], (None, None))
    dropped = (*numbers.collapsed_slice_dims, *of_batch[0])
    whole = sizes[operand] == shape_of(equation.invars[0])[operand]
    if indices is not None or operand in (*dropped, *numbers.start_index_map) or not whole:
        return None
    left = [a for a in range(len(sizes)) if a not in dropped]
    return numbers.offset_dims[left.index(operand)], (None, None)


@_rule("reduce_window_max reduce_window_min reduce_window_sum")
def _reduce_window(equation: core.JaxprEqn, axes: Axes) -> tuple[int, Axes] | None:
    axis, params = axes[0], equation.params
    whole = params["window_dimensions"][axis] == params["window_strides"][axis] == 1
    if not whole or tuple(params["padding"][axis]) != (0, 0):
        return None
    return axis, (None,)


@_rule("pad")
def _pad(equation: core.JaxprEqn, axes: Axes) -> tuple[int, Axes] | None:
    if axes[1] is not None or equation.params["padding_config"][axes[0]] != (0, 0, 0):
        return None
    return axes[0], (None, None)


@_rule("slice split")
def _slice(equation: core.JaxprEqn, axes: Axes) -> tuple[int, Axes] | None:
    axis = axes[0]
    sizes = {shape_of(var)[axis] for var in (*equation.invars, *equation.outvars)}
    return (axis, (None,)) if len(sizes) == 1 else None


@_rule("conv_general_dilated")
def _convolution(equation: core.JaxprEqn, axes: Axes) -> tuple[int, Axes] | None:
    params = equation.params
    spec, groups = params["dimension_numbers"], params["feature_group_count"]
    out_axis, kernel_axis, image_axis = spec.out_spec[1], spec.rhs_spec[0], spec.lhs_spec[1]
    if params["batch_group_count"] != 1 or axes[1] not in (None, kernel_axis):
        return None
    image, kernel = (shape_of(value) for value in equation.invars)
    if axes == (spec.lhs_spec[0], None):
        return spec.out_spec[0], (None, None)  # the images of a batch
    if groups == 1 and axes[0] is None:
        return out_axis, (None, None)
    if groups == image[image_axis] == kernel[kernel_axis] and axes[0] in (None, image_axis):
        # Depthwise: output channel k sees image channel k and kernel channel k alone.
        takes = (image_axis if axes[0] is None else None, kernel_axis if axes[1] is None else None)
        return out_axis, takes
    return None


@_rule("dot_general")
def _dot_general(equation: core.JaxprEqn, axes: Axes) -> tuple[int, Axes] | None:
    contracting, batch = equation.params["dimension_numbers"]
    sides = [side for side in (0, 1) if axes[side] is not None]
    if len(sides) == 1 and axes[sides[0]] not in (*contracting[sides[0]], *batch[sides[0]]):
        side = sides[0]
        used = (*contracting[side], *batch[side])
        free = [a for a in range(_ndim(equation.invars[side])) if a not in used]
        left = _ndim(equation.invars[0]) - len(contracting[0]) - len(batch[0])
        return len(batch[0]) + (left if side else 0) + free.index(axes[side]), (None, None)
    position = [batch[side].index(axes[side]) for side in sides if axes[side] in batch[side]]
    if len(position) != len(sides) or len(set(position)) != 1:
        return None
    takes = tuple(batch[s][position[0]] if axes[s] is None else None for s in (0, 1))
    return position[0], takes
