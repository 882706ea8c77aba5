"""Triton kernels are compared with the reference before their first use on a device; tested without a GPU."""

import threading
import warnings
from types import SimpleNamespace

import pytest
import torch

from fastbert_hf.fff_op import ReferenceBackend
from fastbert_hf.kernels.triton import backend as backend_module
from fastbert_hf.kernels.triton import verification
from fastbert_hf.kernels.triton.backend import TritonBackend
from fastbert_hf.kernels.triton.verification import Verifications, compare

CPU = torch.device("cpu")
SIZES = (24, 20, 2, 3)


class Kernels:
    """The reference in the place of kernels; `break_it` changes what they return."""

    def __init__(self, break_it=lambda name, results: results):
        self.break_it, self.regimes = break_it, []

    def infer(self, *call, regime):
        return self.break_it("infer", [ReferenceBackend.forward(*call)[0]])[0]

    def forward(self, *call, regime):
        self.regimes.append(regime)
        return self.break_it("forward", list(ReferenceBackend.forward(*call)))

    def backward(self, *call, regime):
        self.regimes.append(regime)
        return self.break_it("backward", ReferenceBackend.backward(*call))


@pytest.mark.parametrize("sizes", [SIZES, (1, 1, 1, 0), (0, 4, 1, 1), (768, 768, 64, 11)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equal_results_pass(dtype, sizes):
    kernels, before = Kernels(), torch.random.get_rng_state()
    assert compare(kernels, CPU, dtype, "gelu", sizes, "walk", False) is None
    assert kernels.regimes == ["walk", "walk"]
    assert torch.equal(torch.random.get_rng_state(), before)


BROKEN = {
    "output differs": ("forward", 0),
    "tokens take other paths": ("forward", 1),
    "logits differs": ("forward", 2),
    "gradient of x differs": ("backward", 0),
    "gradient of weight_in differs": ("backward", 1),
    "gradient of bias_in differs": ("backward", 2),
    "gradient of weight_out differs": ("backward", 3),
    "output alone differs": ("infer", 0),
}


@pytest.mark.parametrize("how", ["one element", "nan"])
@pytest.mark.parametrize("message", BROKEN)
def test_whatever_differs_is_named(message, how):
    name, index = BROKEN[message]

    def break_it(called, results):
        if called == name:
            wrong = results[index].clone()
            if wrong.is_floating_point():
                wrong.view(-1)[-1] = float("nan") if how == "nan" else wrong.view(-1)[-1] + 0.1 * wrong.abs().max()
            else:
                wrong.view(-1)[-1] += 1
            results = [*results[:index], wrong, *results[index + 1 :]]
        return results

    reason = compare(Kernels(break_it), CPU, torch.float32, "relu", SIZES, "subtrees", False)
    assert reason.startswith("torch.float32, relu, subtrees: ") and message in reason


def test_whatever_is_raised_is_a_reason_except_too_little_memory():
    def fail(called, results):
        raise error

    error = RuntimeError("no kernel image\nfor this device")
    reason = compare(Kernels(fail), CPU, torch.float32, "gelu", SIZES, "walk", False)
    assert reason == "torch.float32, gelu, walk: RuntimeError: no kernel image"
    error = torch.OutOfMemoryError("no memory")
    with pytest.raises(torch.OutOfMemoryError):
        compare(Kernels(fail), CPU, torch.float32, "gelu", SIZES, "walk", False)


def test_a_comparison_is_made_once_and_its_failure_warned_of_once():
    verifications, made = Verifications(), []

    def differ():
        made.append(1)
        return "it differs"

    def ask():
        assert verifications.reason("kind", CPU, differ) == "it differs"

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ask()
    assert len(made) == 1
    assert [str(w.message) for w in caught] == ["Triton kernels are not used on cpu: it differs"]


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as a backend sees it, what the backend has compared on it, and `supports` for a call there."""
    settings = SimpleNamespace(capability=(9, 0), capturing=False, difference=None, compared=[])

    def record(_backend, *kind):
        settings.compared.append(kind)
        return settings.difference

    monkeypatch.setattr(backend_module, "_is_installed", lambda: True)
    monkeypatch.setattr(backend_module, "interpreting", lambda: False)
    monkeypatch.setattr(backend_module, "compare", record)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: settings.capability)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: settings.capturing)
    monkeypatch.setattr(torch.version, "hip", None)
    verification.too_old.cache_clear()
    backend = TritonBackend()

    def supports(rows=16, width=24, dtype=torch.float32, index=0, activation="gelu", depth=3):
        def tensor(*shape):
            device = torch.device("cuda", index)
            return SimpleNamespace(
                device=device, dtype=dtype, shape=torch.Size(shape), layout=torch.strided, dim=lambda: 2
            )

        weight = tensor(2 ** (depth + 1) - 1, width)
        return backend.supports(tensor(rows, width), weight, weight, 1, depth, activation)

    settings.supports = supports
    yield settings
    verification.too_old.cache_clear()


def test_every_kind_of_call_on_every_device_is_compared_once(gpu):
    kinds = [
        {},
        {"index": 1},
        {"dtype": torch.bfloat16},
        {"activation": "relu"},
        {"width": 40},
        {"rows": 4096, "depth": 11},
    ]
    for _ in range(2):
        assert [gpu.supports(**kind) for kind in kinds] == [None] * len(kinds)
    assert len(gpu.compared) == len(kinds)
    assert gpu.compared[0] == (torch.device("cuda", 0), torch.float32, "gelu", (24, 24, 1, 3), "walk", False)
    assert gpu.compared[-1][3:5] == ((24, 24, 1, 11), "subtrees")
    assert gpu.supports(rows=17) is None and len(gpu.compared) == len(kinds)  # the number of rows compiles nothing
    assert gpu.supports(rows=0, width=33) is None and len(gpu.compared) == len(kinds)


def test_a_difference_declines_with_one_warning_and_its_reason(gpu):
    gpu.difference = "logits differ"
    with pytest.warns(RuntimeWarning, match="Triton kernels are not used on cuda:0: logits differ"):
        assert gpu.supports() == "logits differ"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gpu.supports() == "logits differ"


def test_old_gpus_are_declined_without_running_anything(gpu):
    gpu.capability = (7, 5)
    assert gpu.supports() == "cuda:0 has compute capability 7.5; at least 8.0"
    assert gpu.compared == []
    verification.too_old.cache_clear()
    gpu.capability = (8, 0)
    assert gpu.supports() is None


def test_the_first_call_cannot_be_captured(gpu):
    gpu.capturing = True
    assert "CUDA graph" in gpu.supports() and gpu.compared == []
    gpu.capturing = False
    assert gpu.supports() is None
    gpu.capturing = True
    assert gpu.supports() is None


def test_a_call_on_a_cpu_asks_for_no_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", asked.append)
    x, weight = torch.zeros(2, 4), torch.zeros(7, 4)
    if not backend_module.interpreting():
        assert TritonBackend().supports(x, weight, weight, 1, 2, "gelu") is not None
    assert asked == []
