"""Trees of arrays, such as ids and mask, or boxes and scores, as one array [n, width], and back.

The engine knows one array in and one out. A network of trees is one, with the trees taken apart
inside: bits are moved, none is changed.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfi.faults._transforms import PyTree, word_bits, word_dtype
from jaxfi.network._frozen import ApplyFn


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the leaves of a tree [n, ...] lie in an array [n, width].

    Attributes:
      tree: its structure.
      names: of the leaves.
      shapes, dtypes: of the leaves, without the first axis.
    """

    tree: Any
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]

    @property
    def dtype(self) -> np.dtype:
        """Of the array: the leaves' own where they have one, else words that hold each."""
        if len(set(self.dtypes)) == 1 and self.dtypes[0] != "bool":
            return np.dtype(jnp.dtype(self.dtypes[0]))
        return np.dtype(f"uint{max(_bits(dtype) for dtype in self.dtypes)}")

    @property
    def width(self) -> int:
        """Of the array."""
        return sum(map(math.prod, self.shapes))

    def pack(self, tree: Any) -> Any:
        """[n, width], NumPy of NumPy's arrays."""
        parts = []
        for leaf, shape in zip(jax.tree.leaves(tree), self.shapes, strict=True):
            words = leaf.reshape(leaf.shape[0], math.prod(shape))
            if self.dtype != leaf.dtype:
                words = _words(words).astype(self.dtype)
            parts.append(words)
        on_host = all(isinstance(part, np.ndarray) for part in parts)
        return (np if on_host else jnp).concatenate(parts, axis=1)

    def leaves(self, array: Any) -> list:
        """The leaves, [n, ...] each, of an array [n, width]."""
        leaves, start = [], 0
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            stop = start + math.prod(shape)
            part = array[:, start:stop]
            if self.dtype != jnp.dtype(dtype):
                part = _values(part, dtype)
            leaves.append(part.reshape(array.shape[0], *shape))
            start = stop
        return leaves

    def unpack(self, array: Any) -> Any:
        """The tree of an array [n, width]."""
        return jax.tree.unflatten(self.tree, self.leaves(array))

    def unpack_shape(self, array: jax.ShapeDtypeStruct) -> Any:
        """Of shapes what `unpack` is of arrays."""
        return jax.eval_shape(self.unpack, array)

    def by_name(self, array: Any) -> dict[str, Any]:
        """The leaves of an array [n, width] by their names."""
        return dict(zip(self.names, self.leaves(array), strict=True))

    def describe(self) -> list[list[Any]]:
        """Name, shape and dtype of each leaf, of JSON's types."""
        rows = zip(self.names, self.shapes, self.dtypes, strict=True)
        return [[name, list(shape), dtype] for name, shape, dtype in rows]


def layout_of(what: str, tree: Any, length: int) -> Layout:
    """The layout of a tree of arrays, or shapes, [length, ...].

    Raises ValueError or TypeError naming a leaf of another first axis, or that holds no numbers of
    whole words; `what` says whose.
    """
    with_paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    names, shapes, dtypes = [], [], []
    for path, leaf in with_paths:
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "array"
        shape, dtype = tuple(leaf.shape), str(jnp.dtype(leaf.dtype))
        if shape[:1] != (length,):
            raise ValueError(
                f"{what} hold {name} {dtype}{list(shape)}: allowed are arrays whose first axis is "
                f"the images', [{length}, ...]"
            )
        _bits(dtype, f"{what} hold {name} of ")
        names.append(name)
        shapes.append(shape[1:])
        dtypes.append(dtype)
    if not names:
        raise ValueError(f"{what} hold no array")
    return Layout(structure, tuple(names), tuple(shapes), tuple(dtypes))


def between_arrays(apply_fn: ApplyFn, inputs: Layout | None, outputs: Layout | None) -> ApplyFn:
    """`apply_fn` of trees as a function of arrays; None where there is one array already."""
    if inputs is None and outputs is None:
        return apply_fn

    def of_arrays(params: PyTree, images: Any) -> Any:
        given = images if inputs is None else inputs.unpack(images)
        found = apply_fn(params, given)
        return found if outputs is None else outputs.pack(found)

    return of_arrays


def layout_from(description: list[list[Any]]) -> Layout:
    """The layout that `describe` described, without its tree: leaves have names."""
    names, shapes, dtypes = zip(*description, strict=True)
    return Layout(None, names, tuple(map(tuple, shapes)), dtypes)


def is_tree(values: Any) -> bool:
    """Whether values are a tree of arrays, and not one array or a list that becomes one."""
    if hasattr(values, "shape") or isinstance(values, list):
        return False
    if type(values) is tuple:
        return bool(values) and all(getattr(part, "shape", ()) for part in values)
    return not jax.tree_util.all_leaves([values])


def _bits(dtype: str, where: str = "") -> int:
    if dtype == "bool":
        return 8
    try:
        return word_bits(dtype)
    except TypeError:
        raise TypeError(
            f"{where}{dtype}: allowed are floats, integers and bools of 8 to 64 bits"
        ) from None


def _words(array: Any) -> Any:
    if array.dtype == bool:
        return array.astype(np.uint8)
    word = word_dtype(array.dtype)
    if isinstance(array, np.ndarray):
        return np.ascontiguousarray(array).view(word)
    return lax.bitcast_convert_type(array, word)


def _values(words: Any, dtype: str) -> Any:
    if dtype == "bool":
        return words.astype(np.uint8) != 0
    words = words.astype(word_dtype(dtype))
    if isinstance(words, np.ndarray):
        return words.view(jnp.dtype(dtype))
    return lax.bitcast_convert_type(words, jnp.dtype(dtype))
