"""Campaigns as tables, figures and one HTML page.

In: `Campaign`s. Out: LaTeX, CSV and Markdown (`tables`), vector figures (`figures`, `coverage`),
an HTML file (`python -m jaxfi.report DIR`), and the training-strategies study's tables and figures
(`study`, `python -m jaxfi.report.study DIR`).
"""

from __future__ import annotations

from jaxfi.data._extras import extra

with extra("report"):
    from jaxfi.report._by_arithmetic import masked_beyond, masked_by_arithmetic
    from jaxfi.report._heatmap import heat_map
    from jaxfi.report._html import write_report
    from jaxfi.report._shares import layer_name, shares_by_bit, shares_by_layer

__all__ = [
    "heat_map",
    "layer_name",
    "masked_beyond",
    "masked_by_arithmetic",
    "shares_by_bit",
    "shares_by_layer",
    "write_report",
]
