"""The map between PyTorch's names and layouts and jaxfi's, by kind of layer.

| PyTorch | jaxfi | layout |
|---|---|---|
| `layer1.0.conv1.weight` | `params`: `layer1/0/conv1/kernel` | [out, in, *K] to [*K, in, out] |
| `linear.weight` | `params`: `linear/kernel` | [out, in] to [in, out] |
| `fc1.weight`, behind a flattened image | `params`: `fc1/kernel` | also (C, H, W) to (H, W, C) |
| `up.weight`, of a ConvTranspose | `params`: `up/kernel` | [in, out, *K] to [*K, in, out] |
| with `transpose_kernel=True` in Flax | `params`: `up/kernel` | [in, out, *K] to [*K, out, in] |
| `embed.weight` | `params`: `embed/embedding` | as it is |
| `bn1.weight`, `conv1.bias` | `params`: `bn1/scale`, `conv1/bias` | |
| `bn1.running_mean`, `bn1.running_var` | `batch_stats`: `bn1/mean`, `bn1/var` | |

K is one to three axes; of the first transposed convolution they are reversed. Grouped and depthwise
convolutions are laid out as the others. No name or shape tells what is a transposed convolution, or
what reads a flattened image: `kinds` and `flattened` do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isqrt
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfi.faults._transforms import leaf_paths

PyTree = Any

# Of jaxfi's networks, the dense layers that read a flattened image, and its channels: PyTorch
# flattens (C, H, W) and Flax (H, W, C). Behind a 1×1 image the two are the same, so only these need
# naming.
FLATTENED: Mapping[str, int] = {"fc1": 64, "classifier/0": 512}

KINDS = ("conv_transpose", "conv_transpose_kernel")  # the second of Flax's transpose_kernel=True
_ATTENTION = ("query", "key", "value", "out")  # of Flax's attention: dense layers of three axes

_TORCH_NAMES = {
    "params": {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"},
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
    layer, _, name = (inner.removesuffix("/value") or inner).rpartition("/")  # NNX's end in value
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


class Layout(NamedTuple):
    """What names and shapes do not tell of a network.

    Attributes:
      flattened: path and number of channels of each dense layer that reads a flattened image.
      kinds: path and kind, of `KINDS`, of each transposed convolution.
    """

    flattened: Mapping[str, int]
    kinds: Mapping[str, str] = {}


def layout_of(
    shapes: Mapping[str, tuple[int, ...]],
    flattened: Mapping[str, int] | None,
    kinds: Mapping[str, str] | None,
) -> Layout:
    """The layout of a network with these leaves, by path.

    Raises ValueError for an unknown layer or kind; and where `flattened` is None, the network is
    none of jaxfi's, and a dense layer may read a flattened image: that is not guessed.
    """
    for name, words in (("flattened", flattened), ("kinds", kinds)):
        if words is not None and not isinstance(words, Mapping):
            raise TypeError(f"{name} is {words!r}: allowed is a dict by layer")
    kernels = _kernels(shapes)
    convolutions = sorted(layer for layer, shape in kernels.items() if len(shape) > 2)
    for layer, kind in (kinds or {}).items():
        if kind not in KINDS or layer not in convolutions:
            raise ValueError(
                f"kinds has {layer!r}: {kind!r}: allowed are {' and '.join(KINDS)}, of the "
                f"convolutions {', '.join(convolutions)}"
            )
    for layer, channels in (flattened or {}).items():
        inputs = kernels.get(layer, ())[:1] if len(kernels.get(layer, ())) == 2 else ()
        whole = isinstance(channels, (int, np.integer)) and channels >= 1 and channels is not True
        if not inputs or not whole or inputs[0] % channels:
            dense = (f"{name} ({s[0]} inputs)" for name, s in kernels.items() if len(s) == 2)
            raise ValueError(
                f"flattened has {layer!r}: {channels!r}: allowed are dense layers, and channels "
                f"that divide their inputs: {', '.join(dense)}"
            )
    if flattened is not None:
        return Layout(flattened, kinds or {})
    if _is_own(shapes):
        return Layout(FLATTENED, kinds or {})
    if unclear := _may_be_flattened(shapes):
        layer, channels = unclear
        raise ValueError(
            f"{layer} may read a flattened image, which PyTorch flattens in another order: allowed "
            f"are flattened={{'{layer}': {channels}}} (of {channels} channels) and flattened={{}}"
        )
    return Layout({}, kinds or {})


def _kernels(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    named = ((_split(path), shape) for path, shape in shapes.items())
    return {layer: shape for (_, layer, name), shape in named if name == "kernel"}


def _is_own(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the network is one of jaxfi's that flattens an image: LeNet, or a VGG."""
    kernels = _kernels(shapes)
    if set(kernels) == {"conv1", "conv2", "fc1", "fc2"}:
        convolutions = kernels["conv1"][:2] + kernels["conv1"][3:] + kernels["conv2"]
        inputs = kernels["fc1"][0]
        return convolutions == (3, 3, 32, 3, 3, 32, 64) and inputs == 64 * isqrt(inputs // 64) ** 2
    return kernels.get("classifier/0") == (512, 512) and "features/0" in kernels


def _may_be_flattened(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, int] | None:
    """A dense layer with several inputs for each channel of some convolution, that no other layer's
    outputs explain; and the channels."""
    kernels = _kernels(shapes)
    channels = sorted({shape[-1] for shape in kernels.values() if len(shape) > 2}, reverse=True)
    for layer, shape in kernels.items():
        others = [other for name, other in kernels.items() if name != layer]
        outputs = {other[-1] for other in others if len(other) == 2}
        if len(shape) == 2 and shape[0] not in outputs | set(channels):
            fitting = [number for number in channels if shape[0] % number == 0]
            if fitting:
                return layer, fitting[0]
    return None


def to_torch_layout(path: str, array: np.ndarray, layout: Layout | Mapping[str, int]) -> np.ndarray:
    """An array shaped like the leaf at `path`, in PyTorch's layout; `layout`, or its `flattened`.

    Raises ValueError for a leaf whose layout is not known.
    """
    layout = layout if isinstance(layout, Layout) else Layout(layout)
    _, layer, name = _split(path)
    if name != "kernel":
        _check_axes(path, array, name)
        return array
    spatial = tuple(range(array.ndim - 2))
    kind = layout.kinds.get(layer)
    if kind == "conv_transpose":
        return np.flip(array, spatial).transpose(-2, -1, *spatial)
    if kind == "conv_transpose_kernel":
        return array.transpose(-1, -2, *spatial)
    if array.ndim > 2:
        _check_convolution(path, array, layer)
        return array.transpose(-1, -2, *spatial)
    channels = _flattened_channels(path, array, layout.flattened)
    return _swap(array, (-1, channels)).T if channels else array.T


def from_torch_layout(
    path: str, array: np.ndarray, layout: Layout | Mapping[str, int]
) -> np.ndarray:
    """The inverse of `to_torch_layout`."""
    layout = layout if isinstance(layout, Layout) else Layout(layout)
    _, layer, name = _split(path)
    if name != "kernel":
        _check_axes(path, array, name)
        return array
    spatial = tuple(range(2, array.ndim))
    kind = layout.kinds.get(layer)
    if kind == "conv_transpose":
        return np.flip(array, spatial).transpose(*spatial, 0, 1)
    if kind == "conv_transpose_kernel":
        return array.transpose(*spatial, 1, 0)
    if array.ndim > 2:
        _check_convolution(path, array, layer)
        return array.transpose(*spatial, 1, 0)
    channels = _flattened_channels(path, array.T, layout.flattened)
    return _swap(array.T, (channels, -1)) if channels else array.T


def _check_axes(path: str, array: np.ndarray, name: str) -> None:
    allowed = 2 if name == "embedding" else 1
    if array.ndim != allowed:
        raise ValueError(f"{path} has {array.ndim} axes: allowed for a {name} is {allowed}")


def _check_convolution(path: str, array: np.ndarray, layer: str) -> None:
    if array.ndim > 5:
        raise ValueError(f"{path} has {array.ndim} axes: allowed are 2, or a convolution's 3 to 5")
    if array.ndim == 3 and layer.rpartition("/")[2] in _ATTENTION:
        raise ValueError(f"{path} is an attention's dense layer of 3 axes: its map is not known")


def _flattened_channels(path: str, kernel: np.ndarray, flattened: Mapping[str, int]) -> int:
    """Channels of the image that the dense layer of this [in, out] kernel flattens, else 0."""
    _, layer, name = _split(path)
    channels = flattened.get(layer, 0) if name == "kernel" else 0
    if channels and len(kernel) % channels:
        raise ValueError(f"{path} has {len(kernel)} inputs, not a multiple of {channels} channels")
    return channels


def shapes_of(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf by its path."""
    leaves = zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True)
    return {path: tuple(leaf.shape) for path, leaf in leaves}


def _swap(kernel: np.ndarray, groups: tuple[int, int]) -> np.ndarray:
    """`kernel` [in, out] with its inputs, seen as a matrix of shape `groups`, transposed."""
    return kernel.reshape(*groups, kernel.shape[1]).swapaxes(0, 1).reshape(kernel.shape)
