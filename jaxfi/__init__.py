"""Fault injection and gradient regularization for JAX."""

from jaxfi.adaptive import AdaptiveCampaign, run_sequential, run_stratified
from jaxfi.arithmetic import with_arithmetic
from jaxfi.campaign import Campaign, NotReproducible, load_campaign, run_campaign
from jaxfi.cumulative import CumulativeResult, cumulative_accuracy, draw_trials
from jaxfi.explain import explain
from jaxfi.fault_list import FaultList
from jaxfi.faults import FAULT_MODELS, Fault, corrupt, inject, leaf_paths
from jaxfi.neurons import inject_neurons, neuron_faults, neuron_outputs, with_neuron_words
from jaxfi.outcomes import (
    CRITICAL,
    MASKED,
    NON_CRITICAL,
    Estimate,
    Rates,
    classify,
    paired_difference,
)
from jaxfi.quantization import quantize, with_quantized_weights
from jaxfi.sampling import exhaustive_faults, fault_population, sample_faults, sample_size

__all__ = [
    "CRITICAL",
    "FAULT_MODELS",
    "MASKED",
    "NON_CRITICAL",
    "AdaptiveCampaign",
    "Campaign",
    "CumulativeResult",
    "Estimate",
    "Fault",
    "FaultList",
    "NotReproducible",
    "Rates",
    "classify",
    "corrupt",
    "cumulative_accuracy",
    "draw_trials",
    "exhaustive_faults",
    "explain",
    "fault_population",
    "inject",
    "inject_neurons",
    "leaf_paths",
    "load_campaign",
    "neuron_faults",
    "neuron_outputs",
    "paired_difference",
    "quantize",
    "run_campaign",
    "run_sequential",
    "run_stratified",
    "sample_faults",
    "sample_size",
    "with_arithmetic",
    "with_neuron_words",
    "with_quantized_weights",
]
