"""Arrays as users hold them: in lists, on other devices, deleted, of dtypes that are no numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


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


def images_shape(images: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype, as JAX holds it, of images [N, ...] or of what stands for them; raises as
    `array_of`."""
    has_shape = hasattr(images, "shape") and hasattr(images, "dtype")
    shaped = images if has_shape else array_of("images", images)
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
