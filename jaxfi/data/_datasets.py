"""The data sets: `digits` comes with scikit-learn; `mnist` and `cifar10` are read through TFDS."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxfi.data._extras import extra
from jaxfi.data._files import user_cache

DATASETS = ("digits", "mnist", "cifar10")

_CHANNEL_STATISTICS = {
    "digits": ((0.5,), (0.5,)),
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
_DIGITS_TEST_IMAGES = 500
_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass(frozen=True)
class Dataset:
    """Images and labels on the host."""

    name: str
    train_images: np.ndarray
    """`[N, H, W, C] uint8`."""
    train_labels: np.ndarray
    """`[N] int32`."""
    test_images: np.ndarray
    """`[M, H, W, C] uint8`."""
    test_labels: np.ndarray
    """`[M] int32`."""
    mean: tuple[float, ...]
    """One a channel, of pixels scaled to [0, 1]."""
    std: tuple[float, ...]
    """One a channel, of pixels scaled to [0, 1]."""
    num_classes: int
    note: str
    """Where the images come from, in their source's own words: to be said beside any figure."""


def load_dataset(name: str, input_size: int = 32) -> Dataset:
    """The data set called `name`, one of DATASETS, its images `input_size` pixels square.

    Images of another size are resized bilinearly; decoded ones are kept in the user's cache folder
    (`$XDG_CACHE_HOME/jaxfi`), since decoding takes seconds. Raises ValueError for an unknown name
    or a size below 1, FileNotFoundError, with the command that prepares it, where TFDS lacks it.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset is {name!r}; allowed: {', '.join(DATASETS)}")
    if input_size < 1:
        raise ValueError(f"input_size is {input_size}; allowed: 1 pixel or more")
    arrays, note = _digits(input_size) if name == "digits" else _tfds(name, input_size)
    mean, std = _CHANNEL_STATISTICS[name]
    return Dataset(name=name, **arrays, mean=mean, std=std, num_classes=10, note=note)


def hold_out(dataset: Dataset, fraction: float) -> tuple[Dataset, tuple[np.ndarray, np.ndarray]]:
    """`dataset` without the last `fraction` of its training images, and those, with their labels.

    A fraction of 0 holds out nothing. Raises ValueError if nothing is left to train on.
    """
    total = len(dataset.train_labels)
    kept = total - round(fraction * total)
    if not 0 < kept <= total:
        raise ValueError(f"held_out is {fraction}; allowed: less than all {total} training images")
    rest = dataset.train_images[:kept], dataset.train_labels[:kept]
    held = dataset.train_images[kept:], dataset.train_labels[kept:]
    return replace(dataset, train_images=rest[0], train_labels=rest[1]), held


def normalise(images: Any, mean: Iterable[float], std: Iterable[float]) -> Any:
    """(images / 255 - mean) / std as float32, for `[..., C]` pixels from 0 to 255, NumPy or JAX.

    >>> normalise(np.array([[0], [255]], np.uint8), (0.5,), (0.5,)).tolist()
    [[-1.0], [1.0]]
    """
    shape = (1,) * (images.ndim - 1) + (-1,)
    mean, std = (np.asarray(list(v), np.float32).reshape(shape) for v in (mean, std))
    return (images.astype(np.float32) / np.float32(255) - mean) / std


def first_test_images(dataset: Dataset, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `num_images` test images, normalised, and their labels; 0 is all."""
    chosen = slice(num_images or None)
    images = normalise(dataset.test_images[chosen], dataset.mean, dataset.std)
    return images, dataset.test_labels[chosen]


def _digits(input_size: int) -> tuple[dict[str, np.ndarray], str]:
    with extra("data"):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

    scans = load_digits()
    pixels = np.round(scans.images * (255 / 16)).astype(np.uint8)  # they count from 0 to 16
    images = np.stack([_resize(image, input_size) for image in pixels])
    labels = scans.target.astype(np.int32)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=_DIGITS_TEST_IMAGES, stratify=labels, random_state=0
    )
    note = f"scikit-learn digits: {len(labels)} scans of 8x8 pixels"
    parts = (images[train], labels[train], images[test], labels[test])
    return dict(zip(_ARRAYS, parts, strict=True)), note


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    """`[H, W]` or `[H, W, C]` to `[size, size, C]`, bilinear."""
    with extra("data"):
        from PIL import Image

    image = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
    if image.shape[:2] != (size, size):
        resized = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)
        image = np.asarray(resized)
    return image.reshape(size, size, -1)


def _tfds(name: str, input_size: int) -> tuple[dict[str, np.ndarray], str]:
    builder = _prepared_builder(name)
    note = " ".join(f"{name} {builder.version}: {builder.info.description}".split())
    cache = _cache_path(builder, input_size)
    if (arrays := _read_cache(cache)) is None:
        source = builder.as_data_source(decoders=_no_decoding())
        train, test = (_decode(source[part], input_size) for part in ("train", "test"))
        arrays = dict(zip(_ARRAYS, (*train, *test), strict=True))
        _write_cache(cache, arrays)
    return arrays, note


def _prepared_builder(name: str) -> Any:
    """A builder over files that exist: `tfds.data_source` would start to download instead."""
    with extra("data"):
        import tensorflow_datasets as tfds

    command = f"python -c \"import tensorflow_datasets as tfds; tfds.data_source('{name}')\""
    try:
        builder = tfds.core.read_only_builder.builder_from_files(name)
        builder.as_data_source(split="test")
    except (tfds.core.DatasetNotFoundError, NotImplementedError, FileNotFoundError):
        raise FileNotFoundError(
            f"dataset {name!r} is not prepared for random access; prepare it with: {command}"
        ) from None
    return builder


def _no_decoding() -> dict[str, Any]:
    from tensorflow_datasets.core import decode

    return {"image": decode.SkipDecoding()}


def _decode(source: Any, input_size: int) -> tuple[np.ndarray, np.ndarray]:
    with extra("data"):
        from PIL import Image

    images, labels = [], []
    for start in range(0, len(source), 1000):
        for record in source.__getitems__(range(start, min(start + 1000, len(source)))):
            pixels = np.asarray(Image.open(io.BytesIO(record["image"])))
            images.append(_resize(pixels, input_size))
            labels.append(record["label"])
    return np.stack(images), np.asarray(labels, np.int32)


def _cache_path(builder: Any, input_size: int) -> Path:
    """Named by the records' names, sizes and times, so that other records are never mistaken."""
    files = sorted(Path(builder.data_path).iterdir())
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    fingerprint = hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]
    return user_cache() / f"{builder.name}-{input_size}-{fingerprint}.npz"


def _read_cache(path: Path) -> dict[str, np.ndarray] | None:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in _ARRAYS}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write_cache(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Best effort: a full or read-only disk is no reason to stop, decoding again costs seconds."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # its allow_pickle
        os.replace(file.name, path)
    except OSError:
        return
