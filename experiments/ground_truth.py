"""Does jaxfi agree with what others published? One network, fault by fault.

The published faults, or a stratified sample of them, are injected into the published network under
a named arithmetic, and each fault's shares of masked and critical images are put beside the
published ones. A layer of the table is the first part of a leaf's path: `layer3`.

    python -m experiments.ground_truth --network=resnet20 --weights=FILE.npz --outcomes=FILE.csv \\
        --arithmetic='layer3/*=tf32,*=float32' --num_faults=1000 --num_images=500 --workdir=DIR
"""

from __future__ import annotations

import dataclasses
import functools
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from rich.console import Console

from experiments.agreement import (
    Agreement,
    compare,
    correct_images,
    print_agreement,
    print_correlations,
    sample_rows,
    write_agreement,
    write_faults,
)
from experiments.config import check_same_config, claim_workdir, parse_flags
from jaxfi.arithmetic import with_arithmetic
from jaxfi.campaign import Campaign, NotReproducible, run_campaign
from jaxfi.convert import ResultTable, from_torch, load_state, read_results
from jaxfi.data import load_dataset, normalise
from jaxfi.faults import PyTree
from jaxfi.models import MODELS


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the result; the flags have the same names and say what they mean."""

    network: str
    weights: str
    outcomes: str
    dataset: str
    mean: list[float]
    std: list[float]
    arithmetic: str
    num_faults: int
    num_images: int
    jpeg_quality: int
    nan: str
    engine: str
    precision: str
    batch_size: int
    seed: int


def define_flags(values: flags.FlagValues) -> None:
    """The flags of `Settings`, and --workdir."""
    text: Any = functools.partial(flags.DEFINE_string, flag_values=values)
    number: Any = functools.partial(flags.DEFINE_integer, flag_values=values)
    choice: Any = functools.partial(flags.DEFINE_enum, flag_values=values)
    numbers: Any = functools.partial(flags.DEFINE_list, flag_values=values)
    text("workdir", None, "Folder of the results; the same again continues.")
    text("weights", None, "PyTorch state dict of the network: .npz, .safetensors or .pt.")
    text("outcomes", None, "Published faults and outcomes (CSV, see jaxfi.convert).")
    text("network", "resnet20", "Network: a name in jaxfi.models.MODELS.")
    text("dataset", "cifar10", "Its test images are used: digits, mnist or cifar10.")
    numbers("mean", ["0.4914", "0.4822", "0.4465"], "Of pixels in [0, 1], per channel.")
    numbers("std", ["0.2023", "0.1994", "0.2010"], "Of pixels in [0, 1], per channel.")
    text("arithmetic", "*=float32", "PATTERN=ARITHMETIC, comma-separated; first match counts.")
    number("num_faults", 0, "Faults, stratified by layer and bits; 0 is all.", 0)
    number("num_images", 0, "Test images, the first ones; 0 is all.", 0)
    number("jpeg_quality", 0, "Compress the images again at this quality; 0: do not.", 0, 95)
    choice("nan", "argmax", ("argmax", "critical"), "What a NaN output counts as.")
    choice("engine", "fast", ("fast", "reference", "vmap"), "Campaign engine.")
    choice("precision", "highest", ("highest", "high", "default"), "Of the backend's matmuls.")
    number("batch_size", 100, "Images per batch.", 1)
    number("seed", 0, "Seed of the sample.")


def settings_from_flags(values: flags.FlagValues) -> Settings:
    """Raises ValueError for a missing file name or numbers that are none."""
    given: dict[str, Any] = {
        field.name: values[field.name].value for field in dataclasses.fields(Settings)
    }
    for name in ("weights", "outcomes"):
        if not given[name]:
            raise ValueError(f"--{name} is missing: give the reference file")
    for name in ("mean", "std"):
        given[name] = [float(number) for number in given[name]]
    return Settings(**given)


def parse_arithmetic(text: str) -> dict[str, str]:
    """PATTERN=ARITHMETIC, comma-separated, as `with_arithmetic` takes it; ValueError for others.

    >>> parse_arithmetic("layer3/*=tf32,*=float32")
    {'layer3/*': 'tf32', '*': 'float32'}
    """
    entries = {}
    for entry in text.split(","):
        pattern, equals, name = entry.rpartition("=")
        if not equals or not pattern or pattern in entries:
            raise ValueError(f"arithmetic {text!r} is not PATTERN=ARITHMETIC,... of new patterns")
        entries[pattern] = name
    return entries


class Subject(NamedTuple):
    """What faults are injected into.

    Attributes:
      apply_fn: maps parameters and images [batch, H, W, C] to logits.
      params: the parameters.
      images: [N, H, W, C] float32, normalised.
      labels: [N] int32.
      note: where the images come from.
    """

    apply_fn: Callable[[PyTree, jax.Array], jax.Array]
    params: PyTree
    images: np.ndarray
    labels: np.ndarray
    note: str


def load_subject(settings: Any) -> Subject:
    """Network and images. Raises ValueError or FileNotFoundError for files that do not fit."""
    if settings.network not in MODELS:
        allowed = ", ".join(MODELS)
        raise ValueError(f"network is {settings.network!r}; allowed: {allowed}")
    state = load_state(settings.weights)
    dataset = load_dataset(settings.dataset)
    _check_images(settings, dataset.test_images.shape)
    module = MODELS[settings.network](num_classes=dataset.num_classes)
    image = jnp.zeros((1, *dataset.test_images.shape[1:]), jnp.float32)
    variables = from_torch(state, jax.eval_shape(module.init, jax.random.key(0), image))
    statistics = {name: tree for name, tree in variables.items() if name != "params"}

    def apply_fn(params: PyTree, images: jax.Array) -> jax.Array:
        outputs: Any = module.apply({"params": params, **statistics}, images, train=False)
        return outputs

    count = settings.num_images or len(dataset.test_labels)
    pixels = compress(dataset.test_images[:count], settings.jpeg_quality)
    images = normalise(pixels, settings.mean, settings.std)
    return Subject(apply_fn, variables["params"], images, dataset.test_labels[:count], dataset.note)


def _check_images(settings: Any, shape: tuple[int, ...]) -> None:
    if settings.num_images > shape[0]:
        raise ValueError(f"--num_images={settings.num_images}: allowed are 0 (all) to {shape[0]}")
    for name in ("mean", "std"):
        if len(getattr(settings, name)) != shape[-1]:
            raise ValueError(f"--{name} has not {shape[-1]} numbers, one a channel of the images")
    if settings.jpeg_quality and shape[-1] != 3:
        raise ValueError("--jpeg_quality is for images of 3 channels")


def compress(images: np.ndarray, quality: int) -> np.ndarray:
    """The images [N, H, W, 3] uint8 after one more JPEG compression; 0 leaves them."""
    if quality == 0:
        return images
    from PIL import Image

    compressed = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=quality)
        compressed.append(np.asarray(Image.open(file)))
    return np.stack(compressed)


def check_arithmetic(subject: Subject, arithmetic: Mapping[str, str]) -> Callable:
    """The network under the arithmetic, traced once: an error shows before any work."""
    apply_fn = with_arithmetic(subject.apply_fn, arithmetic)
    jax.eval_shape(apply_fn, subject.params, subject.images[:1])
    return apply_fn


def run(settings: Settings, workdir: Path) -> list[Agreement]:
    """Injects the faults and compares. Raises ValueError or OSError, in one line, before that."""
    arithmetic = parse_arithmetic(settings.arithmetic)
    if not Path(settings.outcomes).is_file():
        raise FileNotFoundError(f"--outcomes={settings.outcomes}: no such file")
    check_same_config(settings, workdir)  # type: ignore[arg-type]
    subject = load_subject(settings)
    published = read_results(settings.outcomes, subject.params)
    rows = sample_rows(published.faults, settings.num_faults, settings.seed)
    apply_fn = check_arithmetic(subject, arithmetic)
    claim_workdir(settings, workdir)  # type: ignore[arg-type]
    campaign = run_campaign(
        apply_fn,
        subject.params,
        published.faults[rows],
        subject.images,
        subject.labels,
        nan=settings.nan,
        engine=settings.engine,
        batch_size=settings.batch_size,
        precision=settings.precision,
        progress=True,
        workdir=workdir / "campaign",
    )
    return write_results(published, rows, campaign, subject.note, workdir)


def write_results(
    published: ResultTable, rows: np.ndarray, campaign: Campaign, note: str, workdir: Path
) -> list[Agreement]:
    """agreement.csv, faults.csv, and the table and correlations on the terminal.

    agreement_correct.csv holds only the images that the golden network gets right.
    """
    console = Console()
    agreements = compare(published, rows, campaign)
    write_agreement(workdir / "agreement.csv", agreements)
    write_faults(workdir / "faults.csv", published, rows, campaign)
    print_agreement("all images", agreements, console)
    of_correct = compare(published, rows, correct_images(campaign))
    write_agreement(workdir / "agreement_correct.csv", of_correct)
    print_agreement("images that the golden network gets right", of_correct[-1:], console)
    print_correlations(published, rows, campaign, console)
    accuracy = f"{len(campaign.labels):,} images, clean accuracy {campaign.clean_accuracy:.4f}"
    console.print(f"{accuracy}; {note}", highlight=False)
    return agreements


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: {argv[1]!r} is not a flag: all settings are --name=value")
    logging.set_verbosity(logging.WARNING)
    try:
        if not flags.FLAGS.workdir:
            raise ValueError("--workdir is missing: give the folder for the results")
        run(settings_from_flags(flags.FLAGS), Path(flags.FLAGS.workdir))
    except (ValueError, TypeError, OSError, NotReproducible) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main, flags_parser=parse_flags)
