"""The loss surface around trained weights: its steepness and its sharpest curvature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfi.faults._transforms import PyTree


class LossSurface(NamedTuple):
    """Of a loss at given parameters, scalars.

    Attributes:
      loss: the loss there.
      gradient_norm: ‖∇L‖.
      sharpness: the Hessian's eigenvalue of largest magnitude, as the power iteration left it.
    """

    loss: jax.Array
    gradient_norm: jax.Array
    sharpness: jax.Array


def loss_surface(
    loss_fn: Callable[[PyTree], jax.Array], params: PyTree, key: jax.Array, iterations: int = 20
) -> LossSurface:
    """Gradient norm and sharpness of `loss_fn` at `params`. Pure, and jit-able.

    The eigenvalue comes from `iterations` products of Hessian and vector (power iteration); it is
    the Rayleigh quotient of the last, so its magnitude is never above the true one's.

    Args:
      loss_fn: maps `params` to a scalar.
      key: random key of the first direction.

    >>> surface = loss_surface(lambda w: 3 * w[0] ** 2 + w[1], jnp.ones(2), jax.random.key(0))
    >>> round(float(surface.sharpness), 4), round(float(surface.gradient_norm) ** 2, 3)
    (6.0, 37.0)
    """
    gradient_fn = jax.grad(loss_fn)

    def product(direction: PyTree) -> PyTree:
        return jax.jvp(gradient_fn, (params,), (direction,))[1]

    def iterate(_: Any, pair: tuple[PyTree, jax.Array]) -> tuple[PyTree, jax.Array]:
        direction, _ = pair
        image = product(direction)
        return _normalised(image), _dot(direction, image)

    start = _normalised(_random_like(key, params))
    _, eigenvalue = jax.lax.fori_loop(0, iterations, iterate, (start, jnp.float32(0)))
    gradient = gradient_fn(params)
    return LossSurface(loss_fn(params), jnp.sqrt(_dot(gradient, gradient)), eigenvalue)


def _dot(a: PyTree, b: PyTree) -> jax.Array:
    products = jax.tree.map(jnp.vdot, a, b)
    return sum(jax.tree.leaves(products), start=jnp.float32(0))


def _normalised(tree: PyTree) -> PyTree:
    norm = jnp.sqrt(_dot(tree, tree))
    return jax.tree.map(lambda leaf: leaf / jnp.where(norm > 0, norm, 1), tree)


def _random_like(key: jax.Array, tree: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)
