"""The commands and snippets of a page, and how they are run in this process."""

import itertools
import re
import runpy
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

from fastbert_hf.cli.main import main

ROOT = Path(__file__).parents[2]
# commands that no test runs: how they begin, and why
NOT_RUN = {
    "pip install": "it would change the environment that the tests run in",
    "make demo": "it sets up an environment; tests/scripts runs the demo itself",
    "make test": "it runs all tests, this one among them",
    "make bench": "it measures for three minutes",
    "python scripts/benchmark.py": "it measures for half an hour",
    "python examples/serve.py": "it serves until it is stopped; tests/clients/test_serve.py runs it",
}


class Step(NamedTuple):
    """One thing that a page tells its reader to run."""

    language: str  # "bash" or "python"
    text: str  # a command in one line, without its comment, or a whole snippet


def steps(page: str) -> list[Step]:
    """Every command of a page's bash blocks and every Python snippet, in the page's order."""
    found = []
    for language, block in re.findall(r"```(bash|python)\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL):
        if language == "python":
            found.append(Step(language, block))
            continue
        commands = (shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines())
        found += [Step(language, shlex.join(words)) for words in commands if words]
    return found


def beginning(step: Step, table: Iterable[str]) -> str | None:
    """The entry of a table that a command begins with; the longest, where there are several."""
    found = [key for key in table if step.language == "bash" and f"{step.text} ".startswith(f"{key} ")]
    return max(found, key=len, default=None)


def run(step: Step, smaller: str = "") -> None:
    """Run one step in the folder of this process; a command gets further options that make it small.

    Raises:
        AssertionError: a script ended with an error, or what a command names as its output is not there.
    """
    if step.language == "python":
        exec(compile(step.text, "snippet", "exec"), {"__name__": "__main__"})
        return
    program, *words = shlex.split(step.text)
    assert program in ("fastbert", "python"), f"no test can run {step.text!r}"
    (main if program == "fastbert" else run_script)([*words, *shlex.split(smaller)])
    for option, value in itertools.pairwise(words):
        if option in ("--output_dir", "--output"):
            assert Path(value).exists(), f"{step.text!r} made no {value}"


def run_script(words: list[str]) -> None:
    """Run a file as `python FILE ...` does, in this process."""
    script = words[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        patch.setattr(sys, "path", [str(Path(script).resolve().parent), *sys.path])
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as ended:
            assert not ended.code, f"{script} ended with {ended.code}"
