"""Tables and figures against counts made by hand from synthetic outcomes."""

from __future__ import annotations

import csv
import dataclasses
import io
import re

import numpy as np
import pytest
from matplotlib import colors
from PIL import Image
from rich.console import Console

from jaxfi.campaign import Campaign
from jaxfi.campaign._parts import rates_by
from jaxfi.faults import FaultList, exhaustive_faults
from jaxfi.outcomes import Estimate
from jaxfi.report import _shares as shares
from jaxfi.report import figures, tables

ISSUE_COLUMNS = (
    "dataset,model,loss,optimizer,epochs,alpha,clean_acc,faulty_acc,masked,non_critical,critical,"
    "due,num_faults,num_images"
)
PARAMS = {
    "conv1": {"kernel": np.zeros((3, 3, 1, 4), np.float32), "bias": np.zeros(4, np.float32)},
    "dense": {"kernel": np.zeros((20, 10), np.float32)},
}


def make_campaign(seed: int = 0, num_faults: int = 96, num_images: int = 8) -> Campaign:
    """A campaign whose critical faults sit in high bits; every bit and leaf has faults."""
    random = np.random.default_rng(seed)
    bits = np.arange(num_faults) % 32
    leaf = np.arange(num_faults) % 3
    faults = FaultList.from_arrays(PARAMS, leaf, leaf, bits, "bit-flip")
    draw = random.random((num_faults, num_images))
    outcomes = np.where(draw < 0.6, 0, np.where((bits > 27)[:, None], 2, 1)).astype(np.uint8)
    labels = random.integers(0, 10, num_images).astype(np.int32)
    golden = np.eye(10, dtype=np.float32)[labels]
    golden[0] = np.roll(golden[0], 1)  # one golden prediction is wrong
    return Campaign(
        faults=faults,
        outcomes=outcomes,
        due=(outcomes == 2) & (draw > 0.9),
        correct=(outcomes != 2).sum(axis=1).astype(np.int32),
        golden=golden,
        labels=labels,
        provenance={"nan": "critical"},
    )


def make_row(campaign: Campaign, loss: str = "default", alpha: float = 0.0) -> tables.TableRow:
    return tables.table_row(
        campaign,
        dataset="digits",
        model="lenet",
        loss=loss,
        optimizer="adadelta",
        epochs=3,
        alpha=alpha,
    )


@pytest.fixture(scope="module")
def campaigns() -> dict[str, Campaign]:
    return {"LeNet, default": make_campaign(0), "LeNet, gradient (α=0.05)": make_campaign(1)}


@pytest.fixture(scope="module")
def rows(campaigns) -> list[tables.TableRow]:
    default, gradient = campaigns.values()
    return [make_row(default), make_row(gradient, "gradient", 0.05)]


DIFFERENCE = Estimate(-0.0123, -0.02, 0.001)
NOTE = "a_set 3.0: 100 % of [it], from a copy"


def test_csv_has_the_columns_of_the_contract_and_percentages(tmp_path, rows, campaigns):
    tables.write_csv(rows, tmp_path / "table.csv")
    text = (tmp_path / "table.csv").read_text()
    assert text.splitlines()[0] == ISSUE_COLUMNS
    for row, campaign in zip(csv.DictReader(io.StringIO(text)), campaigns.values(), strict=True):
        for name, outcome in (("masked", 0), ("non_critical", 1), ("critical", 2)):
            expected = 100 * np.count_nonzero(campaign.outcomes == outcome) / (96 * 8)
            assert float(row[name]) == pytest.approx(expected, abs=1e-6)
        assert float(row["due"]) == pytest.approx(100 * campaign.due.sum() / (96 * 8), abs=1e-6)
        assert float(row["clean_acc"]) == pytest.approx(100 * 7 / 8)
        expected = 100 * campaign.correct.sum() / (96 * 8)
        assert float(row["faulty_acc"]) == pytest.approx(expected, abs=1e-6)
        assert (row["num_faults"], row["num_images"]) == ("96", "8")


def test_markdown_latex_and_terminal_show_the_same_numbers(tmp_path, rows):
    tables.write_markdown(rows, DIFFERENCE, NOTE, tmp_path / "table.md")
    tables.write_latex(rows, DIFFERENCE, NOTE, tmp_path / "table.tex")
    console = Console(file=io.StringIO(), width=120)
    tables.print_table(rows, DIFFERENCE, NOTE, console)
    markdown = (tmp_path / "table.md").read_text()
    latex = (tmp_path / "table.tex").read_text()
    terminal = console.file.getvalue()
    for row in rows:
        low, high = (f"{100 * x:.2f}" for x in row.rates.masked[1:])
        assert f"[{low}, {high}]" in markdown
        assert f"[{low}, {high}]" in latex
        assert f"{low}–{high}" in terminal
    for text in (markdown, latex, terminal):
        assert "-1.23 [-2.00, +0.10]" in text
        assert f"Images: {NOTE}." in text.replace("\\", "")
        assert all(heading in text for heading in tables.HEADINGS)


def test_latex_is_booktabs_of_plain_ascii(tmp_path, rows):
    tables.write_latex(rows, DIFFERENCE, NOTE, tmp_path / "table.tex")
    latex = (tmp_path / "table.tex").read_text()
    assert latex.isascii()
    assert all(rule in latex for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
    assert latex.count("{") == latex.count("}")
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}")
    body = [line for line in latex.splitlines() if line.startswith("lenet")]
    assert [len(re.findall(" & ", line)) for line in body] == [6, 6]


def test_a_failed_write_leaves_the_old_table(tmp_path, rows):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(AttributeError):
        tables.write_csv([*rows, None], path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "dtype, expected",
    [("float16", (9, 14, 15)), ("bfloat16", (6, 14, 15)), ("float64", (51, 62, 63))],
)
def test_bit_fields(dtype, expected):
    assert tuple(shares.bit_fields(dtype)) == expected


def test_bit_fields_of_an_integer_word():
    with pytest.raises(ValueError, match="int8.*floats"):
        shares.bit_fields("int8")


def test_shares_by_bit_and_layer_are_the_counts(campaigns):
    campaign = next(iter(campaigns.values()))
    by_bit = shares.parts_by_bit(campaign)
    assert [part.name for part in by_bit] == [str(bit) for bit in reversed(range(32))]
    rows = campaign.faults.bit == 30
    assert by_bit[1].critical.value == pytest.approx((campaign.outcomes[rows] == 2).mean())
    by_layer = rates_by(campaign.faults, campaign.results, "layer", 2.58, order=["dense", "conv1"])
    assert [(part.name, part.num_faults) for part in by_layer] == [("dense", 32), ("conv1", 64)]
    rows = campaign.faults.leaf == 2  # dense/kernel is last in tree order
    assert by_layer[0].masked.value == pytest.approx((campaign.outcomes[rows] == 0).mean())


def test_parts_of_a_census_have_no_interval(campaigns):
    """Every fault of two bits of two leaves: nothing was left to chance, in any part."""
    faults = exhaustive_faults(PARAMS, paths="conv1/*", bits=[30, 31])
    some = next(iter(campaigns.values()))
    draw = np.random.default_rng(0).integers(0, 3, (len(faults), 8)).astype(np.uint8)
    whole = dataclasses.replace(
        some, faults=faults, outcomes=draw, due=draw > 9, correct=draw.sum(1).astype(np.int32)
    )
    parts = [*whole.rates(by="bit"), *whole.rates(by="layer")]
    assert [part.name for part in parts] == ["31", "30", "conv1"]
    for part in parts:
        assert part.critical.low == part.critical.value == part.critical.high
    assert whole.rates().masked.low == whole.rates().masked.high


def test_shares_by_bit_needs_bits():
    faults = FaultList.from_arrays(PARAMS, 0, [0, 1], -1, "zero")
    ones = np.ones((2, 3), np.uint8)
    campaign = Campaign(
        faults=faults, outcomes=ones, due=ones > 1, correct=np.zeros(2, np.int32),
        golden=np.zeros((3, 10), np.float32), labels=np.zeros(3, np.int32),
        provenance={"nan": "critical"},
    )  # fmt: skip
    with pytest.raises(ValueError, match="no fault of the campaign has a bit"):
        shares.parts_by_bit(campaign)


def test_stacked_bars_have_the_shares_as_lengths_and_fill_the_bar(campaigns):
    axes = figures.outcome_shares(campaigns).axes[0]
    widths = np.array([patch.get_width() for patch in axes.patches]).reshape(3, 2)
    for column, campaign in enumerate(campaigns.values()):
        counts = np.bincount(campaign.outcomes.ravel(), minlength=3) / campaign.outcomes.size
        np.testing.assert_allclose(widths[:, column], 100 * counts)
    np.testing.assert_allclose(widths.sum(axis=0), 100)


def test_every_axis_is_labelled_with_its_unit(campaigns):
    by_layer = figures.critical_by_layer(campaigns, order=["dense", "conv1"]).axes[0]
    assert "(%)" in by_layer.get_xlabel()
    layers = [text.get_text() for text in by_layer.get_yticklabels()]
    assert layers == ["dense  (32)", "conv1  (64)"]
    by_bit = figures.outcomes_by_bit(campaigns).axes
    assert "float32" in by_bit[-1].get_xlabel()
    assert all("(%)" in axes.get_ylabel() for axes in by_bit)
    assert {text.get_text() for text in by_bit[0].texts} == {"mantissa", "exponent", "sign"}


def test_colours_differ_in_lightness():
    rgb = [colors.to_rgb(style["facecolor"]) for style in figures.OUTCOME_STYLES.values()]
    luma = [float(np.dot(c, (0.299, 0.587, 0.114))) for c in rgb]
    assert min(-np.diff(luma)) > 0.25


def test_figures_are_written_as_vector_and_raster(tmp_path, campaigns):
    paths = figures.save_figure(figures.outcomes_by_bit(campaigns), tmp_path / "bits")
    assert [path.name for path in paths] == ["bits.pdf", "bits.svg", "bits.png"]
    assert paths[0].read_bytes().startswith(b"%PDF")
    assert "<svg" in paths[1].read_text()
    image = np.asarray(Image.open(paths[2]).convert("L"))
    assert image.shape[1] == pytest.approx(6.9 * 300, abs=2)
    assert image.std() > 10


@pytest.mark.parametrize("kind", ["outcome_shares", "outcomes_by_bit", "critical_by_layer"])
def test_the_layout_has_settled_when_a_figure_is_written(tmp_path, campaigns, kind):
    """Else the first file, the PDF, would lack what the layout had not yet made room for."""
    figure = getattr(figures, kind)(campaigns)
    first = [path.read_bytes() for path in figures.save_figure(figure, tmp_path / "first")]
    again = [path.read_bytes() for path in figures.save_figure(figure, tmp_path / "again")]
    assert first == again
    figure.draw_without_rendering()
    page = figure.bbox.padded(2)
    for axes in figure.axes:
        for text in (*axes.texts, axes.xaxis.label, axes.yaxis.label, *axes.get_yticklabels()):
            x, y = text.get_window_extent().get_points().T
            assert page.x0 <= min(x) <= max(x) <= page.x1, text.get_text()
            assert page.y0 <= min(y) <= max(y) <= page.y1, text.get_text()
