"""What a flipped bit does to the weights of a network, before any image is seen."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxfi.faults._transforms import word_bits, word_dtype


class BitEffect(NamedTuple):
    """What flipping one bit position would do, over all weights.

    Attributes:
      bit: position in the word, 0 is the least significant.
      share_one: share of the weights whose bit is 1.
      median_change: median of |w' - w|, non-finite ones counting as infinite.
      rms_change: root mean square of w' - w over the finite ones; may be Inf where it overflows.
      share_non_finite: share of the weights that the flip turns into Inf or NaN.
    """

    bit: int
    share_one: float
    median_change: float
    rms_change: float
    share_non_finite: float


def bit_effects(weights: Any) -> list[BitEffect]:
    """The effect of each bit position, the most significant first.

    Args:
      weights: an array, as it is stored: its dtype says what a word is.

    >>> [effect.rms_change for effect in bit_effects(np.array([1.0, 1.5], np.float32))[9:11]]
    [0.5, 0.25]
    """
    weights = np.asarray(weights).reshape(-1)
    return [_effect(weights, bit) for bit in reversed(range(word_bits(weights.dtype)))]


def _effect(weights: np.ndarray, bit: int) -> BitEffect:
    words = weights.view(word_dtype(weights.dtype))
    mask = words.dtype.type(1 << bit)
    with np.errstate(all="ignore"):  # a flip can make a signalling NaN
        flipped = (words ^ mask).view(weights.dtype).astype(np.float64)
        change = np.abs(flipped - weights.astype(np.float64))
        finite = np.isfinite(flipped)
        rms = float(np.sqrt(np.mean(np.square(change[finite])))) if finite.any() else np.nan
    return BitEffect(
        bit,
        float(np.mean((words & mask) != 0)),
        float(np.median(np.where(finite, change, np.inf))),
        rms,
        float(np.mean(~finite)),
    )


def stored_weights(leaves: Any) -> np.ndarray:
    """The elements of several arrays of one dtype, one after the other."""
    flat = [np.asarray(leaf).reshape(-1) for leaf in leaves]
    dtypes = sorted({str(jnp.dtype(leaf.dtype)) for leaf in flat})
    if len(dtypes) != 1:
        raise ValueError(f"the weights have the dtypes {dtypes}: allowed is one")
    return np.concatenate(flat)
