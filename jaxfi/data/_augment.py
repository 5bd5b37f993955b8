"""Random affine augmentation inside the jitted step: rotation, shift, zoom and shear."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class AffineRanges(NamedTuple):
    """How far an image may move; each value is drawn uniformly from its range, for each image.

    The paper says "random affine" and gives no ranges; these defaults are ours, and modest.
    """

    rotation: float = 10.0
    """Degrees, from -rotation to rotation, about the centre."""
    translation: float = 0.1
    """Fraction of the image's height and width, in either direction."""
    scale: float = 0.1
    """Zoom from 1 - scale to 1 + scale."""
    shear: float = 5.0
    """Degrees, from -shear to shear, along the rows."""


def random_affine(key: jax.Array, images: jax.Array, ranges: AffineRanges) -> jax.Array:
    """Images `[B, H, W, C]` of floats, each under its own random affine map; same shape and dtype.

    Outside the image there is black (0), so augment raw pixels, before normalisation. Ranges of 0
    give the images back to the bit. Raises ValueError for a range that is negative or not sensible.
    """
    check_ranges(ranges)
    matrices = random_matrices(key, images.shape[0], ranges)
    shifts = _random_shifts(key, images.shape, ranges)
    return jax.vmap(affine)(images, matrices, shifts)


def check_ranges(ranges: AffineRanges) -> None:
    """Raises ValueError for a range that is negative, or beyond what an image can do."""
    limits = AffineRanges(rotation=180.0, translation=1.0, scale=0.99, shear=89.0)
    for name, value, limit in zip(ranges._fields, ranges, limits, strict=True):
        if not 0 <= value <= limit:
            raise ValueError(f"augmentation {name} is {value}; allowed: 0 to {limit}")


def random_matrices(key: jax.Array, num_images: int, ranges: AffineRanges) -> jax.Array:
    """`[B, 2, 2]` float32: how (row, column) about the centre of the result maps to the source."""
    rotation, scale, shear = (
        _uniform(jax.random.fold_in(key, index), (num_images,), limit)
        for index, limit in enumerate((ranges.rotation, ranges.scale, ranges.shear))
    )
    angle, zoom, slope = jnp.deg2rad(rotation), 1 + scale, jnp.tan(jnp.deg2rad(shear))
    cos, sin = jnp.cos(angle) / zoom, jnp.sin(angle) / zoom
    rows = [[cos, sin], [-sin + cos * slope, cos + sin * slope]]
    return jnp.moveaxis(jnp.array(rows), -1, 0)


def affine(image: jax.Array, matrix: jax.Array, shift: jax.Array) -> jax.Array:
    """Pixel p of the result: `image` at matrix @ (p - centre) + centre + shift, bilinear.

    `image` is `[H, W, C]`, `matrix` `[2, 2]`, `shift` `[2]` in pixels (row, column); outside is 0.
    As `scipy.ndimage.affine_transform(order=1, mode="grid-constant")`, each channel alone. dm-pix
    has this too, but gathers eight corners of a volume where channels need four of a plane.
    """
    height, width, _ = image.shape
    centre = jnp.array([(height - 1) / 2, (width - 1) / 2], matrix.dtype)
    row, column = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    offset = jnp.stack([row - centre[0], column - centre[1]], -1)
    # A few products of full precision: a matmul might run in TF32 on a GPU.
    source = [
        offset[..., 0] * line[0] + offset[..., 1] * line[1] + c + s
        for line, c, s in zip(matrix, centre, shift, strict=True)
    ]
    return _bilinear(image, source[0], source[1])


def _bilinear(image: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
    top, left = jnp.floor(row), jnp.floor(column)
    down, right = row - top, column - left
    result = jnp.zeros((), image.dtype)
    for i, row_weight in enumerate((1 - down, down)):
        for j, column_weight in enumerate((1 - right, right)):
            value = _pixel(image, top.astype(jnp.int32) + i, left.astype(jnp.int32) + j)
            weight = (row_weight * column_weight).astype(image.dtype)
            result = result + weight[..., None] * value
    return result


def _pixel(image: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
    height, width, channels = image.shape
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    flat = jnp.clip(row, 0, height - 1) * width + jnp.clip(column, 0, width - 1)
    value = jnp.take(image.reshape(-1, channels), flat, axis=0, mode="clip")
    return jnp.where(inside[..., None], value, jnp.zeros((), image.dtype))


def _random_shifts(key: jax.Array, shape: tuple[int, ...], ranges: AffineRanges) -> jax.Array:
    shift = _uniform(jax.random.fold_in(key, 3), (shape[0], 2), ranges.translation)
    return shift * jnp.array([[shape[1], shape[2]]], shift.dtype)


def _uniform(key: jax.Array, shape: tuple[int, ...], limit: float) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, -limit, limit) if limit else jnp.zeros(shape)
