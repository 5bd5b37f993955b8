"""Rates from some images of each fault: faults are drawn first, then images of each.

With p_f the share of fault f's m images that did something, the mean over faults has the variance

    (1 - F/N_f) S² / F  +  (F/N_f) (1 - m/N) W / (F m)  +  E B

(Cochran, Sampling Techniques, 1977, 10.13-10.15), where S² is the variance of the p_f, W that
within a fault, N_f and N are the possible faults and the images. The last term is of what faults
share that saw the same images (docs/sampled.md): B is the variance of images, of all faults of a
leaf alike, and E how much more the sample leans on some images than independent draws would.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Seen(NamedTuple):
    """Which images faults saw.

    Attributes:
      images: [F, m] numbers of images.
      right: [N] int8, 1 where the fault-free prediction is the label, 0 where it is not, -1 where
        no fault of the campaign saw the image.
      group: [F] integers, the leaf of each fault.
    """

    images: np.ndarray
    right: np.ndarray
    group: np.ndarray

    def of_faults(self, rows: np.ndarray) -> Seen:
        return Seen(self.images[rows], self.right, self.group[rows])


class Parts(NamedTuple):
    """Parts of a variance, in units of the squared values.

    Attributes:
      within: W / m, of a fault's mean, of the images that it could have seen instead.
      shared: E B.
    """

    within: float
    shared: float


def parts_of_variance(values: np.ndarray, seen: Seen) -> Parts:
    """Of values [F, m], one for each fault and image.

    Where faults have one image each, nothing shows how images of one fault differ: `within` is
    then the variance of all values, which is more.
    """
    values = np.asarray(values, np.float64)
    count = values.shape[1]
    spread = np.var(values, axis=1, ddof=1).mean() if count > 1 else float(np.var(values))
    within = (1 - count / len(seen.right)) * float(spread) / count
    return Parts(within, _leaning(seen) * _variance_of_images(values, seen))


def _leaning(seen: Seen) -> float:
    """E: how much more the weights of images vary than they do where each fault draws by itself."""
    num_pairs, num_images = seen.images.size, len(seen.right)
    weights = np.bincount(seen.images.ravel(), minlength=num_images) / num_pairs
    alone = (1 - seen.images.shape[1] / num_images) / num_pairs
    return max(float(np.square(weights - 1 / num_images).sum()) - alone, 0.0)


def _variance_of_images(values: np.ndarray, seen: Seen) -> float:
    """B: between images, by an analysis of variance within each leaf."""
    num_images = len(seen.right)
    _, group = np.unique(seen.group, return_inverse=True)
    cell = (group[:, None].astype(np.int64) * num_images + seen.images).ravel()
    _, cell, counts = np.unique(cell, return_inverse=True, return_counts=True)
    flat = values.ravel()
    leaf = np.repeat(group, values.shape[1])
    centred = flat - (np.bincount(leaf, flat) / np.bincount(leaf))[leaf]
    sums = np.bincount(cell, centred)
    num_cells, num_pairs, num_leaves = len(counts), flat.size, int(group.max()) + 1
    of_leaf = np.zeros(num_cells, np.int64)
    of_leaf[cell] = leaf
    squares = np.bincount(of_leaf, counts.astype(float) ** 2) / np.bincount(of_leaf, counts)
    free_between, free_within = num_cells - num_leaves, num_pairs - num_cells
    if free_between <= 0 or free_within <= 0:
        return 0.0
    between = float((sums**2 / counts).sum())
    within = float(np.square(centred).sum()) - between
    pairs_an_image = (num_pairs - squares.sum()) / free_between
    excess = between / free_between - within / free_within
    return max(excess / pairs_an_image, 0.0) if pairs_an_image > 0 else 0.0


def clean_accuracy(seen: Seen) -> tuple[float, float]:
    """Share of the images that the campaign saw which the fault-free network gets right, and the
    variance of that as the share of all N images."""
    known = seen.right[seen.right >= 0]
    share, count = float(known.mean()), len(known)
    spread = (share * (1 - share) * count + 0.25) / count
    return share, (1 - count / len(seen.right)) * spread / max(count - 1, 1)
