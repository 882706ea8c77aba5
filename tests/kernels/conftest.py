"""The native library, built on demand, on every instruction set that this machine has."""

import sys

import pytest
import torch

from fastbert_hf.fff_op import BACKENDS
from fastbert_hf.kernels.native import build, library

INSTRUCTION_SETS = {"AVX512": ("avx512", "avx2", "generic"), "AVX2": ("avx2", "generic")}.get(
    torch.backends.cpu.get_cpu_capability(), ("generic",)
)
if torch.cpu._is_avx512_bf16_supported():
    INSTRUCTION_SETS = ("avx512_bf16", *INSTRUCTION_SETS)


def _why_not_built() -> str | None:
    if sys.platform == "win32":
        return "the native kernels are for Linux and macOS"
    try:
        build.find_compiler()
    except build.BuildError as error:
        return str(error)
    return None


def pytest_collection_modifyitems(items):
    """Without a compiler, skip what needs the native library."""
    reason = _why_not_built()
    for item in items:
        if reason is not None and "native_library" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason=reason))


def _build_if_stale() -> str | None:
    """Compile where no library newer than its sources exists; the reason if that fails."""
    target = build.FOLDER / build.LIBRARY_NAME
    newest = max(path.stat().st_mtime for path in (build.FOLDER / "csrc").iterdir())
    if target.exists() and target.stat().st_mtime >= newest:
        return None
    return build.build_or_explain(build.FOLDER)


@pytest.fixture(scope="session")
def native_library():
    reason = _build_if_stale()
    assert reason is None, reason  # with a compiler at hand, sources that do not build are a failure, not a skip
    return library.load_library()


@pytest.fixture
def native(native_library):
    """The backend, and two threads of torch whatever the machine."""
    backend = BACKENDS["native"]
    assert backend.unavailable() is None
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield backend
    torch.set_num_threads(threads)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request, native_library):
    before = native_library.fff_instruction_set()
    assert native_library.fff_select_instruction_set(request.param.encode()), "torch finds it on this CPU"
    yield request.param
    native_library.fff_select_instruction_set(before)


@pytest.fixture(scope="session")
def native_backend(native_library):
    """The backend for property tests, which run many examples per call of the test."""
    return BACKENDS["native"]
