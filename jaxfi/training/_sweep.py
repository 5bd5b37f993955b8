"""Many trainings at once: members that differ only in numbers share one compiled step.

The step of `jaxfi.training.step` is vmapped over the members' weights, rates, decays and penalties.
A member sees the batches, augmentation and dropout that it would see alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxfi.data._datasets import Dataset
from jaxfi.engine._compilation import compiled
from jaxfi.training._checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from jaxfi.training._config import TrainConfig
from jaxfi.training._history import EpochRecord
from jaxfi.training._loop import epoch_batches, epoch_record, next_learning_rate, split
from jaxfi.training._plan import choose_plan
from jaxfi.training._step import (
    Batches,
    Plan,
    RunSteps,
    TrainState,
    initial_state,
    make_evaluate,
    make_run_steps,
    several_steps,
    zero_totals,
)

NUMBERS = (
    "alpha", "weight_decay", "learning_rate", "seed", "schedule", "gamma", "decay_every", "t_max",
    "factor", "patience", "threshold",
)  # fmt: skip
"""The settings that members may differ in: the compiled step is the same whatever they are."""

OnEpoch = Callable[[int, EpochRecord, Any], None]
"""`on_epoch(member, record, variables)`, after each epoch of each member that has not diverged."""


class Member(NamedTuple):
    """What one member's training ended in."""

    variables: Any
    """Of its last epoch: `{"params": ..., "batch_stats"?: ...}`."""
    history: list[EpochRecord]
    """One record an epoch; the last is that in which the member diverged, if it did."""
    diverged_at: tuple[int, int] | None
    """Epoch and step, from 1, of the first loss or gradient that was not finite."""


class _Progress(NamedTuple):
    state: TrainState
    histories: list[list[EpochRecord]]
    diverged: list[tuple[int, int] | None]
    plan: Plan | None


def train_sweep(
    model: nn.Module,
    dataset: Dataset,
    configs: Sequence[TrainConfig],
    *,
    workdir: str | Path | None = None,
    on_epoch: OnEpoch | None = None,
) -> list[Member]:
    """Trains one member for each of `configs`, together; each as `train` would train it alone.

    Equal seeds share their batches, and what is computed from the images alone. A member whose loss
    or gradient is not finite has diverged: the epoch in which it did is its last. `workdir` gets
    a checkpoint every `checkpoint_every` seconds and at the end; a sweep found there is continued,
    and calls `on_epoch` again for the epochs since.

    Raises ValueError for settings that are not allowed, or that differ in more than `NUMBERS`.
    """
    check_members(configs)
    dataset, held_out = split(dataset, configs[0])
    sweep = _Sweep(model, dataset, held_out, tuple(configs))
    folder = None if workdir is None else Path(workdir).absolute() / "sweep"
    progress = sweep.start(folder)
    plan, run_steps = sweep.choose(progress)
    progress = sweep.to_the_end(progress._replace(plan=plan), run_steps, folder, on_epoch)
    return [
        Member(_variables(take(progress.state, number)), history, diverged)
        for number, (history, diverged) in enumerate(
            zip(progress.histories, progress.diverged, strict=True)
        )
    ]


def check_members(configs: Sequence[TrainConfig]) -> None:
    """Raises ValueError for no members, or for one that cannot share the others' compiled step."""
    if not configs:
        raise ValueError("a sweep has no members: allowed is one or more")
    for config in configs:
        config.validate()
        for field in dataclasses.fields(TrainConfig):
            here, first = getattr(config, field.name), getattr(configs[0], field.name)
            if field.name not in NUMBERS and here != first:
                raise ValueError(
                    f"members of a sweep differ in {field.name} ({first!r} and {here!r}); "
                    f"allowed: {', '.join(NUMBERS)}"
                )


def make_run_members(
    model: nn.Module, dataset: Dataset, configs: Sequence[TrainConfig], plan: Plan
) -> RunSteps:
    """`make_run_steps` over members: states and rates have a leading axis [M].

    So have the batches' order and key, unless all seeds are equal.
    """
    if len(configs) == 1:
        return _run_alone(make_run_steps(model, dataset.mean, dataset.std, configs[0], plan))
    is_penalized = any(config.alpha for config in configs)
    decays = jnp.array([config.weight_decay for config in configs], jnp.float32)
    alphas = jnp.array([config.alpha for config in configs], jnp.float32)

    def run_member(state: Any, batches: Any, rate: Any, numbers: Any, start: Any, stop: Any) -> Any:
        decay, alpha = numbers
        config = dataclasses.replace(
            configs[0], weight_decay=decay, alpha=alpha if is_penalized else 0.0
        )
        run_steps = several_steps(model, dataset.mean, dataset.std, config, plan)
        return run_steps(state, batches, rate, start, stop)

    axes = (0, _batch_axes(configs), 0, 0, None, None)
    run_members = jax.vmap(run_member, axes)

    def run_steps(state: Any, batches: Any, rates: Any, start: Any, stop: Any) -> Any:
        rates = jnp.broadcast_to(rates, len(configs))
        return run_members(state, batches, rates, (decays, alphas), start, stop)

    return compiled(run_steps, donate_argnums=0)


def _run_alone(run_steps: RunSteps) -> RunSteps:
    """A sweep of one: no vmap, so that convolutions stay what they are."""

    def run(state: Any, batches: Any, rates: Any, start: Any, stop: Any) -> Any:
        state = run_steps(take(state, 0), batches, jnp.reshape(rates, ()), start, stop)
        return stack([state])

    return run


def _batch_axes(configs: Sequence[TrainConfig]) -> Any:
    own = None if len({config.seed for config in configs}) == 1 else 0
    return Batches(None, None, own, own)  # type: ignore[arg-type]


class _Sweep:
    """What stays the same from the first epoch to the last."""

    def __init__(
        self, model: nn.Module, dataset: Dataset, held_out: Any, configs: tuple[TrainConfig, ...]
    ):
        self.model, self.dataset, self.configs = model, dataset, configs
        self.train_set = jax.device_put((dataset.train_images, dataset.train_labels))
        self.test_set = jax.device_put((dataset.test_images, dataset.test_labels))
        self.held_out = jax.device_put(held_out)
        self.num_steps = len(dataset.train_labels) // configs[0].batch_size
        batch_size = min(configs[0].test_batch_size, len(dataset.test_labels))
        self.evaluate = make_evaluate(model, dataset.mean, dataset.std, batch_size)

    def start(self, folder: Path | None) -> _Progress:
        if folder and has_checkpoint(folder):  # of the initial state only the shapes are needed
            return load(folder, jax.eval_shape(self.initial), self.configs)
        members = range(len(self.configs))
        return _Progress(self.initial(), [[] for _ in members], [None for _ in members], None)

    def initial(self) -> TrainState:
        image = jnp.zeros((1, *self.dataset.train_images.shape[1:]), jnp.float32)
        initialise = jax.jit(self.model.init)
        variables = [initialise(jax.random.key(config.seed), image) for config in self.configs]
        return stack([initial_state(v, c) for v, c in zip(variables, self.configs, strict=True)])

    def choose(self, progress: _Progress) -> tuple[Plan, RunSteps]:
        def make(plan: Plan) -> RunSteps:
            return make_run_members(self.model, self.dataset, self.configs, plan)

        if progress.plan:
            return progress.plan, make(progress.plan)
        penalized = max(self.configs, key=lambda config: config.alpha)
        num_steps = penalized.epochs * self.num_steps
        return choose_plan(penalized, make, progress.state, self.batches(0), num_steps)

    def batches(self, epoch: int) -> Batches:
        """Those of each member, stacked; one for all where the seeds are equal."""
        seeds = [config.seed for config in self.configs]
        if len(set(seeds)) == 1:
            return epoch_batches(self.train_set, seeds[0], epoch)
        own = [epoch_batches(self.train_set, seed, epoch) for seed in seeds]
        return own[0]._replace(
            order=jnp.stack([batches.order for batches in own]),
            key=jnp.stack([batches.key for batches in own]),
        )

    def to_the_end(
        self,
        progress: _Progress,
        run_steps: RunSteps,
        folder: Path | None,
        on_epoch: OnEpoch | None,
    ) -> _Progress:
        saved_at = time.monotonic()
        start = max(map(len, progress.histories))
        for epoch in range(start, self.configs[0].epochs):
            if None not in progress.diverged:
                break
            progress = self.epoch(progress, run_steps, epoch, on_epoch)
            if folder and time.monotonic() - saved_at >= self.configs[0].checkpoint_every:
                save(folder, progress, self.configs)
                saved_at = time.monotonic()
        if folder:
            save(folder, progress, self.configs)
        return progress

    def epoch(
        self, progress: _Progress, run_steps: RunSteps, epoch: int, on_epoch: OnEpoch | None
    ) -> _Progress:
        started = time.perf_counter()
        pairs = zip(self.configs, progress.histories, strict=True)
        rates = jnp.array([next_learning_rate(*pair) for pair in pairs], jnp.float32)
        state, batches = progress.state, self.batches(epoch)
        assert progress.plan is not None
        for step in range(0, self.num_steps, progress.plan.steps_per_call):
            stop = min(step + progress.plan.steps_per_call, self.num_steps)
            state = run_steps(state, batches, rates, step, stop)
        jax.block_until_ready(state)
        progress = progress._replace(state=state)
        seconds = time.perf_counter() - started
        diverged = list(progress.diverged)
        for number in [number for number, at in enumerate(diverged) if at is None]:
            diverged[number] = self.finish(progress, number, seconds, on_epoch)
        totals = stack([zero_totals()] * len(self.configs))
        return progress._replace(state=state._replace(totals=totals), diverged=diverged)

    def finish(
        self, progress: _Progress, number: int, seconds: float, on_epoch: OnEpoch | None
    ) -> tuple[int, int] | None:
        """Records a member's epoch; returns where it diverged, if it did."""
        state, history = take(progress.state, number), progress.histories[number]

        def evaluate(images: Any, labels: Any) -> tuple[float, float]:
            return self.evaluate(state.params, state.statistics, images, labels)

        record = epoch_record(
            self.configs[number], history, state.params, state.totals, self.num_steps,
            test=evaluate(*self.test_set),
            held_out=evaluate(*self.held_out)[1] if len(self.held_out[1]) else None,
            seconds=seconds,
        )  # fmt: skip
        history.append(record)
        if on_epoch:
            on_epoch(number, record, _variables(state))
        bad_step = int(state.totals.bad_step)
        return None if bad_step < 0 else (record.epoch, bad_step + 1)


def save(folder: Path, progress: _Progress, configs: Sequence[TrainConfig]) -> None:
    """Writes everything that the sweep needs to go on."""
    assert progress.plan is not None
    leaves = jax.tree.leaves(progress.state)
    info = {
        "configs": [dataclasses.asdict(config) for config in configs],
        "histories": progress.histories,
        "diverged": progress.diverged,
        "plan": progress.plan._asdict(),
    }
    save_checkpoint(folder, {f"{number:05d}": leaf for number, leaf in enumerate(leaves)}, info)


def load(folder: Path, like: TrainState, configs: Sequence[TrainConfig]) -> _Progress:
    """What `save` wrote, a state of the structure and shapes of `like`.

    Raises ValueError if the folder is of another sweep.
    """
    leaves, info = load_checkpoint(folder)
    wanted = [dataclasses.asdict(config) for config in configs]
    shapes = [leaf.shape for leaf in jax.tree.leaves(like)]
    found = [leaves[name].shape for name in sorted(leaves)]
    if _plain(info["configs"]) != _plain(wanted) or shapes != found:
        raise ValueError(f"{folder} holds another sweep: use another folder")
    arrays = [jnp.asarray(leaves[name]) for name in sorted(leaves)]
    return _Progress(
        jax.tree.unflatten(jax.tree.structure(like), arrays),
        [[EpochRecord(*record) for record in history] for history in info["histories"]],
        [None if at is None else (at[0], at[1]) for at in info["diverged"]],
        Plan(**info["plan"]),
    )


def stack(trees: Sequence[Any]) -> Any:
    """Trees of equal structure as one, with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def take(tree: Any, number: int) -> Any:
    """One of stacked trees."""
    return jax.tree.map(lambda leaf: leaf[number], tree)


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def _variables(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, **state.statistics}
