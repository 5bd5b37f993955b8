"""The map between PyTorch's names and layouts and jaxfi's.

| PyTorch | jaxfi | layout |
|---|---|---|
| `layer1.0.conv1.weight` | `params`: `layer1/0/conv1/kernel` | [out, in, H, W] to [H, W, in, out] |
| `linear.weight` | `params`: `linear/kernel` | [out, in] to [in, out] |
| `fc1.weight`, behind a flattened image | `params`: `fc1/kernel` | also (C, H, W) to (H, W, C) |
| `bn1.weight`, `conv1.bias` | `params`: `bn1/scale`, `conv1/bias` | |
| `bn1.running_mean`, `bn1.running_var` | `batch_stats`: `bn1/mean`, `bn1/var` | |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxfi.faults._transforms import leaf_paths

PyTree = Any

# Dense layers that read a flattened image, and its channels: PyTorch flattens (C, H, W) and Flax
# (H, W, C). Behind a 1×1 image the two are the same, so only these need naming.
FLATTENED: Mapping[str, int] = {"fc1": 64, "classifier/0": 512}

_TORCH_NAMES = {
    "params": {"kernel": "weight", "scale": "weight", "bias": "bias"},
    "batch_stats": {"mean": "running_mean", "var": "running_var"},
}


def torch_leaves(tree: PyTree) -> Iterator[tuple[str, str, Any]]:
    """(PyTorch name, path, leaf) of every leaf of variables or bare parameters, in tree order."""
    for path, leaf in zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True):
        yield torch_name(path), path, leaf


def _split(path: str) -> tuple[str, str, str]:
    """(collection, layer, name) of a leaf's path; bare parameters have no collection."""
    first, _, rest = path.partition("/")
    collection, inner = (first, rest) if first in _TORCH_NAMES else ("params", path)
    layer, _, name = inner.rpartition("/")
    return collection, layer, name


def torch_name(path: str) -> str:
    """PyTorch's name of a leaf; ValueError if it has none.

    >>> torch_name("layer1/0/bn1/scale"), torch_name("batch_stats/layer1/0/bn1/var")
    ('layer1.0.bn1.weight', 'layer1.0.bn1.running_var')
    """
    collection, layer, name = _split(path)
    names = _TORCH_NAMES[collection]
    if not layer or name not in names:
        allowed = ", ".join(f"LAYER/{known}" for known in names)
        raise ValueError(f"{path} has no PyTorch name: allowed are {allowed}")
    return f"{layer.replace('/', '.')}.{names[name]}"


def to_torch_layout(path: str, array: np.ndarray, flattened: Mapping[str, int]) -> np.ndarray:
    """An array shaped like the leaf at `path`, in PyTorch's layout."""
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    channels = _flattened_channels(path, array, flattened)
    return _swap(array, (-1, channels)).T if channels else array.T


def from_torch_layout(path: str, array: np.ndarray, flattened: Mapping[str, int]) -> np.ndarray:
    """The inverse of `to_torch_layout`."""
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    channels = _flattened_channels(path, array.T, flattened)
    return _swap(array.T, (channels, -1)) if channels else array.T


def _flattened_channels(path: str, kernel: np.ndarray, flattened: Mapping[str, int]) -> int:
    """Channels of the image that the dense layer of this [in, out] kernel flattens, else 0."""
    _, layer, name = _split(path)
    channels = flattened.get(layer, 0) if name == "kernel" else 0
    if channels and len(kernel) % channels:
        raise ValueError(f"{path} has {len(kernel)} inputs, not a multiple of {channels} channels")
    return channels


def _swap(kernel: np.ndarray, groups: tuple[int, int]) -> np.ndarray:
    """`kernel` [in, out] with its inputs, seen as a matrix of shape `groups`, transposed."""
    return kernel.reshape(*groups, kernel.shape[1]).swapaxes(0, 1).reshape(kernel.shape)
