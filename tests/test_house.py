"""The house: a dozen rooms, imports one way, public names that are documented."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jaxfi

ROOT = Path(__file__).parents[1]
# A room imports from those before it.
ROOMS = ("data", "faults", "patterns", "outcomes", "criteria", "network", "engine", "campaign",
         "testset", "models", "training", "convert", "report")  # fmt: skip
LAZY = ("convert", "models", "report", "testset", "training")
HEAVY = (
    "flax",
    "matplotlib",
    "tensorflow_datasets",
    "orbax",
    "optax",
    "pyarrow",
    "pandas",
    "torch",
)


def modules(folder: str) -> list[Path]:
    return [path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts]


def imported(path: Path) -> list[str]:
    """Modules of jaxfi that a file imports, `jaxfi.engine._plan`."""
    names = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not is_for_types(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxfi"):
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [node.module, *(n for n in submodules if is_module(n))]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name.startswith("jaxfi")]
    return names


def is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or path.is_dir()


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def entry(room: str) -> str:
    return f"{room}.py" if room in ("criteria", "patterns", "testset") else room


def test_at_most_sixteen_entries() -> None:
    entries = {path.name for path in (ROOT / "jaxfi").iterdir()} - {"__pycache__"}
    assert entries == {*map(entry, ROOMS), "__init__.py", "py.typed"}
    assert len(entries) <= 16


def test_rooms_import_one_way() -> None:
    for path in modules("jaxfi"):
        here = name_of(path).split(".")
        if here == ["jaxfi"]:
            continue
        for name in imported(path):
            room = name.split(".")[1]
            assert ROOMS.index(room) <= ROOMS.index(here[1]), f"{path} imports {name}"


def test_files_of_a_room_import_no_circle() -> None:
    graph = {name_of(p): {n for n in imported(p) if n.count(".") == 2} for p in modules("jaxfi")}
    graph = {name: others - {name} for name, others in graph.items() if name.count(".") == 2}
    done: set[str] = set()
    while left := graph.keys() - done:
        free = {n for n in left if not (graph[n] & graph.keys()) - done}
        assert free, f"these import each other: {sorted(left)}"
        done |= free


def test_all_but_the_rooms_and_their_commands_is_private() -> None:
    public = {
        name_of(p) for p in modules("jaxfi") if not p.stem.startswith("_") or p.stem == "__init__"
    }
    report = {f"jaxfi.report.{name}" for name in ("figures", "tables", "coverage", "study")}
    assert public == {"jaxfi", *(f"jaxfi.{room}" for room in ROOMS), *report}


def test_experiments_use_public_names() -> None:
    for path in modules("experiments"):
        if "benchmarks" not in path.parts:  # they measure the inside
            private = [name for name in imported(path) if "._" in name]
            assert not private, f"{path} imports {private}"


@pytest.mark.parametrize("name", ["jaxfi", *(f"jaxfi.{room}" for room in ROOMS)])
def test_public_names_are_documented(name: str) -> None:
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    section = page.partition(f"## {name}\n")[2].partition("\n## ")[0]
    documented = set(re.findall(r"^\| `(\w+)` \| \S", section, re.MULTILINE))
    module = importlib.import_module(name)
    assert documented == set(module.__all__) - set(ROOMS)
    assert (module.__doc__ or "").strip()
    for public in module.__all__:
        assert hasattr(module, public)


def run(program: str) -> str:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def test_import_brings_no_heavy_package() -> None:
    run(f"import jaxfi, sys; assert not {set(HEAVY)} & set(sys.modules)")


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_need_no_second_import(room: str) -> None:
    run(f"import jaxfi; assert jaxfi.{room}.__name__ == 'jaxfi.{room}'; from jaxfi import {room}")
    assert room in dir(jaxfi)


@pytest.mark.parametrize(
    "program, package, extra",
    [
        ("import jaxfi; jaxfi.models", "flax", "train"),
        ("from jaxfi.training import train", "optax", "train"),
        ("import jaxfi; jaxfi.report", "matplotlib", "report"),
        ("import jaxfi; jaxfi.data.load_dataset('digits')", "sklearn", "data"),
        ("import jaxfi; jaxfi.load_campaign('nowhere')", "pyarrow", "store"),
    ],
)
def test_what_is_missing_is_said_with_its_extra(program, package, extra) -> None:
    missing = f"import sys; sys.modules['{package}'] = None\n"
    check = (
        f"try:\n    {program.replace('; ', chr(10) + '    ')}\nexcept ImportError as e: print(e)"
    )
    said = run(missing + check).strip()
    assert (
        said == f"{package} is not installed: pip install 'jax-fault-injection[{extra}]' brings it"
    )


@pytest.mark.parametrize(
    "command, package, extra",
    [
        ("jaxfi.report", "matplotlib", "report"),
        ("jaxfi.report.study", "matplotlib", "report"),
        ("experiments.gr", "absl", "experiments"),
        ("experiments.benchmarks.imports", "optax", "experiments"),
    ],
)
def test_a_command_says_what_is_missing_in_one_line(command, package, extra, tmp_path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        f"PathFinder.find_spec = lambda name, *rest: "
        f"None if name.partition('.')[0] == {package!r} else find(name, *rest)\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    said = subprocess.run(
        [sys.executable, "-m", command, "nowhere"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    expected = f"{package} is not installed: pip install 'jax-fault-injection[{extra}]' brings it\n"
    assert (said.returncode, said.stderr) == (1, expected)


# What a room imports comes with the core or with these extras, each named where it is needed.
EXTRAS = {"campaign": ["store", "report"], "data": ["data"], "models": ["train"],
          "training": ["train"], "report": ["report"],
          "convert": ["convert", "equinox", "keras", "torch", "train"],
          "experiments": ["experiments"], "benchmarks": ["experiments", "bench"]}  # fmt: skip
NAMES = {"absl": "absl-py", "sklearn": "scikit-learn", "PIL": "pillow", "orbax": "orbax-checkpoint"}


def declared(extras: list[str]) -> set[str]:
    """Distributions that the core and extras name, those of extras they include too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found, to_read = set(), [*project["dependencies"]]
    to_read += [line for extra in extras for line in project["optional-dependencies"][extra]]
    while to_read:
        name, inner = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", to_read.pop()).groups()
        found.add(name)
        for extra in (inner or "").split(",") if name == project["name"] else []:
            to_read += project["optional-dependencies"][extra]
    return found


@pytest.mark.parametrize("folder", ["jaxfi", "experiments"])
def test_what_is_imported_is_declared(folder) -> None:
    for path in modules(folder):
        parts = path.relative_to(ROOT).with_suffix("").parts
        room = parts[1] if folder == "jaxfi" else "experiments"
        allowed = declared(EXTRAS.get("benchmarks" if "benchmarks" in parts else room, []))
        tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        names = {
            name.partition(".")[0]
            for node in tree
            for name in (
                [alias.name for alias in node.names] if isinstance(node, ast.Import)
                else [node.module] if isinstance(node, ast.ImportFrom) else []
            )
        }  # fmt: skip
        others = names - set(sys.stdlib_module_names) - {"jaxfi", "experiments", "tests"}
        missing = {NAMES.get(name, name.replace("_", "-")) for name in others} - allowed
        assert not missing, f"{path}: {missing} not declared"


def test_types_ship() -> None:
    assert (ROOT / "jaxfi" / "py.typed").exists()
    assert 'packages = ["jaxfi"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
