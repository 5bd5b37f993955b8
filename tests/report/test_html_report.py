"""The HTML report: its numbers, its markup, what it must not load, and how a browser shows it."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxfi.campaign import Campaign, load_campaign
from jaxfi.campaign._store import open_store
from jaxfi.faults import FaultList
from jaxfi.outcomes import CRITICAL, MASKED, Results
from jaxfi.report import __main__ as command
from jaxfi.report import _heatmap as heatmap
from jaxfi.report import coverage, write_report
from jaxfi.report._page import escape
from jaxfi.report.figures import save_figure

HOSTILE = "<script>alert('1')</script>\"&$x_{\\frac$\x00\u202e"
NUM_FAULTS, NUM_IMAGES = 240, 30
BROWSER = next(
    (p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))),
    None,
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on the PATH")


def make_params(layer: str = "conv1") -> dict:
    """Three leaves in two layers, of which one may have any name."""
    random = np.random.default_rng(0)
    return {
        layer: {
            "kernel": random.normal(size=(3, 3, 1, 4)).astype(np.float32),
            "bias": np.zeros(4, np.float32),
        },
        "dense": {"kernel": random.normal(size=(20, 10)).astype(np.float32)},
    }


def write_campaign(folder: Path, seed: int = 0, layer: str = "conv1", note: str = "") -> None:
    """A finished campaign whose high bits are critical; the last fault makes NaN everywhere."""
    random = np.random.default_rng(seed)
    params = make_params(layer)
    bits = np.arange(NUM_FAULTS) % 32
    leaf = np.arange(NUM_FAULTS) % 3
    faults = FaultList.from_arrays(params, leaf, np.arange(NUM_FAULTS) % 4, bits, "bit-flip")
    rate = np.where(bits > 27, 0.7, bits / 100)[:, None] * random.random(NUM_IMAGES)
    draw = random.random((NUM_FAULTS, NUM_IMAGES))
    outcomes = ((draw < rate).astype(np.uint8) + (draw < rate * (bits > 27)[:, None])).astype("u1")
    outcomes[-1] = CRITICAL
    due = np.zeros(outcomes.shape, bool)
    due[-1] = True
    labels = random.integers(0, 10, NUM_IMAGES).astype(np.int32)
    golden = np.eye(10, dtype=np.float32)[labels]
    correct = np.count_nonzero(outcomes != CRITICAL, axis=1).astype(np.int32)
    fingerprint = {
        "nan": "critical",
        "params_sha256": "ab" * 32,
        "versions": {"jax": "0.10.2", "note": note},
    }
    values = faults.values(params)
    with open_store(folder, fingerprint, faults, NUM_IMAGES, values=values) as store:
        store.keep(golden=golden, labels=labels)
        store.write(np.arange(NUM_FAULTS), Results(outcomes, due, correct))


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "lenet"
    write_campaign(folder)
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def campaign(single) -> Campaign:
    return load_campaign(single)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    """A working directory like those of experiments.gr, with names made to break a page."""
    folder = tmp_path_factory.mktemp("experiment")
    write_campaign(folder / "campaigns" / "default", 0, HOSTILE, note=HOSTILE)
    write_campaign(folder / "campaigns" / "gradient", 1, HOSTILE)
    config = {"dataset": "digits", "model": HOSTILE, "alpha": 0.05, HOSTILE: [HOSTILE]}
    (folder / "config.json").write_text(json.dumps(config))
    write_report(folder)
    return folder


def page(folder: Path) -> ElementTree.Element:
    """The report parsed as XML, which forgives nothing."""
    return ElementTree.fromstring((folder / "report.html").read_text("utf-8"))


def rows_of(table: ElementTree.Element) -> list[list[str]]:
    return [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]


def pictures(root: ElementTree.Element) -> list[bytes]:
    sources = [image.get("src") for image in root.iter("img")]
    prefix = "data:image/svg+xml;base64,"
    assert all(source.startswith(prefix) for source in sources)
    return [base64.b64decode(source.removeprefix(prefix)) for source in sources]


class TagBalance(HTMLParser):
    """Opening and closing tags as an HTML parser, not an XML one, finds them."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.seen.add(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", ["single", "experiment"])
def test_the_page_is_well_formed_and_holds_every_section(request, name):
    root = page(request.getfixturevalue(name))
    assert [heading.text for heading in root.iter("h2")] == [
        "Outcomes", "Where faults matter", "Test images needed", "Worst faults", "Provenance",
    ]  # fmt: skip
    balance = TagBalance()
    balance.feed((request.getfixturevalue(name) / "report.html").read_text("utf-8"))
    assert balance.open == []
    assert not balance.seen & {"script", "link", "iframe", "object", "a", "form"}
    for picture in pictures(root):
        assert ElementTree.fromstring(picture).tag.endswith("svg")


@pytest.mark.parametrize("name", ["single", "experiment"])
def test_nothing_is_loaded_from_anywhere(request, name):
    folder = request.getfixturevalue(name)
    text = (folder / "report.html").read_text("utf-8")
    outside_pictures = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?:|//|@import|url\(|file:|javascript:", outside_pictures)
    for picture in pictures(page(folder)):
        links = re.findall(rb"(?:href|src)=\"([^\"]*)", picture) + re.findall(
            rb"url\(([^)]*)", picture
        )
        assert all(link.startswith((b"#", b"data:")) for link in links)
        assert b"<script" not in picture


def test_rates_are_the_counts(single, campaign):
    header, row = rows_of(next(page(single).iter("table")))
    shown = dict(zip(header, row, strict=True))
    for heading, outcome in (("Masked", 0), ("Not critical", 1), ("Critical", 2)):
        percent = 100 * np.count_nonzero(campaign.outcomes == outcome) / campaign.outcomes.size
        assert shown[heading].startswith(f"{percent:.2f}")
    assert shown["DUE"].startswith(f"{100 / NUM_FAULTS:.2f}")
    assert shown["Clean accuracy"] == "100.00"
    assert re.fullmatch(r"\d+\.\d\d\d+\.\d\d–\d+\.\d\d", shown["Masked"])


def test_worst_faults_have_their_values_and_counts(single, campaign):
    table = list(page(single).iter("table"))[3]
    header, *rows = rows_of(table)
    critical = np.count_nonzero(campaign.outcomes == CRITICAL, axis=1)
    assert [int(row[6]) for row in rows] == sorted(critical.tolist(), reverse=True)[:20]
    worst = dict(zip(header, rows[0], strict=True))
    # The last fault: leaf 2 is dense/kernel, element 239 % 4, bit 239 % 32.
    kernel = make_params()["dense"]["kernel"]
    before = kernel[0, 3]
    after = (before[None].view(np.uint32) ^ np.uint32(1 << 15)).view(np.float32)[0]
    numbers = (f"{value:.6g}".replace("-", "−") for value in (before, after))
    assert rows[0][:6] == ["dense/kernel", "[0, 3]", "bit-flip", "15", *numbers]
    assert (worst["DUE"], worst["Critical"], worst["Correct"]) == ("30", "30", "0")


def test_the_images_needed_are_those_of_plain_sets(single, campaign):
    table = list(page(single).iter("table"))[1]
    for row, wanted in zip(rows_of(table)[1:], ({1, 2}, {2}), strict=True):
        detects = np.isin(campaign.outcomes, list(wanted))
        assert row[2].startswith(f"{detects.any(axis=1).sum()} ")
        smallest, greedy = int(row[6]), int(row[5])
        assert smallest <= greedy <= NUM_IMAGES
        order = rows_of(list(page(single).iter("table"))[2])[1 + (wanted == {2})][2].split(", ")
        covered = detects[:, [int(i) for i in order[:greedy]]].any(axis=1)
        assert greedy > 16 or (covered == detects.any(axis=1)).all()


def test_an_experiment_shows_both_networks_and_what_changed(experiment):
    root = page(experiment)
    text = "".join(root.itertext())
    assert "default loss" in text
    assert "gradient loss (α=0.05)" in text
    assert re.search(r"paired by fault, in points: masked [+−]\d", text)
    provenance = rows_of(list(root.iter("table"))[-1])
    assert ["params_sha256", "ab" * 32, "ab" * 32] in provenance
    assert "versions.jax" in [row[0] for row in provenance]


def test_text_from_files_is_shown_and_never_run(experiment):
    text = (experiment / "report.html").read_text("utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;" in text
    assert "\x00" not in text
    assert "\u202e" not in text


@pytest.mark.parametrize("code", [0, 8, 0x1F, 0x7F, 0xD800, 0xFFFE, 0x202E])
def test_what_xml_forbids_is_replaced(code):
    assert escape(f"a{chr(code)}<b>") == "a\ufffd&lt;b&gt;"


def test_the_same_campaign_gives_the_same_file(single):
    before = (single / "report.html").read_bytes()
    command.main([str(single)])
    assert (single / "report.html").read_bytes() == before


def test_a_campaign_of_whole_words_has_a_report(tmp_path):
    params = make_params()
    faults = FaultList.from_arrays(params, [0, 1, 2], 0, -1, "zero")
    masked = np.full((3, 2), MASKED, np.uint8)
    with open_store(
        tmp_path, {"nan": "critical"}, faults, 2, values=faults.values(params)
    ) as store:
        store.keep(golden=np.eye(2, dtype=np.float32), labels=np.arange(2, dtype=np.int32))
        store.write(np.arange(3), Results(masked, masked > 0, np.full(3, 2)))
    write_report(tmp_path)
    assert "The 0 faults" in "".join(page(tmp_path).itertext())


def test_errors_are_one_line(tmp_path, single):
    with pytest.raises(FileNotFoundError, match="holds no campaign: neither campaign.json nor"):
        write_report(tmp_path)
    with pytest.raises(SystemExit, match="error: .* holds no campaign"):
        command.main([str(tmp_path)])
    for arguments in ([], ["--help"], ["a", "b"]):
        with pytest.raises(SystemExit, match="usage: python -m jaxfi.report DIR"):
            command.main(arguments)
    write_campaign(tmp_path / "campaigns" / "default")
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(SystemExit, match=r"error: .*config\.json is not a configuration"):
        command.main([str(tmp_path)])


def test_heat_map_cells_are_plain_means(campaign):
    cells = heatmap.shares_by_layer_and_bit(campaign)
    assert cells.layers == ["conv1", "dense"]
    assert cells.bits == list(range(31, -1, -1))
    for row, leaves in enumerate(([0, 1], [2])):
        for column, bit in enumerate(cells.bits):
            rows = np.isin(campaign.faults.leaf, leaves) & (campaign.faults.bit == bit)
            assert cells.num_faults[row, column] == rows.sum()
            if rows.any():
                expected = (campaign.outcomes[rows] == CRITICAL).mean()
                assert cells.critical[row, column] == pytest.approx(expected)
    total = cells.masked + cells.non_critical + cells.critical
    np.testing.assert_allclose(total[cells.num_faults > 0], 1)
    assert np.isnan(total[cells.num_faults == 0]).all()


@pytest.fixture(scope="module")
def coverages(campaign) -> list[coverage.Coverage]:
    return [
        coverage.measure_coverage("a_b, 50 % & more", campaign.outcomes, detect, time_limit=10)
        for detect in ("observable", "critical")
    ]


def test_coverage_tables_show_the_same_numbers(tmp_path, coverages):
    for kind in ("csv", "markdown", "latex"):
        getattr(coverage, f"write_{kind}")(coverages, tmp_path / kind)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "csv").read_text())))
    latex = (tmp_path / "latex").read_text()
    for row, line in zip(rows, (tmp_path / "markdown").read_text().splitlines()[2:], strict=False):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        numbers = [row[f"greedy_{f}"] for f in (90, 99, 100)]
        assert cells[3:6] == numbers
        assert cells[6] == row["exact_100"] == row["exact_100_lower"]
        assert " & ".join(numbers) in latex
    assert latex.isascii()
    assert r"a\_b, 50 \% \& more" in latex
    body = [line for line in latex.splitlines() if line.startswith("a")]
    assert [len(re.findall("(?<!\\\\)&", line)) for line in body] == [9, 9]


def test_coverage_figure_ends_at_what_is_detectable(tmp_path, coverages):
    figure = coverage.coverage_figure(coverages)
    for axes, measured in zip(figure.axes, coverages, strict=True):
        percent = 100 * measured.num_detectable / NUM_FAULTS
        ends = [line.get_ydata()[-1] for line in axes.lines[:3]]
        assert ends == pytest.approx([percent] * 3)
        assert "(%)" in axes.get_ylabel()
    assert [path.suffix for path in save_figure(figure, tmp_path / "c")] == [".pdf", ".svg", ".png"]
    with pytest.raises(ValueError, match="give at least one"):
        coverage.coverage_figure([])


def test_coverage_figure_shows_the_first_and_the_last_image():
    for num_images in range(1, 2_001):
        shown = coverage._shown_on_log_axis(num_images)
        assert (shown[0], shown[-1]) == (1, num_images)
        assert np.all(np.diff(shown) > 0)
        assert len(shown) <= 200 * np.log10(num_images) + 2


def browse(folder: Path, *arguments: str) -> None:
    """Opens the report in a browser that finds no host."""
    subprocess.run(
        [
            BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={folder / 'profile'}", *arguments,
            (folder / "report.html").resolve().as_uri(),
        ],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip


@needs_browser
def test_a_browser_shows_the_figures_and_colours(experiment, tmp_path):
    shutil.copy(experiment / "report.html", tmp_path)
    browse(tmp_path, "--window-size=1120,2200", f"--screenshot={tmp_path / 'shot.png'}")
    pixels = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).astype(int)
    assert pixels.shape == (2200, 1120, 3)

    def share(color: str, rows: slice) -> float:
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        return float((np.abs(pixels[rows] - wanted).max(axis=-1) < 12).mean())

    assert share("#12466b", slice(0, 200)) > 0.002  # the title
    assert share("#d5e5f0", slice(200, 900)) > 0.01  # the masked part of the bars
    assert share("#08306b", slice(400, 2000)) > 0.002  # masked cells of the heat maps
    assert 0.5 < share("#ffffff", slice(None)) < 0.98


@needs_browser
def test_a_browser_prints_it_on_landscape_pages(experiment, tmp_path):
    shutil.copy(experiment / "report.html", tmp_path)
    browse(tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'report.pdf'}")
    content = (tmp_path / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    boxes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", content)
    assert len(boxes) >= 3
    assert all(float(width) > float(height) for width, height in boxes)
