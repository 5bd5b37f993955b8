"""PyTorch state dicts as Flax variables, and back."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfi.convert._layout import (
    Layout,
    from_torch_layout,
    layout_of,
    shapes_of,
    to_torch_layout,
    torch_leaves,
)
from jaxfi.data._extras import extra

PyTree = Any
Path = str | os.PathLike

TOLERANCE = 1e-4  # of outputs, relative to the largest
# Under which training checkpoints keep the state dict, and what wrappers put before its names.
_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights")
_PREFIXES = ("module.", "_orig_mod.")
_TORCH_SUFFIXES = (".pt", ".pth", ".th", ".tar", ".ckpt", ".bin")
_SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32",
    "U16": "uint16", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def from_torch(
    state: Mapping[str, np.ndarray],
    variables_like: PyTree,
    *,
    flattened: Mapping[str, int] | None = None,
    kinds: Mapping[str, str] | None = None,
    check: tuple[Any, Callable, Any] | None = None,
) -> PyTree:
    """A PyTorch state dict as variables.

    Args:
      state: parameters and running statistics, arrays or tensors by PyTorch name; `module.` and
        `_orig_mod.` may stand before all of them.
      variables_like: variables (`params`, `batch_stats`) whose names, shapes and dtypes to fill;
        `jax.eval_shape(module.init, key, images)` is enough.
      flattened: for networks other than jaxfi's, path and number of channels of each dense layer
        that reads a flattened image; {} if none does.
      kinds: path of each transposed convolution: "conv_transpose", or "conv_transpose_kernel" where
        Flax has `transpose_kernel=True`.
      check: the PyTorch module, `apply_fn(variables, images)`, and images as that takes them: both
        are run, and must agree within 1e-4 of the largest output. Images of three axes and more
        have their channels last here, and are given to PyTorch channels first.

    Returns:
      A tree like `variables_like`.

    Raises:
      TypeError for what is no dict by name;
      ValueError naming what is missing, left over, of the wrong shape, or of a dtype that would
      lose bits; a dense layer that may read a flattened image, where `flattened` does not say; and
      outputs that do not agree.
    """
    layout = layout_of(shapes_of(variables_like), flattened, kinds)
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        what = "names that are no text" if isinstance(state, Mapping) else type(state).__name__
        raise TypeError(f"state is {what}: allowed is a dict of arrays or tensors by name")
    leaves = list(torch_leaves(variables_like))
    names = {name for name, _, _ in leaves}
    if not names & state.keys():
        state = _without(_PREFIXES, state)
    given = {name for name in state if not name.endswith("num_batches_tracked")}
    for what, wrong in (("lacks", names - given), ("has unknown", given - names)):
        if wrong:
            first = ", ".join(sorted(wrong)[:5]) + (", …" if len(wrong) > 5 else "")
            raise ValueError(f"the state {what} {len(wrong)} of {len(names)} names: {first}")
    arrays = [
        _fit(name, _array_of(name, state[name]), path, like, layout) for name, path, like in leaves
    ]
    variables = jax.tree.unflatten(jax.tree.structure(variables_like), arrays)
    if check is not None:
        _check_outputs(*check, variables)
    return variables


def _check_outputs(module: Any, apply_fn: Callable, images: Any, variables: PyTree) -> None:
    """Raises ValueError where the PyTorch module and the converted network put out other values."""
    with extra("torch"):
        import torch

    images = np.asarray(images)
    there = np.moveaxis(images, -1, 1) if images.ndim > 2 else images
    with torch.no_grad():
        expected = module.eval()(torch.from_numpy(np.ascontiguousarray(there))).numpy()
    found = np.asarray(apply_fn(variables, images))
    found = np.moveaxis(found, -1, 1) if found.ndim > 2 else found
    if found.shape != expected.shape:
        raise ValueError(f"PyTorch puts out {expected.shape}, the converted network {found.shape}")
    largest = np.max(np.abs(expected), initial=np.finfo(np.float32).tiny)
    error = np.max(np.abs(found - expected), initial=0.0) / largest
    if not error <= TOLERANCE:
        raise ValueError(
            f"the outputs of PyTorch and of the converted network differ by {error:.2g} of the "
            f"largest, allowed is {TOLERANCE:g}: a dense layer that reads a flattened image "
            "(flattened), a transposed convolution (kinds), or another network"
        )


def to_torch(
    variables: PyTree,
    *,
    flattened: Mapping[str, int] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> dict[str, np.ndarray]:
    """Variables as a PyTorch state dict: the inverse of `from_torch`, bit for bit.

    Write it with `np.savez(path, **state)` or `safetensors.numpy.save_file(state, path)`.

    >>> kernel = jnp.zeros((3, 3, 1, 8))
    >>> to_torch({"params": {"conv1": {"kernel": kernel}}})["conv1.weight"].shape
    (8, 1, 3, 3)
    """
    layout = layout_of(shapes_of(variables), flattened, kinds)
    # Copies: PyTorch wants writable arrays, and JAX's are not.
    return {
        name: np.array(to_torch_layout(path, np.asarray(leaf), layout), order="C")
        for name, path, leaf in torch_leaves(variables)
    }


def load_state(path: Path) -> dict[str, np.ndarray]:
    """Reads a PyTorch state dict; executes nothing in the file.

    Args:
      path: .npz or .safetensors; .pt, .pth, .th, .pth.tar, .ckpt or .bin, whose state dict is taken
        out of a training checkpoint that holds one, whatever its name, and `module.` and
        `_orig_mod.` off every name, as Lightning's `model.`; or .onnx, of which the
        float initializers are taken. An export must have kept the parameters
        (`torch.onnx.export(..., optimize=False)`): by default it folds BatchNorm into the
        convolutions, so BatchNorm's names are missing, as `from_torch` says, and so are its words
        in the memory of the device that runs the file.

    Raises FileNotFoundError; ValueError for another suffix, a file that is not a state dict of
    arrays, or a tensor that is quantized or sparse, which it names; ImportError where PyTorch's own
    files need PyTorch, or .onnx the package onnx.
    """
    path = pathlib.Path(path)
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors, ".onnx": _read_onnx}
    readers |= dict.fromkeys(_TORCH_SUFFIXES, _read_torch)
    if path.suffix not in readers:
        raise ValueError(f"{path}: unknown suffix, allowed are {', '.join(readers)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return readers[path.suffix](path)


def _array_of(name: str, value: Any) -> np.ndarray:
    """A state's array or tensor, on the host."""
    if hasattr(value, "detach"):
        if value.device.type == "meta":
            raise ValueError(f"{name} is on the device meta, without values: load it first")
        return _tensor_to_numpy("the state", name, value.detach().cpu())
    if np.ma.is_masked(value):
        raise ValueError(f"{name}: masked values have no place here: fill them (np.ma.filled)")
    return np.asarray(value)


def _fit(name: str, array: np.ndarray, path: str, like: Any, layout: Layout) -> jax.Array:
    expected = to_torch_layout(path, np.empty(like.shape, bool), layout).shape
    if array.shape != expected:
        also = ""
        if len(expected) > 2 and array.shape == (expected[1], expected[0], *expected[2:]):
            layer = path.rpartition("/")[0].removeprefix("params/")
            also = f"; kinds={{'{layer}': ...}} says that it is a transposed convolution"
        raise ValueError(f"{name} has shape {array.shape}, the network needs {expected}{also}")
    held_as = jax.dtypes.canonicalize_dtype(like.dtype)  # without x64, 32 bits
    if array.dtype.type is np.void:  # what NumPy has no name for
        raise ValueError(
            f"{name} is {array.dtype}: NumPy's files do not say which floats of 8 or 16 bits they "
            "hold: allowed are .safetensors and .pt files, or float32"
        )
    if not np.can_cast(array.dtype, held_as):
        raise ValueError(f"{name} is {array.dtype}, which does not fit in {held_as}")
    return jnp.asarray(from_torch_layout(path, array, layout), like.dtype)


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        # np.load leaves a torn file open, so opening it is not left to np.load.
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            state = dict(arrays)
    except Exception as error:  # whatever a stranger's bytes do to zipfile, zlib and NumPy
        raise ValueError(f"{path}: not an .npz file of arrays: {error}") from None
    for name, array in state.items():
        if not isinstance(array, np.ndarray):  # a member that is no .npy comes as bytes
            raise ValueError(f"{path}: not an .npz file of arrays: {name} is none")
    return state


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    with extra("convert"):  # only this format needs it
        import safetensors
    try:
        tensors = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a .safetensors file: {error}") from None
    state = {}
    for name, tensor in tensors:
        if tensor["dtype"] not in _SAFETENSORS_DTYPES:
            raise ValueError(f"{path}: tensor {name} has dtype {tensor['dtype']}: {_ALLOWED}")
        dtype = jnp.dtype(_SAFETENSORS_DTYPES[tensor["dtype"]])
        state[name] = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
    return state


_ALLOWED = "allowed are dense tensors of floats and integers"


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    with extra("torch"):
        import torch
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, with pages of advice
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: not a PyTorch state dict: {reason}") from None
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{path}: not a state dict of tensors, it is a {type(state).__name__}")
    is_lightning = "pytorch-lightning_version" in state
    found = _without_others(dict(_state_dicts(state)))
    if len(found) > 1:
        raise ValueError(
            f"{path} holds several state dicts, {', '.join(found)}: allowed is one; torch.load the "
            "file, and give from_torch the one that is meant"
        )
    state = next(iter(found.values()), state)
    others = [name for name, tensor in state.items() if not torch.is_tensor(tensor)]
    if others:
        kind = type(state[others[0]]).__name__
        raise ValueError(f"{path}: not a state dict of tensors: {others[0]!r} is a {kind}")
    state = {str(name): tensor for name, tensor in state.items()}
    state = _without(_PREFIXES, state)
    if is_lightning:
        state = _without(("model.", *_PREFIXES), state)
    return {name: _tensor_to_numpy(path, name, tensor.detach()) for name, tensor in state.items()}


def _state_dicts(state: Mapping, path: str = "") -> Iterator[tuple[str, Mapping]]:
    """What may be state dicts in a training checkpoint, at any depth, and where they are."""
    import torch

    if state and all(torch.is_tensor(value) for value in state.values()):
        if any(value.ndim for value in state.values()):  # numbers alone are metrics
            yield path, state
        return
    for name, value in state.items():
        if isinstance(name, str) and isinstance(value, Mapping):
            yield from _state_dicts(value, f"{path}/{name}" if path else name)


def _without_others(found: dict[str, Mapping]) -> dict[str, Mapping]:
    """Those that may be meant: where one has the usual name, it, and others of the same tensors."""
    usual = [path for path in found if path.rpartition("/")[2] in _WRAPPERS]
    if len(found) == 1 or len(usual) != 1:
        return found
    names = set(found[usual[0]])
    return {p: state for p, state in found.items() if p == usual[0] or set(state) == names}


def _without(prefixes: Iterable[str], state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` without the prefixes that all of its names share, in any order."""
    state = dict(state)
    while shared := [p for p in prefixes if state and all(name.startswith(p) for name in state)]:
        state = {name.removeprefix(shared[0]): value for name, value in state.items()}
    return state


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


def _tensor_to_numpy(path: pathlib.Path | str, name: str, tensor: Any) -> np.ndarray:
    import torch

    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_quantized or tensor.layout is not torch.strided:
        found = dtype if tensor.is_quantized else f"{dtype}, {tensor.layout}"
        raise ValueError(f"{path}: tensor {name} is {found}: {_ALLOWED}")
    if dtype == "bfloat16":
        return tensor.contiguous().view(torch.int16).numpy().view(jnp.bfloat16)
    try:
        if dtype.startswith("float8"):
            return tensor.contiguous().view(torch.uint8).numpy().view(jnp.dtype(dtype))
        return tensor.numpy()
    except (TypeError, RuntimeError):
        raise ValueError(f"{path}: tensor {name} is {dtype}: {_ALLOWED}") from None
