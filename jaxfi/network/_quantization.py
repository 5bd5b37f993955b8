"""Weights as 8-bit integers, so that a fault hits the word that a quantized network stores.

Symmetric, one scale a channel (Krishnamoorthi, "Quantizing deep convolutional networks for
efficient inference", 2018): w ≈ scale · q with q from -127 to 127 and scale = max|w| / 127 over
the output channel, which is the last axis of a kernel.
"""

from __future__ import annotations

import fnmatch
from typing import Any

import jax
import jax.numpy as jnp

from jaxfi.faults._transforms import PyTree, leaf_paths
from jaxfi.network._graph import ApplyFn

LARGEST = 127


def quantize(params: PyTree, paths: str = "*kernel") -> tuple[PyTree, PyTree]:
    """The words that are stored, and their scales: symmetric, one a channel (the last axis).

    Source: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", 2018.

    Args:
      params: a tree of float arrays.
      paths: pattern (fnmatch) of the leaves to quantize; the others stay as they are.

    Returns:
      Two trees like `params`: words, int8 in the leaves quantized, and scales, which broadcast to
      the words (1 for the other leaves). A channel of zeros has scale 1.

    Raises ValueError if no leaf matches.

    >>> words, scales = quantize({"kernel": jnp.array([[0.5, 2.0], [-1.0, 4.0]])})
    >>> words["kernel"].tolist(), scales["kernel"].shape
    ([[64, 64], [-127, 127]], (1, 2))
    """
    names = leaf_paths(params)
    chosen = [fnmatch.fnmatchcase(name, paths) for name in names]
    if not any(chosen):
        raise ValueError(f"no leaf matches {paths!r}: the leaves are {', '.join(names)}")
    leaves, structure = jax.tree.flatten(params)
    pairs = [
        _quantize_leaf(jnp.asarray(leaf)) if here else (jnp.asarray(leaf), jnp.ones((), leaf.dtype))
        for leaf, here in zip(leaves, chosen, strict=True)
    ]
    words, scales = zip(*pairs, strict=True)
    return jax.tree.unflatten(structure, words), jax.tree.unflatten(structure, scales)


def dequantize(words: PyTree, scales: PyTree) -> PyTree:
    """The weights that the words stand for, of the scales' dtype."""
    return jax.tree.map(_dequantize_leaf, words, scales)


def with_quantized_weights(apply_fn: ApplyFn, scales: PyTree) -> ApplyFn:
    """`apply_fn` as a function of the stored words, for any campaign on them.

    Args:
      apply_fn: maps parameters and images [batch, ...] to outputs [batch, classes].
      scales: the second tree that `quantize` gave.

    Returns a function of `quantize`'s first tree, and images, to the same outputs.
    """

    def quantized(words: PyTree, images: jax.Array) -> jax.Array:
        return apply_fn(dequantize(words, scales), images)

    return quantized


def _quantize_leaf(leaf: jax.Array) -> tuple[jax.Array, Any]:
    largest = jnp.max(jnp.abs(leaf), axis=tuple(range(leaf.ndim - 1)), keepdims=True)
    scale = jnp.where(largest > 0, largest / LARGEST, 1).astype(leaf.dtype)
    words = jnp.clip(jnp.round(leaf / scale), -LARGEST, LARGEST)
    return words.astype(jnp.int8), scale


def _dequantize_leaf(words: jax.Array, scale: jax.Array) -> jax.Array:
    return words.astype(scale.dtype) * scale if words.dtype == jnp.int8 else words
