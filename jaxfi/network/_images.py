"""Arrays as users hold them: in lists, on other devices, deleted, of dtypes that are no numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfi.network._layout import Layout, is_tree, layout_of


def held(name: str, array: Any) -> Any:
    """`array` itself; TypeError or ValueError naming it if this process has not all of it."""
    if isinstance(array, jax.core.Tracer):
        raise TypeError(f"{name} is traced: a campaign cannot run inside jit, grad or vmap")
    if isinstance(array, jax.Array):
        if array.is_deleted():
            raise ValueError(f"{name} was deleted, as by a step that its buffer was donated to")
        if not array.is_fully_addressable:
            raise ValueError(f"{name} is spread over several processes: allowed are local arrays")
    if np.ma.is_masked(array):
        raise ValueError(
            f"{name}: masked values have no place here: fill them (np.ma.filled), or leave out "
            "what holds them"
        )
    return array


def array_of(name: str, values: Any) -> np.ndarray:
    """Values [N, ...] on the host; TypeError or ValueError naming them if they are no numbers."""
    values = held(name, values)
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} are no array: {error}") from None
    _check(name, array, values)
    return array


def packed(name: str, values: Any) -> tuple[np.ndarray, Layout | None]:
    """Values [N, ...] on the host as one array, and of a tree of arrays how; raises as `array_of`,
    and for leaves of unequal N."""
    if not is_tree(values):
        return canonical(name, array_of(name, values)), None
    tree = jax.tree_util.tree_map_with_path(
        lambda path, leaf: canonical(part := _part(name, path), array_of(part, leaf)), values
    )
    leaves = jax.tree.leaves(tree)
    if not leaves:
        raise ValueError(f"{name} hold no array: allowed are arrays [N, ...]")
    layout = layout_of(name, tree, len(leaves[0]))
    return layout.pack(tree), layout


def _part(name: str, path: tuple) -> str:
    return f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}"


def canonical(name: str, array: np.ndarray) -> np.ndarray:
    """As JAX would hold it."""
    held_so = array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
    if array.dtype.kind in "iu" and (held_so != array).any():
        raise ValueError(
            f"{name} hold {array[held_so != array][0]}, which JAX cuts to 32 bits: set "
            "jax_enable_x64, or cast them"
        )
    return held_so


def packed_shape(images: Any) -> tuple[jax.ShapeDtypeStruct, Layout | None]:
    """Shape of what `packed` gives, of images or of what stands for them."""
    if not is_tree(images):
        return images_shape(images), None
    shapes = jax.tree.map(images_shape, images)
    leaves = jax.tree.leaves(shapes)
    layout = layout_of("images", shapes, leaves[0].shape[0])
    return jax.ShapeDtypeStruct((leaves[0].shape[0], layout.width), layout.dtype), layout


def images_shape(images: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype, as JAX holds it, of images [N, ...] or of what stands for them; raises as
    `array_of`."""
    known = isinstance(images, np.ndarray | jax.Array | jax.ShapeDtypeStruct)
    shaped = images if known else array_of("images", images)
    _check("images", shaped, images)
    return jax.ShapeDtypeStruct(shaped.shape, jax.dtypes.canonicalize_dtype(shaped.dtype))


def _check(name: str, array: Any, given: Any) -> None:
    if not array.shape and not hasattr(given, "shape"):
        raise TypeError(f"{name} are a {type(given).__name__}: allowed is an array [N, ...]")
    if not array.shape or not array.shape[0]:
        raise ValueError(f"{name} have shape {array.shape}: allowed is [N, ...] with N >= 1")
    number = array.dtype == bool or jnp.issubdtype(array.dtype, np.number)
    if not number or np.dtype(array.dtype).kind == "m":  # NumPy calls spans of time integers
        raise TypeError(f"{name} have dtype {array.dtype}: allowed are numbers")
