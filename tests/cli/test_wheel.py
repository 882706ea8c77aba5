"""A built wheel in an environment without the extras: every --help from any folder, one line for what is missing."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from fastbert_hf.cli.main import COMMANDS
from tests.processes import CHILD_SECONDS

ROOT = Path(__file__).resolve().parents[2]
# distributions of the extras, as their files begin; the rest of the running environment is what the core needs
EXTRAS = ("accelerate", "datasets", "evaluate", "matplotlib", "onnx", "scikit_learn", "scipy", "sklearn", "peft")
PACKAGE = ("fastbert", "__editable__", "_fastbert")

# every command and script in one process, as each import of torch takes seconds
HELPS = """
import contextlib, io, runpy, sys
commands, scripts = sys.argv[1].split(","), sys.argv[2:]
import fastbert_hf
from fastbert_hf.cli.main import main
from fastbert_hf.recipes import load_yaml
tasks = scripts + [words.split() for words in commands] + [[]]
for task in tasks:
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            if isinstance(task, list):
                main([*task, "--help"])
            else:
                sys.argv = [task, "--help"]
                runpy.run_path(task, run_name="__main__")
    except SystemExit as end:
        assert not end.code, (task, end.code)
    assert out.getvalue().startswith("usage: "), task
for name in ("accelerate", "datasets", "scipy", "sklearn", "matplotlib", "onnx"):
    assert name not in sys.modules
assert load_yaml("pretrain/cpu-10-minutes")["model_config"] == "model/small-1x8"
print(fastbert_hf.__file__, len(tasks))
"""


def run(*command, cwd, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=CHILD_SECONDS,
    )


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """bin folder of an environment with a wheel of this package, and of the running one only what the core needs."""
    folder = tmp_path_factory.mktemp("wheel")
    source, wheels, environment = folder / "source", folder / "wheels", folder / "environment"
    shutil.copytree(
        ROOT / "fastbert_hf", source / "fastbert_hf", ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    shutil.copytree(ROOT / "configs", source / "configs")
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    offline = ("--no-deps", "--no-index", "--quiet")
    build = run(*pip, "wheel", *offline, "--no-build-isolation", "-w", wheels, source, cwd=folder, CXX="no-compiler")
    assert build.returncode == 0, build.stderr
    venv.create(environment, with_pip=False)
    (site,) = environment.glob("lib/python*/site-packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.lower().startswith((*EXTRAS, *PACKAGE)) and not entry.name.endswith(".pth"):
            (site / entry.name).symlink_to(entry)
    (wheel,) = wheels.iterdir()
    installed = run(*pip, "--python", environment / "bin" / "python", "install", *offline, wheel, cwd=folder)
    assert installed.returncode == 0, installed.stderr
    return environment / "bin"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the environment is made of symbolic links")
def test_every_help_works_from_any_folder_without_the_extras(scratch, tmp_path):
    scripts = sorted((ROOT / "scripts").glob("*.py"))
    result = run(scratch / "python", "-c", HELPS, ",".join(COMMANDS), *scripts, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    file, count = result.stdout.split()
    assert Path(file).is_relative_to(scratch.parent) and int(count) == len(scripts) + len(COMMANDS) + 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the environment is made of symbolic links")
def test_training_without_its_extra_is_one_line(scratch, tmp_path):
    words = ("pretrain", "--config", "pretrain/cpu-10-minutes", "--output_dir", "out")
    result = run(scratch / "fastbert", *words, cwd=tmp_path)
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    assert result.stderr == (
        "error: accelerate, datasets, scipy, sklearn are not installed; this needs the extra training: "
        "pip install 'fastbert-hf[training]'\n"
    )
