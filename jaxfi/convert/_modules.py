"""Networks of other frameworks as pure JAX functions: PyTorch, Keras 3, Flax NNX, Equinox.

Each gives `(apply_fn, params)` for `run_campaign`: the module's own computation in evaluation mode,
its trainable weights as leaves with the names that the framework gives them. What else it holds,
such as the statistics of a batch normalization, is a constant of the function unless `buffers=True`
asks for it; counters and random keys are never leaves. No module is changed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfi.convert._weights import TOLERANCE
from jaxfi.data._extras import extra
from jaxfi.engine._compilation import own_settings
from jaxfi.faults import PyTree
from jaxfi.network import ApplyFn

Converted = tuple[ApplyFn, PyTree]


def from_module(module: Any, example: Any, *, buffers: bool = False) -> Converted:
    """A `torch.nn.Module` as a pure JAX function, traced by torchax.

    The module is copied: what is done to it later changes nothing here, nor does a campaign change
    it. Its hooks are part of what it computes.

    Args:
      module: in evaluation mode (`module.eval()`), on the CPU. All its parameters are leaves,
        frozen ones too; a tensor that is a plain attribute must be a buffer (`register_buffer`).
      example: inputs of a few images, as the module takes them (images channels first): an array or
        a tensor [n, ...]; a tuple for several arguments, a dict for keywords.
      buffers: floating-point buffers, such as running means and variances, are leaves too.

    Returns:
      `apply_fn(params, images)`, images arranged as the example, and `params`, flat by the names of
      the state dict. Outputs are arranged as the module's; of a dataclass, and of the outputs of
      transformers, a dict of those that are not None.

    Raises ValueError naming the line that cannot be traced, as where values decide what runs; for a
    module in training mode; for 64-bit weights, which JAX cuts to 32 bits unless jax_enable_x64 is
    set; and where JAX's outputs on the example differ from PyTorch's by more than 1e-4 of the
    largest (of 16-bit outputs, by eight of their roundings). TypeError for what is no module,
    ImportError without torchax.
    """
    torch, environment = _torch()
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module is a {type(module).__name__}: allowed is a torch.nn.Module")
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    training = [name or "the module" for name, part in module.named_modules() if part.training]
    if training:
        raise ValueError(f"{training[0]} is in training mode: allowed is module.eval()")
    try:
        module = copy.deepcopy(module)
    except Exception as error:  # whatever the user's module holds
        raise ValueError(
            f"{type(module).__name__} cannot be copied: {_first_line(error)}; allowed are modules "
            "that copy.deepcopy copies"
        ) from error
    named = {name: value.detach() for name, value in module.named_parameters()}
    others = {name: value.detach() for name, value in module.named_buffers()}
    if buffers:
        named |= {name: value for name, value in others.items() if value.is_floating_point()}
    _check_words("module.float()", {name: _from_tensor(value) for name, value in named.items()})
    constants = {name: _from_tensor(value) for name, value in others.items() if name not in named}
    params = {name: jnp.asarray(_from_tensor(value)) for name, value in named.items()}

    def apply_fn(params: PyTree, images: Any) -> Any:
        arrays = jax.tree.map(jnp.asarray, ({**constants, **params}, images))
        states, given = environment.j2t_iso(arrays)
        # A module may keep what it computed: each trace has a copy of its own, of the same tensors.
        tensors = (*module.parameters(), *module.buffers())
        traced = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
        with environment, torch.no_grad():
            outputs = torch.func.functional_call(traced, states, *_arguments(given))
        return _arranged(outputs, lambda tensor: environment.t2j_iso(tensor))

    example = _mapped(example, _array)
    with torch.no_grad():
        arguments, keywords = _arguments(_mapped(example, functools.partial(_tensor, torch)))
        expected = copy.deepcopy(module)(*arguments, **keywords)
    expected = _arranged(expected, lambda tensor: _from_tensor(tensor))
    try:
        found = _run(apply_fn, params, example)
    except Exception as error:  # whatever an operation of the user's module raises
        raise ValueError(
            f"{type(module).__name__} cannot be traced{_where(error)}: "
            f"{type(error).__name__}: {_first_line(error)}; {_way_out(error)}"
        ) from error
    _check_equal("PyTorch", expected, found)
    return apply_fn, params


def from_keras(model: Any, example: Any, *, buffers: bool = False) -> Converted:
    """A Keras 3 model on the JAX backend as a pure function, in inference.

    Args:
      model: built.
      example: inputs of a few images, as the model takes them.
      buffers: floating-point variables that are not trained, such as moving means, are leaves too.

    Returns `apply_fn(params, images)` and `params`, flat by the variables' paths.

    Raises ValueError for another backend (`KERAS_BACKEND=jax` must be set before Keras is imported)
    and for outputs that differ from Keras's on the example; TypeError for what is no model.
    """
    with extra("keras"):
        import keras
    if not isinstance(model, keras.Model):
        raise TypeError(f"model is a {type(model).__name__}: allowed is a keras.Model")
    frozen = [layer.name for layer in _layers(model) if layer.weights and not layer.trainable]
    if frozen:
        raise ValueError(
            f"layer {frozen[0]} is frozen, and Keras counts its weights with its statistics: "
            "allowed is trainable = True when converting"
        )
    if keras.backend.backend() != "jax":
        raise ValueError(
            f"Keras runs on {keras.backend.backend()}: allowed is its JAX backend, "
            "KERAS_BACKEND=jax in the environment before Keras is imported"
        )
    example = _mapped(example, _array)
    with own_settings():
        expected = model(example, training=False)
    trained, others = model.trainable_variables, model.non_trainable_variables
    is_leaf = {id(variable): True for variable in trained}
    if buffers:
        is_leaf |= {id(v): True for v in others if jnp.issubdtype(v.value.dtype, jnp.floating)}
    params = {v.path: jnp.asarray(v.value) for v in (*trained, *others) if id(v) in is_leaf}
    if len(params) != len(is_leaf):
        paths = [v.path for v in (*trained, *others) if id(v) in is_leaf]
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"two variables are called {twice}: allowed are distinct names")
    constants = {id(v): np.asarray(v.value) for v in others if id(v) not in is_leaf}

    def apply_fn(params: PyTree, images: Any) -> Any:
        def values(variables: list) -> list:
            return [params[v.path] if id(v) in is_leaf else constants[id(v)] for v in variables]

        outputs, _ = model.stateless_call(values(trained), values(others), images, training=False)
        return outputs

    _check_equal("Keras", expected, _run(apply_fn, params, example))
    return apply_fn, params


def from_nnx(module: Any, example: Any, *, buffers: bool = False) -> Converted:
    """A Flax NNX module as a pure function, in evaluation mode.

    Args:
      module: an `nnx.Module`; what it has of `eval()` is done on a copy.
      example: inputs of a few images, as the module takes them.
      buffers: floating-point variables that are no `nnx.Param`, such as `nnx.BatchStat`, are leaves
        too.

    Returns `apply_fn(params, images)` and `params`, a nested dict by the module's attributes.

    Raises ValueError for outputs that differ from the module's on the example, TypeError for what
    is no module.
    """
    with extra("train"):
        from flax import nnx
    if not isinstance(module, nnx.Module):
        raise TypeError(f"module is a {type(module).__name__}: allowed is an nnx.Module")
    copied = nnx.clone(module)
    copied.eval()

    def is_leaf(path: tuple, variable: Any) -> bool:
        value: Any = getattr(variable, "value", None)
        floating = hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating)
        return isinstance(variable, nnx.Param) or (buffers and floating)

    graph, leaves, rest = nnx.split(copied, is_leaf, ...)
    params = nnx.to_pure_dict(leaves)
    if not jax.tree.leaves(params):
        raise ValueError("the module holds no nnx.Param: allowed are modules that have some")
    template = leaves

    def apply_fn(params: PyTree, images: Any) -> Any:
        state = copy.deepcopy(template)
        nnx.replace_by_pure_dict(state, params)
        network = nnx.merge(graph, state, rest)
        arguments, keywords = _arguments(images)
        return network(*arguments, **keywords)

    example = _mapped(example, _array)
    arguments, keywords = _arguments(example)
    _check_equal("NNX", nnx.clone(copied)(*arguments, **keywords), _run(apply_fn, params, example))
    return apply_fn, params


def from_equinox(module: Any, example: Any) -> Converted:
    """An Equinox module as a pure function of a batch, in inference mode.

    Args:
      module: of one image, as Equinox's layers are, and without state; it is vmapped over the
        images.
      example: inputs of a few images [n, ...]; a tuple for several arguments.

    Returns `apply_fn(params, images)` and `params`, flat by the paths of the module's fields. The
    leaves are its floating-point arrays.

    Raises ValueError for outputs that differ from the module's on the example, TypeError for what
    is no module.
    """
    with extra("equinox"):
        import equinox
    if not isinstance(module, equinox.Module):
        raise TypeError(f"module is a {type(module).__name__}: allowed is an equinox.Module")
    still = equinox.nn.inference_mode(module)
    leaves, rest = equinox.partition(still, equinox.is_inexact_array)
    with_paths, tree = jax.tree_util.tree_flatten_with_path(leaves)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in with_paths]
    params = dict(zip(names, (leaf for _, leaf in with_paths), strict=True))

    def apply_fn(params: PyTree, images: Any) -> Any:
        network = equinox.combine(jax.tree.unflatten(tree, [params[n] for n in names]), rest)
        return jax.vmap(lambda image: network(*_arguments(image)[0]))(images)

    example = _mapped(example, _array)
    first = _arguments(jax.tree.map(lambda array: array[0], example))[0]
    try:
        expected = jax.tree.map(lambda array: array[None], still(*first))
    except Exception as error:  # whatever the user's module raises
        raise ValueError(
            f"{type(module).__name__} cannot run on one image: {type(error).__name__}: "
            f"{_first_line(error)}; allowed are modules of one image, without state"
        ) from error
    found = jax.tree.map(lambda array: array[:1], _run(apply_fn, params, example))
    _check_equal("Equinox", expected, found)
    return apply_fn, params


def _run(apply_fn: ApplyFn, params: PyTree, example: Any) -> Any:
    with own_settings(), jax.default_matmul_precision("highest"):
        return jax.tree.map(np.asarray, jax.jit(apply_fn)(params, example))


def _arguments(inputs: Any) -> tuple[tuple, dict]:
    """Positional and keyword arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple) else (inputs,)), {}


def _mapped(inputs: Any, function: Callable) -> Any:
    """An array, a tuple or a dict of them."""
    if isinstance(inputs, Mapping):
        return {name: function(value) for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(map(function, inputs))
    return function(inputs)


def _arranged(outputs: Any, of_tensor: Callable) -> Any:
    """What a PyTorch module puts out, with arrays in the place of tensors, and without None."""
    if isinstance(outputs, Mapping):
        return {k: _arranged(v, of_tensor) for k, v in outputs.items() if v is not None}
    if dataclasses.is_dataclass(outputs):
        fields = [field.name for field in dataclasses.fields(outputs)]
        return _arranged({name: getattr(outputs, name) for name in fields}, of_tensor)
    if isinstance(outputs, tuple | list):
        return tuple(_arranged(value, of_tensor) for value in outputs if value is not None)
    if not hasattr(outputs, "detach"):
        raise TypeError(
            f"the module puts out a {type(outputs).__name__}: allowed are tensors, in tuples and "
            "dicts (of transformers that keep a cache, with config.use_cache = False)"
        )
    return of_tensor(outputs)


def _torch() -> tuple[Any, Any]:
    """PyTorch, and torchax's environment; PyTorch's settings stay as they are."""
    with extra("torch"):
        import torch

        fast = torch.backends.mha.get_fastpath_enabled()
        with _named_dimensions(torch._ops.OpOverloadPacket):
            import torchax

            environment = torchax.default_env()  # reads more tables
        torch.backends.mha.set_fastpath_enabled(fast)
    return torch, environment


@contextlib.contextmanager
def _named_dimensions(packet: Any) -> Iterator[None]:
    """Within it, PyTorch's operators for named dimensions, which 2.13 took out, have names again:
    torchax 0.0.13 lists them in its tables when it is imported, and calls none."""
    original = packet.__getattr__

    def found(self: Any, name: str) -> Any:
        try:
            return original(self, name)
        except AttributeError:
            if "name" in name.lower() and not name.startswith("__"):
                return f"{self}.{name}"
            raise

    packet.__getattr__ = found
    try:
        yield
    finally:
        packet.__getattr__ = original


def _from_tensor(tensor: Any) -> np.ndarray:
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":
        return tensor.float().numpy().astype(jnp.bfloat16)
    return tensor.numpy().copy()


def _tensor(torch: Any, value: np.ndarray) -> Any:
    """A copy: a module may write into its input."""
    if value.dtype == jnp.bfloat16:
        return torch.from_numpy(value.astype(np.float32)).bfloat16()
    return torch.from_numpy(value.copy())


def _check_words(way_out: str, params: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError for weights that JAX would cut, or that are not there."""
    if not params:
        raise ValueError("the module has no parameters: no fault could be put into it")
    for name, value in params.items():
        if jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
            raise ValueError(
                f"{name} is {value.dtype}, which JAX cuts to 32 bits: set jax_enable_x64, or "
                f"convert {way_out}"
            )


def _layers(model: Any) -> Iterator[Any]:
    """Of a Keras model, at any depth."""
    for layer in getattr(model, "layers", ()):
        yield layer
        yield from _layers(layer)


def _array(value: Any) -> np.ndarray:
    return _from_tensor(value) if hasattr(value, "detach") else np.asarray(value)


def _check_equal(framework: str, expected: Any, found: Any) -> None:
    """Raises ValueError where outputs differ by more than rounding."""
    there, here = jax.tree.leaves(expected), jax.tree.leaves(found)
    shapes = [[np.shape(array) for array in arrays] for arrays in (there, here)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{framework} puts out {shapes[0]}, the converted network {shapes[1]}")
    for before, after in zip(map(np.asarray, there), map(np.asarray, here), strict=True):
        allowed = TOLERANCE
        if jnp.issubdtype(after.dtype, jnp.floating):
            allowed = max(allowed, 8 * float(jnp.finfo(after.dtype).eps))
        before, after = (np.asarray(array, np.float64) for array in (before, after))
        largest = np.max(np.abs(before), initial=np.finfo(np.float32).tiny)
        error = np.max(np.abs(after - before), initial=0.0) / largest
        if not error <= allowed:
            raise ValueError(
                f"the outputs of {framework} and of the converted network differ by {error:.2g} of "
                f"the largest on the example: allowed is {allowed:g}"
            )


def _where(error: BaseException) -> str:
    """The line of the module's own code that raised."""
    libraries = ("/torchax/", "/torch/", "/jax/", "/jaxfi/")
    own = [frame for frame in _frames(error) if not any(part in frame[0] for part in libraries)]
    return f" at {own[-1][0]}:{own[-1][1]} ({own[-1][2]})" if own else ""


def _way_out(error: BaseException) -> str:
    if isinstance(error, jax.errors.JAXTypeError):
        return (
            "allowed are modules whose operations do not depend on the values of tensors: write "
            "the branch with torch.where, or take that part out of the module"
        )
    return (
        "allowed are modules of parameters, buffers and operations that torchax knows: a tensor "
        "that is a plain attribute must be a buffer (register_buffer)"
    )


def _frames(error: BaseException) -> Iterator[tuple[str, int, str]]:
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        yield code.co_filename, trace.tb_lineno, code.co_name
        trace = trace.tb_next


def _first_line(error: BaseException) -> str:
    with contextlib.suppress(IndexError):
        return str(error).strip().splitlines()[0]
    return ""
