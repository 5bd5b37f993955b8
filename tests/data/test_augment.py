"""Affine augmentation against scipy.ndimage."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxfi.data import AffineRanges, random_affine
from jaxfi.data._augment import affine, check_ranges, random_matrices


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, (3, 9, 12, 2)).astype(np.float32)


def test_zero_ranges_are_the_identity(images):
    still = AffineRanges(rotation=0.0, translation=0.0, scale=0.0, shear=0.0)
    moved = random_affine(jax.random.key(0), jnp.array(images), still)
    np.testing.assert_array_equal(moved, images)


@pytest.mark.parametrize("seed", range(5))
def test_affine_equals_scipy(images, seed):
    rng = np.random.default_rng(seed)
    matrix = (np.eye(2) + rng.uniform(-0.4, 0.4, (2, 2))).astype(np.float32)
    shift = rng.uniform(-3, 3, 2).astype(np.float32)
    ours = affine(jnp.array(images[0]), jnp.array(matrix), jnp.array(shift))
    centre = np.array([4.0, 5.5])
    for channel in range(2):
        expected = ndimage.affine_transform(
            images[0, ..., channel].astype(np.float64),
            matrix,
            centre - matrix @ centre + shift,
            order=1,
            mode="grid-constant",
        )
        np.testing.assert_allclose(ours[..., channel], expected, atol=2e-3)


def test_quarter_turn_is_exact():
    image = np.arange(16, dtype=np.float32).reshape(4, 4, 1)
    turned = affine(jnp.array(image), jnp.array([[0.0, 1.0], [-1.0, 0.0]]), jnp.zeros(2))
    np.testing.assert_array_equal(turned, np.rot90(image))


def test_matrices_stay_in_their_ranges():
    ranges = AffineRanges(rotation=20.0, translation=0.0, scale=0.3, shear=0.0)
    matrices = np.asarray(random_matrices(jax.random.key(1), 1000, ranges))
    zoom = 1 / np.sqrt(np.linalg.det(matrices))
    angle = np.degrees(np.arctan2(matrices[:, 0, 1], matrices[:, 0, 0]))
    assert 0.7 <= zoom.min() < 0.75
    assert 1.25 < zoom.max() <= 1.3
    assert -20 <= angle.min() < -18
    assert 18 < angle.max() <= 20


def test_shear_moves_along_the_rows_alone():
    ranges = AffineRanges(rotation=0.0, translation=0.0, scale=0.0, shear=30.0)
    matrices = np.asarray(random_matrices(jax.random.key(1), 1000, ranges))
    np.testing.assert_array_equal(matrices[:, 0], np.tile([1.0, 0.0], (1000, 1)))
    np.testing.assert_array_equal(matrices[:, 1, 1], 1.0)
    slope = np.degrees(np.arctan(matrices[:, 1, 0]))
    assert -30.001 <= slope.min() < -28
    assert 28 < slope.max() <= 30.001


def test_each_image_moves_by_itself_and_keys_decide(images):
    same = jnp.array(np.repeat(images[:1], 3, axis=0))
    moved = random_affine(jax.random.key(0), same, AffineRanges())
    assert (moved[0] != moved[1]).any()
    again = random_affine(jax.random.key(0), same, AffineRanges())
    np.testing.assert_array_equal(moved, again)


@pytest.mark.parametrize(
    "ranges, message",
    [
        (AffineRanges(rotation=-1.0), "rotation is -1.0; allowed: 0 to 180"),
        (AffineRanges(scale=1.0), "scale is 1.0; allowed: 0 to 0.99"),
        (AffineRanges(shear=float("nan")), "shear is nan"),
    ],
)
def test_ranges_out_of_range(ranges, message):
    with pytest.raises(ValueError, match=message):
        check_ranges(ranges)
