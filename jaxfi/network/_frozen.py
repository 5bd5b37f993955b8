"""`apply_fn` as it is now: traced once, its one output array taken out of any container.

JAX keeps what it traced by the function. It does not see that a variable which the function closes
over was bound to something else since, nor an attribute, nor a jitted function inside. So a network
is traced under a context of its own, which none of JAX's caches knows, and from then on is what was
traced: whatever changes later, every program of a campaign computes what its fingerprint says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

from jaxfi.faults._transforms import PyTree
from jaxfi.network._rules import shape_of

Array = jax.Array
ApplyFn = Callable[[PyTree, Array], Array]

_CONTEXT = jax.make_user_context()  # in the key of all of JAX's caches
ALLOWED = (
    "allowed is one float array [batch, classes], and in a campaign with criteria= any arrays "
    "[batch, ...]"
)


class Frozen:
    """A function of parameters and images that does what `apply_fn` does when it is first called
    with arrays of these shapes, and returns the array alone, or of several all in a tuple. Of a
    jitted function, it is what was jitted, so that donated or sharded arguments play no part.

    Raises TypeError for what cannot be traced. When first called, it raises TypeError for outputs
    that are no arrays, and ValueError for a network that is spread over several devices, or closes
    over a deleted array.
    """

    __name__ = "apply_fn"  # of programs

    def __init__(self, apply_fn: ApplyFn):
        if isinstance(apply_fn, jax.stages.Compiled) or not callable(apply_fn):
            raise TypeError(
                f"apply_fn is a {type(apply_fn).__name__}: allowed is a function of params and "
                "images, as written or from jax.jit"
            )
        is_jitted = hasattr(apply_fn, "lower") and hasattr(apply_fn, "__wrapped__")
        function = apply_fn.__wrapped__ if is_jitted else apply_fn  # type: ignore[attr-defined]
        self._function = function
        self._traced: dict[Any, tuple[core.ClosedJaxpr, Any]] = {}

    def __call__(self, params: PyTree, images: Any) -> Any:
        outputs = core.jaxpr_as_fun(self.traced(params, images))(*jax.tree.leaves((params, images)))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def traced(self, params: PyTree, images: Any) -> core.ClosedJaxpr:
        """What runs for arrays like these, or shapes: a jaxpr of all leaves and the images."""
        return self._trace(params, images)[0]

    def outputs(self, params: PyTree, images: Any) -> Any:
        """Shapes of what is returned, as `apply_fn` arranges it; of a dataclass that JAX does not
        know, a dict."""
        jaxpr, tree = self._trace(params, images)
        return jax.tree.unflatten(tree, map(_shape, jaxpr.out_avals))

    def _trace(self, params: PyTree, images: Any) -> tuple[core.ClosedJaxpr, Any]:
        shapes = jax.tree.map(_shape, (params, images))
        leaves, tree = jax.tree.flatten(shapes)
        key = tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        if key not in self._traced:
            self._traced[key] = _trace(self._function, *shapes)
        return self._traced[key]


def frozen(apply_fn: ApplyFn) -> Frozen:
    """`apply_fn` as it is now; as it is, if it is frozen already."""
    return apply_fn if isinstance(apply_fn, Frozen) else Frozen(apply_fn)


def _shape(array: Any) -> jax.ShapeDtypeStruct:
    if not hasattr(array, "shape"):
        array = jax.typeof(array)  # of a Python number
    weak = getattr(array, "weak_type", False)
    return jax.ShapeDtypeStruct(array.shape, array.dtype, weak_type=weak)


def _trace(apply_fn: ApplyFn, params: PyTree, images: Any) -> tuple[core.ClosedJaxpr, Any]:
    """The jaxpr, and how its outputs are arranged."""
    others: list[str] = []
    trees: list[Any] = []

    def arrays(*given: Any) -> list:
        leaves, tree = jax.tree.flatten(_tree(apply_fn(*given)))
        trees.append(tree)
        others.extend(type(leaf).__name__ for leaf in leaves if not hasattr(leaf, "shape"))
        return [leaf for leaf in leaves if hasattr(leaf, "shape")]

    with _CONTEXT(object()):
        traced = jax.make_jaxpr(arrays)(params, images)
    if others:
        raise TypeError(f"apply_fn returned something of type {others[0]}: {ALLOWED}")
    for name, what, allowed in _unknown(traced.jaxpr):
        raise ValueError(f"apply_fn holds a {name}, {what}: allowed are {allowed}")
    for name, num_devices in _spread(traced.jaxpr):
        raise ValueError(
            f"apply_fn holds a {name} over {num_devices} devices: allowed are networks that run on "
            "one, without shardings inside"
        )
    if any(isinstance(const, jax.Array) and const.is_deleted() for const in traced.consts):
        raise ValueError("apply_fn closes over an array that was deleted, as by a donation")
    return traced, trees[-1]


def _tree(outputs: Any) -> Any:
    """What is in a container, registered with JAX or a dataclass."""
    leaves = jax.tree.leaves(outputs)
    if len(leaves) == 1 and dataclasses.is_dataclass(leaves[0]):
        names = [field.name for field in dataclasses.fields(leaves[0])]
        return {name: getattr(leaves[0], name) for name in names}
    return outputs


def _unknown(jaxpr: core.Jaxpr) -> Iterator[tuple[str, str, str]]:
    """Operations that are more than a function of their operands, at any depth: what, what it does,
    and what is allowed."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        values = (*equation.invars, *equation.outvars)
        if any("Ref" in type(value.aval).__name__ for value in values):
            yield name, "which reads or writes a mutable array", "functions without jax.new_ref"
        if name == "shard_map":
            yield name, "which divides a batch by devices", "networks that run on one, without it"
        if name == "pallas_call":  # whose kernel has arrays of its own to write
            continue
        for inner in core.jaxprs_in_params(equation.params):
            yield from _unknown(inner)


def _spread(jaxpr: core.Jaxpr) -> Iterator[tuple[str, int]]:
    """Operations that name several devices, at any depth, and how many."""
    for equation in jaxpr.eqns:
        for setting in jax.tree.leaves(list(equation.params.values())):
            if isinstance(setting, jax.sharding.NamedSharding):
                setting = setting.mesh
            if isinstance(setting, (jax.sharding.Mesh, jax.sharding.AbstractMesh)):
                number = setting.size
            elif isinstance(setting, jax.sharding.Sharding):
                number = setting.num_devices
            else:
                continue
            if number > 1:
                yield equation.primitive.name, number
        for inner in core.jaxprs_in_params(equation.params):
            yield from _spread(inner)


def check_output(jaxpr: core.Jaxpr, batch: int) -> None:
    """Raises ValueError unless the output is one array [batch, classes]."""
    found = [var.aval.str_short() for var in jaxpr.outvars]
    shape: tuple = shape_of(jaxpr.outvars[0]) if len(found) == 1 else ()
    if len(shape) != 2 or shape[0] != batch or shape[1] < 1:
        raise ValueError(
            f"apply_fn returned {', '.join(found) or 'nothing'} for a batch of {batch} images: "
            f"{ALLOWED}"
        )
