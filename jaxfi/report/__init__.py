"""Campaigns as tables and figures: `jaxfi.report.tables`, `jaxfi.report.figures`."""
