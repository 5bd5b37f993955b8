"""Where is a network soft? Every bit of every weight is flipped, on a few images each.

One trained network. Writes census.parquet (one row a weight: of each bit, the images that a flip
left masked, made critical, made a DUE), most_critical.csv, by_layer.csv, by_bit.csv, a map of
layers and bits, and a figure of each weight's criticality.

    python -m experiments.census \\
        --flagfile=experiments/flags/census_digits_lenet.flags --workdir=runs/census
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.common.config import check_same_config, claim_workdir, setting
from experiments.common.study import (
    initial_shapes,
    integers,
    load_network,
    require,
    run_from_flags,
    train_network,
)
from experiments.gr import load_images
from jaxfi.campaign import CampaignCounts, run_campaign
from jaxfi.convert import from_torch, load_state
from jaxfi.data import DATASETS, AffineRanges, Dataset, normalise, write_csv
from jaxfi.engine import ENGINES, PRECISIONS
from jaxfi.faults import exhaustive_faults
from jaxfi.models import MODELS, PyTree, evaluation_function
from jaxfi.network import ApplyFn
from jaxfi.outcomes import CRITICAL, MASKED, NAN_POLICIES
from jaxfi.report import criticality_figure, heat_map, most_critical, write_census
from jaxfi.report.figures import save_figure
from jaxfi.training import TrainConfig

_SHOWN = 100  # weights in most_critical.csv


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that can be set; each field is a flag of the same name."""

    dataset: str = setting("digits", "digits, mnist or cifar10.")
    model: str = setting("lenet", "Network: a name in jaxfi.models.MODELS.")
    weights: str = setting(
        "", "Training's folder or PyTorch state dict; none: train as said below."
    )
    mean: Sequence[str] = setting((), "Of pixels in [0, 1], a channel each; none: the data set's.")
    std: Sequence[str] = setting((), "Of pixels in [0, 1], a channel each; none: the data set's.")
    optimizer: str = setting("adadelta", "adadelta, adam, sgd, adagrad or rmsprop.")
    learning_rate: float | None = setting(None, "Initial learning rate; none is the optimizer's.")
    schedule: str = setting("step", "Learning-rate schedule: constant, step, cosine or plateau.")
    gamma: float = setting(0.7, "Factor of the step schedule.")
    decay_every: int = setting(3, "Epochs between two decays of the step schedule.")
    epochs: int = setting(10, "Epochs of the training.")
    batch_size: int = setting(64, "Images per training step.")
    alpha: float = setting(0.0, "Weight of the gradient penalty; 0 is the default loss.")
    augment: bool = setting(True, "Random affine augmentation of the training images.")
    num_train_images: int = setting(0, "Training images to use, the first ones; 0 is all.")
    paths: str = setting("*", "Pattern of the arrays whose bits are flipped.")
    bits: Sequence[str] = setting((), "Bit positions that are flipped; none is all.")
    num_images: int = setting(0, "Test images, the first ones; 0 is all.")
    images_per_fault: int = setting(4, "Of those, images drawn for each flip.")
    campaign_batch_size: int = setting(32, "Images per batch of the campaign.")
    nan: str = setting("argmax", "What a NaN output counts as: argmax (as published) or critical.")
    engine: str = setting("fast", "Campaign engine: fast, reference or vmap.")
    precision: str = setting("highest", "Matmul and convolution precision of the campaign.")
    memory_budget: int = setting(0, "Bytes the campaign may use; 0 is 70 % of it.", decides=False)
    check_faults: int = setting(
        1000, "Flips, drawn at random, that are run again as a campaign of pairs.", decides=False
    )
    seed: int = setting(0, "Seed of the training, and of the images drawn.")

    def validate(self) -> None:
        """Raises ValueError, in one line, for a setting that is not allowed."""
        named = {"dataset": DATASETS, "model": MODELS, "nan": NAN_POLICIES, "engine": ENGINES}
        for name, names in {**named, "precision": PRECISIONS}.items():
            require(self, name, getattr(self, name) in names, ", ".join(names))
        for name in ("images_per_fault", "campaign_batch_size"):
            require(self, name, getattr(self, name) >= 1, "integers >= 1")
        for name in ("num_train_images", "num_images", "memory_budget", "check_faults"):
            require(self, name, getattr(self, name) >= 0, "integers >= 0")
        integers(self, "bits")
        self.training().validate()

    def training(self) -> TrainConfig:
        """The settings of the training: those that have the same name here."""
        names = {field.name for field in dataclasses.fields(TrainConfig)} - {"augment"}
        given = {name: value for name, value in vars(self).items() if name in names}
        return TrainConfig(augment=AffineRanges() if self.augment else None, **given)


class Subject(NamedTuple):
    """What is flipped, and the images that see it."""

    apply_fn: ApplyFn
    params: PyTree
    images: np.ndarray
    labels: np.ndarray


def run(settings: Settings, workdir: Path) -> CampaignCounts:
    """Flips every bit. What `workdir` holds is not done again.

    Raises ValueError or OSError, in one line, and before any work for all that is known then.
    """
    settings.validate()
    check_same_config(settings, workdir)
    dataset = load_images(settings)  # type: ignore[arg-type]
    num_images = settings.num_images or len(dataset.test_images)
    most = f"up to {num_images}, the images"
    require(settings, "images_per_fault", settings.images_per_fault <= num_images, most)
    shapes = initial_shapes(settings.model, dataset)
    bits = integers(settings, "bits") or None
    faults = exhaustive_faults(shapes["params"], paths=settings.paths, bits=bits)
    images = test_images(settings, dataset, num_images)
    variables = given_network(settings, shapes) if settings.weights else None
    claim_workdir(settings, workdir)
    if variables is None:
        variables = train_network(settings, dataset, workdir / "network")
    module = MODELS[settings.model](num_classes=dataset.num_classes)
    apply_fn = evaluation_function(module, variables)
    labels = dataset.test_labels[:num_images]
    subject = Subject(apply_fn, variables["params"], images, labels)
    campaign = run_campaign(
        *subject[:2], faults, *subject[2:],
        images_per_fault=settings.images_per_fault,
        keep="counts",
        nan=settings.nan,
        engine=settings.engine,
        precision=settings.precision,
        batch_size=settings.campaign_batch_size,
        memory_budget=settings.memory_budget or None,
        seed=settings.seed,
        progress=True,
        workdir=workdir / "campaign",
    )  # fmt: skip
    write_report(campaign, subject.params, dataset.note, workdir)
    if settings.check_faults:
        agree, checked = check(settings, subject, campaign)
        print(f"Check: {agree:,} of {checked:,} flips have the counts of a campaign of pairs.")
    return campaign


def test_images(settings: Settings, dataset: Dataset, num_images: int) -> np.ndarray:
    """The first test images, normalised as training does it or as the settings say."""
    known: dict[str, Sequence[float]] = {"mean": dataset.mean, "std": dataset.std}
    for name in ("mean", "std"):
        if given := getattr(settings, name):
            allowed = f"numbers, {len(known[name])} of them, one a channel of the images"
            try:
                known[name] = [float(text) for text in given]
            except ValueError:
                require(settings, name, False, allowed)
            require(settings, name, len(known[name]) == dataset.test_images.shape[-1], allowed)
    return normalise(dataset.test_images[:num_images], known["mean"], known["std"])


def given_network(settings: Settings, shapes: PyTree) -> PyTree:
    """The variables that `weights` names. Raises ValueError if they are of another network."""
    if Path(settings.weights).is_dir():
        return load_network(settings, shapes)
    return from_torch(load_state(settings.weights), shapes)


def write_report(campaign: CampaignCounts, params: PyTree, note: str, workdir: Path) -> None:
    """The tables and figures, and the rates on the terminal."""
    print(f"{campaign}\n{campaign.rates(by='layer')}\nImages: {note}.")
    for by in ("layer", "bit"):
        table = campaign.rates(by=by).to_pandas()
        write_csv(workdir / f"by_{by}.csv", list(table.columns), table.to_numpy().tolist())
    write_census(campaign, params, workdir / "census.parquet")
    columns = ("path", "index", "value", "critical", "masked", "due", "critical_bits")
    rows = [
        [*dataclasses.astuple(weight)[:-1], " ".join(map(str, weight.bits))]
        for weight in most_critical(campaign, params, _SHOWN)
    ]
    write_csv(workdir / "most_critical.csv", columns, rows)
    save_figure(heat_map(campaign), workdir / "layers_and_bits")
    save_figure(criticality_figure(campaign), workdir / "criticality")


def check(settings: Settings, subject: Subject, campaign: CampaignCounts) -> tuple[int, int]:
    """Of flips drawn at random, how many have the counts of `run_campaign`'s outcomes on the same
    pairs, and how many were checked."""
    random = np.random.default_rng(settings.seed)
    num_faults = min(settings.check_faults, len(campaign))
    rows = np.sort(random.choice(len(campaign), num_faults, replace=False))
    size = min(settings.campaign_batch_size, len(subject.labels))
    seen, agree = campaign.images(rows), 0
    for some, images in _with_few_images(seen, size, len(subject.labels)):
        pairs = run_campaign(
            *subject[:2], campaign.faults[rows[some]],
            subject.images[images], subject.labels[images],
            nan=settings.nan, precision=settings.precision, batch_size=size,
        )  # fmt: skip
        place = np.searchsorted(images, seen[some])
        row = np.arange(len(some))[:, None]
        outcomes, due = pairs.outcomes[row, place], pairs.due[row, place]
        found = (outcomes == MASKED, outcomes == CRITICAL, due)
        known = (campaign.masked, campaign.critical, campaign.due)
        same = [a.sum(axis=1) == b[rows[some]] for a, b in zip(found, known, strict=True)]
        agree += int(np.all(same, axis=0).sum())
    return agree, num_faults


def _with_few_images(
    seen: np.ndarray, size: int, num_images: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions in `seen` [k, m] of flips that share a batch or so of images, and those, rising; of
    fewer than a batch some more, since the bits are of that shape."""
    left, most = np.arange(len(seen)), size * -(-seen.shape[1] // size)
    while len(left):
        images = np.unique(seen[left[0]])
        for row in left:
            more = np.union1d(images, seen[row])
            images = more if len(more) <= most else images
        inside = np.isin(seen[left], images).all(axis=1)
        others = np.setdiff1d(np.arange(num_images), images)
        yield left[inside], np.union1d(images, others[: max(0, size - len(images))])
        left = left[~inside]


if __name__ == "__main__":
    run_from_flags(run, Settings)
