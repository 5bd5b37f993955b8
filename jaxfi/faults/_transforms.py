"""Faults in stored parameters, as pure transforms of a parameter tree.

Every fault model is one operation on the stored word of one element::

    word' = (word & keep) ^ flip

bit-flip keeps all bits and flips one; stuck-at clears one bit and sets it or not; zero and value
clear the word and write another. So a batch of mixed faults is four arrays, and `inject` has no
branches: it can be jitted and vmapped over any batch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

PyTree = Any

HIT_GRADIENTS = ("zero", "straight-through")
FAULT_MODELS = ("bit-flip", "stuck-at-0", "stuck-at-1", "zero", "value", "null")
BIT_MODELS = FAULT_MODELS[:3]  # those that name a bit; the others name a whole word


class Fault(NamedTuple):
    """One fault (scalars), several in the same parameters ([K]), or a batch to vmap over ([F]).

    Attributes:
      leaf: int32, position of the leaf in `jax.tree.flatten` order.
      element: int32, flat index into the leaf, C order.
      keep: unsigned word, the bits of the stored word that survive.
      flip: unsigned word, the bits inverted after that.
    """

    leaf: jax.Array
    element: jax.Array
    keep: jax.Array
    flip: jax.Array


def word_bits(dtype: Any) -> int:
    """Width in bits of a stored word of `dtype`: 8, 16, 32 or 64.

    Raises TypeError for a dtype whose storage is not a whole float or integer word, such as int4,
    which takes 4 bits of its byte.

    >>> word_bits("bfloat16")
    16
    """
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        bits = jnp.finfo(dtype).bits
    elif jnp.issubdtype(dtype, jnp.integer):
        bits = jnp.iinfo(dtype).bits
    else:
        bits = 0
    if bits != dtype.itemsize * 8:
        raise TypeError(f"cannot inject faults into dtype {dtype}: allowed are floats and integers")
    return bits


def word_dtype(dtype: Any) -> np.dtype:
    """The unsigned integer dtype of the same width as `dtype`."""
    return np.dtype(f"uint{word_bits(dtype)}")


def to_words(array: jax.Array) -> jax.Array:
    """The stored words of `array`, same shape, unsigned."""
    return lax.bitcast_convert_type(array, word_dtype(array.dtype))


def leaf_paths(params: PyTree) -> tuple[str, ...]:
    """Names of the leaves, `conv1/kernel`, in `jax.tree.flatten` order.

    >>> leaf_paths({"conv1": {"kernel": jnp.zeros(3), "bias": jnp.zeros(1)}})
    ('conv1/bias', 'conv1/kernel')
    """
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return tuple(jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)


# What to do with leaves that are no numbers.
_TAKE_OUT = "take it out of the tree that faults go into, as nnx.split and eqx.partition do"
_INSTEAD = dict.fromkeys(("int4", "int2", "uint4", "uint2"), "; int8 holds its values")


def describe_leaves(params: PyTree) -> tuple[tuple, tuple, tuple]:
    """Path, shape and dtype name of every leaf; TypeError for one that is not a numeric array."""
    paths, leaves = leaf_paths(params), jax.tree.leaves(params)
    for path, leaf in zip(paths, leaves, strict=True):
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise TypeError(f"leaf {path} is a {type(leaf).__name__}: allowed are arrays")
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"leaf {path} is a random key: {_TAKE_OUT}")
        if leaf.dtype == bool:
            raise TypeError(f"leaf {path} is bool, a mask: {_TAKE_OUT}, or cast it to int8")
        try:
            word_bits(leaf.dtype)
        except TypeError:
            raise TypeError(
                f"leaf {path} has dtype {leaf.dtype}: allowed are floats and integers of 8, 16, 32 "
                f"or 64 bits{_INSTEAD.get(str(leaf.dtype), '')}"
            ) from None
        if paths.count(path) > 1:
            raise ValueError(f"two leaves have the path {path}: a fault could not name its leaf")
    shapes = tuple(tuple(leaf.shape) for leaf in leaves)
    return paths, shapes, tuple(str(jnp.dtype(leaf.dtype)) for leaf in leaves)


def described_leaves(params: PyTree) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype name of every leaf by its path."""
    return {
        path: (shape, dtype) for path, shape, dtype in zip(*describe_leaves(params), strict=True)
    }


def reread(array: jax.Array, words: jax.Array, hit_gradient: str = "zero") -> jax.Array:
    """`array` with the stored `words` in place of its own; the gradient goes straight through.

    Args:
      array: any shape, float or integer dtype.
      words: of the same shape, as `to_words` gives them.
      hit_gradient: of the elements whose word is another: "zero", since a stuck weight does not
        move what the network sees; or "straight-through", as of the others (Bengio et al., 2013).
    """
    if hit_gradient not in HIT_GRADIENTS:
        allowed = ", ".join(HIT_GRADIENTS)
        raise ValueError(f"unknown hit_gradient {hit_gradient!r}: allowed are {allowed}")
    return _reread(array, words, hit_gradient)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _reread(array: jax.Array, words: jax.Array, hit_gradient: str) -> jax.Array:
    return lax.bitcast_convert_type(words, array.dtype)


@_reread.defjvp
def _reread_jvp(hit_gradient: str, primals: tuple, tangents: tuple) -> tuple:
    (array, words), (tangent, _) = primals, tangents
    if hit_gradient == "zero":
        tangent = jnp.where(to_words(array) == words, tangent, jnp.zeros_like(tangent))
    return _reread(array, words, hit_gradient), tangent


def corrupt(
    array: jax.Array, element: Any, keep: Any, flip: Any, *, hit_gradient: str = "zero"
) -> jax.Array:
    """`array` with the words at flat index `element` replaced by `(word & keep) ^ flip`.

    Args:
      array: any shape, float or integer dtype.
      element: int scalar or [K], flat indices in C order; one past the end changes nothing. Faults
        in one element all change it, in their order.
      keep, flip: unsigned words, shaped like `element`.
      hit_gradient: see `reread`.

    Returns an array of the same shape and dtype. Raises TypeError for a dtype without words of 8,
    16, 32 or 64 bits.

    >>> corrupt(jnp.ones(2), jnp.array([1, 1]), jnp.uint32([2**32 - 1] * 2),
    ...         jnp.uint32([2**31, 1 << 23])).tolist()
    [1.0, -0.5]
    """
    if array.size == 0:
        return array
    element = jnp.asarray(element)
    keep, flip = (_as_words(mask, array.dtype) for mask in (keep, flip))
    if element.ndim:
        element = jnp.where(element < 0, element + array.size, element)  # as Python counts
        element, keep, flip = _composed(element, keep, flip, array.size)
    return corrupt_distinct(array, element, keep, flip, hit_gradient)


def _as_words(mask: Any, dtype: Any) -> jax.Array:
    """A mask as the words of a dtype; Python's integers may need more bits than JAX's do."""
    mask = mask if isinstance(mask, jax.Array) else np.asarray(mask)
    if not jnp.issubdtype(mask.dtype, jnp.integer):
        raise TypeError(f"a mask is {mask.dtype}: allowed are unsigned words, or integers")
    return jnp.asarray(mask.astype(word_dtype(dtype)))


def corrupt_distinct(
    array: jax.Array, element: Any, keep: Any, flip: Any, hit_gradient: str = "zero"
) -> jax.Array:
    """`corrupt` for elements that are distinct, which nothing checks."""
    words = to_words(array).reshape(-1)
    old = words.at[element].get(mode="clip")
    new = (old & jnp.asarray(keep).astype(words.dtype)) ^ jnp.asarray(flip).astype(words.dtype)
    words = words.at[element].set(new, mode="drop")
    return reread(array, words.reshape(array.shape), hit_gradient)


def _composed(
    element: jax.Array, keep: jax.Array, flip: jax.Array, size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One fault for each element: (w & k) ^ f and then (w & l) ^ g is (w & k & l) ^ (f & l ^ g).

    The last fault of an element gets all of its faults, the others an element past the end.
    """
    order = jnp.argsort(element, stable=True)
    element, keep, flip = element[order], keep[order], flip[order]
    first = jnp.concatenate([jnp.ones(1, bool), element[1:] != element[:-1]])[: len(element)]
    last = jnp.concatenate([element[1:] != element[:-1], jnp.ones(1, bool)])[: len(element)]

    def then(before: tuple, after: tuple) -> tuple:
        (starts, keep, flip), (new, keeps, flips) = before, after
        both = keep & keeps, (flip & keeps) ^ flips
        return (
            starts | new,
            jnp.where(new, keeps, both[0]),
            jnp.where(new, flips, both[1]),
        )

    _, keep, flip = lax.associative_scan(then, (first, keep, flip))
    return jnp.where(last, element, size), keep, flip


def _check_place(fault: Fault, leaves: Sequence) -> None:
    if not _is_known(fault):
        return
    leaf, element = np.broadcast_arrays(fault.leaf, fault.element)
    sizes = np.array([np.size(leaf) for leaf in leaves], np.int64)
    there = (leaf >= 0) & (leaf < len(sizes))
    fits = there & (element >= 0) & (element < np.append(sizes, 0)[np.where(there, leaf, -1)])
    if not np.all(fits):
        first = np.flatnonzero(~fits)[0]
        raise ValueError(
            f"a fault is in leaf {leaf.flat[first]}, element {element.flat[first]}: the leaves of "
            f"the parameters have {', '.join(map(str, sizes.tolist()))} elements"
        )


def _is_known(fault: Fault) -> bool:
    return not any(isinstance(place, jax.core.Tracer) for place in (fault.leaf, fault.element))


def inject(params: PyTree, fault: Fault, *, hit_gradient: str = "zero") -> PyTree:
    """`params` with the fault in it: pure, jit-able, and vmap-able over a batch of faults.

    Args:
      params: any pytree of float or integer arrays.
      fault: scalars for one fault; arrays [K] inject K faults together, in their order: several in
        one element all change it.
      hit_gradient: of the faulty elements, "zero" or "straight-through"; the gradient of the others
        is that of the fault-free ones, so that a network can be trained with faults in it.

    Returns:
      A tree like `params`. Only the faulty elements differ.

    Raises TypeError for a leaf whose dtype has no words of 8, 16, 32 or 64 bits; ValueError for a
    fault of other parameters, where its place is known: inside jit and vmap it is not.

    >>> from jaxfi import FaultList
    >>> params = {"w": jnp.ones((2, 3))}
    >>> faults = FaultList.from_sites([("w", (0, 2), 31)], params)
    >>> inject(params, faults.fault(0))["w"].tolist()
    [[1.0, 1.0, -1.0], [1.0, 1.0, 1.0]]
    """
    leaves, treedef = jax.tree.flatten(params)
    _check_place(fault, leaves)
    faulty = []
    for number, leaf in enumerate(leaves):
        array = jnp.asarray(leaf)
        here = jnp.where(fault.leaf == number, fault.element, array.size)  # out of range: no-op
        faulty.append(corrupt(array, here, fault.keep, fault.flip, hit_gradient=hit_gradient))
    return jax.tree.unflatten(treedef, faulty)
