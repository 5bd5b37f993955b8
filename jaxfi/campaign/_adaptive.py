"""Campaigns that stop when the answer is known: `margin` is a promise about it.

A fixed sample is sized for the worst case, a rate of one half whose images all agree. Most rates
are far from that, and most faults of a kind do alike. `run_sequential` draws from one seeded order
until every rate is known within the margin; `run_stratified` draws more where faults differ. Both
run each fault on few images, by default as many as a pilot finds best.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfi.campaign._anytime import FRESH, Goal, anytime_estimate, draw_until_kept
from jaxfi.campaign._checks import check_images_per_fault, warn
from jaxfi.campaign._result import Campaign
from jaxfi.campaign._run import run_campaign
from jaxfi.campaign._strata import PILOT_LEAST, Strata, draw_strata_until_kept, stratified_estimates
from jaxfi.engine import explain
from jaxfi.faults._cutoff import checked_cutoff
from jaxfi.faults._layers import layers_of
from jaxfi.faults._list import FaultList, Stratum
from jaxfi.faults._sampling import fault_population, nth_key, sample_faults, sample_size
from jaxfi.faults._sites import checked_integer
from jaxfi.faults._transforms import PyTree
from jaxfi.network._graph import ApplyFn
from jaxfi.network._images import packed_shape
from jaxfi.outcomes._outcomes import Estimate, Rates, pairs_that_count, per_fault_shares
from jaxfi.outcomes._two_stage import clean_accuracy, parts_of_variance

_PILOT_FAULTS, _PILOT_IMAGES = 200, 8  # of the pilot that chooses m
_PILOT_KEY = 2**31 - 1  # no stratum's
_MOST_IMAGES = 64  # of one fault: a pilot that saw no difference within a fault proves little


class AdaptiveCampaign(NamedTuple):
    """What an adaptive campaign found.

    Attributes:
      campaign: all faults that ran. Its own `rates()` know nothing of how they were chosen.
      rates: the rates over all fault sites, each within the margin.
      stages: faults that had run when it looked at the rates, after each stage.
      num_fixed: faults that a fixed sample takes for the same margin, `sample_size`; for the
        smallest half width asked, where that was a share of a rate.
      criteria: the rates of the campaign's own criteria, by name.
    """

    campaign: Campaign
    rates: Rates
    stages: tuple[int, ...]
    num_fixed: int
    criteria: Mapping[str, Estimate] = MappingProxyType({})

    def rate(self, name: str) -> Estimate:
        """One of `rates`, or of `criteria`, by name."""
        if name not in (allowed := (*Rates._fields, *self.criteria)):
            raise ValueError(f"unknown rate {name!r}: allowed are {', '.join(allowed)}")
        return self.criteria[name] if name in self.criteria else getattr(self.rates, name)

    @property
    def num_saved(self) -> int:
        """Faults fewer than the fixed sample's; negative if there were more."""
        return self.num_fixed - self.stages[-1]

    @property
    def images_per_fault(self) -> int:
        """m, images that each fault saw."""
        return self.campaign.outcomes.shape[1]

    @property
    def num_pairs(self) -> int:
        """Pairs of a fault and an image that ran, but for the pilot's that chose m."""
        return self.campaign.outcomes.size

    @property
    def num_pairs_fixed(self) -> int:
        """Pairs of the fixed sample on all images."""
        return self.num_fixed * len(self.campaign.labels)


def run_sequential(
    apply_fn: ApplyFn,
    params: PyTree,
    images: Any,
    labels: Any,
    *,
    key: int | jax.Array = 0,
    margin: float = 0.01,
    relative: float | Mapping[str, float] | None = None,
    t: float | None = None,
    confidence: float | None = None,
    first: int = 500,
    images_per_fault: int | str | None = "auto",
    rates: Sequence[str] | None = None,
    workdir: str | os.PathLike | None = None,
    sampling: dict[str, Any] | None = None,
    **settings: Any,
) -> AdaptiveCampaign:
    """Draws faults until the interval of every rate that is asked for is within the margin.

    The intervals are those of a confidence sequence (`_anytime.py`): they hold with their
    confidence although the stop depends on them.

    Args:
      apply_fn, params, images, labels: as in `run_campaign`; `settings` are its other arguments.
      key: of the order of the faults: the same key draws the same, however many are needed.
      margin: half width of every rate's interval, a fraction.
      relative: in place of the margin, half width as a share of the rate itself, for rare rates: of
        all that are asked for, or by their names, `{"critical": 0.2}`. A rate that has never
        occurred when the margin's fixed sample is spent is given up, with a warning that says what
        it is at most.
      t, confidence: how sure: a cut-off of the normal distribution, or such as 0.95; default
        t = 2.58, which the studies take for 99 %.
      first: faults before the first look.
      images_per_fault: m images for each fault, as in `run_campaign`; "auto", as many as give the
        narrowest interval for the arithmetic (docs/adaptive.md); None, all images.
      rates: those that must be within the margin, names in `jaxfi.outcomes.Rates` and of criteria.
        Default all; of sampled images without faulty_accuracy, most of whose variance is of the
        images, as without labels.
      workdir: keeps each stage; the same call there continues it.
      sampling: arguments of `sample_faults`: model, paths, bits, value.

    Raises as `run_campaign` and `sample_faults`.
    """
    checked_integer("first", first, 1)
    subject = _Subject(apply_fn, params, images, labels, key, workdir, sampling or {}, settings)
    t = checked_cutoff(t, confidence)
    num_sites = _num_sites(params, subject.sampling)
    enough = sample_size(fault_population(params), margin, t)

    def attempt(count: int | None, goals: Mapping[str, Goal], stages: _Stages) -> tuple:
        asked = list(goals)
        population = num_sites if count is None else FRESH

        def measure(num_faults: int) -> tuple[np.ndarray, np.ndarray]:
            faults = sample_faults(key, params, num_faults, by="network", **subject.sampling)
            campaign = stages.run(faults[stages.num_faults :])
            return _shares(campaign, asked), _shared(campaign, asked)

        looks = draw_until_kept(
            measure, population, list(goals.values()), t, first, num_sites, enough
        )
        names = subject.names
        every = [goals.get(rate, Goal(margin)) for rate in names]
        shares, shared = _shares(stages.campaign, names), _shared(stages.campaign, names)
        columns = zip(shares.T, every, shared, strict=True)
        return looks, [anytime_estimate(v, population, g, t, float(s)) for v, g, s in columns]

    return _until_kept(subject, images_per_fault, rates, margin, relative, t, attempt)


def run_stratified(
    apply_fn: ApplyFn,
    params: PyTree,
    images: Any,
    labels: Any,
    *,
    key: int | jax.Array = 0,
    margin: float = 0.01,
    relative: float | Mapping[str, float] | None = None,
    t: float | None = None,
    confidence: float | None = None,
    pilot: int = 1000,
    images_per_fault: int | str | None = "auto",
    rates: Sequence[str] | None = None,
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
      apply_fn, params, images, labels, key, margin, relative, t, confidence,
        images_per_fault, rates, workdir, sampling, settings: as in `run_sequential`.

    Raises as `run_campaign` and `sample_faults`.
    """
    checked_integer("pilot", pilot, 1)
    subject = _Subject(apply_fn, params, images, labels, key, workdir, sampling or {}, settings)
    t = checked_cutoff(t, confidence)
    strata, drawers = _layers_and_bits(key, params, subject.sampling, pilot)
    enough = sample_size(fault_population(params), margin, t)

    def attempt(count: int | None, goals: Mapping[str, Goal], stages: _Stages) -> tuple:
        asked = list(goals)
        belongs: list[np.ndarray] = []  # of each stage, the stratum of each fault

        def measure(counts: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
            before = np.bincount(np.concatenate([[], *belongs]).astype(int), minlength=len(counts))
            faults = functools.reduce(lambda a, b: a + b, (
                draw(int(stop))[start:]
                for draw, start, stop in zip(drawers, before, counts, strict=True) if stop > start
            ))  # fmt: skip
            belongs.append(np.repeat(np.arange(len(counts)), counts - before))
            campaign = stages.run(faults)
            shares = _by_stratum(_shares(campaign, asked), np.concatenate(belongs), len(counts))
            return shares, _shared(campaign, asked)

        sampled, wanted = count is not None, list(goals.values())
        looks = draw_strata_until_kept(measure, strata, wanted, t, pilot, sampled, enough)
        names, parts = subject.names, np.concatenate(belongs)
        shares = _by_stratum(_shares(stages.campaign, names), parts, len(drawers))
        shared = _shared(stages.campaign, names) if sampled else None
        return looks, stratified_estimates(strata, shares, looks, t, shared)

    return _until_kept(subject, images_per_fault, rates, margin, relative, t, attempt)


def _until_kept(
    subject: _Subject,
    images_per_fault: int | str | None,
    rates: Sequence[str] | None,
    margin: float,
    relative: float | Mapping[str, float] | None,
    t: float,
    attempt: Callable[[int | None, Mapping[str, Goal], _Stages], tuple[list, list[Estimate]]],
) -> AdaptiveCampaign:
    """The first attempt whose rates are as their goals ask; on all images that is the last one."""
    asked = _asked(rates, None if images_per_fault is None else 1, subject)
    goals = _goals(asked, margin, relative)
    for count, stages in _attempts(subject, images_per_fault, asked):
        looks, estimates = attempt(count, goals, stages)
        found = _rates(stages.campaign, dict(zip(subject.names, estimates, strict=True)), t)
        left = {name: goal for name, goal in goals.items() if not goal.is_kept(found[name])}
        if count is None or all(goal.is_hopeless(found[name]) for name, goal in left.items()):
            break
    for name in left:
        num_faults, num_images = stages.campaign.outcomes.shape
        warn(
            f"{name} did not occur in {num_faults:,} faults x {num_images:,} images: it is at most "
            f"{found[name].high:.2g}; what can be had of it is a margin, not a share of it"
        )
    halves = [
        goal.half(rate.value) or rate.high or margin
        for rate, goal in ((found[name], goal) for name, goal in goals.items())
    ]
    num_fixed = sample_size(fault_population(subject.params), min(*halves, 0.99), t)
    num_run = tuple(int(np.sum(look)) for look in looks)
    of_outcomes = Rates(*(found.pop(name) for name in Rates._fields))
    return AdaptiveCampaign(stages.campaign, of_outcomes, num_run, num_fixed, found)


def _goals(
    asked: Sequence[str], margin: float, relative: float | Mapping[str, float] | None
) -> dict[str, Goal]:
    """Of each rate asked for. Raises ValueError or TypeError naming what is allowed."""
    if relative is None:
        return dict.fromkeys(asked, Goal(margin))
    of_rate = relative if isinstance(relative, Mapping) else dict.fromkeys(asked, relative)
    for name, share in of_rate.items():
        if name not in asked:
            raise ValueError(f"relative names {name!r}: allowed are the rates {', '.join(asked)}")
        if not isinstance(share, int | float) or not 0 < share < math.inf:
            raise ValueError(f"relative is {share!r}: allowed are numbers above 0, 0.2 for a fifth")
    return {name: Goal(margin, of_rate.get(name)) for name in asked}


class _Subject(NamedTuple):
    """What is asked about: the arguments that both campaigns share."""

    apply_fn: ApplyFn
    params: PyTree
    images: Any
    labels: Any
    key: int | jax.Array
    workdir: str | os.PathLike | None
    sampling: dict[str, Any]
    settings: dict[str, Any]

    @property
    def num_images(self) -> int:
        return packed_shape(self.images)[0].shape[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the rates, and of the criteria that are no outcome."""
        own = self.settings.get("criteria") or {}
        return (*Rates._fields, *(name for name in own if name not in Rates._fields))

    def run(self, faults: FaultList, folder: str, seed: int, count: int | None) -> Campaign:
        """A campaign in a folder of its own, which draws images of its own."""
        settings = dict(self.settings)
        if seed:
            settings["seed"] = settings.get("seed", 0) + seed
        return run_campaign(
            self.apply_fn, self.params, faults, self.images, self.labels, images_per_fault=count,
            workdir=None if self.workdir is None else Path(self.workdir) / folder, **settings,
        )  # fmt: skip


class _Stages:
    """What ran so far, on m images of each fault (None: all)."""

    def __init__(self, subject: _Subject, count: int | None, folder: str):
        self._subject, self._count, self._folder = subject, count, folder
        self._done: list[Campaign] = []
        self.num_faults = 0

    def run(self, faults: FaultList) -> Campaign:
        """Runs these faults too; all that ran."""
        number = len(self._done)
        folder = f"{self._folder}stage-{number}"
        self._done.append(self._subject.run(faults, folder, number, self._count))
        self.num_faults += len(faults)
        self.campaign = _joined(self._done)
        return self.campaign


def _attempts(
    subject: _Subject, asked: int | str | None, rates: Sequence[str]
) -> Iterator[tuple[int | None, _Stages]]:
    """m, and where stages go; more images again and again where all faults on m of them did not do.
    Checks before any work."""
    num_images = subject.num_images
    if isinstance(asked, str):
        if asked != "auto":
            raise ValueError(f'images_per_fault is {asked!r}: allowed are "auto", None, integers')
        sees_all = "faulty_accuracy" in rates or num_images <= _PILOT_IMAGES
        count = None if sees_all else _best_images(subject, rates, num_images)
    else:
        count = asked
        if count is not None:
            check_images_per_fault(count, num_images)
    folder = ""
    while count is not None and count < num_images:
        yield count, _Stages(subject, count, folder)
        count *= 4
        folder = f"images-{min(count, num_images)}/"
    yield None, _Stages(subject, None, folder)


def _asked(
    rates: Iterable[str] | None, images_per_fault: int | None, subject: _Subject
) -> tuple[str, ...]:
    """The rates that must be within the margin; ValueError for one that does not exist."""
    allowed = subject.names
    if subject.labels is None:
        allowed = tuple(name for name in allowed if name != "faulty_accuracy")
    if rates is None:
        few = images_per_fault is not None
        return tuple(name for name in allowed if not few or name != "faulty_accuracy")
    names = [rates] if isinstance(rates, str) or not isinstance(rates, Iterable) else list(rates)
    if isinstance(rates, str) or not names or any(name not in allowed for name in names):
        raise ValueError(f"rates is {rates!r}: allowed are some of {', '.join(allowed)}")
    return tuple(map(str, names))


def best_images_per_fault(
    apply_fn: ApplyFn,
    params: PyTree,
    images: Any,
    labels: Any,
    *,
    key: int | jax.Array = 0,
    rates: Sequence[str] | None = None,
    workdir: str | os.PathLike | None = None,
    sampling: dict[str, Any] | None = None,
    **settings: Any,
) -> int:
    """The images_per_fault whose intervals are narrowest for the work, by a pilot.

    That is m = sqrt(W/V · cost of a fault / cost of a pair), at most 64, of the rate with the
    largest variance; V is that between faults and W that within one. The costs are the plan's
    arithmetic and not a clock's, so m is the same on every machine.

    Args:
      apply_fn, params, images, labels, key, rates, workdir, sampling, settings: as in
        `run_sequential`.

    Raises as `run_sequential`.
    """
    subject = _Subject(apply_fn, params, images, labels, key, workdir, sampling or {}, settings)
    return _best_images(subject, _asked(rates, 1, subject), subject.num_images)


def _best_images(subject: _Subject, rates: Sequence[str], num_images: int) -> int:
    """`best_images_per_fault`; no rate uses the pilot."""
    count = min(_PILOT_IMAGES, num_images)
    num_faults = min(_PILOT_FAULTS, _num_sites(subject.params, subject.sampling))
    key = nth_key(subject.key, _PILOT_KEY)
    faults = sample_faults(key, subject.params, num_faults, by="network", **subject.sampling)
    pilot = subject.run(faults, "stage-pilot", 0, count)
    between, within = max((_variances(pilot, rate) for rate in rates), key=sum)
    batch_size = min(subject.settings.get("batch_size", 100), num_images)
    costs = explain(subject.apply_fn, subject.params, subject.images, faults, batch_size=batch_size)
    of_fault = sum(cost.num_faults * cost.columns for cost in costs) * batch_size
    of_pair = sum(cost.num_faults * cost.suffix for cost in costs)
    best = math.sqrt(within * of_fault / (between * of_pair)) if of_pair else num_images
    return min(max(1, round(best)), _MOST_IMAGES, num_images)


def _variances(campaign: Campaign, rate: str) -> tuple[float, float]:
    """V between faults and W within one, of a pilot, which may have missed a little of each."""
    pairs = pairs_that_count(campaign.results, rate)
    num_faults, count = pairs.shape
    spread = float(pairs.var(axis=1, ddof=1).mean()) if count > 1 else 0.25
    within = (spread * num_faults + 0.25) / (num_faults + 1)
    between = (float(pairs.mean(axis=1).var()) * num_faults + 0.25) / (num_faults + 1)
    return max(between - within / count, between / count), within


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


def _num_sites(params: PyTree, sampling: dict[str, Any]) -> int:
    return sample_faults(0, params, 0, **sampling).population


def _shares(campaign: Campaign, rates: Sequence[str]) -> np.ndarray:
    """[F, rates], what each fault counts for each rate. Of sampled images, faulty accuracy is what
    the fault changes, -1 to 1, from 0 to 1: the clean accuracy is known of more images."""
    results = campaign.results
    shares = [per_fault_shares(results, rate) for rate in rates]
    if (seen := results.seen) is not None and "faulty_accuracy" in rates:
        clean = (seen.right == 1)[seen.images].mean(axis=1)
        column = list(rates).index("faulty_accuracy")
        shares[column] = (1 + shares[column] - clean) / 2
    return np.stack(shares, axis=1)


def _shared(campaign: Campaign, rates: Sequence[str]) -> np.ndarray:
    """[rates], the variance of what faults have in common that saw the same images."""
    results = campaign.results._replace(pairs_correct=None)  # a directory does not keep them
    if (seen := results.seen) is None:
        return np.zeros(len(rates))
    found = []
    for rate in rates:
        values = pairs_that_count(results, rate).astype(np.float64)
        if rate == "faulty_accuracy":
            values = (values - (seen.right == 1)[seen.images]) / 2
        found.append(parts_of_variance(values, seen).shared)
    return np.array(found)


def _rates(campaign: Campaign, estimates: dict[str, Estimate], t: float) -> dict[str, Estimate]:
    """The estimates of `_shares`, and faulty accuracy as what it is."""
    results = campaign.results
    if not results.labelled:
        return {**estimates, "faulty_accuracy": Estimate(math.nan, math.nan, math.nan)}
    if (seen := results.seen) is None:
        return estimates
    clean, variance = clean_accuracy(seen)
    change = estimates["faulty_accuracy"]
    value = min(max(float(clean + 2 * change.value - 1), 0.0), 1.0)
    half = math.hypot(change.high - change.low, t * math.sqrt(variance))
    low, high = max(value - half, 0.0), min(value + half, 1.0)
    return {**estimates, "faulty_accuracy": Estimate(value, low, high)}


def _by_stratum(shares: np.ndarray, belongs: np.ndarray, num_strata: int) -> list[np.ndarray]:
    return [shares[belongs == stratum] for stratum in range(num_strata)]


def _joined(stages: Sequence[Campaign]) -> Campaign:
    """One campaign of the faults of all stages, in their order."""
    first = stages[0]
    golden = jax.tree.map(np.copy, first.golden)
    images = [campaign.images for campaign in stages if campaign.images is not None]
    known = first.seen.copy()
    for campaign in stages[1:]:  # of sampled images each stage ran those that its faults saw
        new = campaign.seen & ~known
        for whole, part in zip(*map(jax.tree.leaves, (golden, campaign.golden)), strict=True):
            whole[new] = part[new]
        known |= new
    idle = sum(campaign.num_not_activated for campaign in stages)
    pairs = [c.pairs_correct for c in stages if c.pairs_correct is not None]
    return dataclasses.replace(
        first,
        faults=functools.reduce(lambda a, b: a + b, (campaign.faults for campaign in stages)),
        outcomes=np.concatenate([campaign.outcomes for campaign in stages]),
        due=np.concatenate([campaign.due for campaign in stages]),
        correct=np.concatenate([campaign.correct for campaign in stages]),
        pairs_correct=np.concatenate(pairs) if len(pairs) == len(stages) else None,
        criteria={
            name: np.concatenate([campaign.criteria[name] for campaign in stages])
            for name in first.criteria
        },
        golden=golden,
        images=None
        if first.images is None
        else np.concatenate([i for i in images if i is not None]),
        provenance={**first.provenance, "num_not_activated": idle},
    )
