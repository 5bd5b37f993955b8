"""Command-line experiments on top of the library. Flags live only here."""

import importlib.util
import sys

for _package in (
    "absl",
    "flax",
    "matplotlib",
    "optax",
    "pyarrow",
    "sklearn",
    "tensorflow_datasets",
):
    if _package not in sys.modules and importlib.util.find_spec(_package) is None:
        sys.exit(
            f"{_package} is not installed: pip install 'jax-fault-injection[experiments]' brings it"
        )
