"""One training step, compiled: pick, augment, normalise, differentiate, update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax

from jaxfi.data._augment import random_affine
from jaxfi.data._datasets import normalise
from jaxfi.engine._compilation import compiled
from jaxfi.training._config import TrainConfig
from jaxfi.training._convolution import with_matmul_convolutions
from jaxfi.training._optimizers import make_optimizer
from jaxfi.training._regularization import penalized_value_and_grad


class Plan(NamedTuple):
    """How a step is computed. Plans differ in speed and rounding only."""

    convolution: str
    """One of CONVOLUTIONS."""
    derivative: str
    """One of FORMS."""
    steps_per_call: int
    """Steps in one compiled loop; 1 is no loop."""


class Totals(NamedTuple):
    """Sums over the steps of an epoch so far."""

    loss: jax.Array
    """float32, of the batches' mean losses."""
    penalty: jax.Array
    """float32, of ‖∇L‖²."""
    correct: jax.Array
    """int32, training images predicted right, with dropout and augmentation."""
    bad_step: jax.Array
    """int32: the first step whose loss or penalty is not finite, or -1."""


class TrainState(NamedTuple):
    """Everything that training changes."""

    params: Any
    statistics: dict[str, Any]
    """The model's other collections: `batch_stats`, if any."""
    opt_state: Any
    totals: Totals


class Batches(NamedTuple):
    """What an epoch's steps read: all images on the device, and the order of this epoch."""

    images: jax.Array
    """`[N, H, W, C] uint8`."""
    labels: jax.Array
    """`[N] int32`."""
    order: jax.Array
    """`[N] int32`, a permutation."""
    key: jax.Array
    """Random key of the epoch's augmentation and dropout."""


RunSteps = Callable[[TrainState, Batches, jax.Array, int, int], TrainState]


def zero_totals() -> Totals:
    """Nothing summed yet."""
    return Totals(jnp.float32(0), jnp.float32(0), jnp.int32(0), jnp.int32(-1))


def initial_state(variables: Any, config: TrainConfig) -> TrainState:
    """The state before the first step; it owns copies, since the compiled step consumes it."""
    variables = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), variables)
    statistics = {name: tree for name, tree in variables.items() if name != "params"}
    optimizer = make_optimizer(config.optimizer, 0.0, config.weight_decay)
    params = variables["params"]
    return TrainState(params, statistics, optimizer.init(params), zero_totals())


def make_loss(model: nn.Module, convolution: str) -> Callable[..., Any]:
    """`loss_fn(params, statistics, images, labels, key) -> (mean cross-entropy, aux)`.

    `aux` is the number of right predictions and the new statistics.
    """

    def apply(params: Any, statistics: Any, images: jax.Array, key: jax.Array) -> Any:
        variables = {"params": params, **statistics}
        rngs = {"dropout": key}
        return model.apply(variables, images, train=True, rngs=rngs, mutable=[*statistics])

    network = with_matmul_convolutions(apply) if convolution == "im2col" else apply

    def loss_fn(params: Any, statistics: Any, images: Any, labels: Any, key: Any) -> Any:
        logits, statistics = network(params, statistics, images, key)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        correct = (logits.argmax(-1) == labels).sum(dtype=jnp.int32)
        return loss, (correct, statistics)

    return loss_fn


def make_run_steps(
    model: nn.Module,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    config: TrainConfig,
    plan: Plan,
) -> RunSteps:
    """`several_steps`, compiled: nothing but another shape compiles again; `state` is consumed."""
    return compiled(several_steps(model, mean, std, config, plan), donate_argnums=0)


def several_steps(
    model: nn.Module,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    config: TrainConfig,
    plan: Plan,
) -> RunSteps:
    """`run_steps(state, batches, learning_rate, start, stop) -> state`.

    It takes the steps from `start` to `stop` of an epoch. With `steps_per_call=1` it takes step
    `start` alone, whatever `stop` is.
    """
    loss_fn = make_loss(model, plan.convolution)
    differentiate = penalized_value_and_grad(loss_fn, config.alpha, plan.derivative)

    def step(state: TrainState, batches: Batches, rate: jax.Array, number: Any) -> TrainState:
        augment_key, dropout_key = jax.random.split(jax.random.fold_in(batches.key, number))
        images, labels = _pick(batches, number, config.batch_size)
        images = images.astype(jnp.float32)
        if config.augment is not None:
            images = random_affine(augment_key, images, config.augment)
        images = normalise(images, mean, std)
        (loss, penalty, (correct, statistics)), gradient = differentiate(
            state.params, state.statistics, images, labels, dropout_key
        )
        optimizer = make_optimizer(config.optimizer, rate, config.weight_decay)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        totals = _add(state.totals, loss, penalty, correct, number)
        return TrainState(params, statistics, opt_state, totals)

    def run_steps(state: Any, batches: Any, rate: Any, start: Any, stop: Any) -> TrainState:
        if plan.steps_per_call == 1:
            return step(state, batches, rate, start)
        return lax.fori_loop(
            start, stop, lambda number, state: step(state, batches, rate, number), state
        )

    return run_steps


def _pick(batches: Batches, number: Any, batch_size: int) -> tuple[jax.Array, jax.Array]:
    chosen = lax.dynamic_slice(batches.order, (number * batch_size,), (batch_size,))
    images = jnp.take(batches.images, chosen, axis=0, mode="clip")
    return images, jnp.take(batches.labels, chosen, axis=0, mode="clip")


def _add(totals: Totals, loss: Any, penalty: Any, correct: Any, number: Any) -> Totals:
    is_first = (totals.bad_step < 0) & ~jnp.isfinite(loss + penalty)
    return Totals(
        totals.loss + loss,
        totals.penalty + penalty,
        totals.correct + correct,
        jnp.where(is_first, number, totals.bad_step),
    )


def make_evaluate(
    model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], batch_size: int
) -> Callable[[Any, Any, jax.Array, jax.Array], tuple[float, float]]:
    """`evaluate(params, statistics, images uint8, labels) -> (accuracy, mean loss)`, no dropout.

    One batch size throughout: the last batch is filled up with images that do not count.
    """

    @compiled
    def totals(params: Any, statistics: Any, images: Any, labels: Any) -> Any:
        pixels = normalise(images.astype(jnp.float32), mean, std)
        logits = model.apply({"params": params, **statistics}, pixels, train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        counts = labels >= 0
        correct = (logits.argmax(-1) == labels).sum(dtype=jnp.int32)
        return correct, jnp.where(counts, losses, 0).sum()

    def evaluate(params: Any, statistics: Any, images: Any, labels: Any) -> tuple[float, float]:
        missing = -len(labels) % batch_size
        images = jnp.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
        labels_or_none = jnp.pad(labels, (0, missing), constant_values=-1)
        batches = [slice(i, i + batch_size) for i in range(0, len(images), batch_size)]
        parts = [totals(params, statistics, images[b], labels_or_none[b]) for b in batches]
        correct, loss = (sum(map(float, values)) for values in zip(*parts, strict=True))
        return correct / len(labels), loss / len(labels)

    return evaluate
