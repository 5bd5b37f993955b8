"""Faults in stored parameters, as pure transforms of a parameter tree.

Every fault model is one operation on the stored word of one element::

    word' = (word & keep) ^ flip

bit-flip keeps all bits and flips one; stuck-at clears one bit and sets it or not; zero and value
clear the word and write another. So a batch of mixed faults is four arrays, and `inject` has no
branches: it can be jitted and vmapped over any batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

PyTree = Any

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

    Raises TypeError for a dtype whose storage is not a whole float or integer word.

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


def describe_leaves(params: PyTree) -> tuple[tuple, tuple, tuple]:
    """Path, shape and dtype name of every leaf; TypeError for one that is not a numeric array."""
    paths, leaves = leaf_paths(params), jax.tree.leaves(params)
    for path, leaf in zip(paths, leaves, strict=True):
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise TypeError(f"leaf {path} is a {type(leaf).__name__}: allowed are arrays")
        if paths.count(path) > 1:
            raise ValueError(f"two leaves have the path {path}: a fault could not name its leaf")
    shapes = tuple(tuple(leaf.shape) for leaf in leaves)
    return paths, shapes, tuple(str(jnp.dtype(leaf.dtype)) for leaf in leaves)


def described_leaves(params: PyTree) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype name of every leaf by its path."""
    return {
        path: (shape, dtype) for path, shape, dtype in zip(*describe_leaves(params), strict=True)
    }


def corrupt(array: jax.Array, element: Any, keep: Any, flip: Any) -> jax.Array:
    """`array` with the words at flat index `element` replaced by `(word & keep) ^ flip`.

    Args:
      array: any shape, float or integer dtype.
      element: int scalar or [K], flat indices in C order; one past the end changes nothing.
      keep, flip: unsigned words, shaped like `element`.

    Returns an array of the same shape and dtype. Raises TypeError for a dtype without words of 8,
    16, 32 or 64 bits.
    """
    if array.size == 0:
        return array
    words = to_words(array).reshape(-1)
    old = words.at[element].get(mode="clip")
    new = (old & jnp.asarray(keep).astype(words.dtype)) ^ jnp.asarray(flip).astype(words.dtype)
    words = words.at[element].set(new, mode="drop")
    return lax.bitcast_convert_type(words, array.dtype).reshape(array.shape)


def inject(params: PyTree, fault: Fault) -> PyTree:
    """`params` with the fault in it: pure, jit-able, and vmap-able over a batch of faults.

    Args:
      params: any pytree of float or integer arrays.
      fault: scalars for one fault; arrays [K] inject K faults together, in distinct elements.

    Returns:
      A tree like `params`. Only the faulty elements differ.

    Raises TypeError for a leaf whose dtype has no words of 8, 16, 32 or 64 bits.

    >>> from jaxfi import FaultList
    >>> params = {"w": jnp.ones((2, 3))}
    >>> faults = FaultList.from_sites([("w", (0, 2), 31)], params)
    >>> inject(params, faults.fault(0))["w"].tolist()
    [[1.0, 1.0, -1.0], [1.0, 1.0, 1.0]]
    """
    leaves, treedef = jax.tree.flatten(params)
    faulty = []
    for number, leaf in enumerate(leaves):
        array = jnp.asarray(leaf)
        here = jnp.where(fault.leaf == number, fault.element, array.size)  # out of range: no-op
        faulty.append(corrupt(array, here, fault.keep, fault.flip))
    return jax.tree.unflatten(treedef, faulty)
