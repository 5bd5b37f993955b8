"""How does the way of training change a network's reliability? Optimizers, schedules, and decays.

Every strategy of the --sweep flags is trained, those that differ only in numbers together; then
weights read as zero, cumulatively, the same ones in every network. Writes training.csv,
accuracy_by_injections.csv, summary.csv, the tables of `jaxfi.report.study_tables`, and the figures.

    python -m experiments.training_strategies \\
        --flagfile=experiments/flags/training_strategies_smoke.flags --workdir=runs/strategies
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from absl import logging

from experiments.config import check_same_config, claim_workdir, setting
from experiments.gr import load_images
from experiments.strategies import Strategy, groups, list_strategies
from experiments.study import apply_function, require, run_from_flags
from jaxfi.augment import AffineRanges
from jaxfi.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from jaxfi.cumulative import cumulative_accuracy, draw_trials
from jaxfi.data import DATASETS, Dataset, first_test_images, normalise
from jaxfi.faults import PyTree
from jaxfi.files import read_csv, write_csv
from jaxfi.models import MODELS
from jaxfi.outcomes import NAN_POLICIES
from jaxfi.report.study import (
    INJECTION_COLUMNS,
    SUMMARY_COLUMNS,
    TRAINING_COLUMNS,
    write_figures,
)
from jaxfi.report.study_tables import write_tables
from jaxfi.sharpness import loss_surface
from jaxfi.training import EpochRecord, TrainConfig
from jaxfi.training.convolution import with_matmul_convolutions
from jaxfi.training.sweep import Member, train_sweep


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the result; each field is a flag of the same name."""

    dataset: str = setting("digits", "digits, mnist or cifar10.")
    model: str = setting("lenet", "Network: a name in jaxfi.models.MODELS.")
    sweep: tuple[str, ...] = setting((), "Strategies: 'optimizer=sgd weight_decay=0,5e-5'; often.")
    epochs: int = setting(100, "Epochs of each training.")
    batch_size: int = setting(128, "Images per training step, where a sweep does not say.")
    learning_rate: float = setting(0.1, "Initial learning rate, where a sweep does not say.")
    schedule: str = setting("cosine", "constant, step, cosine or plateau, likewise.")
    t_max: int = setting(200, "Epochs of half a cosine.")
    patience: int = setting(3, "Bad epochs that the plateau schedule tolerates.")
    threshold: float = setting(1e-3, "Relative improvement that it counts.")
    factor: float = setting(0.1, "What it multiplies the rate with.")
    held_out: float = setting(0.0, "Share of training images for it to watch; 0: the test images.")
    augment: bool = setting(False, "Random affine augmentation of the training images.")
    convolution: str = setting("auto", "Training's convolution: xla, im2col, or auto, the faster.")
    num_train_images: int = setting(0, "Training images to use, the first ones; 0 is all.")
    members_together: int = setting(8, "Trainings in one compiled step, at most; 1 for large ones.")
    keep_every: int = setting(20, "The network of every k-th epoch is kept.")
    injected_epochs: Sequence[str] = setting(("last",), "Networks that get faults: last,best,20.")
    paths: str = setting("*kernel", "Pattern of the arrays whose elements are weights.")
    ranges: Sequence[str] = setting(("10000/1000", "100000/10000"), "Most faults / step between.")
    trials: int = setting(10, "Fault lists for each network, the same for all networks.")
    num_images: int = setting(0, "Test images that faulty networks see, the first ones; 0 is all.")
    injection_batch_size: int = setting(500, "Images that run together through a faulty network.")
    trials_together: int = setting(
        1, "Faulty networks that run together: more on a GPU.", decides=False
    )
    nan: str = setting("argmax", "What a NaN output counts as: argmax (as published) or critical.")
    surface_images: int = setting(512, "Training images for sharpness and gradient norm.")
    surface_iterations: int = setting(20, "Steps of the power iteration for sharpness.")
    seed: int = setting(0, "Seed of the trainings, where a sweep does not say, and of the faults.")

    def validate(self) -> None:
        """Raises ValueError, in one line, for a setting that is not allowed."""
        for name, names in (("dataset", DATASETS), ("model", MODELS), ("nan", NAN_POLICIES)):
            require(self, name, getattr(self, name) in names, ", ".join(names))
        for name in ("members_together", "keep_every", "trials", "injection_batch_size",
                     "trials_together", "surface_images", "surface_iterations"):  # fmt: skip
            require(self, name, getattr(self, name) >= 1, "integers >= 1")
        for name in ("num_train_images", "num_images"):
            require(self, name, getattr(self, name) >= 0, "integers >= 0")
        known = all(text in ("last", "best") or text.isdecimal() for text in self.injected_epochs)
        require(self, "injected_epochs", known, "last, best, and numbers of kept epochs")
        self.counts()
        for strategy in list_strategies(self.sweep, self.base()):
            self._require_kept(strategy.config.epochs)

    def _require_kept(self, epochs: int) -> None:
        """The numbers among `injected_epochs` are of epochs that a training so long keeps."""
        for epoch in (int(text) for text in self.injected_epochs if text.isdecimal()):
            kept = 0 < epoch <= epochs and (epoch == epochs or epoch % self.keep_every == 0)
            allowed = f"last, best, every {self.keep_every}th epoch and the last, {epochs}"
            require(self, "injected_epochs", kept, allowed)

    def base(self) -> TrainConfig:
        """The settings of a training that no sweep speaks of."""
        names = {field.name for field in dataclasses.fields(TrainConfig)} - {"augment"}
        given = {name: value for name, value in vars(self).items() if name in names}
        augment = AffineRanges() if self.augment else None
        return TrainConfig(optimizer="sgd", augment=augment, **given)

    def counts(self) -> list[int]:
        """Numbers of faults, rising from 0: of all ranges together, since trials are nested."""
        counts = {0}
        for text in self.ranges:
            most, _, step = text.partition("/")
            readable = most.isdecimal() and step.isdecimal() and 0 < int(step) <= int(most)
            require(self, "ranges", readable, "most/step, as 10000/1000")
            counts.update(range(int(step), int(most) + 1, int(step)))
        return sorted(counts)


def run(settings: Settings, workdir: Path) -> None:
    """Trains every strategy, injects faults, and reports. What `workdir` holds is not done again.

    Raises ValueError or OSError, in one line, and before any training for all that is known then.
    """
    settings.validate()
    check_same_config(settings, workdir)
    dataset = load_images(settings)  # type: ignore[arg-type]
    strategies = list_strategies(settings.sweep, settings.base())
    claim_workdir(settings, workdir)
    members: dict[str, Member] = {}
    for group in groups(strategies, settings.members_together):
        members.update(train_group(settings, group, dataset, workdir))
        write_training(members, workdir)
    inject_all(settings, members, dataset, workdir)
    write_summary(settings, members, dataset, workdir)
    write_tables(workdir)
    write_figures(workdir)


def train_group(
    settings: Settings, group: Sequence[Strategy], dataset: Dataset, workdir: Path
) -> dict[str, Member]:
    """Trains strategies together; networks/STRATEGY/EPOCH keeps every k-th, the last, the best."""
    folders = [workdir / "networks" / strategy.name for strategy in group]
    best = [_stored_best(folder) for folder in folders]

    def on_epoch(number: int, record: EpochRecord, variables: PyTree) -> None:
        info = {"epoch": record.epoch, "test_accuracy": record.test_accuracy}
        is_last = record.epoch == group[number].config.epochs
        if record.epoch % settings.keep_every == 0 or is_last:
            save_checkpoint(folders[number] / str(record.epoch), {"variables": variables}, info)
        if record.test_accuracy > best[number]:
            best[number] = record.test_accuracy
            save_checkpoint(folders[number] / "best", {"variables": variables}, info)
        logging.info("%s, epoch %d: %.2f %%", group[number].name, record.epoch,
                     100 * record.test_accuracy)  # fmt: skip

    model = MODELS[settings.model](num_classes=dataset.num_classes)
    configs = [strategy.config for strategy in group]
    together = workdir / "trainings" / "+".join([group[0].name, f"{len(group)}"])
    trained = train_sweep(model, dataset, configs, workdir=together, on_epoch=on_epoch)
    return {strategy.name: member for strategy, member in zip(group, trained, strict=True)}


def _stored_best(folder: Path) -> float:
    if not has_checkpoint(folder / "best"):
        return -1.0
    return load_checkpoint(folder / "best")[1]["test_accuracy"]


def write_training(members: dict[str, Member], workdir: Path) -> None:
    """training.csv: one row a strategy and epoch."""
    rows = [
        [name, *(getattr(record, column) for column in TRAINING_COLUMNS[1:])]
        for name, member in members.items()
        for record in member.history
    ]
    write_csv(workdir / "training.csv", TRAINING_COLUMNS, rows)


def kept_networks(settings: Settings, folder: Path) -> dict[int, PyTree]:
    """The variables of the epochs that get faults, by epoch."""
    kept = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
    wanted = {"last": str(max(kept, default=0))}
    networks = {}
    for text in settings.injected_epochs:
        name = wanted.get(text, text)
        if not has_checkpoint(folder / name):
            raise ValueError(
                f"injected_epochs names {text}, but {folder.name} has kept {sorted(kept)}; "
                "allowed: last, best, and numbers of kept epochs"
            )
        tree, info = load_checkpoint(folder / name)
        networks[info["epoch"]] = tree["variables"]
    return networks


def inject_all(
    settings: Settings, members: dict[str, Member], dataset: Dataset, workdir: Path
) -> None:
    """accuracy_by_injections.csv, network by network; networks that it has are left alone."""
    path = workdir / "accuracy_by_injections.csv"
    stored = read_csv(path, INJECTION_COLUMNS) if path.exists() else []
    rows: list[Any] = [list(row.values()) for row in stored]
    done = {(row["strategy"], row["epoch"]) for row in stored}
    images, labels = first_test_images(dataset, settings.num_images)
    apply_fn = apply_function(MODELS[settings.model](num_classes=dataset.num_classes))
    counts, trials = settings.counts(), None
    for name in _sound(members):
        for epoch, variables in kept_networks(settings, workdir / "networks" / name).items():
            if (name, str(epoch)) in done:
                continue
            trials = trials or draw_trials(
                settings.seed, variables, counts[-1], settings.trials, paths=settings.paths
            )
            with jax.default_matmul_precision("highest"):
                result = cumulative_accuracy(
                    apply_fn, variables, trials, counts, images, labels, nan=settings.nan,
                    batch_size=settings.injection_batch_size,
                    trials_together=settings.trials_together,
                )  # fmt: skip
            for (trial, step), accuracy in np.ndenumerate(result.accuracy):
                rows.append([name, epoch, trial, counts[step], float(accuracy)])
            write_csv(path, INJECTION_COLUMNS, rows)


def _sound(members: dict[str, Member]) -> list[str]:
    """Strategies that ended in numbers: a diverged network has no accuracy to lose."""
    return [name for name, member in members.items() if member.diverged_at is None]


def write_summary(
    settings: Settings, members: dict[str, Member], dataset: Dataset, workdir: Path
) -> None:
    """summary.csv: what each training came to, and the loss surface around its last weights."""
    surface = surface_function(settings, dataset)
    rows = []
    for name, member in members.items():
        best = max(member.history, key=lambda record: record.test_accuracy)
        last = member.history[-1]
        found = (None, None) if member.diverged_at else surface(member.variables)
        diverged = member.diverged_at[0] if member.diverged_at else None
        weights = (last.weight_mean, last.weight_std, last.weight_l2)
        rows.append([name, last.epoch, best.test_accuracy, best.epoch, last.test_accuracy,
                     diverged, *weights, *found])  # fmt: skip
    write_csv(workdir / "summary.csv", SUMMARY_COLUMNS, rows)


def surface_function(settings: Settings, dataset: Dataset) -> Any:
    """`surface(variables) -> (gradient norm, sharpness)` of the loss on some training images."""
    chosen = slice(settings.surface_images)
    images = normalise(dataset.train_images[chosen], dataset.mean, dataset.std)
    labels = dataset.train_labels[chosen]
    module = MODELS[settings.model](num_classes=dataset.num_classes)
    apply_fn = apply_function(module)
    if jax.default_backend() == "cpu":
        apply_fn = with_matmul_convolutions(apply_fn)  # whose gradients are faster there

    @jax.jit  # images are an argument: the compiler would spend minutes on a constant's patches
    def measure(variables: PyTree, images: jax.Array) -> Any:
        def loss_fn(params: PyTree) -> jax.Array:
            logits = apply_fn({**variables, "params": params}, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        key = jax.random.key(settings.seed)
        found = loss_surface(loss_fn, variables["params"], key, settings.surface_iterations)
        return found.gradient_norm, found.sharpness

    return lambda variables: tuple(float(value) for value in measure(variables, images))


if __name__ == "__main__":
    run_from_flags(run, Settings)
