"""Weights as 8-bit integers, so that a fault hits the word that a quantized network stores.

Symmetric, one scale an output channel (Krishnamoorthi, "Quantizing deep convolutional networks for
efficient inference", 2018): w ≈ scale · q with q from -127 to 127 and scale = max|w| / 127 over the
channel. Of 4 bits, q from -7 to 7, one word is in the lower half of each byte.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfi.faults._transforms import PyTree, leaf_paths
from jaxfi.network._graph import ApplyFn

LARGEST = {8: 127, 4: 7}


def quantize(
    params: PyTree,
    paths: str = "*kernel",
    *,
    axis: int | Callable[[str], int] | None = None,
    bits: int = 8,
    vectors: bool = False,
) -> tuple[PyTree, PyTree]:
    """The words that are stored, and their scales: symmetric, one an output channel.

    Source: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", 2018.

    Args:
      params: a tree of float arrays.
      paths: pattern (fnmatch) of the leaves to quantize; the others stay as they are.
      axis: of the output channels, or a function from a leaf's path to it. By default the last, as
        in Flax's kernels; the first of a leaf called `weight`, as PyTorch lays it out.
      bits: 8, or 4: one word in the lower half of each byte, whose upper half is not read; draw
        faults with `bits=range(4)`.
      vectors: also quantize leaves of one axis that match, biases and scales, with one scale.

    Returns:
      Two trees like `params`: words, int8 in the leaves quantized, and scales, which broadcast to
      the words (1 for the other leaves). A channel of zeros has scale 1.

    Raises ValueError if no leaf matches, or one that does holds NaN or Inf; TypeError if it is not
    of floats.

    >>> words, scales = quantize({"kernel": jnp.array([[0.5, 2.0], [-1.0, 4.0]])})
    >>> words["kernel"].tolist(), scales["kernel"].shape
    ([[64, 64], [-127, 127]], (1, 2))
    """
    if bits not in LARGEST:
        raise ValueError(f"bits is {bits}: allowed are {' and '.join(map(str, LARGEST))}")
    names = leaf_paths(params)
    if not any(fnmatch.fnmatchcase(name, paths) for name in names):
        raise ValueError(f"no leaf matches {paths!r}: the leaves are {', '.join(names)}")
    leaves, structure = jax.tree.flatten(params)
    pairs = []
    for name, leaf in zip(names, map(jnp.asarray, leaves), strict=True):
        chosen = fnmatch.fnmatchcase(name, paths) and (leaf.ndim > 1 or vectors)
        if not chosen or leaf.size == 0:
            pairs.append((leaf, jnp.ones((), leaf.dtype)))
            continue
        _check_leaf(name, leaf)
        channel = _output_axis(name, axis)
        if not -leaf.ndim <= channel < max(leaf.ndim, 1):
            raise ValueError(f"axis {channel} is outside {name} of shape {leaf.shape}")
        pairs.append(_quantize_leaf(leaf, channel, LARGEST[bits]))
    words, scales = zip(*pairs, strict=True)
    return jax.tree.unflatten(structure, words), jax.tree.unflatten(structure, scales)


def dequantize(words: PyTree, scales: PyTree, *, bits: int = 8) -> PyTree:
    """The weights that the words stand for, of the scales' dtype."""
    return jax.tree.map(lambda word, scale: _dequantize_leaf(word, scale, bits), words, scales)


def with_quantized_weights(apply_fn: ApplyFn, scales: PyTree, *, bits: int = 8) -> ApplyFn:
    """`apply_fn` as a function of the stored words, for any campaign on them.

    Args:
      apply_fn: maps parameters and images [batch, ...] to outputs [batch, classes].
      scales: the second tree that `quantize` gave, with the same `bits`.

    Returns a function of `quantize`'s first tree, and images, to the same outputs.
    """

    def quantized(words: PyTree, images: jax.Array) -> jax.Array:
        return apply_fn(dequantize(words, scales, bits=bits), images)

    return quantized


def _output_axis(path: str, axis: int | Callable[[str], int] | None) -> int:
    if callable(axis):
        return axis(path)
    if axis is not None:
        return axis
    return 0 if path.removesuffix("/value").replace(".", "/").split("/")[-1] == "weight" else -1


def _check_leaf(name: str, leaf: jax.Array) -> None:
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype.itemsize < 2:
        raise TypeError(f"leaf {name} is {leaf.dtype}: allowed are floats of 16 bits or more")
    wrong = int(np.count_nonzero(~np.isfinite(np.asarray(leaf, np.float64))))
    if wrong:
        raise ValueError(f"leaf {name} holds {wrong} NaN or Inf: allowed are finite weights")


def _quantize_leaf(leaf: jax.Array, axis: int, most: int) -> tuple[jax.Array, Any]:
    others = tuple(n for n in range(leaf.ndim) if n != axis % max(leaf.ndim, 1))
    others = others if leaf.ndim > 1 else tuple(range(leaf.ndim))
    wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    largest = jnp.max(jnp.abs(wide), axis=others, keepdims=True)
    # The dtype's smallest number at least: a narrow one may have none as small as the scale.
    least = float(jnp.finfo(leaf.dtype).tiny)
    scale = jnp.where(largest > 0, jnp.maximum(largest / most, least), 1).astype(leaf.dtype)
    below = jnp.nextafter(scale, jnp.zeros_like(scale))
    scale = jnp.where(jnp.isfinite(scale * most), scale, below)  # rounded up, it may overflow
    words = jnp.clip(jnp.round(wide / scale.astype(wide.dtype)), -most, most)
    return words.astype(jnp.int8), scale


def _dequantize_leaf(words: jax.Array, scale: jax.Array, bits: int) -> jax.Array:
    if words.dtype != jnp.int8 or not jnp.issubdtype(scale.dtype, jnp.floating):
        return words  # of a leaf that was not quantized
    if bits < 8:  # the lower half of the byte, with its sign
        words = jnp.right_shift(jnp.left_shift(words, 8 - bits), 8 - bits)
    return words.astype(scale.dtype) * scale
