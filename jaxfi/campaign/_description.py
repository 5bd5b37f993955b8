"""What a results directory says of its campaign: campaign.json and the fault list beside it."""

from __future__ import annotations

import hashlib
import json
import operator
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxfi.data._files import content_hash, damaged, read_npz
from jaxfi.faults._list import FaultGroups, FaultList, Stratum, typed_columns
from jaxfi.faults._sampling import ExhaustiveFaults

FORMAT = 1
KEPT = ("outcomes", "counts")  # of pairs, or numbers of faults
CAMPAIGN_FILE = "campaign.json"
LIST_COLUMNS = ("leaf", "element", "bit", "model", "value")
_DTYPE_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_FAULTS_NAME = re.compile(r"faults-[0-9a-f]{32}\.npz")


def list_arrays(faults: FaultList) -> dict[str, np.ndarray]:
    """A fault list's columns by name; of experiments of several faults also the others'."""
    columns = {name: getattr(faults, name) for name in LIST_COLUMNS}
    if isinstance(faults, FaultGroups):
        columns |= {f"other_{name}": getattr(faults.others, name) for name in LIST_COLUMNS}
        columns["owner"] = faults.owner
    return columns


def describe(
    fingerprint: Mapping[str, Any],
    faults: FaultList,
    num_images: int,
    content: bytes | None,
    keep: str = "outcomes",
    criteria: tuple[str, ...] = (),
) -> dict[str, Any]:
    """What campaign.json says; `content` is the fault list's file, None where it is a rule."""
    description: dict[str, Any] = {
        "format": FORMAT,
        "fingerprint": dict(fingerprint),
        "num_faults": len(faults),
        "num_images": num_images,
        "paths": faults.paths,
        "shapes": faults.shapes,
        "dtypes": faults.dtypes,
        "drawn_from": faults.drawn_from,
    }
    if isinstance(faults, FaultGroups) and faults.possible is not None:
        description["possible"] = faults.possible
    if keep != "outcomes":
        description["keep"] = keep
    if criteria:
        description["criteria"] = list(criteria)
    if content is not None:
        description["faults_file"] = f"faults-{content_hash(content)}.npz"
    else:
        assert isinstance(faults, ExhaustiveFaults), "a list that is no rule has a file"
        sites = [(faults.paths[s.leaf], s.bits) for s in faults.drawn_from or ()]
        value = None if faults.rule_value is None else repr(faults.rule_value)
        description["every"] = {"model": faults.rule_model, "value": value, "sites": sites}
    return signed(description)


def signed(description: dict[str, Any]) -> dict[str, Any]:
    """The description as JSON would give it back, with its hash, which names the campaign."""
    body = json.dumps({k: v for k, v in description.items() if k != "sha256"}, sort_keys=True)
    return {**json.loads(body), "sha256": hashlib.sha256(body.encode()).hexdigest()}


def read_description(directory: Path) -> dict[str, Any]:
    """What campaign.json says, checked. FileNotFoundError or ValueError naming the file."""
    path = directory / CAMPAIGN_FILE
    try:
        description = json.loads(path.read_bytes())
        intact = description["sha256"] == signed(description)["sha256"]
    except FileNotFoundError:
        raise FileNotFoundError(f"{directory} holds no campaign: {path} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise damaged(path, "its content does not match its checksum")
    if description.get("format") != FORMAT:
        raise ValueError(f"{path} has format {description.get('format')}: allowed is {FORMAT}")
    fingerprint, num_images = description.get("fingerprint"), description.get("num_images")
    keep = description.get("keep", "outcomes")
    known = isinstance(fingerprint, dict) and isinstance(num_images, int) and keep in KEPT
    criteria = description.get("criteria", [])
    known = known and isinstance(criteria, list) and all(isinstance(c, str) for c in criteria)
    if not known or num_images < 1:
        raise damaged(path, "it does not describe a campaign")
    return description


def check_same(directory: Path, stored: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises ValueError naming each difference between two campaigns.

    What the faults were drawn from may differ: of a list that was read from a file it is not known.
    """
    there, now = dict(_flatten("", stored)), dict(_flatten("", here))
    differences = [
        f"{name.removeprefix('fingerprint.')} is {there.get(name, 'absent')} there and "
        f"{now.get(name, 'absent')} here"
        for name in sorted(there.keys() | now.keys())
        if name not in ("sha256", "drawn_from") and there.get(name) != now.get(name)
    ]
    if differences:
        raise ValueError(
            f"{directory} holds another campaign: {'; '.join(differences)}; use another directory"
        )


def _flatten(prefix: str, tree: Any) -> Iterator[tuple[str, str]]:
    """Dotted names and JSON texts of the leaves of nested dicts."""
    if isinstance(tree, dict) and tree:
        for name, branch in tree.items():
            yield from _flatten(f"{prefix}.{name}" if prefix else name, branch)
    else:
        yield prefix, json.dumps(tree)


def read_faults(
    directory: Path, description: dict[str, Any]
) -> tuple[FaultList, tuple[np.ndarray, np.ndarray] | None]:
    """The fault list, checked against the leaves, and the values before and after where it has a
    file."""
    if "every" in description:
        try:
            return _read_rule(description), None
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            raise damaged(directory / CAMPAIGN_FILE, str(error)) from None
    name = str(description.get("faults_file"))
    if not _FAULTS_NAME.fullmatch(name):
        raise damaged(directory / CAMPAIGN_FILE, f"{name!r} is no fault list")
    try:
        arrays = read_npz(directory / name)
    except FileNotFoundError:
        raise FileNotFoundError(f"{directory / name} is missing: run the campaign again") from None
    try:
        columns = (arrays[column] for column in LIST_COLUMNS)
        drawn_from = _read_strata(description.get("drawn_from"))
        faults = FaultList(*_read_leaves(description), *columns, drawn_from=drawn_from)
        if "owner" in arrays:
            columns = (arrays[f"other_{column}"] for column in LIST_COLUMNS)
            others = FaultList(*_read_leaves(description), *columns)
            faults = FaultGroups.of(faults, others, arrays["owner"], description.get("possible"))
        faults.check()
        values = arrays["before"], arrays["after"]
        if any(v.shape != (len(faults),) or v.dtype != np.float64 for v in values):
            raise ValueError("its values have another shape")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise damaged(directory / name, str(error)) from None
    return faults, values


def _read_leaves(description: dict[str, Any]) -> tuple[tuple, tuple, tuple]:
    """Paths, shapes and dtypes."""
    paths, dtypes = tuple(description["paths"]), tuple(description["dtypes"])
    if not all(map(_DTYPE_NAME.fullmatch, dtypes)):  # NumPy would parse anything as one
        raise ValueError(f"its dtypes are {description['dtypes']}")
    shapes = tuple(tuple(map(operator.index, shape)) for shape in description["shapes"])
    return paths, shapes, dtypes


def _read_rule(description: dict[str, Any]) -> ExhaustiveFaults:
    no_faults = typed_columns([], [], [], [], [])
    empty = FaultList(*_read_leaves(description), *no_faults)
    strata, rule = _read_strata(description["drawn_from"]), description["every"]
    value = None if rule["value"] is None else float(rule["value"])
    faults = ExhaustiveFaults(empty, strata or (), rule["model"], value)
    faults.check()
    if len(faults) != description["num_faults"]:
        raise ValueError("it has another number of faults")
    return faults


def _read_strata(strata: Any) -> tuple[Stratum, ...] | None:
    if strata is None:
        return None
    index = operator.index
    return tuple(Stratum(index(n), tuple(map(index, bits)), index(m)) for n, bits, m in strata)
