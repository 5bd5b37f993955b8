"""The peers' adapters: every tool flips the same bit, and leaves the network as it was."""

from __future__ import annotations

import importlib.util

import jax
import numpy as np
import pytest
import torch

from experiments.benchmarks import peers
from experiments.benchmarks.peer_tools import TOOLS, TorchFault, installed_tools
from experiments.common.published_network import Subject
from jaxfi.faults import FaultList
from jaxfi.models import MODELS
from jaxfi.outcomes import NON_CRITICAL, classify
from tests.torch_models import TORCH_MODELS

FAULTS = [
    TorchFault("conv1", 3 * 27 + 9 + 2 * 3 + 1, (3, 1, 2, 1), 30),
    TorchFault("layer2.0.conv2", 5, (0, 0, 1, 2), 31),
    TorchFault("linear", 70, (1, 6), 26),
]


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_flips_the_bit_and_restores_it(name):
    if name not in installed_tools():
        pytest.skip(f"{name} is not installed")
    torch.manual_seed(0)
    model = TORCH_MODELS["resnet20"]().eval()
    images = torch.randn(4, 3, 32, 32)

    def forward(network):
        with torch.no_grad():
            return network(images).numpy()

    golden = forward(model)
    faulty = TOOLS[name](model, forward)
    for fault in FAULTS:
        outputs = faulty(fault)
        if outputs is None:
            assert name == "PyTorchFI"
            assert fault.module == "linear"
            continue
        np.testing.assert_array_equal(outputs, flipped_by_numpy(forward, fault))
    np.testing.assert_array_equal(forward(model), golden)


def flipped_by_numpy(forward, fault: TorchFault) -> np.ndarray:
    """The same network, made again, with the bit flipped by NumPy."""
    torch.manual_seed(0)
    model = TORCH_MODELS["resnet20"]().eval()
    words = model.get_submodule(fault.module).weight.detach().numpy().view(np.uint32)
    words[fault.indices] ^= np.uint32(1 << fault.bit)
    return forward(model)


def test_faults_are_named_as_pytorch_does():
    like = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    params = jax.eval_shape(MODELS["resnet20"]().init, jax.random.key(0), like)["params"]
    sites = [("conv1/kernel", (2, 1, 1, 3), 30), ("linear/kernel", (6, 1), 26)]
    found = peers.torch_faults(FaultList.from_sites(sites, params))
    assert found == [FAULTS[0], FAULTS[2]]


def test_outcomes_are_the_librarys():
    golden = np.array([[1, 2], [1, 2], [1, 2], [2, 1], [1, 2]], np.float32)
    faulty = np.array([[1, 2], [0, 2], [3, 2], [np.nan, np.nan], [np.nan, 0]], np.float32)
    outcome, change = peers.judge(golden, faulty)
    np.testing.assert_array_equal(outcome, classify(golden, faulty, "argmax")[0])
    assert change[:3].tolist() == [0, 0.5, 1]
    assert (peers.judge(golden, None)[0] == peers.UNSUPPORTED).all()


def test_peers_are_found_by_their_packages():
    for name in set(TOOLS) - {"PyTorch"}:
        assert (name in installed_tools()) == bool(importlib.util.find_spec(name.lower()))


def test_the_size_of_a_change_is_of_the_campaigns_arithmetic():
    """Plain `jax.jit` lets XLA's CPU library fuse ReLU and mean, and makes 0 of the NaN."""
    params = {"first": np.ones((1, 1, 1, 64), np.float32), "last": np.ones((64, 3), np.float32)}

    def apply(params, images):
        return jax.nn.relu(images * params["first"] + 1).mean((1, 2)) @ params["last"]

    images = np.zeros((4, 8, 8, 64), np.float32)  # times infinity, but for the first
    images[0] = 1
    subject = Subject(apply, params, images, np.zeros(4, np.int32), "made up")
    faults = FaultList.from_sites([("first", 5, 30)], params)  # 1 becomes infinity
    found = peers.run_jaxfi(subject, faults, size=2)
    assert np.isinf(found.change[0, 0])
    assert np.isnan(found.change[0, 1:]).all()
    assert (found.outcomes[0] == NON_CRITICAL).all()  # of NaN and of equals, argmax is class 0
