"""How does the way of training change a network's reliability? Optimizers, schedules, and decays.

Every strategy of the --sweep flags is trained, those that differ only in numbers together; then
weights read as zero, cumulatively, the same ones in every network. Logs training.csv, summary.csv,
networks.csv and accuracy_by_injections.csv; `jaxfi.report.study` makes tables and figures of them.

    python -m experiments.training_strategies \\
        --flagfile=experiments/flags/training_strategies_smoke.flags --workdir=runs/strategies
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from absl import logging

from experiments.common.config import check_same_config, claim_workdir, setting
from experiments.common.strategies import Strategy, groups, list_strategies
from experiments.common.study import (
    apply_function,
    initial_shapes,
    require,
    require_weights,
    run_from_flags,
)
from experiments.gr import load_images
from jaxfi.campaign import counts_of_range, cumulative_accuracy, draw_trials
from jaxfi.data import (
    DATASETS,
    AffineRanges,
    Dataset,
    first_test_images,
    normalise,
    read_csv,
    write_csv,
)
from jaxfi.engine import compiled
from jaxfi.models import MODELS, PyTree
from jaxfi.outcomes import NAN_POLICIES
from jaxfi.report.study import (
    INJECTION_COLUMNS,
    NETWORK_COLUMNS,
    SUMMARY_COLUMNS,
    TRAINING_COLUMNS,
    write_study,
)
from jaxfi.training import (
    EpochRecord,
    Member,
    TrainConfig,
    has_checkpoint,
    load_checkpoint,
    loss_surface,
    save_checkpoint,
    split,
    train_sweep,
    with_matmul_convolutions,
)

Rows = list[list[Any]]


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
        self.list_ranges()
        self.base().validate()
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

    def list_ranges(self) -> list[range]:
        """The numbers of faults of each range."""
        require(self, "ranges", bool(self.ranges), "one or more, as 10000/1000")
        return [counts_of_range(text) for text in self.ranges]

    def counts(self) -> list[int]:
        """Numbers of faults, rising from 0: of all ranges together, since trials are nested."""
        return sorted(set().union(*self.list_ranges()))


def run(settings: Settings, workdir: Path) -> None:
    """Trains every strategy, injects faults, and reports. What `workdir` holds is not done again.

    Raises ValueError or OSError, in one line, and before any training for all that is known then.
    """
    settings.validate()
    check_same_config(settings, workdir)
    dataset = load_images(settings)  # type: ignore[arg-type]
    strategies = list_strategies(settings.sweep, settings.base())
    check_sizes(settings, strategies, dataset)
    claim_workdir(settings, workdir)
    members: dict[str, Member] = {}
    for group in groups(strategies, settings.members_together):
        members.update(train_group(settings, group, dataset, workdir))
        write_training(members, workdir)
    write_summary(strategies, members, workdir)
    with jax.default_matmul_precision("highest"):
        inject_all(settings, members, dataset, workdir)
        measure_all(settings, members, dataset, workdir)
    write_study(workdir)


def check_sizes(settings: Settings, strategies: Sequence[Strategy], dataset: Dataset) -> None:
    """Raises ValueError for more images or faults than there are, before any training."""
    for strategy in strategies:
        split(dataset, strategy.config)
    available = len(dataset.train_labels)
    enough = settings.surface_images <= available
    require(settings, "surface_images", enough, f"up to {available} training images")
    most = max(counts[-1] for counts in settings.list_ranges())
    require_weights(settings, "ranges", most, initial_shapes(settings.model, dataset))


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


def write_summary(
    strategies: Sequence[Strategy], members: dict[str, Member], workdir: Path
) -> None:
    """summary.csv: what each training came to."""
    rows = []
    for name, recipe, config in strategies:
        history, diverged_at = members[name].history, members[name].diverged_at
        best, last = max(history, key=lambda record: record.test_accuracy), history[-1]
        diverged = diverged_at[0] if diverged_at else None
        rows.append([name, recipe, config.seed, last.epoch, best.test_accuracy, best.epoch,
                     last.test_accuracy, diverged])  # fmt: skip
    write_csv(workdir / "summary.csv", SUMMARY_COLUMNS, rows)


def inject_all(
    settings: Settings, members: dict[str, Member], dataset: Dataset, workdir: Path
) -> None:
    """accuracy_by_injections.csv: the same faults in every network."""
    images, labels = first_test_images(dataset, settings.num_images)
    apply_fn = apply_function(MODELS[settings.model](num_classes=dataset.num_classes))
    counts, shapes = settings.counts(), initial_shapes(settings.model, dataset)
    trials = draw_trials(settings.seed, shapes, counts[-1], settings.trials, paths=settings.paths)

    def rows_of(name: str, epoch: int, variables: PyTree) -> Rows:
        result = cumulative_accuracy(
            apply_fn, variables, trials, images, labels, counts, nan=settings.nan,
            batch_size=settings.injection_batch_size,
            trials_together=settings.trials_together,
        )  # fmt: skip
        return [
            [name, epoch, trial, counts[step], float(accuracy)]
            for (trial, step), accuracy in np.ndenumerate(result.accuracy)
        ]

    path = workdir / "accuracy_by_injections.csv"
    add_missing(path, INJECTION_COLUMNS, settings, members, rows_of)


def measure_all(
    settings: Settings, members: dict[str, Member], dataset: Dataset, workdir: Path
) -> None:
    """networks.csv: what may predict reliability, of each strategy's last network with faults."""
    surface = surface_function(settings, dataset)

    def rows_of(name: str, epoch: int, variables: PyTree) -> Rows:
        record = members[name].history[epoch - 1]
        statistics = (record.weight_mean, record.weight_std, record.weight_l2)
        return [[name, epoch, record.test_accuracy, *statistics, *surface(variables)]]

    path = workdir / "networks.csv"
    add_missing(path, NETWORK_COLUMNS, settings, members, rows_of, only_last=True)


def add_missing(
    path: Path,
    columns: Sequence[str],
    settings: Settings,
    members: dict[str, Member],
    rows_of: Callable[[str, int, PyTree], Rows],
    *,
    only_last: bool = False,
) -> None:
    """Adds `rows_of(strategy, epoch, variables)` of each network with faults that a table lacks.

    Of each strategy's last one only, if so asked. A member that diverged has no accuracy to lose:
    it gets no faults.
    """
    stored = read_csv(path, columns) if path.exists() else []
    rows: Rows = [list(row.values()) for row in stored]
    done = {(row["strategy"], row["epoch"]) for row in stored}
    for name in [name for name, member in members.items() if member.diverged_at is None]:
        networks = kept_networks(settings, path.parent / "networks" / name)
        for epoch in [max(networks)] if only_last and networks else networks:
            if (name, str(epoch)) not in done:
                rows += rows_of(name, epoch, networks[epoch])
                write_csv(path, columns, rows)
    write_csv(path, columns, rows)  # also where there is none, an empty one


def surface_function(settings: Settings, dataset: Dataset) -> Any:
    """`surface(variables) -> (gradient norm, sharpness)` of the loss on some training images."""
    chosen = slice(settings.surface_images)
    images = normalise(dataset.train_images[chosen], dataset.mean, dataset.std)
    labels = dataset.train_labels[chosen]
    module = MODELS[settings.model](num_classes=dataset.num_classes)
    apply_fn = apply_function(module)
    if jax.default_backend() == "cpu":
        apply_fn = with_matmul_convolutions(apply_fn)  # whose gradients are faster there

    @compiled  # images are an argument: the compiler would spend minutes on a constant's patches
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
