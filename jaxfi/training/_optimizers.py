"""The studies' optimizers with PyTorch's arithmetic, built of optax's pieces.

optax's own aliases differ: Adagrad starts its accumulator at 0.1 and puts ε under the root,
RMSprop puts ε under the root, Adam takes 1 - βᵗ in float32, where it cancels (6e-5 off at first),
and weight decay is decoupled. Here, as in torch.optim, weight decay
is L2: λ·w joins the gradient before anything else sees it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class SquaresState(NamedTuple):
    """Running squares of the gradient, shaped as the parameters."""

    squares: Any


class AdamState(NamedTuple):
    """Steps taken, and running means of the gradient and of its square."""

    steps: jax.Array
    mean: Any
    squares: Any


def adadelta(
    lr: Any = 1.0, rho: float = 0.9, eps: float = 1e-6, weight_decay: Any = 0.0
) -> optax.GradientTransformation:
    """torch.optim.Adadelta; the paper's optimizer, at PyTorch's defaults."""
    return _chain(optax.scale_by_adadelta(rho, eps), lr, weight_decay)


def adam(
    lr: Any = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Any = 0.0,
) -> optax.GradientTransformation:
    """torch.optim.Adam."""
    return _chain(_scale_by_adam(*betas, eps), lr, weight_decay)


def sgd(
    lr: Any = 1e-3, momentum: float = 0.9, weight_decay: Any = 0.0
) -> optax.GradientTransformation:
    """torch.optim.SGD with momentum (no dampening); the study's momentum of 0.9 by default."""
    return _chain(optax.trace(momentum), lr, weight_decay)


def adagrad(
    lr: Any = 1e-2, eps: float = 1e-10, weight_decay: Any = 0.0
) -> optax.GradientTransformation:
    """torch.optim.Adagrad: the accumulator starts at 0 and ε is outside the root."""
    scale = _scale_by_squares(lambda squares, g: squares + g * g, eps)
    return _chain(scale, lr, weight_decay)


def rmsprop(
    lr: Any = 1e-2, alpha: float = 0.99, eps: float = 1e-8, weight_decay: Any = 0.0
) -> optax.GradientTransformation:
    """torch.optim.RMSprop: the mean of squares starts at 0 and ε is outside the root."""
    scale = _scale_by_squares(lambda squares, g: alpha * squares + (1 - alpha) * g * g, eps)
    return _chain(scale, lr, weight_decay)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adadelta": adadelta,
    "adam": adam,
    "sgd": sgd,
    "adagrad": adagrad,
    "rmsprop": rmsprop,
}


def default_learning_rate(name: str) -> float:
    """The learning rate that torch.optim gives the optimizer called `name` by default."""
    return inspect.signature(OPTIMIZERS[name]).parameters["lr"].default


def make_optimizer(
    name: str, learning_rate: Any, weight_decay: Any = 0.0, **settings: Any
) -> optax.GradientTransformation:
    """The optimizer called `name`, one of OPTIMIZERS; `settings` are its own, such as `momentum`.

    Raises ValueError for an unknown name or setting, or a rate or decay that is a Python number
    and negative or not finite. Both may be traced arrays.

    >>> optimizer = make_optimizer("sgd", 0.1, momentum=0.5)
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer is {name!r}; allowed: {', '.join(OPTIMIZERS)}")
    _check_rate("learning_rate", learning_rate)
    _check_rate("weight_decay", weight_decay)
    try:
        return OPTIMIZERS[name](learning_rate, weight_decay=weight_decay, **settings)
    except TypeError as error:
        raise ValueError(f"optimizer {name!r} has no such setting: {error}") from None


def _check_rate(name: str, rate: Any) -> None:
    if isinstance(rate, (int, float)) and not (math.isfinite(rate) and rate >= 0):
        raise ValueError(f"{name} is {rate}; allowed: a finite number >= 0")


def _chain(
    scale: optax.GradientTransformation, lr: Any, weight_decay: Any
) -> optax.GradientTransformation:
    return optax.chain(
        optax.add_decayed_weights(weight_decay), scale, optax.scale_by_learning_rate(lr)
    )


def _scale_by_squares(
    advance: Callable[[jax.Array, jax.Array], jax.Array], eps: float
) -> optax.GradientTransformation:
    def init(params: Any) -> SquaresState:
        return SquaresState(jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: SquaresState, params: Any = None) -> Any:
        squares = jax.tree.map(advance, state.squares, updates)
        scaled = jax.tree.map(lambda g, s: g / (jnp.sqrt(s) + eps), updates, squares)
        return scaled, SquaresState(squares)

    return optax.GradientTransformation(init, update)


def _scale_by_adam(beta1: float, beta2: float, eps: float) -> optax.GradientTransformation:
    def init(params: Any) -> AdamState:
        mean, squares = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return AdamState(jnp.int32(0), mean, squares)

    def update(updates: Any, state: AdamState, params: Any = None) -> Any:
        mean = optax.tree.update_moment(updates, state.mean, beta1, 1)
        squares = optax.tree.update_moment(updates, state.squares, beta2, 2)
        count = state.steps + 1
        # 1 - βᵗ without cancellation
        correction1, correction2 = (-jnp.expm1(count * math.log(b)) for b in (beta1, beta2))
        root = jnp.sqrt(correction2)
        scaled = jax.tree.map(
            lambda m, s: m / correction1 / (jnp.sqrt(s) / root + eps), mean, squares
        )
        return scaled, AdamState(count, mean, squares)

    return optax.GradientTransformation(init, update)
