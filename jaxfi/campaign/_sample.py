"""Which images each fault of a sampled campaign sees.

A rate needs few images of each fault (docs/sampled.md). Each fault's m are drawn without
replacement. Faults that follow each other in the parameters draw from the same batch of images,
which the engine then computes once for all of them; batches are of a random order of the images,
so each fault's sample is a simple random one, and what faults have in common by sharing a batch is
in the intervals.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from jaxfi.faults import FaultList
from jaxfi.faults._sampling import generator_of

_LEAST_WINDOWS, _MOST_WINDOWS = 4, 16


class Sample(NamedTuple):
    """Of N images.

    Attributes:
      order: [N] images in the order of the campaign's batches.
      places: [F, m] int32, places in that order of each fault's images.
    """

    order: np.ndarray
    places: np.ndarray

    @property
    def images(self) -> np.ndarray:
        """[F, m] int32, each fault's images."""
        return self.order[self.places].astype(np.int32)

    def batches_of_a_fault(self, batch_size: int) -> float:
        """How many hold its images, on average."""
        numbers = np.sort(self.places // batch_size, axis=1)
        return 1 + float(np.mean(np.count_nonzero(np.diff(numbers, axis=1), axis=1)))

    def batches(self, batch_size: int) -> list[int]:
        """The numbers of those that any fault sees."""
        return np.unique(self.places // batch_size).tolist()


def draw_sample(
    faults: FaultList,
    num_images: int,
    images_per_fault: int,
    batch_size: int,
    seed: int,
    *,
    in_order: bool = False,
) -> Sample:
    """The same sample on every machine, of a list of F faults, N images and a seed.

    Args:
      faults: the whole list.
      num_images: N.
      images_per_fault: m, from 1 to N.
      batch_size: B images.
      seed: of the draws.
      in_order: the batches hold the images in their own order, as they must where a network mixes
        the images of a batch.
    """
    generator = np.random.Generator(generator_of(seed))
    order = np.arange(num_images) if in_order else generator.permutation(num_images)
    num_batches = -(-num_images // batch_size)
    first = generator.permutation(num_batches)
    by_leaf = np.argsort(faults.leaf, kind="stable")
    wanted = min(max(math.ceil(len(faults) / (2 * batch_size)), _LEAST_WINDOWS), _MOST_WINDOWS)
    places = np.empty((len(faults), images_per_fault), np.int32)
    next_batch = 0
    for rows in np.array_split(by_leaf, min(wanted, len(faults))):
        window: list[np.ndarray] = []
        while sum(map(len, window)) < images_per_fault:
            start = first[next_batch % num_batches] * batch_size
            window.append(np.arange(start, min(start + batch_size, num_images)))
            next_batch += 1
        there = np.concatenate(window)
        places[rows] = _draw_each(generator, there, len(rows), images_per_fault)
    return Sample(order, places)


def _draw_each(
    generator: np.random.Generator, there: np.ndarray, num_faults: int, count: int
) -> np.ndarray:
    """[F, count] of `there`, each row without replacement, in order."""
    if count == len(there):
        return np.tile(np.sort(there), (num_faults, 1))
    chosen = np.empty((num_faults, count), np.int64)
    step = max(1, 2**22 // len(there))
    for start in range(0, num_faults, step):
        some = slice(start, start + step)
        keys = generator.random((len(chosen[some]), len(there)))
        chosen[some] = np.argpartition(keys, count - 1, axis=1)[:, :count]
    return np.sort(there[chosen], axis=1)


def reordered(batches: np.ndarray, order: np.ndarray) -> np.ndarray:
    """[num_batches, B, ...] images in another order; the last batch is filled up with the first."""
    flat = batches.reshape(-1, *batches.shape[2:])
    fill = np.full(len(flat) - len(order), order[0])
    return flat[np.concatenate([order, fill])].reshape(batches.shape)
