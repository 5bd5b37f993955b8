"""A campaign's memory: what the plan says before it starts, against what the process takes."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

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
