"""Campaigns as tables, figures and one HTML page.

In: `Campaign`s. Out: LaTeX, CSV and Markdown (`tables`), vector figures (`figures`, `coverage`),
an HTML file (`python -m jaxfi.report DIR`), and the training-strategies study's tables and figures
(`study`, `python -m jaxfi.report.study DIR`).
"""

from __future__ import annotations

from jaxfi.data._extras import extra

with extra("report"):
    from jaxfi.report._by_arithmetic import masked_beyond, masked_by_arithmetic
    from jaxfi.report._census import criticality_figure, most_critical, write_census
    from jaxfi.report._heatmap import heat_map
    from jaxfi.report._html import write_report

__all__ = [
    "criticality_figure",
    "heat_map",
    "masked_beyond",
    "masked_by_arithmetic",
    "most_critical",
    "write_census",
    "write_report",
]
