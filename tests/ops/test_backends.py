"""The choice of a backend, the same for both ops: reasons, and where it holds: threads, tasks, processes, backward,
autocast, copies of the code."""

import asyncio
import contextvars
import importlib.util
import multiprocessing
import runpy
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastbert_hf import backends_fastbert, use_backend
from fastbert_hf.backends_fastbert import BACKENDS, backend_for, chosen_backend
from fastbert_hf.fff_op import ReferenceBackend, select_backend
from fastbert_hf.kernels import BACKENDS_BY_OP, KERNEL_BACKENDS
from fastbert_hf.leaf_op import LeafReferenceBackend
from tests.forms import FORMS, Form
from tests.processes import CHILD_SECONDS

X = torch.zeros(2, 4)
CALL = (X, X, X, 1, 0, "gelu")  # what a choice looks at: one node, or one leaf
REFERENCES = {"fff": ReferenceBackend, "leaf_trees": LeafReferenceBackend}


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def form(request) -> Form:
    return request.param


def call_op(form: Form) -> torch.Tensor:
    parameters = form.shapes(4, 4, 1, 2).values()
    return form.function(X, *map(torch.zeros, parameters), 1, 2)


def chosen(form: Form) -> str:
    return backend_for(form.name, *CALL).name


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    """Every test begins without a choice and leaves none."""
    monkeypatch.delenv("FASTBERT_BACKEND", raising=False)
    token = backends_fastbert._CHOICE.set(None)
    yield
    backends_fastbert._CHOICE.reset(token)


class DecliningBackend(ReferenceBackend):
    name = "declining"

    def supports(self, *call):
        return "it is Tuesday"


class MissingBackend(ReferenceBackend):
    name = "missing"

    def unavailable(self):
        return "no compiler was found"

    def supports(self, *call):
        return self.unavailable()


class CountingBackend:
    """The reference of an op, under another name; it keeps what it was asked for and in which dtype."""

    unavailable = supports = staticmethod(lambda *call: None)

    def __init__(self, name, form):
        self.name, self.reference, self.calls, self.dtypes = name, REFERENCES[form.name](), [], []

    def infer(self, *call):
        return self.forward(*call)[0]

    def forward(self, *call):
        self.calls.append("forward")
        self.dtypes.append(call[0].dtype)
        return self.reference.forward(*call)

    def backward(self, *call):
        self.calls.append("backward")
        self.dtypes.append(call[0].dtype)
        return self.reference.backward(*call)


@pytest.fixture
def registry(monkeypatch, form):
    """The backends of the op as a test wants them; those of the others stay."""

    def register(*backends):
        # a new table: one that is changed and restored has another order, which is that of preference
        monkeypatch.setitem(BACKENDS, form.name, {backend.name: backend for backend in backends})

    return register


def test_the_choice_gives_its_reasons(form, registry, monkeypatch):
    registry(DecliningBackend(), MissingBackend(), REFERENCES[form.name]())
    assert chosen(form) == "reference"
    with use_backend("declining"):
        with pytest.raises(
            ValueError, match=f"'declining' cannot take this call of the op {form.name}: it is Tuesday"
        ):
            call_op(form)
        with use_backend("reference"):
            assert chosen(form) == "reference" and call_op(form).shape == (2, 4)
        assert chosen_backend() == "declining"
    assert chosen_backend() is None
    with pytest.raises(ValueError, match="'missing' is not available: no compiler was found"):
        use_backend("missing")
    with pytest.raises(ValueError, match=r"unknown backend 'tpu'; known: auto, .*declining, missing"):
        use_backend("tpu")
    assert chosen_backend() is None
    monkeypatch.setenv("FASTBERT_BACKEND", "tpu")
    with pytest.raises(ValueError, match=f"unknown backend 'tpu' of the op {form.name}; known: auto, declining"):
        call_op(form)
    use_backend("auto")
    assert chosen(form) == "reference"


def test_ops_share_the_choice_and_have_backends_of_their_own(form, registry):
    others = [other for other in FORMS.values() if other is not form]
    registry(DecliningBackend(), CountingBackend("counting", form))
    assert chosen(form) == "counting"
    with use_backend("declining"), pytest.raises(ValueError, match=f"the op {form.name}: it is Tuesday"):
        chosen(form)
    with use_backend("counting"):
        assert chosen(form) == "counting"
        for other in others:
            with pytest.raises(ValueError, match=f"'counting' of the op {other.name}; known: auto, "):
                chosen(other)
    with use_backend("reference"):
        assert [chosen(other) for other in others] == ["reference"]
        with pytest.raises(ValueError, match=f"'reference' of the op {form.name}; known: auto, declining"):
            chosen(form)


def test_a_choice_can_be_nested_and_entered_again():
    choice = use_backend("reference")
    assert chosen_backend() == "reference"
    for _ in range(2):
        with choice:
            with use_backend("auto"), choice:
                assert chosen_backend() == "reference"
            assert chosen_backend() == "reference"
        assert chosen_backend() is None


def test_a_choice_leaves_the_environment_alone(form, monkeypatch):
    monkeypatch.setenv("FASTBERT_BACKEND", "reference")
    with use_backend("auto"):
        assert backends_fastbert.os.environ["FASTBERT_BACKEND"] == "reference"
        assert chosen(form) == next(b.name for b in BACKENDS[form.name].values() if b.supports(*CALL) is None)
    assert chosen(form) == "reference"


def test_threads_do_not_see_each_others_choice(form, registry):
    registry(*(CountingBackend(name, form) for name in ("one", "two", "reference")))
    both_chose = threading.Barrier(2, timeout=CHILD_SECONDS)

    def work(name):
        with use_backend(name):
            both_chose.wait()
            taken = [chosen(form) for _ in range(50)]
            both_chose.wait()
        return {*taken}, chosen_backend()

    with use_backend("reference"), ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, ("one", "two"))) == [({"one"}, None), ({"two"}, None)]
        assert chosen(form) == "reference"


def test_tasks_do_not_see_each_others_choice():
    async def work(name):
        with use_backend(name):
            await asyncio.sleep(0)
            return chosen_backend()

    async def main():
        return await asyncio.gather(work("reference"), work("auto"))

    assert asyncio.run(main()) == ["reference", "auto"]


@pytest.fixture
def two_backends(form, registry):
    first, second = CountingBackend("first", form), CountingBackend("second", form)
    registry(first, second, REFERENCES[form.name]())
    return first, second


def test_backward_takes_the_backend_of_forward_in_any_thread(form, two_backends):
    first, second = two_backends
    layer = form.layer(4, 4, depth=2)
    with use_backend("second"):
        outside, elsewhere = layer(X).sum(), layer(X).sum()
    outside.backward()
    thread = threading.Thread(target=elsewhere.backward)  # as the threads of the autograd engine: without a choice
    thread.start()
    thread.join()
    with use_backend("first"):
        again = layer(X).sum()
    with use_backend("reference"):
        again.backward()
    assert second.calls == ["forward"] * 2 + ["backward"] * 2 and first.calls == ["forward", "backward"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_chosen_backend_computes_in_its_dtype(form, two_backends, dtype, monkeypatch):
    first, second = two_backends
    layer = form.layer(4, 4, depth=2)
    with use_backend("second"), torch.autocast("cpu", dtype=dtype):
        y = layer(X)
        with torch.no_grad():
            assert torch.equal(layer(X), y)
    y.sum().backward()
    assert (first.calls, second.calls) == ([], ["forward", "forward", "backward"])
    assert second.dtypes == [dtype] * 3 and layer.weight_in.grad.dtype == torch.float32
    monkeypatch.setitem(BACKENDS[form.name], "second", DecliningBackend())
    declined = f"'second' cannot take this call of the op {form.name}: it is Tuesday"
    with use_backend("second"), torch.autocast("cpu", dtype=dtype), pytest.raises(ValueError, match=declined):
        layer(X)


def test_a_compiled_layer_follows_the_choice_at_the_time_of_the_call(form, two_backends):
    first, second = two_backends
    compiled = torch.compile(form.layer(4, 4, depth=2), fullgraph=True, backend="aot_eager")
    with use_backend("first"):
        y = compiled(X).sum()
    thread = threading.Thread(target=y.backward)  # without a choice: that of the time of tracing
    thread.start()
    thread.join()
    assert first.calls == ["forward", "backward"]
    with use_backend("second"):
        compiled(X).sum().backward()
    assert second.calls == ["forward", "backward"] and len(first.calls) == 2


def _taken_by_worker(op):
    return backend_for(op, *CALL).name


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
@pytest.mark.filterwarnings("ignore:This process")
def test_worker_processes_inherit_the_environment(method, monkeypatch):
    monkeypatch.setenv("FASTBERT_BACKEND", "reference")
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map(_taken_by_worker, BACKENDS) == ["reference"] * len(BACKENDS)


def test_every_copy_of_the_code_in_a_process_has_the_same_choice(form):
    path = Path(backends_fastbert.__file__)
    spec = importlib.util.spec_from_file_location("copy_of_backends", path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    copy.register_backends(form.name, REFERENCES[form.name]())
    assert copy.BACKENDS[form.name].keys() == BACKENDS[form.name].keys()
    with use_backend("reference"):
        assert copy.backend_for(form.name, *CALL).name == "reference"
    with copy.use_backend("reference"):
        assert chosen(form) == "reference"
        assert contextvars.copy_context()[backends_fastbert._CHOICE] == "reference"


def test_code_saved_with_older_models_finds_the_kernels():
    """It imports KERNEL_BACKENDS, and calls `select_backend`."""
    assert [backend.name for backend in KERNEL_BACKENDS] == ["native", "triton"]
    with use_backend("reference"):
        assert select_backend(*CALL) is BACKENDS["fff"]["reference"]


def test_every_op_has_its_kernels_then_its_reference(form):
    assert [*BACKENDS[form.name].values()][:-1] == [*BACKENDS_BY_OP[form.name]]
    assert type([*BACKENDS[form.name].values()][-1]) is REFERENCES[form.name]


def test_the_command_lists_the_backends_of_every_op_with_reasons(form, registry, capsys):
    registry(MissingBackend(), DecliningBackend(), REFERENCES[form.name]())
    runpy.run_module("fastbert_hf.kernels", run_name="__main__")
    _, _, output = capsys.readouterr().out.partition(f"backends of the op {form.name}:\n")
    lines = [line.strip() for line in output.splitlines()[:4]]
    assert lines[:3] == [
        "missing    not available: no compiler was found",
        "declining  available",
        "reference  available",
    ]
    assert lines[3] == "cpu float32: reference (declining: it is Tuesday)"


@pytest.mark.parametrize(
    ("file", "ops"),
    [
        ("fff_op", ["fff"]),
        ("leaf_op", ["leaf_trees"]),
        ("quantized_op", ["leaf_trees_int8", "fff_int8"]),
        ("encoder_op", ["add_norm", "linear_int8", "attention", "attention_int8"]),
    ],
)
def test_without_the_package_only_the_ops_own_backends_are_registered(file, ops, tmp_path):
    (tmp_path / "bundle").mkdir()
    for source in Path(backends_fastbert.__file__).parent.glob("*.py"):
        if not source.name.startswith("__"):
            (tmp_path / "bundle" / source.name).write_text(source.read_text())
    script = (
        "import sys; sys.modules['fastbert_hf'] = None\n"  # an import of it fails
        f"import bundle.{file}\nfrom bundle.backends_fastbert import BACKENDS\n"
        "print({name: list(backends) for name, backends in BACKENDS.items()})"
    )
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={}, capture_output=True, text=True, timeout=CHILD_SECONDS
    )
    assert process.stdout.strip() == str({op: ["reference"] for op in ops}), process.stderr[-2000:]
