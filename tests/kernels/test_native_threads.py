"""How many threads the native kernels wake, how many rows they number, and what they say of themselves."""

import ctypes
import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from fastbert_hf.kernels import BACKENDS_BY_OP
from fastbert_hf.kernels.native import library
from fastbert_hf.kernels.native.kernels import NativeKernels
from tests.kernels.cases import make_leaf_problem, make_problem

STATUS_BAD_ARGUMENT = 3
REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


FORMS = {"fff": make_problem, "leaf_trees": make_leaf_problem}


@pytest.fixture(params=FORMS)
def form(request, native):
    """The native backend of one form of tree, and what makes a problem for it."""
    return BACKENDS_BY_OP[request.param][0], FORMS[request.param]


def gradients(native, problem, output_mask=None):
    problem = dataclasses.replace(problem, output_mask=output_mask or problem.output_mask)
    _, *saved = native.forward(problem.x, *problem.parameters())
    return problem.backward(native, saved)


def part(problem, rows):
    return dataclasses.replace(problem, x=problem.x[rows], grad_y=problem.grad_y[rows])


@pytest.fixture
def regions(native_library):
    """The numbers of threads that parallel regions ask for; every region runs on the calling thread."""
    asked = []

    @REGION
    def region(function, argument, threads, _flags):
        asked.append(threads)
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(argument)

    native_library.fff_set_parallel_region(ctypes.cast(region, ctypes.c_void_p))
    yield asked
    native_library.fff_set_parallel_region(library._parallel_region_of_torch())


def test_a_small_backward_wakes_no_thread(form, regions):
    native, make = form
    torch.set_num_threads(8)
    gradients(native, make(3, 40, 24, 2, 3))
    assert regions == []


def test_a_backward_that_writes_nothing_large_wakes_no_thread(native, regions):
    torch.set_num_threads(8)
    gradients(native, make_problem(3, 64, 64, 1, 11), [True, False, True, False])
    assert regions == []


def test_a_large_backward_uses_all_threads(form, regions):
    native, make = form
    torch.set_num_threads(8)
    gradients(native, make(3000, 96, 96, 1, 5))
    assert max(regions) == 8


def test_a_backward_that_writes_a_large_gradient_uses_all_threads(form, regions):
    native, make = form
    torch.set_num_threads(8)
    gradients(native, make(1, 96, 96, 1, 11))  # thousands of rows of zeros
    assert max(regions) == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted_from", ["all", "every second", "x alone"])
def test_backward_of_more_rows_than_it_can_number_goes_in_chunks(form, monkeypatch, dtype, wanted_from):
    native, make = form
    problem = make(50, 24, 20, 2, 3, dtype=dtype)
    count = len(problem.names)
    masks = {"all": [True] * count, "every second": [i % 2 == 1 for i in range(count)]}
    mask = masks.get(wanted_from, [True] + [False] * (count - 1))
    expected = gradients(native, problem, mask)
    parts = [gradients(native, part(problem, rows), mask) for rows in (slice(0, 20), slice(20, 40), slice(40, 50))]
    monkeypatch.setattr(NativeKernels, "max_backward_rows", 20)
    chunked = gradients(native, problem, mask)
    for index, (value, wanted) in enumerate(zip(chunked, expected, strict=True)):
        assert (value is None) == (wanted is None) == (not mask[index])
        if index == 0 and mask[0]:
            assert torch.equal(value, wanted)
        elif mask[index]:  # each part and each result is rounded once, to the last of its digits
            assert value.dtype == dtype
            sizes = sum(chunk[index].double().abs() for chunk in parts) + wanted.double().abs()
            error = (value.double() - wanted.double()).abs()
            assert (error <= 4 * torch.finfo(dtype).eps * sizes + 1e-6).all()


def test_the_library_refuses_more_rows_than_it_can_number(native_library):
    memory = torch.zeros(64)
    pointers = [memory.data_ptr()] * 6 + [None] * 4
    assert native_library.fff_backward(*pointers, 2**31, 4, 4, 1, 1, 0, 0, 1) == STATUS_BAD_ARGUMENT
    pointers = [memory.data_ptr()] * 10 + [None] * 7
    assert native_library.fff_leaf_backward(*pointers, 2**31, 4, 4, 1, 2, 1, 0, 0, 1) == STATUS_BAD_ARGUMENT
    assert NativeKernels.max_backward_rows == 2**31 - 1


def test_the_backend_names_its_instruction_set_and_threads(native, instruction_set, monkeypatch):
    torch.set_num_threads(2)
    assert native.describe() == f"instruction set {instruction_set}, up to 2 threads of torch"
    monkeypatch.setenv(library.INSTRUCTION_SET_VARIABLE, instruction_set)
    torch.set_num_threads(1)
    chosen = f"{instruction_set} (chosen by FASTBERT_NATIVE_ISA)"
    assert native.describe() == f"instruction set {chosen}, one thread: torch.get_num_threads() is 1"


def test_a_runtime_without_its_function_is_named(native, native_library):
    try:
        native_library.fff_set_parallel_region(None)
        assert native.describe().endswith(
            "one thread: torch's OpenMP runtime has no GOMP_parallel to share its threads"
        )
    finally:
        native_library.fff_set_parallel_region(library._parallel_region_of_torch())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_child_says_so(native):
    assert library.why_one_thread() is None
    child = os.fork()
    if child == 0:
        os._exit(0 if "this process was forked" in (library.why_one_thread() or "") else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert library.why_one_thread() is None


def test_the_command_prints_them(native, native_library):
    output = subprocess.run(
        [sys.executable, "-m", "fastbert_hf.kernels"],
        env={**os.environ, "OMP_NUM_THREADS": "2", "FASTBERT_NATIVE_ISA": "generic"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    expected = "available: instruction set generic (chosen by FASTBERT_NATIVE_ISA), up to 2 threads of torch"
    assert expected in output and "backends of the op fff:" in output
