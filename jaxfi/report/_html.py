"""A campaign, or several side by side, as one HTML file that needs nothing else.

It opens from disk with no network, and prints. All text that comes from files is escaped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from jaxfi.campaign._result import Campaign, load_campaign
from jaxfi.data._files import write_whole
from jaxfi.faults._transforms import FAULT_MODELS
from jaxfi.outcomes._outcomes import CRITICAL, NON_CRITICAL, Estimate, paired_difference
from jaxfi.report import coverage
from jaxfi.report._heatmap import heat_map
from jaxfi.report._page import document, escape, heading, literal, paragraph, picture, table
from jaxfi.report.figures import outcome_shares
from jaxfi.testset import DETECTS

REPORT_FILE = "report.html"
NUM_WORST = 20
_CAMPAIGN_FILE, _CONFIG_FILE = "campaign.json", "config.json"
_NOTHING = "–"
_RATES = ("masked", "non_critical", "critical", "due", "faulty_accuracy")


def write_report(directory: str | os.PathLike[str], time_limit: float = 10.0) -> Path:
    """Writes `directory`/report.html and returns its path.

    Args:
      directory: of one campaign (`run_campaign(..., workdir=directory)`), or the working
        directory of an experiment, with campaigns in `directory`/campaigns/NAME.
      time_limit: seconds to look for each smallest image set; 0 does not look.

    Raises FileNotFoundError if there is no campaign, ValueError if one is unfinished or damaged,
    OSError if the report cannot be written.
    """
    directory = Path(directory)
    folders, config = find_campaigns(directory), _read_config(directory)
    campaigns, values = {}, {}
    for folder_name, folder in folders.items():
        name = _network_name(folder_name, config)
        campaigns[name] = load_campaign(folder)
        values[name] = _read_values(folder, len(campaigns[name].faults))
    text = render(campaigns, values, config, time_limit)
    write_whole(directory / REPORT_FILE, text.encode())
    return directory / REPORT_FILE


def find_campaigns(directory: Path) -> dict[str, Path]:
    """The campaign directories at or below `directory`, by name; "default" is first.

    Raises FileNotFoundError if there is none.
    """
    if (directory / _CAMPAIGN_FILE).is_file():
        return {directory.resolve().name: directory}
    paths = sorted(directory.glob(f"campaigns/*/{_CAMPAIGN_FILE}"))
    found = {path.parent.name: path.parent for path in paths}
    if not found:
        raise FileNotFoundError(
            f"{directory} holds no campaign: neither {_CAMPAIGN_FILE} nor "
            f"campaigns/NAME/{_CAMPAIGN_FILE} is there"
        )
    return dict(sorted(found.items(), key=lambda item: item[0] != "default"))


def render(
    campaigns: Mapping[str, Campaign],
    values: Mapping[str, tuple[np.ndarray, np.ndarray]],
    config: Mapping[str, Any],
    time_limit: float = 10.0,
) -> str:
    """The report's text; the same campaigns give the same text.

    Args:
      campaigns: by the name to print.
      values: the parameters' values before and after each fault, two [F] arrays a campaign.
      config: the experiment's settings, to be printed; empty if there are none.
      time_limit: see `write_report`.
    """
    title = " · ".join(str(config[key]) for key in ("dataset", "model") if key in config)
    title = title or " · ".join(campaigns)
    sections = (
        _header(title, campaigns),
        _rates(campaigns),
        _heat_maps(campaigns),
        _coverage(campaigns, time_limit),
        _worst_faults(campaigns, values),
        _provenance(campaigns, config),
    )
    elements = (element for section in sections for element in section)
    return document(f"{title}: fault injection", elements)


def _header(title: str, campaigns: Mapping[str, Campaign]) -> Iterator[str]:
    sizes = dict.fromkeys(
        f"{len(c.faults):,} faults × {len(c.labels):,} images" for c in campaigns.values()
    )
    text = f"Fault-injection campaign, {'; '.join(sizes)}"
    if len(campaigns) > 1:
        text += f", {len(campaigns)} networks"
    yield f"<header><h1>{escape(title)}</h1>{paragraph(text)}</header>"


def _rates(campaigns: Mapping[str, Campaign]) -> Iterator[str]:
    """The table of rates, what changed between networks, and the bars."""
    yield heading("Outcomes")
    rows = []
    asked = list(dict.fromkeys(name for c in campaigns.values() for name in c.criteria))
    for name, campaign in campaigns.items():
        rates, clean = campaign.rates(), campaign.clean_accuracy
        estimates = [_interval(getattr(rates, rate)) for rate in _RATES]
        answers = [
            _interval(campaign.rate(one)) if one in campaign.criteria else _NOTHING for one in asked
        ]
        known = f"{100 * clean:.2f}" if clean >= 0 else _NOTHING
        rows.append([name, known, *estimates, *answers])
    headings = ["Network", "Clean accuracy", "Masked", "Not critical", "Critical", "DUE"]
    caption = "Percent of all (fault, image) pairs; below, the 99 % interval."
    if asked:
        caption += (
            f" Of the campaign's own criteria ({', '.join(asked)}), the pairs that meet them."
        )
    yield table([*headings, "Faulty accuracy", *asked], rows, caption=caption)
    yield from _differences(campaigns)
    yield picture(
        outcome_shares({literal(name): campaign for name, campaign in campaigns.items()}),
        "Masked: the output is bit-identical to the fault-free one. Not critical: it differs, the "
        "class does not. Critical: another class. A DUE, an output that holds NaN or Inf, is "
        "counted beside the three.",
    )


def _differences(campaigns: Mapping[str, Campaign]) -> Iterator[str]:
    """Of every other network to the first one, paired by fault; nothing where faults differ."""
    (first, before), *others = campaigns.items()
    for name, after in others:
        if before.faults == after.faults:
            changes = []
            for rate in ("masked", "critical"):
                value, low, high = (100 * x for x in paired_difference(before, after, rate))
                changes.append(f"{rate} {value:+.2f} [{low:+.2f}, {high:+.2f}]".replace("-", "−"))
            yield paragraph(f"{name} − {first}, paired by fault, in points: {'; '.join(changes)}.")


def _heat_maps(campaigns: Mapping[str, Campaign]) -> Iterator[str]:
    yield heading("Where faults matter")
    for name, campaign in campaigns.items():
        if len(campaigns) > 1:
            yield heading(name, 3)
        yield picture(
            heat_map(campaign),
            "Outcome shares by layer and bit position of the fault; bit 0 is the least "
            "significant. Hatched: no fault injected.",
        )


def _coverage(campaigns: Mapping[str, Campaign], time_limit: float) -> Iterator[str]:
    yield heading("Test images needed")
    measured = [
        coverage.measure_coverage(name, campaign.outcomes, detect, time_limit=time_limit)
        for name, campaign in campaigns.items()
        for detect in DETECTS
    ]
    yield picture(
        coverage.coverage_figure(measured),
        "Faults that the first images detect, of all injected. Marks: 90, 99 and 100 % of those "
        "that all images detect.",
    )
    rows = [coverage.coverage_cells(m) for m in measured]
    headings = [text.replace(" %", "\u00a0%") for text in coverage.HEADINGS]
    yield table(headings, rows, caption=coverage.caption(measured), num_text_columns=2)
    best = [[m.network, m.detect, ", ".join(map(str, m.cover.images[:16]))] for m in measured]
    headings = ["Network", "Faults", "Images in greedy order, by index: the first 16"]
    yield table(headings, best, num_text_columns=3)


def _worst_faults(
    campaigns: Mapping[str, Campaign], values: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> Iterator[str]:
    yield heading("Worst faults")
    headings = ["Parameter", "Index", "Fault", "Bit", "Value before", "Value after", "Critical",
                "Not critical", "DUE", "Correct"]  # fmt: skip
    for name, campaign in campaigns.items():
        if len(campaigns) > 1:
            yield heading(name, 3)
        rows = _worst(campaign)
        caption = (
            f"The {len(rows)} faults with most critical images, then DUEs, then not critical ones; "
            f"counts of {len(campaign.labels):,} images."
        )
        cells = _fault_rows(campaign, rows, *values[name])
        yield table(headings, cells, caption=caption, num_text_columns=3)


def _worst(campaign: Campaign) -> np.ndarray:
    """Rows of the worst faults that had any effect, the worst first."""
    critical, due, other = _counts(campaign)
    order = np.lexsort((-other, -due, -critical))[:NUM_WORST]
    return order[(critical + due + other)[order] > 0]


def _counts(campaign: Campaign) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[F] images whose outcome was critical, DUE, and not critical."""
    outcomes = campaign.outcomes
    critical = np.count_nonzero(outcomes == CRITICAL, axis=1)
    other = np.count_nonzero(outcomes == NON_CRITICAL, axis=1)
    return critical, campaign.num_due, other


def _fault_rows(
    campaign: Campaign, rows: np.ndarray, before: np.ndarray, after: np.ndarray
) -> Iterator[list[str]]:
    faults = campaign.faults[rows]
    critical, due, other = (counts[rows] for counts in _counts(campaign))
    for i, index in enumerate(faults.indices()):
        bit = str(faults.bit[i]) if faults.bit[i] >= 0 else "–"
        numbers = (critical[i], other[i], due[i], campaign.correct[rows[i]])
        where = [faults.paths[faults.leaf[i]], str(list(index)), FAULT_MODELS[faults.model[i]]]
        old, new = (f"{v[rows[i]]:.6g}".replace("-", "−") for v in (before, after))
        yield [*where, bit, old, new, *(f"{number:,}" for number in numbers)]


def _provenance(campaigns: Mapping[str, Campaign], config: Mapping[str, Any]) -> Iterator[str]:
    yield heading("Provenance")
    described = [dict(_flatten(campaign.provenance)) for campaign in campaigns.values()]
    keys = sorted(dict.fromkeys(key for one in described for key in one))
    rows = [[key, *(one.get(key, "–") for one in described)] for key in keys]
    columns = len(campaigns) + 1
    caption = "The campaign's fingerprint: what its results depend on."
    names = ["", *campaigns]
    yield table(names, rows, caption=caption, num_text_columns=columns, wrapped=True)
    if config:
        settings = (f"{name}={text}" for name, text in _flatten(config))
        yield paragraph(f"The experiment's settings: {', '.join(settings)}.")


def _interval(estimate: Estimate) -> str:
    value, low, high = (100 * fraction for fraction in estimate)
    if value != value:  # NaN: there are no labels
        return _NOTHING
    return f"{value:.2f}\n{low:.2f}–{high:.2f}"


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and texts of the leaves of nested dicts."""
    if isinstance(tree, Mapping) and tree:
        for name, branch in tree.items():
            yield from _flatten(branch, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, tree if isinstance(tree, str) else json.dumps(tree)


def _network_name(folder: str, config: Mapping[str, Any]) -> str:
    """A campaign folder's name, with what the experiment's settings say of it."""
    if folder not in ("default", "gradient") or "model" not in config:
        return folder
    alpha = f" (α={config.get('alpha')})" if folder == "gradient" else ""
    return f"{config['model']}, {folder} loss{alpha}"


def _read_config(directory: Path) -> dict[str, Any]:
    """The experiment's settings; empty if it left none. ValueError if they cannot be read."""
    path = directory / _CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a configuration: delete it and report again")
    return config


def _read_values(folder: Path, num_faults: int) -> tuple[np.ndarray, np.ndarray]:
    """The parameters' values before and after each fault, two [F] float64 arrays."""
    results = pq.read_table(folder / "results", columns=["row", "value_before", "value_after"])
    rows, *stored = (column.to_numpy() for column in results.columns)
    values = np.full((2, num_faults), np.nan)
    values[:, rows] = stored
    return values[0], values[1]
