"""Which test images show that the hardware is broken: small image sets that detect the faults.

An image detects a fault if the fault's outcome on it is one that the test looks for. Choosing the
fewest images that together detect every detectable fault is the set-cover problem: `cover` is the
greedy solution, `exact_cover_size` the optimum of small instances, to know the gap.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, sparse

from jaxfi.outcomes._outcomes import CRITICAL, MASKED

__all__ = [
    "DETECTS",
    "Cover",
    "Curve",
    "ExactCover",
    "cover",
    "coverage_curve",
    "exact_cover_size",
    "images_needed",
    "num_detectable",
    "rank_images",
]

DETECTS = ("observable", "critical")
_BLOCK_BYTES = 2**24  # of outcomes that are looked at in one go


class Cover(NamedTuple):
    """Images that together detect every detectable fault.

    Attributes:
      images: [k] int64, image indices in the order chosen.
      coverage: [k] float64, fraction of the detectable faults detected by the first 1, 2, ... k.
    """

    images: np.ndarray
    coverage: np.ndarray


class Curve(NamedTuple):
    """Coverage of images in random order, over many orders.

    Attributes:
      mean, low, high: [N] float64, fractions of the detectable faults detected after 1, 2, ... N
        images: the mean over the orders, and the coverage that 95 % and 5 % of them reach.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


class ExactCover(NamedTuple):
    """What is known of the smallest cover.

    Attributes:
      size: images in the smallest cover found.
      lower: no cover has fewer images; equal to `size` if that is proven to be the optimum.
      images: [size] int64, the cover, ascending.
    """

    size: int
    lower: int
    images: np.ndarray


def cover(outcomes: np.ndarray, detect: str = "observable") -> Cover:
    """Greedy set cover: each next image is the one that detects most of what is not yet detected.

    Its size is at most ln(d) + 1 times the optimum's, d the most faults that one image detects
    (Chvatal, Math. Oper. Res. 1979), and no k images detect more than 1/(1 - 1/e) times what its
    first k detect (Nemhauser et al., Math. Program. 1978). Among equals the lowest index is taken.

    Args:
      outcomes: [F, N] uint8, of F faults on N images.
      detect: "observable" takes a fault as detected where its output differs from golden (outcome
        1 or 2), "critical" where its argmax does (2).

    Faults that no image detects are left out; without any other, the cover is empty. Raises
    ValueError or TypeError for what is not a matrix of outcomes, or an unknown `detect`.

    >>> outcomes = np.array([[1, 0, 0], [2, 1, 0], [0, 1, 1], [0, 0, 0]], np.uint8)
    >>> cover(outcomes)
    Cover(images=array([0, 1]), coverage=array([0.66666667, 1.        ]))
    """
    bits = _pack_by_image(outcomes, detect)
    num_detectable = _count(np.bitwise_or.reduce(bits, axis=0))
    images, gains = _choose_greedily(bits, num_detectable)
    coverage = np.cumsum(gains) / max(num_detectable, 1)
    return Cover(np.array(images, np.int64), coverage.astype(np.float64))


def num_detectable(outcomes: np.ndarray, detect: str = "observable") -> int:
    """Faults that at least one of the images detects: what a coverage of 1 stands for.

    Arguments and errors as of `cover`.
    """
    return _count(np.bitwise_or.reduce(_pack_by_image(outcomes, detect), axis=0))


def rank_images(outcomes: np.ndarray, detect: str = "observable") -> tuple[np.ndarray, np.ndarray]:
    """All images by the faults that each detects alone, most first; equals by index.

    Arguments and errors as of `cover`.

    Returns:
      [N] int64 image indices, and [N] int64 faults that each of these detects.
    """
    detected = np.bitwise_count(_pack_by_image(outcomes, detect)).sum(axis=1, dtype=np.int64)
    order = np.argsort(-detected, kind="stable")
    return order, detected[order]


def coverage_curve(
    outcomes: np.ndarray, detect: str = "observable", *, num_orders: int = 100, seed: int = 0
) -> Curve:
    """Coverage of images in random order, what `cover` is to be compared with.

    Args:
      outcomes, detect: as of `cover`.
      num_orders: random permutations of the images to average over.
      seed: of the permutations.

    Raises ValueError as `cover`, for no orders, and where no fault is detectable.
    """
    if num_orders < 1:
        raise ValueError(f"num_orders is {num_orders}: allowed are integers >= 1")
    bits = _pack_by_image(outcomes, detect)
    detectable = _count(np.bitwise_or.reduce(bits, axis=0))
    if detectable == 0:
        raise ValueError(f"no curve: no image detects a fault (detect={detect!r})")
    random = np.random.default_rng(seed)
    detected = np.empty((num_orders, len(bits)), np.int64)
    for row in detected:
        known = np.bitwise_or.accumulate(bits[random.permutation(len(bits))], axis=0)
        np.bitwise_count(known).sum(axis=1, dtype=np.int64, out=row)
    low, high = np.quantile(detected, (0.05, 0.95), axis=0, method="inverted_cdf")
    return Curve(detected.mean(axis=0) / detectable, low / detectable, high / detectable)


def images_needed(
    coverage: Cover | np.ndarray, fractions: Sequence[float] = (0.9, 0.99, 1.0)
) -> tuple[int | None, ...]:
    """How many images, in their order, detect these fractions of the detectable faults.

    Args:
      coverage: a `Cover`, or [k] ascending coverage after 1, 2, ... k images, as in `Curve`.
      fractions: from 0 to 1.

    Returns:
      For each fraction the number of images: 0 if nothing is detectable, None if a coverage
      that was given as an array does not reach it. Raises ValueError for another fraction.

    >>> images_needed(np.array([0.5, 0.9, 1.0]))
    (2, 3, 3)
    """
    for fraction in fractions:
        if not 0 <= fraction <= 1:
            raise ValueError(f"cannot reach a coverage of {fraction}: allowed are 0 to 1")
    if isinstance(coverage, Cover) and len(coverage.images) == 0:
        return (0,) * len(fractions)
    reached = coverage.coverage if isinstance(coverage, Cover) else np.asarray(coverage)
    needed = [int(np.searchsorted(reached, f)) + 1 if f else 0 for f in fractions]
    return tuple(number if number <= len(reached) else None for number in needed)


def exact_cover_size(
    outcomes: np.ndarray, detect: str = "observable", *, time_limit: float = 60.0
) -> ExactCover:
    """The smallest image set that detects every detectable fault, by integer programming (HiGHS).

    The time may grow exponentially. At the time limit the best cover so far and a bound are
    returned, so `lower < size`.

    Args:
      outcomes, detect: as of `cover`.
      time_limit: seconds.

    Raises ValueError as `cover`, and for a time limit that is not positive.
    """
    if not time_limit > 0:
        raise ValueError(f"time_limit is {time_limit}: allowed are seconds > 0")
    greedy = cover(outcomes, detect).images
    if len(greedy) <= 1:
        return ExactCover(len(greedy), len(greedy), greedy)
    detects = _hardest_faults(outcomes, detect)
    solution = optimize.milp(
        np.ones(detects.shape[1]),
        integrality=1,
        bounds=optimize.Bounds(0, 1),
        constraints=optimize.LinearConstraint(sparse.csr_array(detects, dtype=float), lb=1),
        options={"time_limit": float(time_limit)},
    )
    return _checked_solution(solution, detects, greedy)


def _checked_solution(
    solution: optimize.OptimizeResult, detects: np.ndarray, greedy: np.ndarray
) -> ExactCover:
    """The solver's cover if it is one and not larger than the greedy one, with the proven bound."""
    images = np.sort(greedy)
    if solution.x is not None:
        found = np.flatnonzero(np.round(solution.x))
        if detects[:, found].any(axis=1).all() and len(found) <= len(images):
            images = found
    bound = solution.mip_dual_bound
    known = bound is not None and math.isfinite(bound)
    # The bound is a float sum: 6.0000001 must not prove 7.
    lower = max(2, math.ceil(bound - 1e-6)) if known else 2
    return ExactCover(len(images), min(lower, len(images)), images)


def _choose_greedily(bits: np.ndarray, num_detectable: int) -> tuple[list[int], list[int]]:
    """Images in greedy order and what each adds, from [N, words] detected faults.

    Lazy evaluation (Minoux 1978): what an image adds only shrinks, so an old number is a bound,
    and only images whose bound is the highest are counted again.
    """
    missing = np.bitwise_or.reduce(bits, axis=0)
    alone = np.bitwise_count(bits).sum(axis=1, dtype=np.int64)
    bounds = [(-int(gain), image) for image, gain in enumerate(alone) if gain]
    heapq.heapify(bounds)
    images, gains = [], []
    while num_detectable:
        image = bounds[0][1]
        gain = _count(bits[image] & missing)
        if -gain != bounds[0][0]:
            heapq.heapreplace(bounds, (-gain, image))
            continue
        heapq.heappop(bounds)
        missing &= ~bits[image]
        num_detectable -= gain
        images.append(image)
        gains.append(gain)
    return images, gains


def _pack_by_image(outcomes: np.ndarray, detect: str) -> np.ndarray:
    """[N, ceil(F / 64)] uint64: the faults that each image detects, a bit a fault."""
    outcomes = _checked_outcomes(outcomes, detect)
    num_faults, num_images = outcomes.shape
    bits = np.zeros((num_images, -(-num_faults // 64) * 8), np.uint8)
    step = max(64, _BLOCK_BYTES // num_images // 64 * 64)  # whole words of 64 faults
    for start in range(0, num_faults, step):
        block = _detected(outcomes[start : start + step], detect)
        packed = np.packbits(block, axis=0).T
        bits[:, start // 8 : start // 8 + packed.shape[1]] = packed
    return bits.view(np.uint64)


def _hardest_faults(outcomes: np.ndarray, detect: str) -> np.ndarray:
    """[R, N] bool: the detectable faults, less those that are detected with some other one kept.

    A fault that all images of another fault detect needs no constraint of its own. Most faults of
    a campaign are such, which is what brings real campaigns into the solver's reach.
    """
    detects = _detected(_checked_outcomes(outcomes, detect), detect)
    padded = np.pad(detects, ((0, 0), (0, -detects.shape[1] % 64)))
    words = np.ascontiguousarray(np.packbits(padded, axis=1)).view(np.uint64)
    words, first = np.unique(words, axis=0, return_index=True)
    fewest_first = np.argsort(np.bitwise_count(words).sum(axis=1, dtype=np.int64), kind="stable")
    kept = np.empty_like(words)
    rows: list[int] = []
    for row in fewest_first:
        implied = ~(kept[: len(rows)] & ~words[row]).any(axis=1)
        if words[row].any() and not implied.any():
            kept[len(rows)] = words[row]
            rows.append(first[row])
    return detects[rows]


def _detected(outcomes: np.ndarray, detect: str) -> np.ndarray:
    return outcomes == CRITICAL if detect == "critical" else outcomes != MASKED


def _checked_outcomes(outcomes: np.ndarray, detect: str) -> np.ndarray:
    if detect not in DETECTS:
        raise ValueError(f"detect is {detect!r}: allowed are {', '.join(DETECTS)}")
    outcomes = np.asarray(outcomes)
    if outcomes.dtype != np.uint8:
        raise TypeError(f"outcomes are {outcomes.dtype}: allowed is uint8")
    if outcomes.ndim != 2 or 0 in outcomes.shape:
        raise ValueError(f"outcomes have shape {outcomes.shape}: allowed is [F, N], F and N > 0")
    if outcomes.max() > CRITICAL:
        raise ValueError(f"outcomes hold {outcomes.max()}: allowed are 0, 1, 2")
    return outcomes


def _count(words: np.ndarray) -> int:
    return int(np.bitwise_count(words).sum(dtype=np.int64))
