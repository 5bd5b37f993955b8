"""The network as equations, and transforms of it that a campaign can run.

In: `apply_fn(params, images)`. Out: a `Network`, one flat jaxpr that knows where it may be cut and
which axis is the images'; or another `apply_fn`: with emulated arithmetic, with faults in what
neurons put out, on quantized words.
"""

from __future__ import annotations

from jaxfi.network._arithmetic import with_arithmetic
from jaxfi.network._graph import ApplyFn, Network, trace_network
from jaxfi.network._neurons import (
    inject_neurons,
    neuron_faults,
    neuron_outputs,
    with_neuron_words,
    with_random_values,
)
from jaxfi.network._quantization import dequantize, quantize, with_quantized_weights

__all__ = [
    "ApplyFn",
    "Network",
    "dequantize",
    "inject_neurons",
    "neuron_faults",
    "neuron_outputs",
    "quantize",
    "trace_network",
    "with_arithmetic",
    "with_neuron_words",
    "with_quantized_weights",
    "with_random_values",
]
