"""Which images each fault of a sampled campaign sees.

A rate needs few images of each fault (docs/sampled.md). Each fault's m are drawn without
replacement. Faults that follow each other in the parameters, a window, draw from the same batch of
images, which the engine then computes once for all of them; batches are of a random order of the
images, so each fault's sample is a simple random one, and what faults have in common by sharing a
batch is in the intervals. Windows take the batches in turn, by their sizes, and each draws from
random numbers of its own: the images of some faults are known without drawing those of all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import numpy as np

from jaxfi.faults import FaultList
from jaxfi.faults._sampling import ExhaustiveFaults, generator_of

_LEAST_WINDOWS, _MOST_WINDOWS = 4, 16
_MOST_SEEN = 1600  # images: as many windows of small batches as see them
# Of an exhaustive list; faults, and windows of a leaf that is neither small nor large.
_SMALLEST_WINDOW, _LARGEST_WINDOW, _WINDOWS_OF_A_LEAF = 2**7, 2**16, 64
_LARGEST_DRAW = 2**22  # images of a window's faults
_GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it spread evenly over the circle, however many


class Sample:
    """The images of each fault of a list, of N.

    The same on every machine, of the number of faults, their leaves, N images and a seed.

    Args:
      faults: F faults.
      num_images: N.
      images_per_fault: m, from 1 to N.
      batch_size: B images.
      seed: of the draws.
      in_order: the batches hold the images in their own order, as they must where a network mixes
        the images of a batch.

    Attributes:
      order: [N] images in the order of the campaign's batches.
      count: m.
      edges: [windows + 1] where windows begin and end, in the order of the leaves.
    """

    def __init__(
        self,
        faults: FaultList,
        num_images: int,
        images_per_fault: int,
        batch_size: int,
        seed: int,
        *,
        in_order: bool = False,
    ):
        self.order = np.arange(num_images)
        if not in_order:
            self.order = np.random.Generator(generator_of(seed)).permutation(num_images)
        self.count, self._batch_size, self._seed = images_per_fault, batch_size, seed
        self._num_faults = len(faults)
        self._start = np.random.Generator(generator_of(seed, 0)).random()
        self._place = None  # of each fault in the order of the leaves; as they stand
        if isinstance(faults, ExhaustiveFaults):
            self.edges = _windows_of_leaves(faults.counts_by_leaf(), images_per_fault)
        else:
            by_leaf = np.argsort(faults.leaf, kind="stable")
            self._place = np.empty_like(by_leaf)
            self._place[by_leaf] = np.arange(len(faults))
            most = max(_MOST_WINDOWS, _MOST_SEEN // batch_size)
            wanted = min(max(len(faults) // (2 * batch_size) + 1, _LEAST_WINDOWS), most)
            self.edges = np.arange(wanted + 1) * len(faults) // wanted
        self._drawn = functools.lru_cache(maxsize=4)(self._draw)

    def of(self, rows: np.ndarray) -> np.ndarray:
        """[k, m] int32, places in `order` of the images of the faults at `rows` [k], rising."""
        place = rows if self._place is None else self._place[rows]
        window = np.searchsorted(self.edges, place, side="right") - 1
        places = np.empty((len(rows), self.count), np.int32)
        for number in np.unique(window).tolist():
            here = window == number
            places[here] = self._drawn(number)[place[here] - self.edges[number]]
        return places

    @functools.cached_property
    def places(self) -> np.ndarray:
        """`of` all faults, [F, m]."""
        return self.of(np.arange(self._num_faults))

    @property
    def images(self) -> np.ndarray:
        """[F, m] int32, each fault's images."""
        return self.order[self.places].astype(np.int32)

    def batches(self) -> list[int]:
        """The numbers of those that any fault may see."""
        windows = range(len(self.edges) - 1)
        return sorted({number for window in windows for number in self._batches_of(window)})

    def seen(self) -> np.ndarray:
        """[N] bool: images of those batches."""
        seen = np.empty(len(self.order), bool)
        seen[self.order] = np.isin(np.arange(len(seen)) // self._batch_size, self.batches())
        return seen

    def batches_of_a_fault(self) -> float:
        """How many hold its images, on average, about."""
        windows = np.unique(np.linspace(0, len(self.edges) - 2, 8).astype(np.int64))
        some = [self._drawn(window)[:200] // self._batch_size for window in windows.tolist()]
        numbers = np.sort(np.concatenate(some), axis=1)
        return 1 + float(np.mean(np.count_nonzero(np.diff(numbers, axis=1), axis=1)))

    def weights(self, first: int, last: int) -> np.ndarray:
        """[N] share of the pairs that each place in `order` is expected to have, of the faults from
        `first` to `last` in the order of the leaves."""
        weights = np.zeros(len(self.order))
        inside = np.clip(self.edges, first, last)
        for window in np.flatnonzero(np.diff(inside)).tolist():
            there = self._images_of(window)
            weights[there] += (inside[window + 1] - inside[window]) / len(there) / (last - first)
        return weights

    def _batches_of(self, window: int) -> Iterator[int]:
        """Enough of them for m images."""
        num_images, found = len(self.order), 0
        place = int((self._start + window * _GOLDEN) % 1 * num_images)
        number = place // self._batch_size
        while found < self.count:
            yield number
            found += min(self._batch_size, num_images - number * self._batch_size)
            number = (number + 1) % -(-num_images // self._batch_size)

    def _images_of(self, window: int) -> np.ndarray:
        """Places in `order`, rising, of the images that a window draws from."""
        size, batches = self._batch_size, sorted(self._batches_of(window))
        every = (np.arange(n * size, min((n + 1) * size, len(self.order))) for n in batches)
        return np.concatenate(list(every))

    def _draw(self, window: int) -> np.ndarray:
        random = np.random.Generator(generator_of(self._seed, 1, window))
        there = self._images_of(window)
        num_faults = int(self.edges[window + 1] - self.edges[window])
        return there[_draw_each(random, len(there), num_faults, self.count)].astype(np.int32)


def _windows_of_leaves(counts: np.ndarray, images_per_fault: int) -> np.ndarray:
    """Edges of windows of an exhaustive list: of each leaf so many that its faults see many images
    together, whose rates are asked for too."""
    edges, first = [np.zeros(1, np.int64)], 0
    largest = min(_LARGEST_WINDOW, max(1, _LARGEST_DRAW // images_per_fault))
    for count in counts.tolist():
        wanted = max(min(count // _SMALLEST_WINDOW, _WINDOWS_OF_A_LEAF), count // largest)
        wanted = max(wanted, min(count, _LEAST_WINDOWS))
        if count:
            edges.append(first + np.arange(1, wanted + 1) * count // wanted)
        first += count
    return np.concatenate(edges)


def _draw_each(
    random: np.random.Generator, num_images: int, num_faults: int, count: int
) -> np.ndarray:
    """[F, count] of `range(num_images)`, each row without replacement, rising."""
    if count == num_images:
        return np.tile(np.arange(num_images), (num_faults, 1))
    if count**2 <= num_images:  # Floyd's way: a number that is there already stands for the last
        chosen = np.full((num_faults, count), -1)
        for column in range(count):
            last = num_images - count + column
            number = random.integers(0, last, num_faults, endpoint=True)
            repeated = (chosen[:, :column] == number[:, None]).any(axis=1)
            chosen[:, column] = np.where(repeated, last, number)
        return np.sort(chosen, axis=1)
    chosen = np.empty((num_faults, count), np.int64)
    step = max(1, 2**22 // num_images)
    for start in range(0, num_faults, step):
        some = slice(start, start + step)
        keys = random.random((len(chosen[some]), num_images))
        chosen[some] = np.argpartition(keys, count - 1, axis=1)[:, :count]
    return np.sort(chosen, axis=1)


def reordered(batches: np.ndarray, order: np.ndarray) -> np.ndarray:
    """[num_batches, B, ...] images in another order; the last batch is filled up with the first."""
    flat = batches.reshape(-1, *batches.shape[2:])
    fill = np.full(len(flat) - len(order), order[0])
    return flat[np.concatenate([order, fill])].reshape(batches.shape)
