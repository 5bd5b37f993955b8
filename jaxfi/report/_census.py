"""A census as files: one row a weight, the weights that matter most, and how few they are."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxfi.campaign._counts import CampaignCounts, by_element, cells_of
from jaxfi.data._extras import extra
from jaxfi.data._files import write_whole
from jaxfi.faults._layers import layers_of
from jaxfi.faults._transforms import PyTree, word_bits
from jaxfi.report._page import literal
from jaxfi.report._style import TEXT_WIDTH, print_style

_POINTS = 400  # of a curve
_COUNTED = ("masked", "critical", "due")


@dataclasses.dataclass(frozen=True)
class SoftWeight:
    """A weight and what its faults did.

    Attributes:
      path, index: of the element.
      value: of the parameter.
      critical, masked, due: shares of its (fault, image) pairs.
      bits: bit positions that were critical on any image, the worst first.
    """

    path: str
    index: tuple[int, ...]
    value: float
    critical: float
    masked: float
    due: float
    bits: tuple[int, ...]


def write_census(campaign: CampaignCounts, params: PyTree, path: str | os.PathLike) -> None:
    """Writes one row a weight to a Parquet file, whole or not at all.

    Columns: path, element (flat index), value, and masked, critical, due: of each bit position,
    least significant first, the images with that outcome; null where the bit was not injected. The
    metadata's `jaxfi.images` says how many images each fault saw.

    Args:
      campaign: of faults that name a bit, each at most once.
      params: the campaign's parameters, for `value`.
    """
    with extra("store"):
        import pyarrow as pa
        import pyarrow.parquet as pq

    faults, tables = campaign.faults, []
    if (cells_of(campaign).faults.bit < 0).any():
        raise ValueError("faults are of whole words: allowed are those that name a bit")
    for leaf, array in enumerate(jax.tree.leaves(params)):
        size, width = array.size, word_bits(faults.dtypes[leaf])
        cells, there = {}, None
        for name in _COUNTED:
            totals, numbers = by_element(faults, getattr(campaign, name), leaf, by_bit=True)
            if numbers.max(initial=0) > 1:
                raise ValueError("a bit has several faults: allowed is one, of one model")
            there = numbers.astype(bool)
            kind = getattr(campaign, name).dtype
            values = pa.array(totals.astype(kind).ravel(), mask=~there.ravel())
            cells[name] = pa.FixedSizeListArray.from_arrays(values, width)
        assert there is not None
        columns = {
            "path": pa.DictionaryArray.from_arrays(
                np.full(size, leaf, np.int32), list(faults.paths)
            ),
            "element": np.arange(size),
            "value": np.asarray(array).reshape(-1).astype(np.float64),
            **{name: cell.cast(pa.list_(cell.type.value_type)) for name, cell in cells.items()},
        }
        tables.append(pa.table(columns).filter(pa.array(there.any(axis=1))))
    table = pa.concat_tables(tables, promote_options="permissive")
    table = table.replace_schema_metadata({"jaxfi.images": str(campaign.num_images)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=2**17)
    write_whole(Path(path), buffer.getvalue())


def most_critical(campaign: CampaignCounts, params: PyTree, count: int = 100) -> list[SoftWeight]:
    """The `count` weights whose faults are critical most often, the worst first; of equal ones, the
    first."""
    found: list[tuple[float, int, int]] = []
    for leaf, (totals, numbers) in enumerate(_of_leaves(campaign, "critical")):
        with np.errstate(invalid="ignore"):
            share = np.nan_to_num(totals / numbers / campaign.num_images, nan=-1.0)
        order = np.argsort(-share, kind="stable")[:count]
        found += [(-float(share[e]), leaf, int(e)) for e in order if numbers[e]]
    chosen = sorted(found)[:count]
    return [_soft_weight(campaign, params, leaf, element) for _, leaf, element in chosen]


def _of_leaves(campaign: CampaignCounts, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Sums of a count by element, and numbers of faults, of each leaf."""
    for leaf in range(len(campaign.faults.paths)):
        yield by_element(campaign.faults, getattr(campaign, name), leaf, by_bit=False)


def _soft_weight(campaign: CampaignCounts, params: PyTree, leaf: int, element: int) -> SoftWeight:
    faults = campaign.faults
    rows = _rows_of_element(campaign, leaf, element)
    bits, critical = faults[rows].bit, campaign.critical[rows]
    worst = np.argsort(-critical.astype(np.int64), kind="stable")
    shares = [float(getattr(campaign, n)[rows].mean() / campaign.num_images) for n in _COUNTED]
    return SoftWeight(
        faults.paths[leaf],
        tuple(map(int, np.unravel_index(element, faults.shapes[leaf] or (1,)))),
        float(np.asarray(jax.tree.leaves(params)[leaf]).reshape(-1)[element]),
        shares[1],
        shares[0],
        shares[2],
        tuple(int(bits[n]) for n in worst if critical[n]),
    )


def _rows_of_element(campaign: CampaignCounts, leaf: int, element: int) -> np.ndarray:
    faults = campaign.faults
    if (rule := getattr(faults, "rows_of_element", None)) is not None:
        return rule(leaf, element)
    return np.flatnonzero((faults.leaf == leaf) & (faults.element == element))


def criticality_figure(campaign: CampaignCounts) -> Figure:
    """Two panels: how often a fault in a weight is critical, its weights by rank, for each layer;
    and the share of all critical pairs that lie in the most critical weights of the network.

    Both have logarithmic axes of weights: who protects a few of them sees what that is worth.
    """
    names = layers_of(campaign.faults.paths)
    shares: dict[str, list[np.ndarray]] = {}
    for name, (totals, numbers) in zip(names, _of_leaves(campaign, "critical"), strict=True):
        there = numbers > 0
        share = totals[there] / numbers[there] / campaign.num_images
        shares.setdefault(name, []).append(share)
    of_layers = {name: np.sort(np.concatenate(s))[::-1] for name, s in shares.items()}
    of_layers = {name: share for name, share in of_layers.items() if share.size}
    with print_style():
        figure = Figure(figsize=(TEXT_WIDTH, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        greys = np.linspace(0.0, 0.72, max(len(of_layers), 2))
        for number, (name, share) in enumerate(of_layers.items()):
            rank = _ranks(len(share))
            style: Any = {"linestyle": ("-", "--", ":", "-.")[number % 4], "linewidth": 1.2}
            color = _shade(greys[number])
            left.plot(rank, 100 * share[rank - 1], label=literal(name), color=color, **style)
        left.set(xscale="log", xlabel="Weight of the layer, by rank", ylim=(0, None))
        left.set_ylabel("Critical share of a weight's pairs (%)")
        left.set_title("Criticality by layer", loc="left")
        if len(of_layers) <= 12:
            left.legend(fontsize=7, ncols=1 + (len(of_layers) > 6))
        _draw_concentration(right, np.sort(np.concatenate(list(of_layers.values())))[::-1])
        return figure


def _shade(grey: float) -> tuple[float, float, float]:
    """From dark red to light: print without colours keeps the order."""
    return (0.55 + 0.42 * grey, 0.05 + 0.9 * grey, 0.12 + 0.8 * grey)


def _ranks(count: int) -> np.ndarray:
    return np.unique(np.geomspace(1, count, _POINTS).astype(np.int64))


def _draw_concentration(axes: Axes, share: np.ndarray) -> None:
    total = share.sum()
    rank = _ranks(len(share))
    if total:
        held = 100 * np.cumsum(share)[rank - 1] / total
        axes.plot(100 * rank / len(share), held, color="#8c2330", linewidth=1.4)
    axes.set(xscale="log", ylim=(0, 100), xlabel="Most critical weights of the network (%)")
    axes.set_ylabel("Of all critical pairs (%)")
    axes.set_title("Concentration", loc="left")
