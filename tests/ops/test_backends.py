"""The choice of a backend: reasons, and where it holds: threads, tasks, processes, backward, copies of the code."""

import asyncio
import contextvars
import importlib.util
import multiprocessing
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastbert_hf import FastFeedForward, backends_fastbert, fff, use_backend
from fastbert_hf.backends_fastbert import BACKENDS, backend_for, chosen_backend
from fastbert_hf.fff_op import ReferenceBackend, select_backend
from tests.processes import CHILD_SECONDS

X, WEIGHT = torch.zeros(2, 4), torch.zeros(7, 4)
CALL = (X, WEIGHT, WEIGHT, 1, 2, "gelu")


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


class CountingBackend(ReferenceBackend):
    def __init__(self, name):
        self.name, self.calls = name, []

    def forward(self, *call):
        self.calls.append("forward")
        return ReferenceBackend.forward(*call)

    def backward(self, *call):
        self.calls.append("backward")
        return ReferenceBackend.backward(*call)


@pytest.fixture
def registry(monkeypatch):
    """The backends of the op as a test wants them."""

    def register(*backends):
        for name in list(BACKENDS["fff"]):
            monkeypatch.delitem(BACKENDS["fff"], name)
        for backend in backends:
            monkeypatch.setitem(BACKENDS["fff"], backend.name, backend)

    return register


def test_the_choice_gives_its_reasons(registry, monkeypatch):
    reference = ReferenceBackend()
    registry(DecliningBackend(), MissingBackend(), reference)
    assert select_backend(*CALL) is reference
    with use_backend("declining"):
        with pytest.raises(ValueError, match="'declining' cannot take this call of the op fff: it is Tuesday"):
            fff(X, WEIGHT, None, WEIGHT, 1, 2)
        with use_backend("reference"):
            assert select_backend(*CALL) is reference
        assert chosen_backend() == "declining"
    assert chosen_backend() is None
    with pytest.raises(ValueError, match="'missing' is not available: no compiler was found"):
        use_backend("missing")
    with pytest.raises(ValueError, match="unknown backend 'tpu'; known: auto, declining, missing, reference"):
        use_backend("tpu")
    assert chosen_backend() is None
    monkeypatch.setenv("FASTBERT_BACKEND", "tpu")
    with pytest.raises(ValueError, match="unknown backend 'tpu' of the op fff; known: auto, declining"):
        fff(X, WEIGHT, None, WEIGHT, 1, 2)
    use_backend("auto")
    assert select_backend(*CALL) is reference


def test_ops_share_the_choice_and_have_backends_of_their_own(monkeypatch):
    taking, declining = CountingBackend("counting"), DecliningBackend()
    monkeypatch.setattr(taking, "supports", lambda *call: None, raising=False)
    monkeypatch.setitem(BACKENDS, "other", {"declining": declining, "counting": taking})
    assert backend_for("other", 1, "two") is taking
    with use_backend("declining"), pytest.raises(ValueError, match="the op other: it is Tuesday"):
        backend_for("other", 1, "two")
    with use_backend("counting"):
        assert backend_for("other", 1, "two") is taking
        with pytest.raises(ValueError, match="unknown backend 'counting' of the op fff; known: auto, "):
            select_backend(*CALL)
    with (
        use_backend("reference"),
        pytest.raises(ValueError, match="'reference' of the op other; known: auto, declining"),
    ):
        backend_for("other")


def test_a_choice_can_be_nested_and_entered_again():
    choice = use_backend("reference")
    assert chosen_backend() == "reference"
    for _ in range(2):
        with choice:
            with use_backend("auto"), choice:
                assert chosen_backend() == "reference"
            assert chosen_backend() == "reference"
        assert chosen_backend() is None


def test_a_choice_leaves_the_environment_alone(monkeypatch):
    monkeypatch.setenv("FASTBERT_BACKEND", "reference")
    with use_backend("auto"):
        assert backends_fastbert.os.environ["FASTBERT_BACKEND"] == "reference"
        assert select_backend(*CALL) is next(b for b in BACKENDS["fff"].values() if b.supports(*CALL) is None)
    assert select_backend(*CALL).name == "reference"


def test_threads_do_not_see_each_others_choice(registry):
    registry(CountingBackend("one"), CountingBackend("two"), ReferenceBackend())
    both_chose = threading.Barrier(2, timeout=CHILD_SECONDS)

    def work(name):
        with use_backend(name):
            both_chose.wait()
            taken = [select_backend(*CALL).name for _ in range(50)]
            both_chose.wait()
        return {*taken}, chosen_backend()

    with use_backend("reference"), ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, ("one", "two"))) == [({"one"}, None), ({"two"}, None)]
        assert select_backend(*CALL).name == "reference"


def test_tasks_do_not_see_each_others_choice():
    async def work(name):
        with use_backend(name):
            await asyncio.sleep(0)
            return chosen_backend()

    async def main():
        return await asyncio.gather(work("reference"), work("auto"))

    assert asyncio.run(main()) == ["reference", "auto"]


def test_backward_takes_the_backend_of_forward_in_any_thread(registry):
    first, second = CountingBackend("first"), CountingBackend("second")
    registry(first, second, ReferenceBackend())
    layer = FastFeedForward(4, 4, depth=2)
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


def test_a_compiled_layer_follows_the_choice_at_the_time_of_the_call(registry):
    first, second = CountingBackend("first"), CountingBackend("second")
    registry(first, second, ReferenceBackend())
    compiled = torch.compile(FastFeedForward(4, 4, depth=2), fullgraph=True, backend="aot_eager")
    with use_backend("first"):
        y = compiled(X).sum()
    thread = threading.Thread(target=y.backward)  # without a choice: that of the time of tracing
    thread.start()
    thread.join()
    assert first.calls == ["forward", "backward"]
    with use_backend("second"):
        compiled(X).sum().backward()
    assert second.calls == ["forward", "backward"] and len(first.calls) == 2


def _taken_by_worker(_=None):
    return select_backend(*CALL).name


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
@pytest.mark.filterwarnings("ignore:This process")
def test_worker_processes_inherit_the_environment(method, monkeypatch):
    monkeypatch.setenv("FASTBERT_BACKEND", "reference")
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map(_taken_by_worker, [0]) == ["reference"]


def test_every_copy_of_the_code_in_a_process_has_the_same_choice():
    path = Path(backends_fastbert.__file__)
    spec = importlib.util.spec_from_file_location("copy_of_backends", path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    copy.register_backends("fff", ReferenceBackend())
    assert copy.BACKENDS["fff"].keys() == BACKENDS["fff"].keys()
    with use_backend("reference"):
        assert copy.backend_for("fff", *CALL).name == "reference"
    with copy.use_backend("reference"):
        assert select_backend(*CALL).name == "reference"
        assert contextvars.copy_context()[backends_fastbert._CHOICE] == "reference"


def test_code_saved_with_older_models_finds_the_kernels():
    from fastbert_hf.kernels import KERNEL_BACKENDS

    assert [backend.name for backend in (*KERNEL_BACKENDS, ReferenceBackend())] == ["native", "triton", "reference"]


def test_without_the_package_only_the_ops_own_backends_are_registered(tmp_path):
    for name in ("backends_fastbert", "dispatch_fastbert", "fff_op", "fff_reference"):
        source = Path(backends_fastbert.__file__).with_name(f"{name}.py")
        (tmp_path / "bundle").mkdir(exist_ok=True)
        (tmp_path / "bundle" / f"{name}.py").write_text(source.read_text())
    script = (
        "import sys; sys.modules['fastbert_hf'] = None\n"  # an import of it fails
        "from bundle.fff_op import BACKENDS; print(list(BACKENDS))"
    )
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={}, capture_output=True, text=True, timeout=CHILD_SECONDS
    )
    assert process.stdout.strip() == "['reference']", process.stderr[-2000:]
