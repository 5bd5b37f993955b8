"""Published outcomes against measured ones, fault by fault, by layer and by bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from jaxfi.campaign import Campaign
from jaxfi.convert import ResultTable
from jaxfi.data import write_csv
from jaxfi.faults import FaultList
from jaxfi.outcomes import CRITICAL, MASKED, NON_CRITICAL, Estimate, shares

BIT_CLASSES = {
    "0-11": range(12),
    "12-22": range(12, 23),
    "23-29": range(23, 30),
    "30": range(30, 31),
    "31": range(31, 32),
}
AGREEMENT_COLUMNS = (
    "layer", "bits", "num_faults", "masked_published", "masked_measured",
    "critical_published", "critical_measured",
)  # fmt: skip
INTERVAL_COLUMNS = (
    "images", "layer", "bits", "num_faults",
    "masked_published", "masked_measured", "masked_low", "masked_high",
    "critical_published", "critical_measured", "critical_low", "critical_high",
)  # fmt: skip
OUTCOMES = {"masked": MASKED, "non_critical": NON_CRITICAL, "critical": CRITICAL}
ALL = "all"


# Strata


def stratum_of_faults(faults: FaultList) -> np.ndarray:
    """[F] number of each fault's stratum, layers x bit classes, in the order of `strata`."""
    layers = layer_names(faults)
    layer = np.array([layers.index(path.split("/")[0]) for path in faults.paths])[faults.leaf]
    class_of_bit = np.concatenate([
        np.full(len(bits), number) for number, bits in enumerate(BIT_CLASSES.values())
    ])  # fmt: skip
    return layer * len(BIT_CLASSES) + class_of_bit[faults.bit]


def layer_names(faults: FaultList) -> list[str]:
    """The first parts of the leaves' paths."""
    return list(dict.fromkeys(path.split("/")[0] for path in faults.paths))


def strata(faults: FaultList) -> list[tuple[str, str]]:
    """Layer and bit class of every stratum."""
    return [(layer, bits) for layer in layer_names(faults) for bits in BIT_CLASSES]


def sample_rows(faults: FaultList, num_faults: int, seed: int) -> np.ndarray:
    """Rows of a sample with equally many faults of each stratum, as far as it has them.

    Raises ValueError for more faults than there are.
    """
    if num_faults > len(faults):
        raise ValueError(f"--num_faults={num_faults}: allowed are 0 (all) to {len(faults)}")
    if num_faults == 0:
        return np.arange(len(faults))
    generator = np.random.Generator(np.random.Philox(seed))
    stratum = stratum_of_faults(faults)
    # The faults of a stratum in random order, and strata by turns: the k-th faults come together.
    order = generator.permutation(len(faults))
    turn = np.empty(len(faults), np.int64)
    for number in np.unique(stratum):
        members = order[stratum[order] == number]
        turn[members] = np.arange(len(members))
    return np.sort(order[np.argsort(turn[order], kind="stable")[:num_faults]])


# Agreement


class Agreement(NamedTuple):
    """Published against measured for a part of the faults; shares of images, fractions.

    Attributes:
      layer, bits: the part; "all" for no restriction.
      num_faults: faults compared.
      masked, critical: published mean, and measured mean with the interval that the sampling of
        faults and images leaves around it (`measured_estimate`).
    """

    layer: str
    bits: str
    num_faults: int
    masked: tuple[float, Estimate]
    critical: tuple[float, Estimate]


def published_shares(published: ResultTable) -> dict[str, np.ndarray]:
    """Each fault's share of images per outcome, [F]."""
    counts = published._asdict()
    return {name: counts[name] / published.n_injections for name in OUTCOMES}


def measured_shares(campaign: Campaign) -> dict[str, np.ndarray]:
    """Each fault's share of images per outcome, [F]."""
    return {name: shares(campaign.outcomes, code) for name, code in OUTCOMES.items()}


def measured_estimate(
    happened: np.ndarray,
    published: np.ndarray,
    weights: np.ndarray,
    fault_coverage: np.ndarray,
    image_coverage: float,
    t: float = 2.58,
) -> Estimate:
    """The measured mean, with the error that it has as an estimate of the whole published mean.

    Two samples make it: of the list's faults, where what counts is how measured - published varies
    between faults, and of the images, where what counts is how an image's mean over faults varies.
    Both errors vanish where everything was run. What is left beyond them is systematic. The images
    count one (fault, image) pair more that happened and one that did not, half each: so an outcome
    that was not seen has an interval too, unless every image was run.

    Args:
      happened: [F, N] bool, the outcome in question.
      published: [F] published shares.
      weights: [F], sum 1.
      fault_coverage: [F] share of the fault's stratum that was run.
      image_coverage: share of the published number of images that was run.
      t: half width in standard errors; default 2.58, which is 99 %.
    """
    difference = happened.mean(axis=1) - published
    mean = float(weights @ happened.mean(axis=1))
    residual = difference - weights @ difference
    num_faults, num_images = happened.shape
    bessel = num_faults / max(num_faults - 1, 1)
    of_faults = bessel * np.sum((weights * residual) ** 2 * (1 - fault_coverage))
    variance = np.var(weights @ happened) + np.max(weights) ** 2 / num_images
    of_images = variance / max(num_images - 1, 1) * max(1 - image_coverage, 0)
    half = t * float(np.sqrt(of_faults + of_images))
    return Estimate(mean, max(mean - half, 0.0), min(mean + half, 1.0))


def compare(published: ResultTable, rows: np.ndarray, campaign: Campaign) -> list[Agreement]:
    """One agreement per stratum, then by layer, by bit class, and overall.

    A stratum has the weight of its size in the whole list.

    Args:
      published: the whole list.
      rows: those that were injected.
    """
    names = strata(published.faults)
    whole = stratum_of_faults(published.faults)
    sizes, stratum = np.bincount(whole, minlength=len(names)), whole[rows]
    coverage = np.bincount(stratum, minlength=len(names)) / np.maximum(sizes, 1)
    images = campaign.outcomes.shape[1] / published.n_injections.min()
    before = {name: array[rows] for name, array in published_shares(published).items()}

    def part(layer: str, bits: str, numbers: Sequence[int]) -> Agreement:
        chosen = np.isin(stratum, numbers)
        here = coverage[stratum[chosen]]
        weights = 1 / here / np.sum(1 / here)
        pairs = {}
        for name in ("masked", "critical"):
            happened = campaign.outcomes[chosen] == OUTCOMES[name]
            published_mean = float(weights @ before[name][chosen])
            estimate = measured_estimate(happened, before[name][chosen], weights, here, images)
            pairs[name] = (published_mean, estimate)
        return Agreement(layer, bits, int(chosen.sum()), **pairs)

    groups: dict[tuple[str, str], list[int]] = {}
    for number, (layer, bits) in enumerate(names):
        for group in ((layer, bits), (layer, ALL), (ALL, bits), (ALL, ALL)):
            groups.setdefault(group, []).append(number)
    order = sorted(groups, key=lambda group: (group[0] == ALL, group[1] == ALL))
    present = [group for group in order if np.isin(stratum, groups[group]).any()]
    return [part(*group, groups[group]) for group in present]


def correct_images(campaign: Campaign) -> Campaign:
    """The campaign on the images that its golden network gets right."""
    right = np.argmax(campaign.golden, axis=-1) == campaign.labels
    return dataclasses.replace(
        campaign,
        outcomes=campaign.outcomes[:, right],
        due=campaign.due[:, right],
        golden=campaign.golden[right],
        labels=campaign.labels[right],
    )


def correlation(published: np.ndarray, measured: np.ndarray) -> float:
    """Pearson's correlation over faults; NaN where one of the two does not vary."""
    if np.ptp(published) == 0 or np.ptp(measured) == 0:
        return float("nan")
    return float(np.corrcoef(published, measured)[0, 1])


# Output


def write_agreement(path: Path, agreements: Iterable[Agreement]) -> None:
    """The strata, in the columns of AGREEMENT_COLUMNS."""
    write_csv(path, AGREEMENT_COLUMNS, in_decimals(
        (found.layer, found.bits, found.num_faults,
         found.masked[0], found.masked[1].value, found.critical[0], found.critical[1].value)
        for found in agreements
        if ALL not in (found.layer, found.bits)
    ))  # fmt: skip


def write_intervals(path: Path, by_images: Mapping[str, Sequence[Agreement]]) -> None:
    """Every part of the table, with the intervals, for each set of images."""
    write_csv(path, INTERVAL_COLUMNS, in_decimals(
        (images, found.layer, found.bits, found.num_faults,
         found.masked[0], *found.masked[1], found.critical[0], *found.critical[1])
        for images, agreements in by_images.items()
        for found in agreements
    ))  # fmt: skip


def write_faults(path: Path, published: ResultTable, rows: np.ndarray, campaign: Campaign) -> None:
    """One row a fault: its row in the published list, its site, and both outcomes."""
    before, after = published_shares(published), measured_shares(campaign)
    faults = campaign.faults
    header = ["row", "path", "index", "bit"]
    header += [f"{name}_{source}" for source in ("published", "measured") for name in before]
    columns = [before[name][rows] for name in before] + list(after.values())
    due = campaign.due.mean(axis=1)
    write_csv(path, [*header, "due_measured"], in_decimals(
        (row, faults.paths[leaf], index, bit, *numbers)
        for row, leaf, index, bit, *numbers in zip(
            rows.tolist(), faults.leaf, faults.indices(), faults.bit.tolist(), *columns, due,
            strict=True,
        )
    ))  # fmt: skip


def in_decimals(rows: Iterable[Sequence]) -> Iterator[list]:
    """The rows with six decimals for each float."""
    for row in rows:
        yield [f"{x:.6f}" if isinstance(x, float) else x for x in row]


def print_agreement(title: str, agreements: Sequence[Agreement], console: Console) -> None:
    """The table on the terminal; ± is the half width of the interval around ours (t = 2.58)."""
    table = Table(
        title=f"Published and ours: {title}",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("Layer")
    table.add_column("Bits")
    for heading in ("Faults", "Masked", "ours", "±", "Critical", "ours", "±"):
        table.add_column(heading, justify="right")
    for found in agreements:
        cells = [found.layer, found.bits, f"{found.num_faults:,}"]
        for published, measured in (found.masked, found.critical):
            half = max(measured.high - measured.value, measured.value - measured.low)
            cells += [f"{published:.4f}", f"{measured.value:.4f}", f"{half:.4f}"]
        table.add_row(*cells)
    console.print(table)


def print_correlations(
    published: ResultTable, rows: np.ndarray, campaign: Campaign, console: Console
) -> None:
    """How well each fault's shares agree, over faults."""
    before, after = published_shares(published), measured_shares(campaign)
    for name in ("masked", "critical"):
        found = correlation(before[name][rows], after[name])
        console.print(f"correlation over {len(rows):,} faults, {name}: {found:.4f}")
