"""Campaigns that stop when the answer is known: `margin` is a promise about it.

A fixed sample is sized for the worst case, a rate of one half whose images all agree. Most rates
are far from that, and most faults of a kind do alike. `run_sequential` draws from one seeded order
until every rate is known within the margin; `run_stratified` draws more where faults differ.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfi.campaign._anytime import anytime_estimate, draw_until_kept
from jaxfi.campaign._result import Campaign
from jaxfi.campaign._run import run_campaign
from jaxfi.campaign._strata import PILOT_LEAST, Strata, draw_strata_until_kept, stratified_estimates
from jaxfi.faults._cutoff import checked_cutoff
from jaxfi.faults._layers import layers_of
from jaxfi.faults._list import FaultList, Stratum
from jaxfi.faults._sampling import fault_population, nth_key, sample_faults, sample_size
from jaxfi.faults._transforms import PyTree
from jaxfi.network._graph import ApplyFn
from jaxfi.outcomes._outcomes import Rates, per_fault_shares


class AdaptiveCampaign(NamedTuple):
    """What an adaptive campaign found.

    Attributes:
      campaign: all faults that ran. Its own `rates()` know nothing of how they were chosen.
      rates: the rates over all fault sites, each within the margin.
      stages: faults that had run when it looked at the rates, after each stage.
      num_fixed: faults that a fixed sample takes for the same margin, `sample_size`.
    """

    campaign: Campaign
    rates: Rates
    stages: tuple[int, ...]
    num_fixed: int

    @property
    def num_saved(self) -> int:
        """Faults fewer than the fixed sample's; negative if there were more."""
        return self.num_fixed - self.stages[-1]


def run_sequential(
    apply_fn: ApplyFn,
    params: PyTree,
    images: Any,
    labels: Any,
    *,
    key: int | jax.Array = 0,
    margin: float = 0.01,
    t: float | None = None,
    confidence: float | None = None,
    first: int = 500,
    workdir: str | os.PathLike | None = None,
    sampling: dict[str, Any] | None = None,
    **settings: Any,
) -> AdaptiveCampaign:
    """Draws faults until every rate's interval is within the margin, and stops.

    The intervals are those of a confidence sequence (`_anytime.py`): they hold with their
    confidence although the stop depends on them.

    Args:
      apply_fn, params, images, labels: as in `run_campaign`; `settings` are its other arguments.
      key: of the order of the faults: the same key draws the same, however many are needed.
      margin: half width of every rate's interval, a fraction.
      t, confidence: how sure: a cut-off of the normal distribution, or such as 0.95; default
        t = 2.58, which the studies take for 99 %.
      first: faults before the first look.
      workdir: keeps each stage; the same call there continues it.
      sampling: arguments of `sample_faults`: model, paths, bits, value.

    Raises as `run_campaign` and `sample_faults`.
    """
    _check_settings(settings)
    sampling, t = dict(sampling or {}), checked_cutoff(t, confidence)
    num_fixed = sample_size(fault_population(params), margin, t)
    population = _num_sites(params, sampling)
    done: list[Campaign] = []

    def measure(num_faults: int) -> np.ndarray:
        start = sum(len(campaign.faults) for campaign in done)
        faults = sample_faults(key, params, num_faults, by="network", **sampling)
        done.append(run_campaign(apply_fn, params, faults[start:], images, labels,
                                 workdir=_folder(workdir, len(done)), **settings))  # fmt: skip
        return _shares(_joined(done))

    stages = draw_until_kept(measure, population, margin, t, first)
    campaign = _joined(done)
    estimates = [anytime_estimate(v, population, margin, t) for v in _shares(campaign).T]
    return AdaptiveCampaign(campaign, Rates(*estimates), tuple(stages), num_fixed)


def run_stratified(
    apply_fn: ApplyFn,
    params: PyTree,
    images: Any,
    labels: Any,
    *,
    key: int | jax.Array = 0,
    margin: float = 0.01,
    t: float | None = None,
    confidence: float | None = None,
    pilot: int = 1000,
    workdir: str | os.PathLike | None = None,
    sampling: dict[str, Any] | None = None,
    **settings: Any,
) -> AdaptiveCampaign:
    """Divides the sites by layer and bit position, and draws more faults where they differ.

    A pilot shows where; `_strata.py` says how the rest is divided, and how the stages become one
    estimate. The intervals are large-sample ones, as the fixed sample's are.

    Args:
      pilot: faults of the pilot, about: at least two a stratum are taken. Where the layers are too
        many for that, the smallest are taken as one.
      apply_fn, params, images, labels, key, margin, t, confidence, workdir, sampling, settings: as
        in `run_sequential`.

    Raises as `run_campaign` and `sample_faults`.
    """
    _check_settings(settings)
    sampling, t = dict(sampling or {}), checked_cutoff(t, confidence)
    num_fixed = sample_size(fault_population(params), margin, t)
    strata, drawers = _layers_and_bits(key, params, sampling, pilot)
    done: list[Campaign] = []
    belongs: list[np.ndarray] = []  # of each stage, the stratum of each fault

    def measure(counts: np.ndarray) -> list[np.ndarray]:
        before = np.bincount(np.concatenate([[], *belongs]).astype(int), minlength=len(counts))
        faults = functools.reduce(lambda a, b: a + b, (
            draw(int(stop))[start:]
            for draw, start, stop in zip(drawers, before, counts, strict=True) if stop > start
        ))  # fmt: skip
        done.append(run_campaign(apply_fn, params, faults, images, labels,
                                 workdir=_folder(workdir, len(done)), **settings))  # fmt: skip
        belongs.append(np.repeat(np.arange(len(counts)), counts - before))
        return _by_stratum(_joined(done), np.concatenate(belongs), len(counts))

    stages = draw_strata_until_kept(measure, strata, margin, t, pilot)
    campaign = _joined(done)
    shares = _by_stratum(campaign, np.concatenate(belongs), len(drawers))
    rates = Rates(*stratified_estimates(strata, shares, stages, t))
    return AdaptiveCampaign(campaign, rates, tuple(int(s.sum()) for s in stages), num_fixed)


def _check_settings(settings: dict[str, Any]) -> None:
    """Raises ValueError for sampled pairs: a fault's share is taken to be of all images."""
    if settings.get("images_per_fault") is not None:
        raise ValueError(
            "images_per_fault is not for adaptive campaigns, whose faults see all images: allowed "
            "is run_campaign with it"
        )


def _layers_and_bits(
    key: int | jax.Array, params: PyTree, sampling: dict[str, Any], pilot: int
) -> tuple[Strata, list[functools.partial[FaultList]]]:
    """The strata, and for each a function that draws its first so many faults."""
    strata_of = sample_faults(0, params, 0, **sampling).drawn_from or ()
    empty = sample_faults(0, params, 0)
    layers = _layers(empty, strata_of, pilot)
    cells: dict[tuple[int, str], list[tuple[str, int]]] = {}
    for leaf, bits, num_models in strata_of:
        num_sites = math.prod(empty.shapes[leaf]) * num_models
        for bit in bits:
            cells.setdefault((bit, layers[leaf]), []).append((empty.paths[leaf], num_sites))
    cells = {cell: leaves for cell, leaves in cells.items() if sum(n for _, n in leaves)}
    drawers = []
    for number, ((bit, _), leaves) in enumerate(cells.items()):
        paths = [glob.escape(path) for path, _ in leaves]
        only = {"paths": paths, "bits": None if bit < 0 else [bit]}
        stratum_key = nth_key(key, number)
        arguments = {**sampling, **only, "by": "network"}
        drawers.append(functools.partial(_draw, stratum_key, params, arguments))
    sites = np.array([sum(n for _, n in leaves) for leaves in cells.values()], np.int64)
    return Strata(sites, np.array([bit for bit, _ in cells])), drawers


def _layers(empty: FaultList, strata_of: Sequence[Stratum], pilot: int) -> list[str]:
    """Of each leaf, the layer that it is counted with: if a pilot of `pilot` faults has two for
    each bit of each layer, its own; if not, the largest layers are themselves, the rest are one."""
    layers = layers_of(empty.paths)
    sites = dict.fromkeys(layers, 0)
    for leaf, bits, num_models in strata_of:
        sites[layers[leaf]] += math.prod(empty.shapes[leaf]) * len(bits) * num_models
    num_bits = max((len(bits) for _, bits, _ in strata_of), default=1)
    most = max(1, pilot // (PILOT_LEAST * num_bits))
    if len(sites) <= most:
        return layers
    large = sorted(sites, key=sites.__getitem__, reverse=True)[: most - 1]
    return [layer if layer in large else "the rest" for layer in layers]


def _draw(key: jax.Array, params: PyTree, arguments: dict[str, Any], num_faults: int) -> FaultList:
    return sample_faults(key, params, num_faults, **arguments)


def _folder(workdir: str | os.PathLike | None, stage: int) -> Path | None:
    return None if workdir is None else Path(workdir) / f"stage-{stage}"


def _num_sites(params: PyTree, sampling: dict[str, Any]) -> int:
    return sample_faults(0, params, 0, **sampling).population


def _shares(campaign: Campaign) -> np.ndarray:
    """[F, rates], what each fault counts for each rate."""
    columns = [per_fault_shares(campaign.results, rate) for rate in Rates._fields]
    return np.stack(columns, axis=1)


def _by_stratum(campaign: Campaign, belongs: np.ndarray, num_strata: int) -> list[np.ndarray]:
    shares = _shares(campaign)
    return [shares[belongs == stratum] for stratum in range(num_strata)]


def _joined(stages: Sequence[Campaign]) -> Campaign:
    """One campaign of the faults of all stages, in their order."""
    first = stages[0]
    idle = sum(campaign.num_not_activated for campaign in stages)
    pairs = [c.pairs_correct for c in stages if c.pairs_correct is not None]
    return dataclasses.replace(
        first,
        faults=functools.reduce(lambda a, b: a + b, (campaign.faults for campaign in stages)),
        outcomes=np.concatenate([campaign.outcomes for campaign in stages]),
        due=np.concatenate([campaign.due for campaign in stages]),
        correct=np.concatenate([campaign.correct for campaign in stages]),
        pairs_correct=np.concatenate(pairs) if len(pairs) == len(stages) else None,
        provenance={**first.provenance, "num_not_activated": idle},
    )
