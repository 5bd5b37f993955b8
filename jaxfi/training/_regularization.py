"""Gradient regularization: the penalized loss L + α‖∇L‖² and its gradient (Eq. 2 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LossFn = Callable[..., tuple[jax.Array, Any]]
"""`loss_fn(params, *args) -> (loss, aux)`: a scalar and any tree, such as new batch statistics."""

FORMS = ("fast", "plain")


def squared_norm(tree: Any) -> jax.Array:
    """The sum of squares over all leaves: ‖∇L‖² of a tree of gradients, a scalar."""
    return sum((jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(tree)), start=jnp.float32(0))


def penalized_loss(loss_fn: LossFn, alpha: Any) -> Callable[..., tuple[jax.Array, Any]]:
    """L + α‖∇L‖², as a function of what `loss_fn` takes.

    It returns `(penalized loss, (loss, ‖∇L‖², aux))`. `loss_fn` is traced once, so a random key
    among its arguments means one dropout mask, and the loss and its gradient see the same.
    """

    def penalized(params: Any, *args: Any) -> tuple[jax.Array, Any]:
        (loss, aux), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, *args)
        penalty = squared_norm(gradient)
        return loss + alpha * penalty, (loss, penalty, aux)

    return penalized


def penalized_value_and_grad(
    loss_fn: LossFn, alpha: Any, form: str = "fast"
) -> Callable[..., tuple[tuple[jax.Array, jax.Array, Any], Any]]:
    """The gradient g + 2αHg of the penalized loss: Eq. 2 differentiated.

    The result maps `(params, *args)` to `((loss, ‖∇L‖², aux), gradient)`. `form="fast"` takes Hg
    by one forward-over-reverse pass, the derivative of ∇L along g; `form="plain"` differentiates
    the penalized loss as it is written. Both see the same random keys. `alpha` may be traced; the
    Python number 0 costs no second derivative.

    Raises ValueError for an unknown form, or an α that is negative or not finite.

    >>> step = penalized_value_and_grad(lambda w, x: ((w * x) ** 2, None), 0.5)
    >>> (loss, penalty, aux), gradient = step(1.0, 2.0)
    >>> float(loss), float(penalty), float(gradient)  # L = 4w², so L' = 8w and αL'² = 32w²
    (4.0, 64.0, 72.0)
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; allowed: {', '.join(FORMS)}")
    if isinstance(alpha, (int, float)):
        check_alpha(alpha)
        if alpha == 0:
            return _unpenalized(loss_fn)
    return _plain(loss_fn, alpha) if form == "plain" else _fast(loss_fn, alpha)


def check_alpha(alpha: float) -> None:
    """Raises ValueError unless α is finite and not negative."""
    if not math.isfinite(alpha) or alpha < 0:
        raise ValueError(f"alpha is {alpha}; allowed: a finite number >= 0")


def _unpenalized(loss_fn: LossFn) -> Callable[..., Any]:
    def value_and_grad(params: Any, *args: Any) -> Any:
        (loss, aux), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, *args)
        return (loss, squared_norm(gradient), aux), gradient

    return value_and_grad


def _plain(loss_fn: LossFn, alpha: Any) -> Callable[..., Any]:
    def value_and_grad(params: Any, *args: Any) -> Any:
        penalized = penalized_loss(loss_fn, alpha)
        (_, parts), gradient = jax.value_and_grad(penalized, has_aux=True)(params, *args)
        return parts, gradient

    return value_and_grad


def _fast(loss_fn: LossFn, alpha: Any) -> Callable[..., Any]:
    def value_and_grad(params: Any, *args: Any) -> Any:
        def gradient_and_value(params: Any) -> Any:
            (loss, aux), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, *args)
            return gradient, (loss, aux)

        # Not jvp along a gradient computed before: the compiler sees that pass as different from
        # the primal half of this one, and computes every layer's gradient twice.
        gradient, along, (loss, aux) = jax.linearize(gradient_and_value, params, has_aux=True)
        total = jax.tree.map(lambda g, h: g + 2 * alpha * h, gradient, along(gradient))
        return (loss, squared_norm(gradient), aux), total

    return value_and_grad
