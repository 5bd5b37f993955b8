"""Image sets in, and files that are whole or not there.

In: a name ("digits", "mnist", "cifar10"). Out: a `Dataset` of NumPy arrays, normalised or augmented
as asked; tables and files written whole or not at all.
"""

from __future__ import annotations

from jaxfi.data._augment import AffineRanges, random_affine
from jaxfi.data._datasets import (
    DATASETS,
    Dataset,
    first_test_images,
    hold_out,
    load_dataset,
    normalise,
)
from jaxfi.data._files import read_csv, write_csv, write_whole, writing

__all__ = [
    "DATASETS",
    "AffineRanges",
    "Dataset",
    "first_test_images",
    "hold_out",
    "load_dataset",
    "normalise",
    "random_affine",
    "read_csv",
    "write_csv",
    "write_whole",
    "writing",
]
