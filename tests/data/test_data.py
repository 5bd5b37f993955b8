"""The data sets: shapes, splits, cache, and answers where they are missing."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from jaxfi.data import _datasets as data
from jaxfi.data import load_dataset, normalise


def loaded(name: str) -> data.Dataset:
    try:
        return load_dataset(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_digits_are_all_there_once():
    digits = load_dataset("digits")
    assert digits.train_images.shape == (1297, 32, 32, 1)
    assert digits.test_images.shape == (500, 32, 32, 1)
    assert digits.train_images.dtype == np.uint8
    labels = np.concatenate([digits.train_labels, digits.test_labels])
    assert labels.dtype == np.int32
    assert (np.bincount(labels) == np.bincount(load_digits().target)).all()
    shares = np.bincount(digits.test_labels) / 500 - np.bincount(digits.train_labels) / 1297
    assert abs(shares).max() < 0.01  # stratified
    assert "1797" in digits.note


def test_digits_are_the_same_every_time():
    first, second = load_dataset("digits"), load_dataset("digits")
    np.testing.assert_array_equal(first.test_images, second.test_images)


def test_digits_at_their_own_size_are_the_scans():
    digits = load_dataset("digits", input_size=8)
    images = np.concatenate([digits.train_images, digits.test_images])[..., 0]
    scans = np.round(load_digits().images * 255 / 16)
    assert sorted(map(bytes, images)) == sorted(map(bytes, scans.astype(np.uint8)))


@pytest.mark.parametrize("name, train, channels", [("mnist", 60_000, 1), ("cifar10", 50_000, 3)])
def test_tfds_sets(name, train, channels):
    images = loaded(name)
    assert images.train_images.shape == (train, 32, 32, channels)
    assert images.test_images.shape == (10_000, 32, 32, channels)
    assert set(images.test_labels) == set(range(10))
    assert images.note.startswith(name)


def test_mnist_statistics_are_the_published_ones():
    mnist = loaded("mnist")
    # Published for 28×28 pixels; resizing hardly moves the mean.
    assert mnist.train_images.mean() / 255 == pytest.approx(0.1307, abs=5e-4)
    assert mnist.mean == (0.1307,)
    assert mnist.std == (0.3081,)


def test_normalise_by_channel():
    images = np.array([[[[0, 51, 255]]]], np.uint8)
    result = normalise(images, (0.5, 0.2, 0.0), (0.5, 1.0, 2.0))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result.ravel(), [-1.0, 0.0, 0.5], atol=1e-7)


def test_cache_is_whole_or_ignored(tmp_path):
    arrays = {name: np.arange(5) for name in data._ARRAYS}
    path = tmp_path / "cache" / "images.npz"
    data._write_cache(path, arrays)
    assert [file.name for file in path.parent.iterdir()] == ["images.npz"]
    np.testing.assert_array_equal(data._read_cache(path)["test_labels"], np.arange(5))
    path.write_bytes(path.read_bytes()[:300])
    assert data._read_cache(path) is None
    assert data._read_cache(tmp_path / "absent.npz") is None


def test_unprepared_set_says_what_prepares_it(tmp_path):
    code = "from jaxfi.data import load_dataset; load_dataset('mnist')"
    environment = {"TFDS_DATA_DIR": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": "."}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("FileNotFoundError: dataset 'mnist' is not prepared")
    assert "tfds.data_source('mnist')" in last


def test_importing_costs_no_tfds():
    code = "import sys, jaxfi.data; sys.exit('tensorflow_datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("imagenet",), "dataset is 'imagenet'; allowed: digits, mnist, cifar10"),
        (("digits", 0), "input_size is 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(*arguments)
