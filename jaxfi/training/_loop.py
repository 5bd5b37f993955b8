"""Training from the first step to the last, resumable anywhere, to the bit."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from rich import progress as rich_progress

from jaxfi.data._datasets import Dataset, hold_out
from jaxfi.data._files import write_whole, writing
from jaxfi.training._checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from jaxfi.training._config import TrainConfig, learning_rate_of_epoch
from jaxfi.training._history import (
    EpochRecord,
    weight_statistics,
    write_history,
    write_tensorboard,
)
from jaxfi.training._plan import choose_plan
from jaxfi.training._step import (
    Batches,
    Plan,
    RunSteps,
    Totals,
    TrainState,
    initial_state,
    make_evaluate,
    make_run_steps,
    zero_totals,
)

SETTINGS_FILE = "training.json"

Images = tuple[Any, Any]
"""`[N, H, W, C] uint8` and labels `[N] int32`."""


class TrainResult(NamedTuple):
    """What training ends in."""

    variables: Any
    """Of the last epoch: `{"params": ..., "batch_stats"?: ...}`."""
    history: list[EpochRecord]
    """One record an epoch."""
    plan: Plan
    """How the steps were computed."""


@dataclasses.dataclass
class _Position:
    """Where training is; a checkpoint holds this and the state."""

    epoch: int = 0
    step: int = 0
    history: list[EpochRecord] = dataclasses.field(default_factory=list)


def train(
    model: nn.Module,
    dataset: Dataset,
    config: TrainConfig,
    *,
    workdir: str | Path | None = None,
    variables: Any = None,
    progress: bool = False,
) -> TrainResult:
    """Trains `model`, called as `model.apply(variables, images, train=...)`, on `dataset`.

    `variables` to start from are by default `model.init(jax.random.key(config.seed), image)`. With
    equal seeds the initialisation, the batches, their augmentation and the dropout are equal
    whatever α is. `workdir` gets training.csv, TensorBoard's files, and checkpoints/last and
    checkpoints/best (by test accuracy); a training found there is continued, and ends in the same
    bits as one that was never stopped.

    Raises ValueError for settings that are not allowed, or that `workdir` has otherwise;
    FloatingPointError as soon as a loss is not finite, naming α, epoch and step; OSError if
    `workdir` cannot be written.
    """
    config.validate()
    dataset, held_out = split(dataset, config)
    folder = None if workdir is None else Path(workdir)
    settings = _claim(folder, dataset, config) if folder else {}
    state, position = _start(model, dataset, config, variables, folder)
    plan, run_steps = _choose(model, dataset, config, state, settings.get("plan"))
    if folder and "plan" not in settings:
        _write_settings(folder, settings | {"plan": plan._asdict()})
    with _progress_bar(progress, config, dataset) as show:
        run = _Run(model, dataset, held_out, config, folder, plan, run_steps, show)
        state = run.to_the_end(state, position)
    return TrainResult(_variables(state), position.history, plan)


class _Run:
    """What stays the same from the first step to the last."""

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        held_out: Images,
        config: TrainConfig,
        folder: Path | None,
        plan: Plan,
        run_steps: RunSteps,
        show: Callable[[_Position], None],
    ):
        self.config, self.folder, self.plan, self.show = config, folder, plan, show
        self.run_steps = run_steps
        self.train_set = jax.device_put((dataset.train_images, dataset.train_labels))
        self.test_set = jax.device_put((dataset.test_images, dataset.test_labels))
        self.held_out = jax.device_put(held_out)
        self.steps_per_epoch = len(dataset.train_labels) // config.batch_size
        batch_size = min(config.test_batch_size, len(dataset.test_labels))
        self.evaluate = make_evaluate(model, dataset.mean, dataset.std, batch_size)
        self.saved_at = time.monotonic()
        self.is_saved = True
        self.best: TrainState | None = None  # not on disk yet

    def to_the_end(self, state: TrainState, position: _Position) -> TrainState:
        while position.epoch < self.config.epochs:
            started = time.perf_counter()
            state = self.epoch(state, position)
            state = self.finish_epoch(state, position, started)
        if self.folder and not self.is_saved:
            self.save(state, position)
        return state

    def epoch(self, state: TrainState, position: _Position) -> TrainState:
        rate = jnp.float32(next_learning_rate(self.config, position.history))
        batches = epoch_batches(self.train_set, self.config.seed, position.epoch)
        while position.step < self.steps_per_epoch:
            stop = min(position.step + self.plan.steps_per_call, self.steps_per_epoch)
            state = self.run_steps(state, batches, rate, position.step, stop)
            self.require_finite(state, position)
            position.step = stop
            self.is_saved = False
            self.show(position)
            if stop < self.steps_per_epoch:
                self.save_if_due(state, position)
        return state

    def require_finite(self, state: TrainState, position: _Position) -> None:
        bad_step = int(state.totals.bad_step)
        if bad_step >= 0:
            raise FloatingPointError(
                f"the loss or its gradient is not finite at alpha={self.config.alpha}, "
                f"epoch {position.epoch + 1}, step {bad_step + 1} of {self.steps_per_epoch}: "
                "take a smaller alpha or learning rate"
            )

    def finish_epoch(self, state: TrainState, position: _Position, started: float) -> TrainState:
        best = max((record.test_accuracy for record in position.history), default=-1.0)
        record = epoch_record(
            self.config, position.history, state.params, state.totals, self.steps_per_epoch,
            test=self.evaluate(state.params, state.statistics, *self.test_set),
            held_out=self.evaluate_held_out(state),
            seconds=time.perf_counter() - started,
        )  # fmt: skip
        position.history.append(record)
        position.epoch, position.step = position.epoch + 1, 0
        state = state._replace(totals=zero_totals())
        if record.test_accuracy > best:
            self.best = jax.device_get(state) if self.folder else None
        if self.folder:
            write_history(position.history, self.folder)
            write_tensorboard(position.history, self.folder)
        self.show(position)
        self.save_if_due(state, position)
        return state

    def evaluate_held_out(self, state: TrainState) -> float | None:
        if not len(self.held_out[1]):
            return None
        return self.evaluate(state.params, state.statistics, *self.held_out)[1]

    def save_if_due(self, state: TrainState, position: _Position) -> None:
        if self.folder and time.monotonic() - self.saved_at >= self.config.checkpoint_every:
            self.save(state, position)

    def save(self, state: TrainState, position: _Position) -> None:
        """The best first: a kill in between repeats the epochs since, and finds the same best."""
        assert self.folder is not None
        checkpoints = self.folder / "checkpoints"
        if self.best is not None:
            accuracy = max(record.test_accuracy for record in position.history)
            epoch = next(r.epoch for r in position.history if r.test_accuracy == accuracy)
            best = {"epoch": epoch, "test_accuracy": accuracy}
            save_checkpoint(checkpoints / "best", {"variables": _variables(self.best)}, best)
            self.best = None
        save_checkpoint(checkpoints / "last", _to_tree(state), dataclasses.asdict(position))
        self.saved_at, self.is_saved = time.monotonic(), True


def split(dataset: Dataset, config: TrainConfig) -> tuple[Dataset, Images]:
    """What is trained on, and the held-out images and labels, none if `config` says so.

    Raises ValueError if a batch takes more images than there are.
    """
    dataset, held_out = hold_out(dataset, config.held_out)
    if config.batch_size > len(dataset.train_labels):
        raise ValueError(
            f"batch_size is {config.batch_size}; "
            f"allowed: up to the {len(dataset.train_labels)} training images"
        )
    return dataset, held_out


def next_learning_rate(config: TrainConfig, history: Sequence[EpochRecord]) -> float:
    """The learning rate of the epoch that comes after `history`."""
    watched = [r.test_loss if r.held_out_loss is None else r.held_out_loss for r in history]
    return learning_rate_of_epoch(config, len(history), watched)


def epoch_record(
    config: TrainConfig,
    history: Sequence[EpochRecord],
    params: Any,
    totals: Totals,
    num_steps: int,
    *,
    test: tuple[float, float],
    held_out: float | None,
    seconds: float,
) -> EpochRecord:
    """The record that follows `history`; `test` is accuracy and loss, `held_out` a loss."""
    weights = weight_statistics(params)
    return EpochRecord(
        epoch=len(history) + 1,
        learning_rate=next_learning_rate(config, history),
        train_loss=float(totals.loss) / num_steps,
        penalty=float(totals.penalty) / num_steps,
        train_accuracy=int(totals.correct) / (num_steps * config.batch_size),
        test_loss=test[1],
        test_accuracy=test[0],
        seconds=seconds,
        weight_mean=weights.mean,
        weight_std=weights.std,
        weight_l2=weights.l2,
        held_out_loss=held_out,
    )


def epoch_batches(train_set: tuple[jax.Array, jax.Array], seed: int, epoch: int) -> Batches:
    """The epoch's order and keys, from nothing but the seed and the epoch's number."""
    # The key of the seed itself draws the initialisation; 1 is folded in to be apart from it.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), epoch)
    order_key, step_key = jax.random.split(key)
    images, labels = train_set
    return Batches(images, labels, jax.random.permutation(order_key, len(labels)), step_key)


def _start(
    model: nn.Module, dataset: Dataset, config: TrainConfig, variables: Any, folder: Path | None
) -> tuple[TrainState, _Position]:
    if variables is None:
        image = jnp.zeros((1, *dataset.train_images.shape[1:]), jnp.float32)
        variables = jax.jit(model.init)(jax.random.key(config.seed), image)
    state = initial_state(variables, config)
    last = folder / "checkpoints" / "last" if folder else None
    if last is None or not has_checkpoint(last):
        return state, _Position()
    tree, info = load_checkpoint(last)
    history = [EpochRecord(*record) for record in info["history"]]
    return _from_tree(tree, state, last), _Position(info["epoch"], info["step"], history)


def _choose(
    model: nn.Module, dataset: Dataset, config: TrainConfig, state: TrainState, plan: Any
) -> tuple[Plan, RunSteps]:
    def make(plan: Plan) -> RunSteps:
        return make_run_steps(model, dataset.mean, dataset.std, config, plan)

    if plan is not None:
        return Plan(**plan), make(Plan(**plan))
    train_set = jax.device_put((dataset.train_images, dataset.train_labels))
    num_steps = config.epochs * (len(dataset.train_labels) // config.batch_size)
    return choose_plan(config, make, state, epoch_batches(train_set, config.seed, 0), num_steps)


def _variables(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, **state.statistics}


def _to_tree(state: TrainState) -> dict[str, Any]:
    rest = jax.tree.leaves((state.opt_state, state.totals))
    return {
        "variables": _variables(state),
        "rest": {f"{index:05d}": leaf for index, leaf in enumerate(rest)},
    }


def _from_tree(tree: Any, like: TrainState, folder: Path) -> TrainState:
    """The state of a checkpoint, of the structure, shapes and dtypes of `like`."""
    wanted = _to_tree(like)
    paths = {path: (leaf.shape, leaf.dtype) for path, leaf in jax.tree.leaves_with_path(wanted)}
    found = {path: (leaf.shape, leaf.dtype) for path, leaf in jax.tree.leaves_with_path(tree)}
    for path in paths | found:
        if paths.get(path) != found.get(path):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"checkpoint {folder} is of another training: {name} is {found.get(path)} there "
                f"and {paths.get(path)} here; use another folder"
            )
    tree = jax.tree.map(jnp.asarray, tree)
    opt_state, totals = jax.tree.unflatten(
        jax.tree.structure((like.opt_state, like.totals)), jax.tree.leaves(tree["rest"])
    )
    statistics = {name: tree["variables"][name] for name in like.statistics}
    return TrainState(tree["variables"]["params"], statistics, opt_state, totals)


def _claim(folder: Path, dataset: Dataset, config: TrainConfig) -> dict[str, Any]:
    """Makes the folder, or reads what it says of the training in it, which must be this one."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    wanted = json.loads(json.dumps({"dataset": dataset.name, **dataclasses.asdict(config)}))
    path = folder / SETTINGS_FILE
    if not path.exists():
        return {"config": wanted}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        # What a training of an older jaxfi could not set had its default.
        stored = json.loads(json.dumps(dataclasses.asdict(TrainConfig()))) | settings["config"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path} is damaged or foreign: use another folder") from None
    for name in wanted | stored:
        if wanted.get(name) != stored.get(name):
            raise ValueError(
                f"{folder} holds another training: {name} is {stored.get(name)!r} there and "
                f"{wanted.get(name)!r} here; use another folder"
            )
    return settings


def _write_settings(folder: Path, settings: dict[str, Any]) -> None:
    write_whole(folder / SETTINGS_FILE, (json.dumps(settings, indent=2) + "\n").encode())


@contextlib.contextmanager
def _progress_bar(
    visible: bool, config: TrainConfig, dataset: Dataset
) -> Iterator[Callable[[_Position], None]]:
    steps = len(dataset.train_labels) // config.batch_size
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TextColumn("ETA"),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, disable=not visible) as bar:
        name = f"training, alpha={config.alpha:g}"
        task = bar.add_task(name, total=config.epochs * steps)

        def show(position: _Position) -> None:
            description = f"{name}, epoch {min(position.epoch + 1, config.epochs)}/{config.epochs}"
            if position.history:
                description += f", test {position.history[-1].test_accuracy:.2%}"
            done = position.epoch * steps + position.step
            bar.update(task, completed=done, description=description)

        yield show
