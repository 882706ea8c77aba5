"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from fastbert_hf.kernels.native import build
from tests.processes import CHILD_SECONDS

DRIVERS = sorted((Path(__file__).parent / "sanitize").glob("*.cpp"))
FLAGS = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def sanitizers_link() -> bool:
    """Whether there is a compiler, and it has the runtime of the sanitizers."""
    try:
        compiler = build.find_compiler()
    except build.BuildError:
        return False
    with tempfile.TemporaryDirectory() as folder:
        command = [*compiler, *FLAGS, "-x", "c++", "-", "-o", str(Path(folder) / "probe")]
        return subprocess.run(command, input=b"int main() { return 0; }", capture_output=True).returncode == 0


@pytest.mark.skipif(not sanitizers_link(), reason="no C++ compiler with a runtime of the sanitizers")
def test_kernels_are_clean_under_sanitizers(tmp_path):
    compiler = build.find_compiler()
    objects, compilations = [], []
    for source in (*build.SOURCES, *DRIVERS):
        objects.append(tmp_path / f"{source.stem}.o")
        flags = FLAGS if source in DRIVERS else [flag for flag in build.FLAGS if flag != "-O3"] + FLAGS
        command = [*compiler, "-std=c++17", *flags, "-c", str(source), "-o", str(objects[-1])]
        compilations.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in compilations:
        assert process.communicate()[1] is not None and process.returncode == 0, "the compiler failed"
    program = tmp_path / "driver"
    subprocess.run([*compiler, *FLAGS, *map(str, objects), "-pthread", "-o", str(program)], check=True)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    environment.pop("LD_PRELOAD", None)
    result = subprocess.run([str(program)], capture_output=True, text=True, env=environment, timeout=CHILD_SECONDS)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "0 failures" in result.stdout
