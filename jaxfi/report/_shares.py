"""The fields of a float word, and the one dtype of the faulty leaves."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxfi.campaign._parts import Part
from jaxfi.campaign._result import Campaign
from jaxfi.faults._list import FaultList
from jaxfi.faults._transforms import word_bits


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


def parts_by_bit(
    campaign: Campaign, t: float | None = None, confidence: float | None = None
) -> list[Part]:
    """`campaign.rates(by="bit")` of the faults that have one.

    Raises ValueError if no fault has a bit, or the faulty leaves have several dtypes.
    """
    if not (campaign.faults.bit >= 0).any():
        raise ValueError("no fault of the campaign has a bit position")
    fault_dtype(campaign.faults)
    parts = campaign.rates(t=t, confidence=confidence, by="bit")
    return [part for part in parts if part.name.isdecimal()]
