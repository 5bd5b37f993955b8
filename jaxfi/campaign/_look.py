"""The first look at a campaign or a fault list: a few lines of text, or a few of HTML."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from jaxfi.campaign._parts import RateTable, in_percent

if TYPE_CHECKING:
    from jaxfi.campaign._result import Campaign

# From light to dark, so that print without colours keeps them apart.
_COLOURS = {"masked": "#dfe6ec", "non_critical": "#7fa8c9", "critical": "#7a1020"}
_TITLES = {"masked": "masked", "non_critical": "not critical", "critical": "critical"}


def lines_of(campaign: Campaign) -> list[str]:
    """Sizes, rates with intervals, accuracies, and how to go on."""
    num_faults, num_images = campaign.outcomes.shape
    rates = campaign.rates()
    return [
        f"Campaign: {num_faults:,} faults x {num_images:,} images"
        + (f" of {len(campaign.labels):,} each" if campaign.images is not None else ""),
        f"  masked {in_percent(rates.masked)}, not critical {in_percent(rates.non_critical)}, "
        f"critical {in_percent(rates.critical)} %" + _meaning(campaign),
        f"  DUE {in_percent(rates.due)} %"
        + (
            f"; accuracy {100 * campaign.clean_accuracy:.2f} % without faults, "
            f"{in_percent(rates.faulty_accuracy)} % with"
            if campaign.clean_accuracy >= 0
            else ""
        ),
        *(f"  {name} {in_percent(campaign.rate(name))} %" for name in campaign.criteria),
        "  go on: .rates(by='layer'), .rates(by='bit'), .to_pandas(), [rows]; intervals are 99 %",
    ]


def _meaning(campaign: Campaign) -> str:
    """What is critical, where it is not the argmax."""
    name = campaign.provenance.get("critical", "argmax")
    return "" if name == "argmax" else f" (by your criterion {name!r})"


def html_of(campaign: Campaign) -> str:
    """The same lines, and the outcomes by bit position as bars (inline SVG)."""
    text = html.escape("\n".join(lines_of(campaign)))
    bars = _bars(campaign.rates(by="bit"))
    return f"<div><pre>{text}</pre>{bars}</div>"


def _bars(parts: RateTable) -> str:
    """A stacked bar for each bit position, most significant first."""
    width, height, left = 14, 90, 4
    shapes = []
    for number, part in enumerate(parts):
        top = 0.0
        for name, colour in _COLOURS.items():
            share = getattr(part, name).value * height
            shapes.append(
                f'<rect x="{left + number * width}" y="{height - top - share:.2f}" '
                f'width="{width - 2}" height="{share:.2f}" fill="{colour}">'
                f"<title>bit {html.escape(part.name)}: {100 * getattr(part, name).value:.2f} % "
                f"{_TITLES[name]}</title></rect>"
            )
            top += share
        if number % 4 == 0:
            middle = left + number * width + width / 2 - 1
            shapes.append(
                f'<text x="{middle}" y="{height + 11}" font-size="9" text-anchor="middle" '
                f'fill="currentColor">{html.escape(part.name)}</text>'
            )
    key = " ".join(
        f'<span style="background:{colour};padding:0 .6em;border:1px solid #888">&nbsp;</span> '
        f"{_TITLES[name]}"
        for name, colour in _COLOURS.items()
    )
    size = f'width="{2 * left + len(parts) * width}" height="{height + 14}"'
    return f'<svg {size} role="img">{"".join(shapes)}</svg><div>by bit position: {key}</div>'
