"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import subprocess
from pathlib import Path

import pytest

from fastbert_hf.kernels.native import build
from tests.processes import CHILD_SECONDS

DRIVER = Path(__file__).parent / "sanitize" / "driver.cpp"
FLAGS = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def test_kernels_are_clean_under_sanitizers(tmp_path):
    try:
        compiler = build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }")
    linked = subprocess.run([*compiler, *FLAGS, str(probe), "-o", str(tmp_path / "probe")], capture_output=True)
    if linked.returncode:
        pytest.skip("the compiler has no sanitizer runtime")
    objects, compilations = [], []
    for source in (*build.SOURCES, DRIVER):
        objects.append(tmp_path / f"{source.stem}.o")
        flags = FLAGS if source == DRIVER else [flag for flag in build.FLAGS if flag != "-O3"] + FLAGS
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
