"""What README.md promises: its example runs, its commands and files exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert re.match(r"Estimate\(value=0\.\d+", capsys.readouterr().out)


def test_the_files_it_names_exist():
    flagfiles = re.findall(r"--flagfile=(\S+)", README)
    links = re.findall(r"\]\(([^):]+)\)", README)
    assert flagfiles
    assert links
    for name in (*flagfiles, *links, "requirements.lock"):
        assert (ROOT / name).exists(), name


def test_its_test_command_is_what_ci_runs():
    assert '-c requirements.lock -e ".[test]"' in README
    assert ".venv/bin/python -m pytest -n 2\n" in README
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert '-c requirements.lock -e ".[test]"' in ci
    assert ci.rstrip().endswith('"$venv/bin/python" -m pytest -n 2')


def test_the_examples_of_questions_run():
    text = (ROOT / "docs" / "questions.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 2
    exec(compile("\n".join(examples), "questions.md", "exec"), {})
