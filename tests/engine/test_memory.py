"""A campaign's memory: what the plan says before it starts, against what the process takes."""

from __future__ import annotations

import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import lax

import jaxfi
from jaxfi.engine._programs import Programs

CAMPAIGN = """
import threading, time
import jax, numpy as np, jaxfi
from jaxfi.models import MODELS

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

module = MODELS["lenet"]()
images = np.random.default_rng(0).normal(size=(4000, 32, 32, 3)).astype(np.float32)
params = module.init(jax.random.key(0), images[:1])["params"]
faults = jaxfi.sample_faults(0, params, 300)
start = peak = resident()

def watch():
    global peak
    while True:
        peak = max(peak, resident())
        time.sleep(0.005)

threading.Thread(target=watch, daemon=True).start()
jaxfi.run_campaign(lambda p, x: module.apply({"params": p}, x), params, faults, images,
                   np.zeros(4000, int), batch_size=200, memory_budget=%d, progress=True)
print(peak - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("budget", [2**30, 2**31])
def test_peak_is_within_a_fifth_of_the_plan_and_of_the_budget(budget: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CAMPAIGN % budget], capture_output=True, text=True, check=True
    )
    planned = float(re.search(r"about ([\d,]+) MiB", done.stderr)[1].replace(",", ""))
    taken = float(done.stdout)
    assert taken == pytest.approx(planned, rel=0.2)
    assert taken < 1.2 * budget / 2**20


@pytest.mark.parametrize("count", [None, 5])
@pytest.mark.parametrize("num_images", [100, 300])
def test_one_batch_of_golden_values_is_held_where_no_more_fit(
    num_images, count, monkeypatch
) -> None:
    """Also of the batches that only check programs, and while the next one is computed."""

    def conv(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)

    def network(p, x):
        return conv(jax.nn.relu(conv(x, p["a"])), p["b"]).mean((1, 2)) @ p["d"]

    shapes = {"a": (3, 3, 2, 32), "b": (3, 3, 32, 2), "d": (2, 3)}
    generator = np.random.default_rng(0)
    params = {k: generator.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    images = generator.normal(size=(num_images, 24, 24, 2)).astype(np.float32)
    prefix, live = Programs._run_prefix, []

    def spy(*arguments):
        golden = jax.block_until_ready(prefix(*arguments))
        live.append(sum(array.nbytes for array in jax.live_arrays()))
        return golden

    monkeypatch.setattr(Programs, "_run_prefix", spy)
    before = sum(array.nbytes for array in jax.live_arrays())
    jaxfi.run_campaign(
        network, params, jaxfi.sample_faults(0, params, 60, by="network", paths="b"), images,
        np.zeros(num_images, int), memory_budget=8_500_000, images_per_fault=count,
    )  # fmt: skip
    one_batch = 100 * 24 * 24 * 32 * 4
    assert len(live) > 1
    assert max(live) - before < 1.5 * one_batch
