"""Faults in the outputs of a layer's neurons, in a network that was written without them.

A layer is named by the path of the module that holds its leaves. Its output is what a PyTorch
forward hook on it would see: the result of the last operation that joins the layer's own leaves
with what depends on the images (of a convolution with bias: after the bias, before the ReLU).

A layer that the network calls several times has one set of neurons, as one piece of hardware has
that computes them all: a fault hits every call, as a forward hook does. `neuron_outputs` can also
name the calls apart, `conv1#1` and `conv1#2`, for faults that hit one of them.

`neuron_outputs` gives the neurons as a tree, so that a `FaultList` can name them: a crashed neuron
is the fault model "zero", a Byzantine one "value", and an output word can have a bit flipped or
stuck. `inject_neurons` puts such faults into a traced network. `with_neuron_words` makes a network
whose neuron faults are faults in extra leaves, for `run_campaign`.

>>> def apply_fn(params, images):
...     return jnp.maximum(images @ params["first"]["w"], 0) @ params["last"]["w"]
>>> params = {"first": {"w": jnp.eye(2)}, "last": {"w": jnp.eye(2)}}
>>> images = jnp.array([[1.0, 2.0]])
>>> neurons = neuron_outputs(apply_fn, params, images)
>>> crash = FaultList.from_sites([("first", (1,), None)], neurons, model="zero")
>>> inject_neurons(apply_fn, neurons, crash.fault(0))(params, images).tolist()
[[1.0, 0.0]]
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxfi.faults import layer_of
from jaxfi.faults._list import FaultList
from jaxfi.faults._transforms import (
    BIT_MODELS,
    FAULT_MODELS,
    Fault,
    PyTree,
    corrupt,
    leaf_paths,
    reread,
    to_words,
    word_dtype,
)
from jaxfi.network._equations import bind, read
from jaxfi.network._graph import ApplyFn, Network, trace_network
from jaxfi.network._images import images_shape
from jaxfi.network._sources import IMAGES, inner_sources, leaf_sources, sources_of

Neurons = dict[str, jax.ShapeDtypeStruct]
"""Shape and dtype of a layer's neurons by the layer's path, sorted as trees are."""

_OVERRIDE, _FLIP = "override", "flip"


class _Join(NamedTuple):
    """An operation that joins leaves of a layer with what depends on the images."""

    kind: str
    leaves: frozenset[int]
    output: core.Var | None
    """None where a loop or a branch does it, somewhere inside."""


def neuron_outputs(
    apply_fn: ApplyFn,
    params: PyTree,
    images: Any,
    *,
    layers: str = "*",
    per_image: bool = False,
    by_call: bool = False,
) -> Neurons:
    """The neurons that can be faulty, as a tree for `FaultList` and `sample_faults`.

    Args:
      apply_fn: pure; maps `params` and images [batch, ...] to outputs [batch, classes].
      params: the parameter tree.
      images: one batch, or its shape and dtype.
      layers: pattern (fnmatch) of layer paths.
      per_image: a leaf has the shape [batch, ...] of the layer's output, so that a fault names one
        image of the batch too; else that of one image's neurons, and a fault hits them for all.
      by_call: a layer that is called several times has a leaf for each call, `conv1#1`, `conv1#2`;
        else one for all calls, and a fault hits each of them.

    Raises ValueError if no layer matches, or if one that does is called in a loop or branch, has
    calls of several shapes (and not `by_call`), or has no leading axis of images.
    """
    network = trace_network(apply_fn, params, images_shape(images), keep_derivatives=True)
    outputs = layer_outputs(network)
    chosen = sorted(name for name in outputs if fnmatch.fnmatchcase(name, layers))
    if not chosen:
        raise ValueError(f"no layer matches {layers!r}: the layers are {', '.join(outputs)}")
    found: dict[str, list[core.Var]] = {}
    for name in chosen:
        _check_outputs(name, outputs[name], network, by_call)
        found |= dict(_named_calls(name, outputs[name])) if by_call else {name: outputs[name]}
    first = 0 if per_image else 1
    avals: dict[str, Any] = {name: calls[0].aval for name, calls in sorted(found.items())}
    return {
        name: jax.ShapeDtypeStruct(aval.shape[first:], aval.dtype) for name, aval in avals.items()
    }


def _check_outputs(name: str, calls: list[core.Var], network: Network, by_call: bool) -> None:
    """Raises ValueError where a layer's outputs cannot be faulty."""
    if not calls:
        raise ValueError(
            f"layer {name} is called inside a loop or a branch, where its output has no name: "
            "choose other layers"
        )
    if any(network.batch_axis[var] != 0 for var in calls):
        raise ValueError(f"the output of layer {name} does not have the images' axis first")
    shapes = sorted({str(var.aval.str_short()) for var in calls})
    if len(shapes) > 1 and not by_call:
        raise ValueError(
            f"layer {name} is called {len(calls)} times, with outputs {' and '.join(shapes)}: "
            "name its calls apart with by_call=True"
        )


def _named_calls(name: str, calls: list[core.Var]) -> list[tuple[str, list[core.Var]]]:
    """The calls of a layer as layers of their own; a single call keeps the layer's name."""
    if len(calls) == 1:
        return [(name, calls)]
    return [(f"{name}#{number}", [var]) for number, var in enumerate(calls, start=1)]


def inject_neurons(
    apply_fn: ApplyFn,
    neurons: Neurons,
    fault: Fault,
    *,
    per_image: bool = False,
    hit_gradient: str = "zero",
) -> ApplyFn:
    """`apply_fn` with faults in its neurons: pure, jit-able, and vmap-able over `fault`.

    Args:
      apply_fn: as in `neuron_outputs`.
      neurons: what `neuron_outputs` gave, with the same `per_image`.
      fault: of a `FaultList` on `neurons`: scalars, or [K] faults together.
        With `per_image`, K faults can hit K images differently.
      hit_gradient: of the faulty neurons, as in `inject`.

    Returns a function of parameters and images [batch, ...] to outputs [batch, classes].
    """

    def change(layer: str, output: jax.Array) -> jax.Array:
        if layer not in neurons:
            return output
        number, size = list(neurons).index(layer), np.prod(neurons[layer].shape, dtype=np.int32)
        element = jnp.where(fault.leaf == number, fault.element, size)  # out of range: no-op

        def faulty(values: jax.Array) -> jax.Array:
            masks = fault.keep, fault.flip
            return corrupt(values, element, *masks, hit_gradient=hit_gradient)

        return faulty(output) if per_image else jax.vmap(faulty)(output)

    return transform_outputs(apply_fn, change)


def with_neuron_words(
    apply_fn: ApplyFn,
    params: PyTree,
    neurons: Neurons,
    *,
    per_image: bool = False,
    hit_gradient: str = "zero",
) -> tuple[ApplyFn, PyTree]:
    """A network and its parameters in which faults in extra leaves are faults in neurons.

    The parameters are `{"params": params, "neurons": ...}`; each layer of `neurons` has a leaf
    "override", which a neuron's output is replaced with unless it holds all ones, and a leaf
    "flip", whose word its output's is xored with. Without faults both change nothing.
    `neuron_faults` turns faults in neurons into faults in these leaves.

    Args:
      apply_fn, params: as in `neuron_outputs`.
      neurons: what `neuron_outputs` gave, with the same `per_image`: then the network takes
        batches of the size that `neurons` has.
      hit_gradient: of the faulty neurons, as in `inject`.

    Returns the network, of that tree and images, and the tree.
    """
    words = {
        name: {
            _OVERRIDE: jnp.asarray(_all_ones(shape.dtype, shape.shape)),
            _FLIP: jnp.zeros(shape.shape, shape.dtype),  # a float, so that reports know its bits
        }
        for name, shape in neurons.items()
    }

    def faulty(tree: PyTree, images: jax.Array) -> jax.Array:
        def change(layer: str, output: jax.Array) -> jax.Array:
            if layer not in tree["neurons"]:
                return output
            here = tree["neurons"][layer]
            override, flip = to_words(here[_OVERRIDE]), to_words(here[_FLIP])
            if not per_image:
                override, flip = override[None], flip[None]
            kept = override == np.array(-1).astype(override.dtype)
            changed = jnp.where(kept, to_words(output), override) ^ flip
            return reread(output, changed, hit_gradient)

        return transform_outputs(apply_fn, change)(tree["params"], images)

    return faulty, {"params": params, "neurons": words}


def neuron_faults(faults: FaultList, tree: PyTree) -> FaultList:
    """Faults in neurons as faults in the leaves that `with_neuron_words` added.

    Args:
      faults: on the tree of `neuron_outputs`; models "zero", "value" and "bit-flip".
      tree: the parameters of `with_neuron_words`.

    Raises ValueError for another model, for a value whose word is all ones, which stands for no
    fault, and for a value that follows a flip in the same neuron: they would come out in the other
    order.
    """
    names = np.array(FAULT_MODELS)[faults.model]
    unknown = sorted(set(names.tolist()) - {"zero", "value", "bit-flip"})
    if unknown:
        raise ValueError(f"fault model {unknown[0]!r}: allowed are zero, value and bit-flip")
    _check_order(faults)
    places = {path: number for number, path in enumerate(leaf_paths(tree))}

    def place(layer: int, has_bit: bool) -> int:
        return places[f"neurons/{faults.paths[layer]}/{_FLIP if has_bit else _OVERRIDE}"]

    has_bit = np.isin(names, BIT_MODELS)
    leaf = [place(*row) for row in zip(faults.leaf, has_bit, strict=True)]
    drawn_from = faults.drawn_from and tuple(
        stratum._replace(leaf=place(stratum.leaf, stratum.bits != (-1,)))
        for stratum in faults.drawn_from
    )
    columns = (faults.element, faults.bit, faults.model, faults.value)
    return FaultList.from_arrays(tree, leaf, *columns, drawn_from=drawn_from)


def _check_order(faults: FaultList) -> None:
    ones = np.array([np.iinfo(word_dtype(d)).max for d in faults.dtypes], np.uint64)[faults.leaf]
    keep, flip = faults.masks()
    flipped: set[tuple[int, int]] = set()
    for row, place in enumerate(zip(faults.leaf.tolist(), faults.element.tolist(), strict=True)):
        if faults.bit[row] >= 0:
            flipped.add(place)
        elif place in flipped:
            raise ValueError(
                f"fault {row} writes a value after a flip in the same neuron of "
                f"{faults.paths[place[0]]}: allowed are values before flips, or inject_neurons"
            )
        elif keep[row] == 0 and flip[row] == ones[row]:
            raise ValueError(
                f"fault {row} writes a word of ones, which stands for no fault: allowed is "
                "inject_neurons"
            )


def with_random_values(faults: FaultList, seed: int, low: float, high: float) -> FaultList:
    """The same sites as Byzantine neurons: each writes a value of its own, uniform in a range.

    Raises ValueError unless low < high, both finite.
    """
    if not -np.inf < low < high < np.inf:
        raise ValueError(f"values from {low} to {high}: allowed are finite numbers, low < high")
    values = np.random.default_rng(seed).uniform(low, high, len(faults))
    tree = {
        path: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        for path, shape, dtype in zip(faults.paths, faults.shapes, faults.dtypes, strict=True)
    }
    return FaultList.from_arrays(tree, faults.leaf, faults.element, -1, "value", values)


def transform_outputs(apply_fn: ApplyFn, change: Callable[[str, jax.Array], jax.Array]) -> ApplyFn:
    """`apply_fn` with each layer's output replaced by `change(layer, output)`.

    Of a layer that is called several times each call's is, first as the layer's, then as that of
    `layer#1`, `layer#2` and so on.
    """

    def changed(params: PyTree, images: jax.Array) -> jax.Array:
        shape = jax.ShapeDtypeStruct(images.shape, images.dtype)
        network = trace_network(apply_fn, params, shape, keep_derivatives=True)
        names = _names_of_outputs(network)
        leaves = zip(network.leaves, jax.tree.leaves(params), strict=True)
        env = {**network.given, **dict(leaves), network.image: images}
        for equation in network.equations:
            results = bind(equation, [read(env, value) for value in equation.invars])
            for var, result in zip(equation.outvars, results, strict=True):
                for name in names.get(var, ()):
                    result = change(name, result)
                env[var] = result
        return read(env, network.output)

    return changed


def _names_of_outputs(network: Network) -> dict[core.Var, list[str]]:
    """What each layer's outputs go by."""
    names: dict[core.Var, list[str]] = {}
    for layer, calls in layer_outputs(network).items():
        for name, (var,) in _named_calls(layer, calls):
            names.setdefault(var, []).extend(dict.fromkeys((layer, name)))
    return names


def layer_outputs(network: Network) -> dict[str, list[core.Var]]:
    """The output of each call of each layer, by the layer's path, calls in their order.

    Layers are in the order of their first use. A leaf that is in no module is a layer of its own. A
    layer that is used inside a loop or a branch has no outputs here.
    """
    sources = leaf_sources(network)
    joins: dict[str, list[_Join]] = {}
    for equation in network.equations:
        operands = sources_of(equation.invars, sources)
        if not any(IMAGES in source for source in operands):
            continue
        output = None if inner_sources(equation, operands) else equation.outvars[0]
        own = frozenset().union(*(source for source in operands if IMAGES not in source))
        for layer, leaves in _by_layer(own, network.paths).items():
            joins.setdefault(layer, []).append(_Join(equation.primitive.name, leaves, output))
    return {layer: _outputs_of_calls(found) for layer, found in joins.items()}


def _by_layer(leaves: Iterable[int], paths: Sequence[str]) -> dict[str, frozenset[int]]:
    layers: dict[str, frozenset[int]] = {}
    for leaf in leaves:
        layer = layer_of(paths[leaf])
        layers[layer] = layers.get(layer, frozenset()) | {leaf}
    return layers


def _outputs_of_calls(joins: Sequence[_Join]) -> list[core.Var]:
    """The output of each call: its last join.

    Every call does the same with the same leaves, so what is repeated is called several times.
    """
    outputs = [join.output for join in joins if join.output is not None]
    if len(outputs) < len(joins):
        return []
    kinds = [(join.kind, join.leaves) for join in joins]
    lengths = range(1, len(kinds) + 1)
    call = next(n for n in lengths if kinds == kinds[:n] * (len(kinds) // n))
    return outputs[call - 1 :: call]


def _all_ones(dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Words of ones, as the dtype: a NaN that no arithmetic gives."""
    word = word_dtype(dtype)
    return np.full(shape, np.iinfo(word).max, word).view(jnp.dtype(dtype))
