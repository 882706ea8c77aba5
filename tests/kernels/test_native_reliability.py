"""What callers rely on beyond the numbers: determinism, threads, processes, the op's machinery, wrong arguments."""

import os
import threading

import pytest
import torch

from fastbert_hf import FastFeedForward, fff, use_backend
from fastbert_hf.fff_op import select_backend
from fastbert_hf.kernels.native import build, library
from tests.kernels.cases import make_problem

DTYPES = (torch.float32, torch.bfloat16)


def forward_and_gradients(native, problem):
    y, visited, logits = native.forward(problem.x, *problem.parameters())
    gradients = native.backward(
        problem.grad_y,
        problem.x,
        problem.weight_in,
        problem.bias_in,
        problem.weight_out,
        visited,
        logits,
        problem.activation,
        problem.output_mask,
    )
    return [y, visited, logits, *gradients]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(9, 40, 24, 1, 3), (700, 96, 200, 1, 8), (1200, 40, 24, 3, 5), (90, 16, 16, 40, 0)]
)
def test_thread_count_changes_no_bit(native, instruction_set, shape, dtype):
    problem = make_problem(*shape, dtype=dtype)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(forward_and_gradients(native, problem))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(40, 50, 70, 1, 3), (1100, 96, 80, 1, 7), (300, 24, 40, 5, 4), (20, 16, 24, 30, 0)]
)
def test_a_row_does_not_depend_on_its_neighbours(native, instruction_set, shape, dtype):
    problem = make_problem(*shape, dtype=dtype)
    y, visited, logits = native.forward(problem.x, *problem.parameters())
    for begin, end in [(0, 1), (3, 4), (5, 7), (2, 11), (1, shape[0]), (shape[0] // 2, shape[0])]:
        part = native.forward(problem.x[begin:end], *problem.parameters())
        assert torch.equal(part[0], y[begin:end])
        assert torch.equal(part[1], visited[begin:end])
        assert torch.equal(part[2], logits[begin:end])


def test_python_threads_do_not_disturb_each_other(native):
    problems = [make_problem(200 + 10 * i, 40, 40, 2, 5, seed=i) for i in range(6)]
    expected = [forward_and_gradients(native, problem) for problem in problems]
    failures = []

    def work(problem, wanted):
        for _ in range(10):
            results = forward_and_gradients(native, problem)
            if not all(torch.equal(a, b) for a, b in zip(results, wanted)):
                failures.append(problem)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(problems, expected)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_child_computes_the_same(native):
    """The parent has used its OpenMP threads; the child does not have them, and must not wait for them."""
    problem = make_problem(600, 40, 40, 1, 6)
    expected = forward_and_gradients(native, problem)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            y = native.infer(problem.x, *problem.parameters())
            status = 0 if torch.equal(y, expected[0]) else 2
        finally:
            os._exit(status)
    for _ in range(600):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        threading.Event().wait(0.05)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        raise AssertionError("the forked child hangs")
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_passes(native, dtype):
    problem = make_problem(6, 12, 10, 2, 3, dtype=dtype)
    tensors = [problem.x, problem.weight_in, problem.bias_in, problem.weight_out]
    arguments = (*(t.clone().requires_grad_() for t in tensors), 2, 3, "gelu")
    with use_backend("native"):
        torch.library.opcheck(torch.ops.fastbert.fff_v1, arguments)


def test_compiled_layer_matches_eager(native):
    torch.manual_seed(0)
    layer = FastFeedForward(16, 12, 3, trees=2)
    x = torch.randn(2, 5, 16)
    with use_backend("native"):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        eager, traced = layer(x), compiled(x)
        assert torch.equal(eager, traced)
        gradients = []
        for y in (eager, traced):
            layer.zero_grad()
            y.square().sum().backward()
            gradients.append([p.grad.clone() for p in layer.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_training_step_under_autocast_runs_in_bfloat16(native):
    layer = FastFeedForward(16, 16, 3)
    with use_backend("native"), torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(4, 16))
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float16}, "float16"),
        ({"dtype": torch.float64}, "float64"),
        ({"device": "meta"}, "meta"),
    ],
    ids=str,
)
def test_declines_with_a_reason(native, change, reason):
    x, weight = torch.zeros(2, 4, **change), torch.zeros(7, 4, **change)
    assert reason in native.supports(x, weight, weight, 1, 2, "gelu")
    with use_backend("native"), pytest.raises(ValueError, match=reason):
        select_backend(x, weight, weight, 1, 2, "gelu")


def test_wrong_arguments_raise(native):
    problem = make_problem(4, 8, 6, 1, 2)
    x, (weight_in, bias_in, weight_out, *_) = problem.x, problem.parameters()
    for wrong, reason in (
        ((x, weight_in[:-1], bias_in, weight_out), "weight_in has 6 rows"),
        ((x, weight_in[:, :-1], bias_in, weight_out), "x is 8 wide and weight_in 7"),
        ((x, weight_in, bias_in[:-1], weight_out), "bias_in has shape"),
        ((x, weight_in, bias_in, weight_out[:-1]), "weight_out has 6"),
        ((x, weight_in.double(), bias_in, weight_out), "dtypes are"),
        ((x, weight_in, bias_in.bfloat16(), weight_out), "dtypes are"),
        ((x, weight_in, bias_in.to("meta"), weight_out), "devices are"),
    ):
        with pytest.raises(ValueError, match=reason):
            native.infer(*wrong, 1, 2, "gelu")
        with pytest.raises(ValueError, match=reason):
            native.forward(*wrong, 1, 2, "gelu")
    for trees, depth, activation in ((0, 2, "gelu"), (1, -1, "gelu"), (1, 2, "tanh")):
        with pytest.raises(ValueError, match="expected"):
            native.infer(x, weight_in, bias_in, weight_out, trees, depth, activation)
    _, visited, logits = native.forward(x, *problem.parameters())
    rest = (x, weight_in, bias_in, weight_out)
    with pytest.raises(ValueError, match="grad_y"):
        native.backward(problem.grad_y[:-1], *rest, visited, logits, "gelu", [True] * 4)
    with pytest.raises(ValueError, match="int32"):
        native.backward(problem.grad_y, *rest, visited.long(), logits, "gelu", [True] * 4)
    for bad in (visited + 1, visited - 1, visited * 0, visited + 2**30, visited.flip(-1)):
        with pytest.raises(ValueError, match="paths from the root"):
            native.backward(problem.grad_y, *rest, bad, logits, "gelu", [True] * 4)


def test_empty_widths_work(native):
    for width, out_width in ((0, 4), (4, 0), (0, 0)):
        for dtype in DTYPES:
            for rows in (1, 5):
                problem = make_problem(rows, width, out_width, 2, 2, dtype=dtype)
                results = forward_and_gradients(native, problem)
                assert results[0].shape == (rows, out_width)


def test_instruction_set_comes_from_the_environment(native_library, monkeypatch):
    before = native_library.fff_instruction_set()
    try:
        monkeypatch.setenv(library.INSTRUCTION_SET_VARIABLE, "generic")
        assert library.load_library.__wrapped__().fff_instruction_set() == b"generic"
        monkeypatch.setenv(library.INSTRUCTION_SET_VARIABLE, "abacus")
        with pytest.raises(library.LibraryError, match="'abacus' is unknown"):
            library.load_library.__wrapped__()
    finally:
        native_library.fff_select_instruction_set(before)


def test_a_missing_library_explains_itself(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    with pytest.raises(library.LibraryError, match="compiled when the package is installed"):
        library.load_library.__wrapped__()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler" in build.build_or_explain(tmp_path)
    with pytest.raises(library.LibraryError, match="no C\\+\\+ compiler"):
        library.load_library.__wrapped__()


def test_torchs_openmp_runtime_is_used(native_library):
    """Two runtimes would spin against each other; ours must be none but the one torch has loaded."""
    assert library._parallel_region_of_torch() is not None
    with open("/proc/self/maps") as maps:
        runtimes = {line.split()[-1] for line in maps if "gomp" in line or "iomp" in line}
    torch_library = os.path.join(os.path.dirname(torch.__file__), "lib")
    assert any(runtime.startswith(torch_library) for runtime in runtimes) or len(runtimes) == 1


def test_layer_uses_native_by_default(native):
    layer = FastFeedForward(8, 8, 2)
    assert select_backend(torch.zeros(1, 8), layer.weight_in, layer.weight_out, 1, 2, "gelu").name == "native"
    x = torch.randn(3, 8)
    with torch.no_grad():
        direct = fff(x, layer.weight_in, layer.bias_in, layer.weight_out, 1, 2)
    assert torch.equal(direct, layer(x))
