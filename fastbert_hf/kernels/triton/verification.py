"""Compare the kernels with the reference on the device at hand before any result of theirs is used.

What Triton compiles for a device is checked where it runs: on first use, by a small call forward and backward.
"""

import functools
import threading
import warnings
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from fastbert_hf.fff_reference import fff_backward, fff_forward, nodes_per_tree

LEAST_CAPABILITY = (8, 0)  # of NVIDIA GPUs; nobody compiled the kernels for older ones
ROWS = 64
MARGIN = 1e-3  # rows with a logit closer to a tie are left out; logits are of order 1
MOST_WEIGHTS = 1 << 23  # elements of the weights, which are drawn on the CPU
LOGIT_TOLERANCE = 1e-4  # relative to the largest value, as the others
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
TF32_TOLERANCE = 5e-3


@functools.cache
def too_old(device: torch.device) -> str | None:
    """Why a GPU is older than what the kernels are compiled for, or None. AMD numbers its GPUs otherwise."""
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= LEAST_CAPABILITY:
        return None
    has, least = (".".join(map(str, numbers)) for numbers in (capability, LEAST_CAPABILITY))
    return f"{device} has compute capability {has}; at least {least}"


class Verifications:
    """The results of comparisons, each made once a process."""

    def __init__(self):
        self._reasons: dict[Hashable, str | None] = {}
        self._lock = threading.Lock()

    def reason(self, key: Hashable, device: torch.device, compare: Callable[[], str | None]) -> str | None:
        """Why the kernels must not be used for calls of this kind, or None; warns when it finds a reason."""
        if key in self._reasons:
            return self._reasons[key]
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "a CUDA graph is captured, which leaves no room for its first comparison; make a call before"
        with self._lock:
            if key not in self._reasons:
                self._reasons[key] = reason = compare()
                if reason is not None:
                    warnings.warn(f"Triton kernels are not used on {device}: {reason}", RuntimeWarning, stacklevel=2)
        return self._reasons[key]


def compare(
    backend, device: torch.device, dtype: torch.dtype, activation: str, sizes: Sequence[int], regime: str, tf32: bool
) -> str | None:
    """Compare a backend with the reference on the CPU: output, paths, logits and every gradient.

    Args:
        backend: its `infer`, `forward` and `backward` take `regime`.
        device: where it runs. dtype: of its tensors.
        sizes: H, H_out, P, D of the call that asks; many trees and large trees are cut to fewer.
        tf32: whether products may be rounded to TF32.
    Returns: a sentence that says what failed or differs, or None.
    """
    kind = f"{dtype}, {activation}, {regime}"
    try:
        difference = _difference(backend, device, dtype, activation, sizes, regime, tf32)
    except torch.OutOfMemoryError:  # says nothing about the kernels
        raise
    except Exception as error:  # whatever a compiler, a driver or a launch raises is a reason not to use the kernels
        first_line = (str(error).strip().splitlines() or [""])[0]
        return f"{kind}: {type(error).__name__}: {first_line}"
    return None if difference is None else f"{kind}: {difference}"


@torch.no_grad()
def _difference(backend, device, dtype, activation, sizes, regime, tf32) -> str | None:
    width, out_width, trees, depth = sizes
    trees = min(trees, 2)
    while depth > 7 and trees * nodes_per_tree(depth) * (width + out_width) > MOST_WEIGHTS:
        depth -= 1
    x, parameters, grad_y = _problem(width, out_width, trees, depth, dtype)
    call = (trees, depth, activation)
    logits = fff_forward(x, *parameters, *call)[2]
    is_clear = logits.abs().flatten(1).amin(1) > MARGIN
    x, grad_y = x[is_clear], grad_y[is_clear]
    y, visited, logits = fff_forward(x, *parameters, *call)
    wanted = [y, *fff_backward(grad_y, x, *parameters, visited, logits, activation, [True] * 4)]

    x, grad_y, *parameters = (t.to(device) for t in (x, grad_y, *parameters))
    own_y, own_visited, own_logits = backend.forward(x, *parameters, *call, regime=regime)
    if not torch.equal(own_visited.cpu(), visited):  # backward with such paths could read outside of the tensors
        return "tokens take other paths than in the reference"
    paths = (own_visited, own_logits)
    gradients = backend.backward(grad_y, x, *parameters, *paths, activation, [True] * 4, regime=regime)
    inferred = backend.infer(x, *parameters, *call, regime=regime)
    tolerance = TF32_TOLERANCE if tf32 and dtype == torch.float32 else TOLERANCES[dtype]
    names = ("output", "gradient of x", "gradient of weight_in", "gradient of bias_in", "gradient of weight_out")
    results = [("logits", own_logits, logits, LOGIT_TOLERANCE), ("output alone", inferred, y, tolerance)]
    results += [(*triple, tolerance) for triple in zip(names, (own_y, *gradients), wanted, strict=True)]
    for name, value, expected, most in results:
        error = _relative_error(value.cpu(), expected)
        if not error <= most:  # NaN too
            return f"{name} differs from the reference by {error:.1e} of its largest value"
    return None


def _problem(width: int, out_width: int, trees: int, depth: int, dtype: torch.dtype):
    """x, (weight_in, bias_in, weight_out) and grad_y on the CPU, always the same."""
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32) * scale).to(dtype)

    nodes = trees * nodes_per_tree(depth)
    parameters = (
        normal(nodes, width, scale=max(1, width) ** -0.5),
        normal(nodes, scale=0.3),
        normal(nodes, out_width),
    )
    return normal(ROWS, width), parameters, normal(ROWS, out_width)


def _relative_error(value: Tensor, expected: Tensor) -> float:
    if value.shape != expected.shape or value.dtype != expected.dtype:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    largest = expected.double().abs().max().clamp_min(1e-30)
    return float((value.double() - expected.double()).abs().max() / largest)
