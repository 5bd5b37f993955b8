"""PyTorch state dicts as Flax variables, and back."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfi.convert._layout import FLATTENED, from_torch_layout, to_torch_layout, torch_leaves
from jaxfi.data._extras import extra

PyTree = Any
Path = str | os.PathLike


def from_torch(
    state: Mapping[str, np.ndarray],
    variables_like: PyTree,
    *,
    flattened: Mapping[str, int] = FLATTENED,
) -> PyTree:
    """A PyTorch state dict as variables.

    Args:
      state: parameters and running statistics by PyTorch name.
      variables_like: variables (`params`, `batch_stats`) whose names, shapes and dtypes to fill;
        `jax.eval_shape(module.init, key, images)` is enough.
      flattened: for networks other than jaxfi's, path and number of channels of each dense layer
        that reads a flattened image.

    Returns:
      A tree like `variables_like`.

    Raises:
      ValueError naming what is missing, left over, of the wrong shape, or of a dtype that would
      lose bits.
    """
    leaves = list(torch_leaves(variables_like))
    names = {name for name, _, _ in leaves}
    given = {name for name in state if not name.endswith("num_batches_tracked")}
    for what, wrong in (("lacks", names - given), ("has unknown", given - names)):
        if wrong:
            first = ", ".join(sorted(wrong)[:5]) + (", …" if len(wrong) > 5 else "")
            raise ValueError(f"the state {what} {len(wrong)} of {len(names)} names: {first}")
    arrays = [
        _fit(name, np.asarray(state[name]), path, like, flattened) for name, path, like in leaves
    ]
    return jax.tree.unflatten(jax.tree.structure(variables_like), arrays)


def to_torch(
    variables: PyTree, *, flattened: Mapping[str, int] = FLATTENED
) -> dict[str, np.ndarray]:
    """Variables as a PyTorch state dict: the inverse of `from_torch`, bit for bit.

    Write it with `np.savez(path, **state)` or `safetensors.numpy.save_file(state, path)`.

    >>> kernel = jnp.zeros((3, 3, 1, 8))
    >>> to_torch({"params": {"conv1": {"kernel": kernel}}})["conv1.weight"].shape
    (8, 1, 3, 3)
    """
    # Copies: PyTorch wants writable arrays, and JAX's are not.
    return {
        name: np.array(to_torch_layout(path, np.asarray(leaf), flattened), order="C")
        for name, path, leaf in torch_leaves(variables)
    }


def load_state(path: Path) -> dict[str, np.ndarray]:
    """Reads a PyTorch state dict; executes nothing in the file.

    Args:
      path: .npz or .safetensors; .pt, .pth or .th, of which a training checkpoint's `state_dict` is
        taken and the `module.` that DataParallel puts before every name is dropped; or .onnx, of
        which the float initializers are taken. An export must have kept the parameters
        (`torch.onnx.export(..., optimize=False)`): by default it folds BatchNorm into the
        convolutions, so BatchNorm's names are missing, as `from_torch` says, and so are its words
        in the memory of the device that runs the file.

    Raises FileNotFoundError; ValueError for another suffix or a file that is not a state dict of
    arrays; ImportError where PyTorch's own files need PyTorch, or .onnx the package onnx.
    """
    path = pathlib.Path(path)
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors, ".onnx": _read_onnx}
    readers |= dict.fromkeys((".pt", ".pth", ".th"), _read_torch)
    if path.suffix not in readers:
        raise ValueError(f"{path}: unknown suffix, allowed are {', '.join(readers)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return readers[path.suffix](path)


def _fit(name: str, array: np.ndarray, path: str, like: Any, flattened: Any) -> jax.Array:
    expected = to_torch_layout(path, np.empty(like.shape, bool), flattened).shape
    if array.shape != expected:
        raise ValueError(f"{name} has shape {array.shape}, the network needs {expected}")
    if not np.can_cast(array.dtype, like.dtype):
        raise ValueError(f"{name} is {array.dtype}, which does not fit in {like.dtype}")
    return jnp.asarray(from_torch_layout(path, array, flattened), like.dtype)


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        # np.load leaves a torn file open, so opening it is not left to np.load.
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # whatever a stranger's bytes do to zipfile, zlib and NumPy
        raise ValueError(f"{path}: not an .npz file of arrays: {error}") from None


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    with extra("convert"):  # only this format needs it
        import safetensors.numpy

    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, KeyError) as error:
        raise ValueError(f"{path}: not a .safetensors file: {error}") from None


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    with extra("torch"):
        import torch
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, with pages of advice
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: not a PyTorch state dict: {reason}") from None
    if isinstance(state, Mapping):
        state = state.get("state_dict", state)
    if not isinstance(state, Mapping) or not all(map(torch.is_tensor, state.values())):
        found = list(state)[:5] if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"{path}: not a state dict of tensors, it holds {found}")
    prefix = "module." if all(name.startswith("module.") for name in state) else ""
    return {
        name.removeprefix(prefix): _tensor_to_numpy(tensor.detach())
        for name, tensor in state.items()
    }


def _read_onnx(path: pathlib.Path) -> dict[str, np.ndarray]:
    with extra("convert"):
        import onnx
        from onnx import numpy_helper
    try:
        initializers = onnx.load(path).graph.initializer
        arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in initializers}
    except Exception as error:  # protobuf's and onnx's own kinds, also for weights in other files
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: not an .onnx file with its weights: {reason}") from None
    # Integers are shapes and indices of the graph.
    state = {name: a for name, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.floating)}
    if not state:  # protobuf takes an empty file for an empty model
        raise ValueError(f"{path}: not an .onnx file with its weights: no initializer is a float")
    return state


def _tensor_to_numpy(tensor: Any) -> np.ndarray:
    if str(tensor.dtype) != "torch.bfloat16":
        return tensor.numpy()
    import torch

    return tensor.contiguous().view(torch.int16).numpy().view(jnp.bfloat16)
