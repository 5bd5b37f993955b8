"""What decides a campaign's outcomes is in its fingerprint, and a difference is named."""

from __future__ import annotations

import subprocess
from pathlib import Path

import jax
import pytest

from jaxfi import run_campaign
from jaxfi.campaign import _fingerprint as fingerprint
from jaxfi.campaign._fingerprint import commit
from tests.campaign.test_campaign import arguments


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder in a repository, with one file, committed."""
    folder = tmp_path / "repository" / "package"
    for room in ("report", "engine"):
        (folder / room).mkdir(parents=True)
    (folder / "engine" / "plan.py").write_text("1\n")
    git(tmp_path, "init", "-q", "repository")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "first")
    return folder


def test_the_commit_is_of_the_files_that_compute(package: Path) -> None:
    first = git(package, "rev-parse", "HEAD")
    for elsewhere in (package.parent / "README.md", package / "report" / "figures.py"):
        elsewhere.write_text("text")
    git(package, "add", "-A")
    git(package, "commit", "-qm", "elsewhere")
    commit.cache_clear()
    assert commit(package) == first != git(package, "rev-parse", "HEAD")


def test_edits_since_the_commit_are_told_apart(package: Path) -> None:
    found = []
    for text in ("1\n", "2\n", "3\n"):
        commit.cache_clear()
        (package / "engine" / "plan.py").write_text(text)
        found.append(commit(package))
    assert found[0] == git(package, "rev-parse", "HEAD")
    assert all(edited.startswith(f"{found[0]}+") for edited in found[1:])
    assert len(set(found)) == 3


def test_an_installed_package_has_no_commit(tmp_path: Path, package: Path, monkeypatch) -> None:
    assert commit(tmp_path / "nowhere") is None
    ignored = package.parent / ".venv"  # inside another's repository, which does not have it
    (ignored / "engine").mkdir(parents=True)
    (ignored / "engine" / "plan.py").write_text("1\n")
    assert commit(ignored) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(tmp_path) is None


def version_of(name: str, version: str):
    real = fingerprint.metadata.version
    return lambda package: version if package == name else real(package)


OTHER_MACHINES = {
    "jaxfi": (
        fingerprint.metadata,
        "version",
        version_of("jax-fault-injection", "9"),
        'there and "9" here',
    ),
    "jaxlib": (fingerprint.metadata, "version", version_of("jaxlib", "9"), 'there and "9" here'),
    "jax": (jax, "__version__", "9", 'there and "9" here'),
    "commit": (fingerprint, "commit", lambda folder: "abc", 'there and "abc" here'),
    "machine": (fingerprint.platform, "machine", lambda: "riscv", 'there and "riscv" here'),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("campaign")
    run_campaign(**few_faults(), workdir=directory)
    return directory


def few_faults() -> dict:
    settings = arguments()
    return {**settings, "faults": settings["faults"][:4]}


@pytest.mark.parametrize("name", OTHER_MACHINES)
def test_another_version_or_machine_is_named(finished: Path, monkeypatch, name: str) -> None:
    owner, attribute, value, message = OTHER_MACHINES[name]
    monkeypatch.setattr(owner, attribute, value)
    with pytest.raises(ValueError, match=f"holds another campaign: {name} is .* {message}; use"):
        run_campaign(**few_faults(), workdir=finished)


def test_another_network_is_named(finished: Path) -> None:
    settings = few_faults()
    apply_fn = settings["apply_fn"]
    other = {**settings, "apply_fn": lambda params, x: 2 * apply_fn(params, x)}
    with pytest.raises(ValueError, match="network_sha256 is .* there and .* here"):
        run_campaign(**other, workdir=finished)
