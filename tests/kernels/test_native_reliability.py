"""What callers rely on beyond the numbers: determinism, threads, processes, the op's machinery, wrong arguments."""

import os
from dataclasses import replace

import pytest
import torch

from fastbert_hf.backends_fastbert import BACKENDS, backend_for, use_backend
from fastbert_hf.kernels.native import build, library
from tests.forms import FORMS, LEAVES, NODES
from tests.kernels.cases import check, make_leaf_problem, make_problem
from tests.kernels.concurrency import check_fork, check_threads

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


@pytest.fixture
def backend(native, form):
    """The native backend of one form of tree, and two threads."""
    return BACKENDS[form.name]["native"]


def make(form, *shape, **options):
    """A problem of either form."""
    return (make_problem if form is NODES else make_leaf_problem)(*shape, **options)


# with the leaf width last where they are leaf trees
THREADED = [
    (NODES, (9, 40, 24, 1, 3)),
    (NODES, (700, 96, 200, 1, 8)),
    (NODES, (1200, 40, 24, 3, 5)),
    (NODES, (90, 16, 16, 40, 0)),
    (LEAVES, (1, 96, 200, 2, 2, 300)),
    (LEAVES, (2, 96, 200, 1, 0, 300)),
    (LEAVES, (300, 48, 130, 2, 3, 50)),
    (LEAVES, (600, 24, 33, 2, 5, 7)),
    (LEAVES, (40, 16, 16, 30, 0, 11)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("form", "shape"), THREADED, ids=lambda value: getattr(value, "name", str(value)))
def test_thread_count_changes_no_bit(backend, form, instruction_set, shape, dtype):
    problem = make(form, *shape, dtype=dtype)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(problem.results(backend))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


SPLIT = [
    (NODES, (40, 50, 70, 1, 3)),
    (NODES, (1100, 96, 80, 1, 7)),
    (NODES, (300, 24, 40, 5, 4)),
    (NODES, (20, 16, 24, 30, 0)),
    (LEAVES, (40, 50, 70, 1, 3, 9)),
    (LEAVES, (500, 31, 33, 2, 2, 50)),
    (LEAVES, (300, 500, 40, 1, 4, 7)),
    (LEAVES, (150, 24, 40, 1, 0, 13)),
    (LEAVES, (20, 16, 24, 30, 1, 1)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("form", "shape"), SPLIT, ids=lambda value: getattr(value, "name", str(value)))
def test_a_row_does_not_depend_on_its_neighbours(backend, form, instruction_set, shape, dtype):
    problem, rows = make(form, *shape, dtype=dtype), shape[0]
    y, *saved = backend.forward(problem.x, *problem.parameters())
    problem.output_mask = [True] + [False] * (len(problem.names) - 1)
    grad_x = problem.backward(backend, saved)[0]
    for begin, end in [(0, 1), (3, 4), (5, 7), (2, 11), (1, rows), (rows // 2, rows)]:
        part = replace(problem, x=problem.x[begin:end], grad_y=problem.grad_y[begin:end])
        part_y, *part_saved, part_grad_x = (result for result in part.results(backend) if result is not None)
        assert torch.equal(part_y, y[begin:end]) and torch.equal(part_grad_x, grad_x[begin:end])
        assert all(torch.equal(a, b[begin:end]) for a, b in zip(part_saved, saved, strict=True))


def test_python_threads_do_not_disturb_each_other(backend, form):
    problems = [make(form, 200 + 10 * i, 40, 40, 2, 4, seed=i) for i in range(6)]
    check_threads([lambda problem=problem: problem.results(backend) for problem in problems])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_child_computes_the_same(backend, form):
    """The parent has used its OpenMP threads; the child does not have them, and must not wait for them."""
    problem = make(form, 600, 40, 40, 1, 6)
    check_fork(lambda: problem.results(backend))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_passes(native, form, dtype):
    problem = make(form, 6, 12, 10, 2, 3, dtype=dtype)
    arguments = (*(t.clone().requires_grad_() for t in problem.tensors()), 2, 3, "gelu")
    with use_backend("native"):
        torch.library.opcheck(form.op, arguments)


def test_compiled_layer_matches_eager(native, form):
    torch.manual_seed(0)
    layer = form.layer(16, 12, 3, trees=2)
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


def test_training_step_under_autocast_runs_in_bfloat16(native, form):
    layer = form.layer(16, 16, 3)
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
def test_declines_with_a_reason(backend, form, change, reason):
    x, weight = torch.zeros(2, 4, **change), torch.zeros(7, 4, **change)
    assert reason in backend.supports(x, weight, weight, 1, 2, "gelu")
    with use_backend("native"), pytest.raises(ValueError, match=reason):
        backend_for(form.name, x, weight, weight, 1, 2, "gelu")


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


def test_empty_widths_work(backend, form):
    for width, out_width in ((0, 4), (4, 0), (0, 0)):
        for dtype in DTYPES:
            for rows in (1, 5):
                problem = make(form, rows, width, out_width, 2, 2, dtype=dtype)
                check(backend, problem)


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


def test_layer_uses_native_by_default(backend, form):
    layer = form.layer(8, 8, 2)
    x, *parameters = form.inputs(3, 8, 8, 1, 2, dtype=torch.float32)
    assert backend_for(form.name, x, layer.weight_in, layer.weight_out, 1, 2, "gelu") is backend
    with torch.no_grad():
        for parameter, value in zip((getattr(layer, name) for name in form.parameter_names), parameters):
            parameter.copy_(value)
        assert torch.equal(form.function(x, *parameters, 1, 2), layer(x))


@pytest.mark.parametrize("index", range(4))
def test_a_tensor_without_memory_is_refused(backend, form, index):
    problem = make(form, 3, 8, 8, 1, 2)
    name = ("x", "weight_in", "weight_out", form.parameter_names[0])[index]
    setattr(problem, name, torch._efficientzerotensor(getattr(problem, name).shape))
    with pytest.raises(ValueError, match="no memory of its own"):
        backend.infer(problem.x, *problem.parameters())
