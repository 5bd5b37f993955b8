"""Peers that flip one weight bit at a time: plain PyTorch, PyTorchFI, MRFI, behind one signature.

`tool(model, forward)` returns a function from a fault to the faulty logits, or None for a fault
that the tool cannot inject. It leaves the network as it was. `forward(model)` runs all images.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

Logits = np.ndarray  # [N, classes] float32
INPUT_SHAPE = (3, 32, 32)


class TorchFault(NamedTuple):
    """A bit-flip in PyTorch's names: module, flat index and indices in its weight, bit."""

    module: str
    element: int
    indices: tuple[int, ...]
    bit: int


def plain_pytorch(model: torch.nn.Module, forward: Callable) -> Callable:
    """Flips the bit in place, runs the network, flips it back."""
    modules = dict(model.named_modules())

    def faulty(fault: TorchFault) -> Logits:
        words = modules[fault.module].weight.detach().view(torch.int32).view(-1)
        mask = int(np.uint32(1 << fault.bit).view(np.int32))
        words[fault.element] ^= mask
        outputs = forward(model)
        words[fault.element] ^= mask
        return outputs

    return faulty


def pytorchfi(model: torch.nn.Module, forward: Callable) -> Callable:
    """`declare_weight_fi` copies the model for each fault. It indexes four axes: convolutions."""
    from pytorchfi.core import fault_injection

    names = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)]
    injector = fault_injection(model, 1, [3, 32, 32], [torch.nn.Conv2d])

    def faulty(fault: TorchFault) -> Logits | None:
        if fault.module not in names:
            return None
        k, *rest = ([axis] for axis in fault.indices)
        corrupted = injector.declare_weight_fi(
            function=lambda weight, index: flip_bit(weight[index], fault.bit),
            layer_num=[names.index(fault.module)], k=k, dim1=rest[0], dim2=rest[1], dim3=rest[2],
        )  # fmt: skip
        return forward(corrupted)

    return faulty


def flip_bit(value: torch.Tensor, bit: int) -> torch.Tensor:
    """A scalar float32 with one bit of its word flipped."""
    word = value.detach().clone().view(torch.int32) ^ int(np.uint32(1 << bit).view(np.int32))
    return word.view(torch.float32)


def mrfi(model: torch.nn.Module, forward: Callable) -> Callable:
    """One injector for every layer, of which one is enabled at a time."""
    import mrfi as package

    injector = {
        "type": "weight", "name": ["weight"], "enabled": False,
        "selector": {"method": "FixPosition", "position": 0},
        "error_mode": {"method": "FloatFixedBitFlip", "bit": 0},
        "module_type": ["Conv2d", "Linear"],
    }  # fmt: skip
    wrapped = package.MRFI(model, package.EasyConfig({"faultinject": [injector]}))

    def faulty(fault: TorchFault) -> Logits:
        (config,) = wrapped.get_weights_configs(module_fullname=fault.module)
        config["selector"]["args"]["position"] = fault.element
        config["error_mode"]["args"]["bit"] = fault.bit
        config["enabled"] = True
        outputs = forward(wrapped)
        # MRFI restores a weight only in the next run of an *enabled* injector: disabling it now
        # would leave the fault in the network for good, and faults would pile up.
        with wrapped.golden_run():
            wrapped(torch.zeros(1, *INPUT_SHAPE))
        config["enabled"] = False
        return outputs

    return faulty


TOOLS = {"PyTorch": plain_pytorch, "PyTorchFI": pytorchfi, "MRFI": mrfi}


def installed_tools() -> dict[str, Callable]:
    """The tools whose packages are here."""
    return {
        name: tool
        for name, tool in TOOLS.items()
        if name == "PyTorch" or importlib.util.find_spec(name.lower())
    }
