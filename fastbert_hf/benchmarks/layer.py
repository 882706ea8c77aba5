"""One feed-forward layer: trees against the dense layer of the same neurons, forward and backward."""

import ctypes
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert_hf.benchmarks import forms
from fastbert_hf.benchmarks.levels import NAMES as LEVEL_NAMES
from fastbert_hf.benchmarks.levels import compile_levels, level_form
from fastbert_hf.benchmarks.rows import Row, make_rows
from fastbert_hf.benchmarks.timing import Stopwatch, interleaved, wall_seconds
from fastbert_hf.fff_layer import FastFeedForward
from fastbert_hf.fff_op import BACKENDS, fff, use_backend
from fastbert_hf.fff_reference import nodes_per_tree

TIE_MARGIN = 1e-4  # rows with a logit nearer to 0 may take either path: they are left out of the check
WIDTH = 768
LEVEL_FORM_TOKENS = 128  # the vector forms take seconds beyond this


class LayerProblem:
    """A layer, its inputs and what its output should be.

    Args:
        layer: the trees. x: (N, H) float32, in the layer's dtype where that differs.
    """

    def __init__(self, layer: FastFeedForward, x: Tensor):
        self.layer, self.x = layer.eval(), x.to(layer.weight_in.dtype)
        with torch.no_grad(), use_backend("reference"):
            op = torch.ops.fastbert.fff_v1
            self.y, self.visited, logits = op(self.x, *self.parameters, layer.trees, layer.depth, layer.activation)
        self.clear = logits.abs().amin(dim=(1, 2)) > TIE_MARGIN

    @property
    def parameters(self) -> tuple[Tensor, Tensor | None, Tensor]:
        return self.layer.weight_in.detach(), self.layer.bias_in.detach(), self.layer.weight_out.detach()

    def labels(self, tokens: int, kind: str = "balanced") -> dict[str, str | int]:
        """The fields that rows of this problem share: case, tokens, threads, dtype, inputs (their kind)."""
        return {
            "case": f"{self.layer.trees}x{self.layer.depth}",
            "tokens": tokens,
            "threads": torch.get_num_threads(),
            "dtype": str(self.x.dtype).removeprefix("torch."),
            "inputs": kind,
        }

    def match(self, y: Tensor) -> str:
        """Whether y (N, H) is the reference's output, and how near."""
        return verdict(y[self.clear], self.y[self.clear])

    def bound_seconds(self, ceilings: dict[str, float]) -> float:
        """What the walk needs at least: every used byte once, every multiplication and addition."""
        rows, width = self.x.shape
        first_row = torch.arange(self.layer.trees, device=self.visited.device).view(1, -1, 1) * (
            nodes_per_tree(self.layer.depth)
        )
        used_rows = (self.visited + first_row).unique().numel()
        num_bytes = (2 * rows * width + 2 * used_rows * width) * self.x.element_size()
        flops = 4 * rows * width * self.layer.neurons_per_token
        return max(num_bytes / ceilings["bytes_per_second"], flops / ceilings["flops_per_second"])

    def dense_bound_seconds(self, ceilings: dict[str, float]) -> float:
        """What the dense layer of the same neurons needs at least."""
        rows, width = self.x.shape
        num_bytes = (2 * rows * width + 2 * self.layer.neurons * width) * self.x.element_size()
        flops = 4 * rows * width * self.layer.neurons
        return max(num_bytes / ceilings["bytes_per_second"], flops / ceilings["flops_per_second"])


def verdict(value: Tensor, expected: Tensor) -> str:
    """ "ok" or "MISMATCH" with the largest difference relative to the largest value."""
    if expected.numel() == 0:
        return "no clear row"
    scale = expected.abs().max().double()
    difference = ((value.double() - expected.double()).abs().max() / scale).item()
    allowed = 2e-2 if expected.dtype == torch.bfloat16 else 2e-5
    return f"{'ok' if difference <= allowed else 'MISMATCH'} {difference:.0e}"


def make_layer(depth: int = 11, trees: int = 1, dtype: torch.dtype = torch.float32) -> FastFeedForward:
    """A layer as it is at the start of training, H = 768."""
    torch.manual_seed(0)
    layer = FastFeedForward(WIDTH, WIDTH, depth, trees)
    return layer.to(dtype)


def make_inputs(tokens: int, kind: str = "balanced") -> Tensor:
    """x (N, H): "balanced" rows spread over all leaves; "one path" rows differ too little to part ways."""
    generator = torch.Generator().manual_seed(1)
    if kind == "balanced":
        return F.layer_norm(torch.randn(tokens, WIDTH, generator=generator), (WIDTH,))
    base = F.layer_norm(torch.randn(1, WIDTH, generator=generator), (WIDTH,))
    return base + 1e-4 * torch.randn(tokens, WIDTH, generator=generator)


def fed(function: Callable[[Tensor], Tensor], x: Tensor, tokens: int) -> Callable[[], Tensor]:
    """The function called with x (N, H); with one token a call, with the next row of x as (1, H)."""
    if tokens > 1:
        return lambda: function(x)
    rows = itertools.cycle([x[i : i + 1] for i in range(x.shape[0])])
    return lambda: function(next(rows))


def native_c_call(layer: FastFeedForward, x: Tensor, y: Tensor, threads: int, rows_per_call: int):
    """The native kernel called through ctypes, arguments prepared: walks `rows_per_call` fresh rows of x a call."""
    from fastbert_hf.kernels.native.kernels import ACTIVATION_CODES, DTYPE_CODES
    from fastbert_hf.kernels.native.library import load_library

    forward = load_library().fff_forward
    stride = rows_per_call * x.shape[1] * x.element_size()
    starts = itertools.cycle([x.data_ptr() + i * stride for i in range(x.shape[0] // rows_per_call)])
    weights = [t.data_ptr() for t in (layer.weight_in, layer.bias_in, layer.weight_out)]
    sizes = (rows_per_call, x.shape[1], y.shape[1], layer.trees)
    codes = (layer.depth, ACTIVATION_CODES[layer.activation], DTYPE_CODES[x.dtype], threads)
    rest = [ctypes.c_void_p(p) for p in (*weights, y.data_ptr())] + [None, None]
    rest += [ctypes.c_int64(v) for v in sizes] + [ctypes.c_int(v) for v in codes]

    def call():
        forward(next(starts), *rest)
        return y

    return call


def compiled(function: Callable) -> Callable:
    """torch.compile with static shapes; every variant is compiled for itself."""
    return torch.compile(function, dynamic=False)


def dense_entries(problem: LayerProblem, tokens: int, compile_dense: bool) -> dict[str, Callable]:
    """The dense layer of the same neurons, as it is and one neuron wider (an even width), eager and compiled."""
    weight_in, bias_in, weight_out = problem.parameters
    neurons = weight_in.shape[0]
    wider = (F.pad(weight_in, (0, 0, 0, 1)), F.pad(bias_in, (0, 1)), F.pad(weight_out, (0, 0, 0, 1)))
    entries = {}
    torch._dynamo.reset()  # its cache holds eight shapes a function, then falls back to eager
    for width, weights in ((neurons, (weight_in, bias_in, weight_out)), (neurons + 1, wider)):
        variants = {"eager": forms.dense} | ({"compiled": compiled(forms.dense)} if compile_dense else {})
        for variant, function in variants.items():
            call = partial(_apply, function, weights)
            entries[f"dense {width} {variant} (function call)"] = fed(call, problem.x, tokens)
    return entries


def _apply(function: Callable, weights: tuple[Tensor, ...], x: Tensor) -> Tensor:
    return function(x, *weights)


def forward_entries(problem: LayerProblem, threads: int, tokens: int, levels) -> dict[str, Callable]:
    """Every form of the trees that runs here, by "name (entry point)"."""
    layer, x_all = problem.layer, problem.x
    weights = problem.parameters
    entries: dict[str, Callable] = {}

    def add(name: str, function: Callable[[Tensor], Tensor]) -> None:
        entries[name] = fed(function, x_all, tokens)

    if layer.trees == 1:
        add("FFF BMM (function call)", lambda x: forms.fff_bmm(x, *weights, layer.depth))
    for name in backends_for(layer, x_all):
        add(f"{name} (module call)", layer)
    if "native (module call)" in entries:
        y = torch.empty(tokens, layer.out_features, dtype=x_all.dtype)
        entries["native (C call)"] = native_c_call(layer, x_all, y, threads, tokens)
    if layer.trees == 1 and not isinstance(levels, str) and threads == 1 and x_all.dtype == torch.float32:
        y_level = torch.empty(tokens, layer.out_features)
        names = LEVEL_NAMES if tokens <= LEVEL_FORM_TOKENS else LEVEL_NAMES[2:]
        for name in names:
            form = level_form(levels, name)
            kind, level = name.split("_level")
            title = f"{'FFF' if kind == 'fff' else kind} Level {level} (C call)"
            add(title, lambda x, form=form: form(x, *weights, y_level))
    if layer.trees == 1 and tokens <= LEVEL_FORM_TOKENS:
        add("dense BMM (function call)", lambda x: forms.dense_bmm(x, *weights))
    return entries


def backends_for(layer: FastFeedForward, x: Tensor) -> list[str]:
    """Names of the backends that compute this layer on inputs like x (N, H) here."""
    call = (x, layer.weight_in, layer.weight_out, layer.trees, layer.depth, layer.activation)
    return [name for name, b in BACKENDS.items() if b.unavailable() is None and b.supports(*call) is None]


def backends_around(entries: dict[str, Callable]) -> dict[str, Callable]:
    """The backend choice under which an entry named after a backend runs, as `interleaved` takes it."""
    names = {entry: entry.partition(" (")[0] for entry in entries}
    return {entry: partial(use_backend, name) for entry, name in names.items() if name in BACKENDS}


def checked(problem: LayerProblem, entries: dict[str, Callable], tokens: int, around: dict) -> dict[str, str]:
    """Run every entry once on the problem's rows and compare: trees with the reference, dense with dense."""
    matches = {}
    weight_in, bias_in, weight_out = problem.parameters
    with torch.no_grad():
        dense = forms.dense(problem.x[: max(tokens, 1)], weight_in, bias_in, weight_out)
    for name, call in entries.items():
        with around.get(name, nullcontext)():
            first = call()
        if tokens == 1:  # rows come one by one: the first call gave row 0
            expected, clear = (dense, True) if name.startswith("dense") else (problem.y[:1], bool(problem.clear[0]))
            matches[name] = verdict(first, expected) if clear else "no clear row"
        else:
            matches[name] = verdict(first, dense) if name.startswith("dense") else problem.match(first)
    return matches


def forward_rows(
    tokens: int,
    threads: int,
    ceilings: dict[str, float],
    *,
    depth: int = 11,
    trees: int = 1,
    dtype: torch.dtype = torch.float32,
    kind: str = "balanced",
    section: str = "forward",
    rounds: int = 7,
    compile_dense: bool = True,
    problem: LayerProblem | None = None,
    stopwatch: Stopwatch = wall_seconds,
) -> list[Row]:
    """Time one forward pass of every form; the baseline is the fastest dense one.

    Args:
        tokens: N; with N = 1 every call gets a fresh token out of 4096.
        threads: threads of torch and the kernels.
        ceilings: the machine's "bytes_per_second" and "flops_per_second", the latter for "dtype" (float32).
        problem: another layer and its inputs than this function makes, on any device.
        stopwatch: as for `interleaved`.
    """
    torch.set_num_threads(threads)
    problem = problem or LayerProblem(
        make_layer(depth, trees, dtype), make_inputs(4096 if tokens == 1 else tokens, kind)
    )
    levels = compile_levels() if kind == "balanced" and section == "forward" else "not in this section"
    with torch.inference_mode():
        entries = {
            **dense_entries(problem, tokens, compile_dense),
            **forward_entries(problem, threads, tokens, levels),
        }
        around = backends_around(entries)
        matches = checked(problem, entries, tokens, around)
        timings = interleaved(entries, rounds, around=around, stopwatch=stopwatch)
    baseline = min((n for n in timings if n.startswith("dense ") and n[6].isdigit()), key=lambda n: timings[n].median)
    one = LayerProblem(problem.layer, problem.x[:1]) if tokens == 1 else problem
    trees_bound, dense_bound = one.bound_seconds(ceilings), one.dense_bound_seconds(ceilings)
    bounds = {name: dense_bound if name.startswith("dense") else trees_bound for name in timings}
    if problem.x.dtype != ceilings.get("dtype", torch.float32):
        bounds = {}
    bounds = {name: bound for name, bound in bounds.items() if not name.startswith("mixture")}
    return make_rows(
        timings,
        baseline,
        matches,
        bounds,
        section=section,
        **problem.labels(tokens, kind),
    )


def training_step(
    function: Callable[..., Tensor], leaves: list[Tensor], grad_y: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """A call that gives the function's output and the gradients of its arguments."""

    def step() -> tuple[Tensor, ...]:
        y = function(*leaves)
        return (y, *torch.autograd.grad(y, leaves, grad_y))

    return step


def training_rows(
    tokens: int,
    threads: int,
    rounds: int = 7,
    depth: int = 11,
    trees: int = 1,
    problem: LayerProblem | None = None,
    section: str = "forward and backward",
    more_forms: dict[str, Callable[..., Tensor]] | None = None,
    other_steps: dict[str, Callable[[], object]] | None = None,
    stopwatch: Stopwatch = wall_seconds,
) -> list[Row]:
    """Forward and backward, gradients of input and parameters, against dense-and-mask and against plain dense.

    Args:
        tokens, threads, rounds, depth, trees, problem, section, stopwatch: as for `forward_rows`.
        more_forms: further functions of (x, weight_in, bias_in, weight_out), by name.
        other_steps: whole steps of something else to time beside them, by name.
    """
    torch.set_num_threads(threads)
    problem = problem or LayerProblem(make_layer(depth, trees), make_inputs(tokens))
    layer, trees, depth = problem.layer, problem.layer.trees, problem.layer.depth
    leaves = [problem.x.clone().requires_grad_(), *(p.clone().requires_grad_() for p in problem.parameters)]
    grad_y = torch.randn_like(problem.y, memory_format=torch.contiguous_format)
    grad_y[~problem.clear] = 0  # rows near a tie may take either path
    masked = partial(forms.dense_and_mask, trees=trees, depth=depth)
    functions = {"dense-and-mask": masked, "dense": forms.dense, **(more_forms or {})}
    entries = {f"{name} (function call)": training_step(form, leaves, grad_y) for name, form in functions.items()}
    for name in backends_for(layer, problem.x):
        walk = partial(fff, trees=trees, depth=depth, activation=layer.activation)
        entries[f"{name} (op with autograd)"] = training_step(walk, leaves, grad_y)
    around = backends_around(entries)
    results = {}
    for name, call in entries.items():
        with around.get(name, nullcontext)():
            results[name] = call()
    expected = results["reference (op with autograd)"]
    matches = {
        name: "" if name.startswith(("dense (", "dense compiled")) else gradients_match(values, expected)
        for name, values in results.items()
    }
    entries |= {f"{name} (function call)": step for name, step in (other_steps or {}).items()}
    timings = interleaved(entries, rounds, around=around, stopwatch=stopwatch)
    return make_rows(
        timings,
        "dense-and-mask (function call)",
        matches,
        section=section,
        **problem.labels(tokens),
    )


def gradients_match(values: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str:
    """The worst verdict over the gradients; the output comes first and is not compared: its rows may hold ties."""
    verdicts = [verdict(value, right) for value, right in zip(values[1:], expected[1:])]
    return max(verdicts, key=lambda text: (text.startswith("MISMATCH"), float(text.split()[-1])))
