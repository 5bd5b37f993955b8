"""Outcome shares of parts of a campaign: the faults of one bit position, or of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxfi.campaign._result import Campaign
from jaxfi.faults._list import FaultList
from jaxfi.faults._transforms import word_bits
from jaxfi.outcomes._outcomes import CRITICAL, MASKED, NON_CRITICAL, Estimate, estimate_rate, shares


class Part(NamedTuple):
    """What the faults of one part did.

    Attributes:
      name: the part: a bit position or a layer.
      masked, non_critical, critical: share of the part's (fault, image) pairs, fractions.
      num_faults: faults in the part.
    """

    name: str
    masked: Estimate
    non_critical: Estimate
    critical: Estimate
    num_faults: int


class BitFields(NamedTuple):
    """The highest bit of each field of a float word; 0 is the least significant bit."""

    mantissa: int
    exponent: int
    sign: int


def bit_fields(dtype: str) -> BitFields:
    """Where mantissa, exponent and sign of a float `dtype` end.

    Raises ValueError for an integer dtype, which has no such fields.

    >>> bit_fields("float32")
    BitFields(mantissa=22, exponent=30, sign=31)
    """
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise ValueError(f"dtype {dtype} has no sign, exponent and mantissa: allowed are floats")
    sign = word_bits(dtype) - 1
    return BitFields(mantissa=int(jnp.finfo(dtype).nmant) - 1, exponent=sign - 1, sign=sign)


def fault_dtype(faults: FaultList) -> str:
    """The one dtype of all leaves with faults. Raises ValueError if they have several."""
    dtypes = sorted({faults.dtypes[leaf] for leaf in np.unique(faults.leaf)})
    if len(dtypes) != 1:
        raise ValueError(f"the faults are in leaves of dtypes {dtypes}: allowed is one dtype")
    return dtypes[0]


def shares_by_bit(campaign: Campaign, t: float = 2.58) -> list[Part]:
    """Outcome shares of each bit position with faults, most significant bit first.

    Raises ValueError if no fault has a bit, or the faulty leaves have several dtypes.
    """
    faults = campaign.faults
    if not (faults.bit >= 0).any():
        raise ValueError("no fault of the campaign has a bit position")
    width = word_bits(fault_dtype(faults))
    bits = [bit for bit in reversed(range(width)) if (faults.bit == bit).any()]
    return [
        _part(campaign, str(bit), faults.bit == bit, faults.population_of(bit=bit), t)
        for bit in bits
    ]


def shares_by_layer(
    campaign: Campaign, order: Sequence[str] | None = None, t: float = 2.58
) -> list[Part]:
    """Outcome shares of each layer with faults; a layer is the leaves under one module.

    Args:
      campaign: F faults, N images.
      order: layer names in the order wanted; None takes the parameter tree's.
      t: half-width of the intervals in standard errors.
    """
    faults = campaign.faults
    layer_of_leaf = np.array([layer_name(path) for path in faults.paths])
    layer = layer_of_leaf[faults.leaf]
    names = list(dict.fromkeys([*(order or ()), *layer_of_leaf]))
    parts = []
    for name in names:
        if (layer == name).any():
            population = faults.population_of(np.flatnonzero(layer_of_leaf == name))
            parts.append(_part(campaign, name, layer == name, population, t))
    return parts


def layer_name(path: str) -> str:
    """The module that holds the leaf; a leaf without one is its own layer.

    >>> layer_name("layer1/conv1/kernel"), layer_name("scale")
    ('layer1/conv1', 'scale')
    """
    return path.rpartition("/")[0] or path


def _part(campaign: Campaign, name: str, rows: np.ndarray, population: int, t: float) -> Part:
    outcomes = np.asarray(campaign.outcomes)[rows]
    masked, non_critical, critical = (
        estimate_rate(shares(outcomes, outcome), outcomes.shape[1], population, t)
        for outcome in (MASKED, NON_CRITICAL, CRITICAL)
    )
    return Part(name, masked, non_critical, critical, len(outcomes))
