"""Which compiler the build calls, and how."""

import os
import subprocess
import sys

import pytest

from fastbert_hf.kernels.native import build


def write_program(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_a_launcher_and_flags_in_cxx_are_part_of_the_command(tmp_path, monkeypatch):
    launcher = write_program(tmp_path / "launcher", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CXX", "launcher g++ '-DNAME=two words'")
    assert build.find_compiler() == [str(launcher), "g++", "-DNAME=two words"]
    monkeypatch.setenv("CXX", "  ")  # set but empty: as if it were not set
    write_program(tmp_path / "c++", "#!/bin/sh\n")
    assert build.find_compiler() == [str(tmp_path / "c++")]


@pytest.mark.parametrize("cxx", ["no-such-launcher g++", "'unfinished"])
def test_a_wrong_cxx_is_named(cxx, monkeypatch):
    monkeypatch.setenv("CXX", cxx)
    with pytest.raises(build.BuildError, match=r"no-such-launcher|unfinished"):
        build.find_compiler()


@pytest.mark.skipif(sys.platform == "win32", reason="the native kernels are for Linux and macOS")
def test_every_call_of_the_compiler_goes_through_the_launcher(tmp_path, monkeypatch):
    """The launcher notes its arguments; the compiler behind it writes an empty file where it should."""
    log = tmp_path / "calls"
    compiler = write_program(tmp_path / "compiler", '#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho > "$2"\n')
    launcher = write_program(tmp_path / "launcher", f'#!/bin/sh\necho "$@" >> {log}\nexec "$@"\n')
    monkeypatch.setenv("CXX", f"{launcher} {compiler} --flag")
    assert build.build_or_explain(tmp_path / "out") is None
    calls = log.read_text().splitlines()
    assert len(calls) == len(build.SOURCES) + 1
    assert all(call.startswith(f"{compiler} --flag ") for call in calls)
    assert (tmp_path / "out" / build.LIBRARY_NAME).exists()
    write_program(compiler, "#!/bin/sh\necho no such option\nexit 1\n")
    assert "no such option" in build.build_or_explain(tmp_path / "out")


def test_the_build_needs_no_torch(tmp_path):
    """setup.py runs it where nothing is installed yet."""
    code = (
        "import runpy, sys; sys.modules['torch'] = None; "
        f"print(runpy.run_path({str(build.FOLDER / 'build.py')!r})['LIBRARY_NAME'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout.strip() == build.LIBRARY_NAME
