"""Does gradient regularization make a network more testable? One row pair of the study's tables.

Two networks from the same initialisation see the same batches, one trained with the default loss,
one with the gradient loss L + alpha |grad L|^2. Both get the same faults; each outcome of every
fault on every test image is masked, non-critical or critical.

    python -m experiments.gr --flagfile=experiments/flags/digits.flags --workdir=runs/digits
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import linen as nn
from flax.traverse_util import flatten_dict

from experiments.common.command import run_command, workdir_from
from experiments.common.config import (
    AUTO,
    Config,
    check_same_config,
    claim_workdir,
    config_from_flags,
    define_flags,
    parse_flags,
)
from experiments.common.job import define_job_flags, join_from_flags, require_trained
from jaxfi.campaign import Campaign, best_images_per_fault, load_campaign, run_campaign
from jaxfi.data import Dataset, first_test_images, load_dataset
from jaxfi.faults import FaultList, fault_population, layer_of, sample_faults, sample_size
from jaxfi.models import MODELS, PyTree, evaluation_function
from jaxfi.outcomes import paired_difference
from jaxfi.report import coverage, figures, tables
from jaxfi.testset import DETECTS
from jaxfi.training import train

LOSSES = ("default", "gradient")


def run(config: Config, workdir: Path, *, train_only: bool = False) -> list[tables.TableRow]:
    """Trains both networks, injects the same faults into both, and reports what came of them.

    What `workdir` already holds is not done again. `train_only` stops after the training. The
    processes of a job share the campaigns, and process 0 reports. Raises ValueError, TypeError or
    OSError, in one line, and before any training for all that can be known by then.
    """
    config.validate()
    check_same_config(config, workdir)
    dataset = load_images(config)
    num_images = config.num_images or len(dataset.test_images)
    count = config.images_per_fault
    if count != AUTO and int(count) > num_images:
        raise ValueError(
            f"images_per_fault is {config.images_per_fault}; allowed: up to {num_images} images"
        )
    module = MODELS[config.model](num_classes=dataset.num_classes)
    variables = initialise(module, dataset, config.seed)
    faults = list_faults(config, variables["params"])
    claim_workdir(config, workdir)
    keep_fault_list(faults, variables["params"], workdir / "faults.csv")
    folders = {loss: workdir / "campaigns" / loss for loss in LOSSES}
    for loss, alpha in zip(LOSSES, (0.0, config.alpha), strict=True):
        folder = workdir / "networks" / loss
        require_trained(folder, config.epochs)
        trained = train_network(config, alpha, module, variables, dataset, folder)
        if not train_only:
            if count == AUTO:
                count = choose_images(config, module, trained, dataset, workdir / "campaigns")
            folder = folders[loss]
            campaign = inject_faults(config, int(count), module, trained, faults, dataset, folder)
            if config.audit_pairs and jax.process_index() == 0:
                print(f"Audit, {loss} loss: {campaign.audit(config.audit_pairs, config.seed)}.")
    if train_only or jax.process_index() > 0:
        return []
    campaigns = {loss: load_campaign(folder) for loss, folder in folders.items()}
    return write_report(config, campaigns, dataset, layer_order(module, dataset), workdir)


def load_images(config: Config) -> Dataset:
    """The data set, cut to the first `num_train_images`."""
    dataset = load_dataset(config.dataset)
    available = {
        "num_train_images": len(dataset.train_images),
        "num_images": len(dataset.test_images),
        "batch_size": config.num_train_images or len(dataset.train_images),
    }
    for name, number in available.items():
        if getattr(config, name) > number:
            raise ValueError(f"{name} is {getattr(config, name)}; allowed: up to {number} images")
    if config.num_train_images:
        dataset = dataclasses.replace(
            dataset,
            train_images=dataset.train_images[: config.num_train_images],
            train_labels=dataset.train_labels[: config.num_train_images],
        )
    return dataset


def initialise(module: nn.Module, dataset: Dataset, seed: int) -> PyTree:
    """The variables that both trainings start from."""
    image = jnp.zeros((1, *dataset.train_images.shape[1:]), jnp.float32)
    return jax.jit(module.init)(jax.random.key(seed), image)


def layer_order(module: nn.Module, dataset: Dataset) -> list[str]:
    """Layer names from input to output: Flax makes parameters in the order of their use."""
    paths: list[str] = []

    def record(image: jax.Array) -> None:
        variables = module.init(jax.random.key(0), image)
        paths.extend(flatten_dict(variables["params"], sep="/"))  # a tree that leaves is sorted

    jax.eval_shape(record, jnp.zeros((1, *dataset.train_images.shape[1:]), jnp.float32))
    return list(dict.fromkeys(map(layer_of, paths)))


def list_faults(config: Config, params: PyTree) -> FaultList:
    """The faults of both campaigns: those of a file, or a sample that depends only on shapes."""
    if config.fault_list:
        return FaultList.from_csv(config.fault_list, params)
    population = fault_population(params)
    num_faults = sample_size(population, config.margin, config.t, config.p)
    if config.num_faults:
        num_faults = config.num_faults
    return sample_faults(config.seed, params, num_faults, model=config.fault_model)


def keep_fault_list(faults: FaultList, params: PyTree, path: Path) -> None:
    """Writes `faults.csv`; an error if the folder has another list."""
    if not len(faults):
        raise ValueError("the fault list is empty: allowed is one fault or more")
    if not path.exists():
        faults.to_csv(path)
    elif FaultList.from_csv(path, params) != faults:
        raise ValueError(f"{path} holds another fault list: use another --workdir")


def train_network(
    config: Config,
    alpha: float,
    module: nn.Module,
    variables: PyTree,
    dataset: Dataset,
    folder: Path,
) -> PyTree:
    """The variables after the last epoch with penalty `alpha`; `folder` keeps the training."""
    settings = config.training(alpha)
    result = train(module, dataset, settings, workdir=folder, variables=variables, progress=True)
    return result.variables


def choose_images(
    config: Config, module: nn.Module, variables: PyTree, dataset: Dataset, folder: Path
) -> int:
    """How many images of a fault give the narrowest intervals for the work, by a pilot."""
    images, labels = first_test_images(dataset, config.num_images)
    params = variables["params"]
    return best_images_per_fault(
        evaluation_function(module, variables), params, images, labels,
        key=config.seed, workdir=folder, sampling={"model": config.fault_model},
        **campaign_settings(config),
    )  # fmt: skip


def inject_faults(
    config: Config,
    images_per_fault: int,
    module: nn.Module,
    variables: PyTree,
    faults: FaultList,
    dataset: Dataset,
    folder: Path,
) -> Campaign:
    """Every fault on the first `num_images` test images, or on `images_per_fault` of them drawn for
    it; continued if `folder` has a part of it."""
    images, labels = first_test_images(dataset, config.num_images)
    return run_campaign(
        evaluation_function(module, variables),
        variables["params"],
        faults,
        images,
        labels,
        images_per_fault=images_per_fault or None,
        progress=jax.process_index() == 0,
        workdir=folder,
        **campaign_settings(config),
    )


def campaign_settings(config: Config) -> dict[str, Any]:
    """Arguments of `run_campaign` that have a flag."""
    return {
        "nan": config.nan,
        "engine": config.engine,
        "precision": config.precision,
        "batch_size": config.campaign_batch_size,
        "memory_budget": config.memory_budget or None,
        "seed": config.seed,
    }


def write_report(
    config: Config,
    campaigns: Mapping[str, Campaign],
    dataset: Dataset,
    order: Sequence[str],
    workdir: Path,
) -> list[tables.TableRow]:
    """The table, into `workdir` and on the terminal, then the figures."""
    rows = [
        tables.table_row(
            campaigns[loss],
            dataset=config.dataset,
            model=config.model,
            loss=loss,
            optimizer=config.optimizer,
            epochs=config.epochs,
            alpha=alpha,
            t=config.t,
        )
        for loss, alpha in zip(LOSSES, (0.0, config.alpha), strict=True)
    ]
    difference = paired_difference(campaigns["default"], campaigns["gradient"], "masked", config.t)
    tables.write_csv(rows, workdir / "table.csv")
    tables.write_markdown(rows, difference, dataset.note, workdir / "table.md")
    tables.write_latex(rows, difference, dataset.note, workdir / "table.tex")
    tables.print_table(rows, difference, dataset.note)
    names = (f"{config.model}, default loss", f"{config.model}, gradient loss (α={config.alpha:g})")
    named = dict(zip(names, (campaigns[loss] for loss in LOSSES), strict=True))
    write_figures(config, named, order, workdir)
    if config.images_per_fault:
        print("No coverage: which images detect a fault is known where faults see all images.")
    else:
        write_coverage(named, workdir)
    return rows


def write_figures(
    config: Config, campaigns: Mapping[str, Campaign], order: Sequence[str], workdir: Path
) -> None:
    """The three figures; the one by bit position only where faults have bits."""
    figures.save_figure(figures.outcome_shares(campaigns, config.t), workdir / "outcome_shares")
    by_layer = figures.critical_by_layer(campaigns, order, config.t)
    figures.save_figure(by_layer, workdir / "critical_by_layer")
    if any((campaign.faults.bit >= 0).any() for campaign in campaigns.values()):
        by_bit = figures.outcomes_by_bit(campaigns, config.t)
        figures.save_figure(by_bit, workdir / "outcomes_by_bit")


def write_coverage(campaigns: Mapping[str, Campaign], workdir: Path) -> None:
    """How many images a test needs to detect the faults of each network."""
    measured = [
        coverage.measure_coverage(name, campaign.outcomes, detect)
        for detect in DETECTS
        for name, campaign in campaigns.items()
    ]
    coverage.write_csv(measured, workdir / "coverage.csv")
    coverage.write_latex(measured, workdir / "coverage.tex")
    figures.save_figure(coverage.coverage_figure(measured), workdir / "coverage")


def run_from_flags(values: Any) -> None:
    """`run` with the configuration and the place in a job that the flags tell of."""
    workdir = workdir_from(values)
    join_from_flags(values)
    run(config_from_flags(values), workdir, train_only=values["train_only"].value)


def main(argv: Sequence[str]) -> None:
    run_command(argv, lambda: run_from_flags(flags.FLAGS))


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    define_job_flags(flags.FLAGS)
    app.run(main, flags_parser=parse_flags)
