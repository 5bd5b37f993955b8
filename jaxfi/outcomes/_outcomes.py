"""What a fault did to the output, and how often, with confidence intervals.

Outcome of one (fault, image) on the network's output vector: 0 masked, bit-identical to golden;
1 non-critical, differs with the same argmax; 2 critical (SDC-1), argmax differs. A faulty output
that holds NaN or Inf is a DUE as well, counted beside the three.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfi.faults import FaultList
from jaxfi.faults._cutoff import checked_cutoff
from jaxfi.faults._transforms import to_words
from jaxfi.outcomes._two_stage import Parts, Seen, clean_accuracy, parts_of_variance

MASKED, NON_CRITICAL, CRITICAL = 0, 1, 2
NAN_POLICIES = ("critical", "argmax")


class Estimate(NamedTuple):
    """A rate and its confidence interval (99 % where t is 2.58, the default), fractions."""

    value: float
    low: float
    high: float


class Rates(NamedTuple):
    """The rates of a campaign over all its (fault, image) pairs.

    Attributes:
      masked, non_critical, critical: the outcomes, which add up to 1.
      due: outputs with NaN or Inf, whatever the outcome.
      faulty_accuracy: predictions that are the label.
    """

    masked: Estimate
    non_critical: Estimate
    critical: Estimate
    due: Estimate
    faulty_accuracy: Estimate


class Results(NamedTuple):
    """What came of F faults on N images.

    Attributes:
      outcomes: [F, N] uint8, 0 masked, 1 non-critical, 2 critical.
      due: [F, N] bool, the faulty output holds NaN or Inf.
      correct: [F] int32, images whose faulty prediction is the label.
      pairs_correct: [F, N] bool, those images; None where only their number was kept.
      seen: of sampled pairs, the images: then arrays are [F, m], not [F, N].
      criteria: by the campaign's own criteria, [F, N] bool each, whether the pair meets it.
      labelled: whether there are labels, of which a prediction can be one.
    """

    outcomes: np.ndarray
    due: np.ndarray
    correct: np.ndarray
    pairs_correct: np.ndarray | None = None
    seen: Seen | None = None
    criteria: Mapping[str, np.ndarray] = MappingProxyType({})
    labelled: bool = True

    def of_faults(self, rows: Any) -> Results:
        """What came of the faults at `rows`: a slice, a mask or [k] integers."""
        pairs = None if self.pairs_correct is None else self.pairs_correct[rows]
        seen = None if self.seen is None else self.seen.of_faults(rows)
        criteria = {name: met[rows] for name, met in self.criteria.items()}
        parts = self.outcomes[rows], self.due[rows], self.correct[rows]
        return Results(*parts, pairs, seen, criteria, self.labelled)

    def repeated(self, num_faults: int) -> Results:
        """The one fault's results, for as many faults."""
        return self.of_faults(np.zeros(num_faults, np.int64))


class Verdict(NamedTuple):
    """What came of faulty outputs, arrays shaped like the batch.

    Attributes:
      outcome: uint8, `MASKED`, `NON_CRITICAL` or `CRITICAL`.
      due: bool, the faulty output holds NaN or Inf.
      correct: bool, the faulty prediction is the label.
    """

    outcome: jax.Array
    due: jax.Array
    correct: jax.Array


def checked_nan_policy(nan: str) -> str:
    """`nan` if it is a policy for NaN outputs; ValueError, listing those allowed, if not."""
    if nan not in NAN_POLICIES:
        raise ValueError(f"unknown nan policy {nan!r}: allowed are {', '.join(NAN_POLICIES)}")
    return nan


@functools.partial(jax.jit, static_argnames="nan")
def judge(golden: jax.Array, faulty: jax.Array, labels: jax.Array, nan: str) -> Verdict:
    """Classifies faulty outputs against golden ones. Pure, and compiled.

    Args:
      golden, faulty: [..., N, classes], equal float dtypes; they broadcast.
      labels: [..., N] integers; they broadcast too.
      nan: "critical" calls a changed output with a NaN critical and its prediction wrong;
        "argmax" takes it as argmax does (first NaN, so class 0 when all are), as published tools.
    """
    if golden.dtype != faulty.dtype:
        raise TypeError(f"golden outputs are {golden.dtype}, faulty ones {faulty.dtype}")
    if not jnp.issubdtype(golden.dtype, jnp.floating):
        raise TypeError(f"outputs are {golden.dtype}: allowed are floats")
    golden, faulty = jnp.broadcast_arrays(golden, faulty)
    same_bits = jnp.all(to_words(golden) == to_words(faulty), axis=-1)
    prediction = jnp.argmax(faulty, axis=-1)
    wrong = prediction != jnp.argmax(golden, axis=-1)
    correct = prediction == jnp.broadcast_to(labels, prediction.shape)
    if nan == "critical":
        any_nan = jnp.any(jnp.isnan(faulty), axis=-1)
        wrong, correct = wrong | any_nan, correct & ~any_nan
    changed = jnp.where(wrong, CRITICAL, NON_CRITICAL)
    outcome = jnp.where(same_bits, MASKED, changed).astype(jnp.uint8)
    return Verdict(outcome, ~jnp.all(jnp.isfinite(faulty), axis=-1), correct)


def classify(
    golden: jax.Array | np.ndarray, faulty: jax.Array | np.ndarray, nan: str = "critical"
) -> tuple[jax.Array, jax.Array]:
    """Outcome and DUE of each faulty output, in the outputs' own precision.

    Args:
      golden, faulty: [..., N, classes], equal float dtypes; they broadcast.
      nan: "critical" counts a changed output with a NaN as critical; "argmax" goes by the argmax.

    Returns:
      outcome [..., N] uint8 (0 masked, 1 non-critical, 2 critical) and due [..., N] bool.

    Raises TypeError for other dtypes, ValueError for another `nan`.

    >>> outcome, due = classify(jnp.array([[1.0, 2.0]]), jnp.array([[1.5, 2.0]]))
    >>> int(outcome[0]), bool(due[0])
    (1, False)
    """
    with _own_precision(golden, faulty):
        verdict = judge(golden, faulty, jnp.zeros((), jnp.int32), checked_nan_policy(nan))
    return verdict.outcome, verdict.due


def accuracy(outputs: np.ndarray, labels: np.ndarray, nan: str) -> float:
    """Share of outputs [N, classes] that predict their label; `nan` as in `judge`."""
    return float(np.mean(correct_predictions(outputs, labels, nan)))


def correct_predictions(outputs: np.ndarray, labels: np.ndarray, nan: str) -> np.ndarray:
    """[N] bool: outputs [N, classes] that predict their label; `nan` as in `judge`."""
    with _own_precision(outputs):
        return np.asarray(judge(outputs, outputs, labels, nan).correct)


def _own_precision(*outputs: Any) -> contextlib.AbstractContextManager:
    """NumPy's float64 reaches JAX whole, which would cut it to float32 by default."""
    wide = any(isinstance(array, np.ndarray) and array.dtype == np.float64 for array in outputs)
    return jax.enable_x64(True) if wide else contextlib.nullcontext()


def shares(outcomes: np.ndarray, outcome: int) -> np.ndarray:
    """Share of each fault's images with this outcome, [F] float64."""
    return np.mean(outcomes == outcome, axis=1)


def estimate_rate(
    per_fault: np.ndarray,
    num_images: int,
    population: float,
    t: float | None = None,
    *,
    confidence: float | None = None,
) -> Estimate:
    """Mean of per-fault shares, with an interval that takes each fault as one cluster.

    The images of one fault are not independent, so the interval is Wilson's at an effective
    sample size (Franco et al., J. Surv. Stat. Methodol. 2019): F / D / (1 - F/N), where D is the
    variance between faults over that of independent faults that do all or nothing, p(1-p), and
    1 - F/N corrects for the finite population. Where hardly any fault did anything its variance
    cannot be seen, so D counts t^2/2 faults more that did all and as many that did nothing, which
    is what Wilson's own centre adds. So no rate has an interval of no width; at 0 and 1 it is that
    of F independent trials, and it goes on from there without a jump as pairs are added.

    Args:
      per_fault: [F] shares in [0, 1].
      num_images: images per fault; caps the effective sample size at all pairs.
      population: N, possible faults; of a census, F = N, the interval has no width.
      t, confidence: of the interval, see `checked_cutoff`; default 99 %.

    Raises ValueError for no faults or no images.
    """
    t, num_faults = checked_cutoff(t, confidence), len(per_fault)
    if num_faults == 0 or num_images == 0:
        raise ValueError(f"no rate of {num_faults} faults x {num_images} images: both must be > 0")
    return _estimate(moments_of(per_fault), num_images, population, t)


class Moments(NamedTuple):
    """Sums of the shares [F] that faults count, each from 0 to 1, and of their squares."""

    num_faults: int
    total: float
    squares: float


def moments_of(per_fault: np.ndarray) -> Moments:
    """Of shares [F]."""
    return Moments(len(per_fault), float(np.sum(per_fault)), float(np.sum(np.square(per_fault))))


def _estimate(moments: Moments, num_images: int, population: float, t: float) -> Estimate:
    num_faults, mean = moments.num_faults, moments.total / moments.num_faults
    correction = max(1 - num_faults / population, 0.0)
    if correction == 0:
        return Estimate(mean, mean, mean)
    effect, _ = _design_effect(moments, t)
    return _wilson(mean, num_faults / min(max(effect, 1 / num_images), 1.0) / correction, t)


def _wilson(mean: float, size: float, t: float) -> Estimate:
    """Wilson's interval of a share of `size` independent trials."""
    size = float(size)
    center = (mean + t**2 / (2 * size)) / (1 + t**2 / size)
    spread = mean * (1 - mean)
    half = t * math.sqrt(spread / size + t**2 / (4 * size**2)) / (1 + t**2 / size)
    return Estimate(mean, min(max(center - half, 0.0), mean), max(min(center + half, 1.0), mean))


def _design_effect(moments: Moments, t: float) -> tuple[float, float]:
    """D of `estimate_rate`: 1 where each fault does all or nothing, less where they are alike; and
    the variance of those that do all or nothing."""
    all_or_nothing = t**2 / 2
    num_faults = moments.num_faults + 2 * all_or_nothing
    mean = (moments.total + all_or_nothing) / num_faults
    variance = (moments.squares + all_or_nothing) / num_faults - mean**2
    return variance / (mean * (1 - mean)), mean * (1 - mean)


def estimate_sampled_rate(values: np.ndarray, seen: Seen, population: float, t: float) -> Estimate:
    """`estimate_rate` where each fault saw m of N images, with the variance of `_two_stage`.

    Args:
      values: [F, m] bool, whether the pair counts.
      seen: its images.
      population: possible faults.
      t: cut-off.
    """
    moments, parts = moments_of(values.mean(axis=1)), parts_of_variance(values, seen)
    return _sampled_estimate(moments, parts, values.shape[1], len(seen.right), population, t)


def estimate_counted_rate(
    moments: Moments, count: int, num_images: int, leaning: float, population: float, t: float
) -> Estimate:
    """`estimate_rate` or `estimate_sampled_rate` where only numbers of images were kept.

    What faults share that saw the same images is then not known: taken is the most that it can be,
    since the variance of images for all faults alike is at most that for each. Of few images that
    agree that cannot be seen either: t^2 images more count, half of which do and half do not.

    Args:
      moments: of the faults' shares.
      count: m, images that each fault saw; `num_images`: N, of which.
      leaning: E of `_two_stage`.
      population, t: as in `estimate_sampled_rate`.
    """
    if count == num_images:
        return _estimate(moments, num_images, population, t)
    mean = moments.total / moments.num_faults
    spread = (moments.total - moments.squares) / moments.num_faults * count / max(count - 1, 1)
    spread = spread if count > 1 else mean * (1 - mean)
    seen = 1 / (leaning + 1 / num_images)  # images, as if each were seen as often
    images = (seen * spread + t**2 / 4) / (seen + t**2)
    parts = Parts((1 - count / num_images) * spread / count, leaning * images)
    return _sampled_estimate(moments, parts, count, num_images, population, t)


def _sampled_estimate(
    moments: Moments, parts: Parts, count: int, num_images: int, population: float, t: float
) -> Estimate:
    num_faults = moments.num_faults
    effect, all_or_nothing = _design_effect(moments, t)
    unseen = (1 - count / num_images) / count / 4  # of a fault that halves its images
    within = (num_faults * parts.within + t**2 * unseen) / (num_faults + t**2)
    correction = max(1 - num_faults / population, 0.0)
    between = min(max(effect, 1 / count), 1.0) * correction
    others = (1 - correction) * within + num_faults * parts.shared
    size = num_faults / (between + others / all_or_nothing)
    return _wilson(moments.total / num_faults, size, t)


def estimate_sampled_difference(
    values: np.ndarray, per_fault: np.ndarray, seen: Seen, population: float, t: float
) -> Estimate:
    """`estimate_difference` where each fault saw m of N images.

    Args:
      values: [F, m] differences of pairs, -1, 0 or 1.
      per_fault: [F] their means.
      seen, population, t: as in `estimate_sampled_rate`.
    """
    num_faults, parts = len(per_fault), parts_of_variance(values, seen)
    correction = max(1 - num_faults / population, 0.0)
    spread = (float(np.var(per_fault)) * num_faults + 1) / num_faults
    variance = (correction * spread + (1 - correction) * parts.within) / num_faults + parts.shared
    mean, half = float(per_fault.mean()), t * math.sqrt(variance)
    return Estimate(mean, max(mean - half, -1.0), min(mean + half, 1.0))


def rate_of(results: Results, rate: str, population: float, t: float) -> Estimate:
    """One of `Rates`, or of a criterion, of all pairs or of sampled ones."""
    if rate == "faulty_accuracy" and not results.labelled:
        return Estimate(math.nan, math.nan, math.nan)
    seen, per_fault = results.seen, per_fault_shares(results, rate)
    if seen is None:
        return estimate_rate(per_fault, results.outcomes.shape[1], population, t)
    if rate != "faulty_accuracy":
        return estimate_sampled_rate(pairs_that_count(results, rate), seen, population, t)
    # What faults change, added to what the network gets right without any: that is known of more
    # images, and has most of the variance.
    right = (seen.right == 1)[seen.images]
    gained = pairs_that_count(results, rate) - right.astype(np.int8)
    change = per_fault - right.mean(axis=1)
    changed = estimate_sampled_difference(gained, change, seen, population, t)
    clean, variance = clean_accuracy(seen)
    half = math.hypot(changed.high - changed.value, t * math.sqrt(variance))
    value = min(max(float(clean + changed.value), 0.0), 1.0)
    return Estimate(value, max(value - half, 0.0), min(value + half, 1.0))


def estimate_difference(
    before: np.ndarray,
    after: np.ndarray,
    population: float,
    t: float | None = None,
    *,
    confidence: float | None = None,
) -> Estimate:
    """Mean of `after - before` over faults that were injected into both, with its interval.

    The variance is that between faults, with one fault more that gained everything and one that
    lost everything, half a count each (after Agresti and Min, Statist. Med. 2005): so an interval
    has a width where no fault made a difference, and a thousand faults hardly notice.

    Args:
      before, after: [F] shares of the same fault list.
      population, t, confidence: as in `estimate_rate`.

    Raises ValueError for no faults or lists of two lengths.
    """
    if len(before) != len(after) or len(before) == 0:
        raise ValueError(
            f"cannot pair {len(before)} faults with {len(after)}: allowed is F = F > 0"
        )
    t = checked_cutoff(t, confidence)
    difference = np.asarray(after) - np.asarray(before)
    num_faults, mean = len(difference), float(np.mean(difference))
    correction = max(1 - num_faults / population, 0.0)
    variance = (float(np.var(difference)) * num_faults + 1) / num_faults
    half = t * math.sqrt(variance / num_faults * correction)
    return Estimate(mean, max(mean - half, -1.0), min(mean + half, 1.0))


def paired_difference(
    before: Any,
    after: Any,
    rate: str = "masked",
    t: float | None = None,
    *,
    confidence: float | None = None,
    population: int | None = None,
) -> Estimate:
    """How much a rate differs between two campaigns with the same faults, `after - before`.

    Args:
      before, after: campaigns (`jaxfi.Campaign`) of the same fault list.
      rate: "masked", "non_critical", "critical", "due" or "faulty_accuracy".
      t, confidence: of the interval, see `checked_cutoff`; default 99 %.
      population: possible faults; default those that the list was drawn from.

    Returns the mean over faults of the difference of their shares, a fraction, with the interval of
    `estimate_difference`, which has the source.

    Raises ValueError if the fault lists differ, for an unknown rate, or a population of fewer
    faults than the list.
    """
    if before.faults != after.faults:
        raise ValueError("the campaigns have different fault lists: a paired difference needs one")
    first, second = (per_fault_shares(campaign.results, rate) for campaign in (before, after))
    known = checked_population(population, before.faults)
    seen, others = before.results.seen, after.results.seen
    if seen is None and others is None:
        return estimate_difference(first, second, known, t, confidence=confidence)
    if seen is None or others is None or not np.array_equal(seen.images, others.images):
        raise ValueError(
            "the campaigns saw different images: a paired difference needs the same, as "
            "images_per_fault and the seed give them"
        )
    pairs = [pairs_that_count(one.results, rate).astype(np.int8) for one in (before, after)]
    t = checked_cutoff(t, confidence)
    return estimate_sampled_difference(pairs[1] - pairs[0], second - first, seen, known, t)


def checked_population(population: int | None, faults: FaultList) -> float:
    """Possible faults: those given, ValueError if they cannot hold the list; by default those that
    the list was drawn from, infinitely many if it repeats faults and so is longer."""
    if population is not None:
        if population < len(faults):
            raise ValueError(f"population {population} is less than the {len(faults)} faults")
        return population
    return faults.population if faults.population >= len(faults) else math.inf


def per_fault_shares(results: Results, rate: str) -> np.ndarray:
    """Share of each fault's images that count towards a rate, [F] float64."""
    if rate == "faulty_accuracy":
        return results.correct / results.outcomes.shape[1]
    return pairs_that_count(results, rate).mean(axis=1)


def pairs_that_count(results: Results, rate: str) -> np.ndarray:
    """[F, N] bool: the pairs that count towards a rate, [F, m] of sampled ones.

    Where only the number of correct predictions was kept, those of sampled pairs that the
    fault-free network gets wrong and a fault changes count as wrong.
    """
    codes = {"masked": MASKED, "non_critical": NON_CRITICAL, "critical": CRITICAL}
    if rate == "due":
        return results.due
    if rate == "faulty_accuracy":
        if results.pairs_correct is not None or results.seen is None:
            assert results.pairs_correct is not None
            return results.pairs_correct
        right = (results.seen.right == 1)[results.seen.images]
        return right & (results.outcomes != CRITICAL)
    if rate in results.criteria:
        return results.criteria[rate]
    if rate not in codes:
        allowed = ", ".join((*Rates._fields, *results.criteria))
        raise ValueError(f"unknown rate {rate!r}: allowed are {allowed}")
    return results.outcomes == codes[rate]
