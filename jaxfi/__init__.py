"""Fault injection and gradient regularization for JAX.

The campaign API is here at once; `jaxfi.models`, `jaxfi.training`, `jaxfi.convert`, `jaxfi.testset`
and `jaxfi.report` are imported when they are first touched, with what they need.
"""

from __future__ import annotations

import importlib
from typing import Any

from jaxfi import campaign, criteria, data, engine, faults, network, outcomes, patterns
from jaxfi.campaign import (
    AdaptiveCampaign,
    Campaign,
    CampaignCounts,
    CumulativeResult,
    NotReproducible,
    best_images_per_fault,
    criticality,
    cumulative_accuracy,
    draw_trials,
    load_campaign,
    run_campaign,
    run_sequential,
    run_stratified,
)
from jaxfi.engine import explain
from jaxfi.faults import (
    FAULT_MODELS,
    Fault,
    FaultList,
    corrupt,
    exhaustive_faults,
    fault_population,
    inject,
    leaf_paths,
    sample_faults,
    sample_size,
)
from jaxfi.network import (
    inject_neurons,
    neuron_faults,
    neuron_outputs,
    quantize,
    with_arithmetic,
    with_neuron_words,
    with_quantized_weights,
)
from jaxfi.outcomes import (
    CRITICAL,
    MASKED,
    NON_CRITICAL,
    Estimate,
    Rates,
    classify,
    paired_difference,
)

_LAZY = ("convert", "models", "report", "testset", "training")

__all__ = [
    "CRITICAL",
    "FAULT_MODELS",
    "MASKED",
    "NON_CRITICAL",
    "AdaptiveCampaign",
    "Campaign",
    "CampaignCounts",
    "CumulativeResult",
    "Estimate",
    "Fault",
    "FaultList",
    "NotReproducible",
    "Rates",
    "best_images_per_fault",
    "campaign",
    "classify",
    "corrupt",
    "criteria",
    "criticality",
    "cumulative_accuracy",
    "data",
    "draw_trials",
    "engine",
    "exhaustive_faults",
    "explain",
    "fault_population",
    "faults",
    "inject",
    "inject_neurons",
    "leaf_paths",
    "load_campaign",
    "network",
    "neuron_faults",
    "neuron_outputs",
    "outcomes",
    "paired_difference",
    "patterns",
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


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"jaxfi.{name}")
    raise AttributeError(f"module 'jaxfi' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
