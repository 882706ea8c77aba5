"""The same layer on a GPU: timed by events, against cuBLAS, with the card's own ceilings, and peak memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fastbert_hf.benchmarks import forms, layer, models
from fastbert_hf.benchmarks.memory import MemoryRow
from fastbert_hf.benchmarks.rows import Row, make_rows
from fastbert_hf.benchmarks.timing import Stopwatch, interleaved, wall_seconds
from fastbert_hf.fff_op import fff, use_backend
from fastbert_hf.kernels.triton.regimes import REGIMES, use_regime

DTYPES = (torch.bfloat16, torch.float32)


def event_seconds(call: Callable[[], object], times: int) -> float:
    """Seconds that so many calls take on the GPU, between two events of its stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def stopwatch_for(device: str) -> Stopwatch:
    """Events on a GPU, the wall clock elsewhere."""
    return event_seconds if device == "cuda" else wall_seconds


def gpu_ceilings(device: str = "cuda", size: int = 8192) -> dict[str, float]:
    """Bandwidth (bytes/s, copying) and float32 arithmetic without TF32 (FLOP/s), and that of bfloat16, measured."""
    big = torch.ones(size * size, device=device)
    target = torch.empty_like(big)
    exact = torch.randn(size, size, device=device)
    half = exact.bfloat16()
    calls = {"copy": lambda: target.copy_(big), "float32": lambda: exact @ exact, "bfloat16": lambda: half @ half}
    times = interleaved(calls, 5, stopwatch=stopwatch_for(device))
    return {
        "bytes_per_second": 2 * big.numel() * big.element_size() / times["copy"].median,
        "flops_per_second": 2 * size**3 / times["float32"].median,
        "bfloat16_flops_per_second": 2 * size**3 / times["bfloat16"].median,
    }


def make_problem(tokens: int, dtype: torch.dtype, device: str, depth: int = 11) -> layer.LayerProblem:
    """The layer at the start of training and balanced inputs, on the device."""
    return layer.LayerProblem(
        layer.make_layer(depth, 1, dtype).to(device), layer.make_inputs(tokens).to(device, dtype)
    )


def forward_rows(tokens: int, dtype: torch.dtype, ceilings: dict, device: str = "cuda", depth: int = 11) -> list[Row]:
    """One forward pass of every form; the baseline is the fastest dense layer, compiled or not."""
    return layer.forward_rows(
        tokens,
        torch.get_num_threads(),
        ceilings,
        section="gpu forward",
        compile_dense=device == "cuda",
        problem=make_problem(4096 if tokens == 1 else tokens, dtype, device, depth),
        stopwatch=stopwatch_for(device),
    )


def experts_for(problem: layer.LayerProblem) -> tuple[Tensor, Tensor, Tensor]:
    """Router (E, H), weights (E, H, w) and (E, w, H): as many neurons as the trees; w = 16, the least a GPU takes."""
    neurons, width = problem.layer.weight_in.shape
    active = 16
    experts = max(1, (neurons + 1) // active)
    generator = torch.Generator().manual_seed(2)
    shapes = ((experts, width), (experts, width, active), (experts, active, width))
    return tuple(torch.randn(shape, generator=generator).mul_(0.02).to(problem.x) for shape in shapes)


def experts_match(x: Tensor, router: Tensor, weight_in: Tensor, weight_out: Tensor, y: Tensor) -> str:
    """Whether y (N, H) is what one expert after the other gives."""
    expert = torch.nn.functional.linear(x, router).argmax(-1)
    expected = torch.empty_like(y)
    for number in expert.unique().tolist():
        rows = expert == number
        expected[rows] = torch.nn.functional.gelu(x[rows] @ weight_in[number]) @ weight_out[number]
    return layer.verdict(y, expected)


def expert_rows(tokens: int, dtype: torch.dtype, device: str = "cuda", depth: int = 11) -> list[Row]:
    """Forward of the trees against a mixture of experts by grouped products: as many neurons, about as many used."""
    problem = make_problem(tokens, dtype, device, depth)
    weights = experts_for(problem)
    functions: dict[str, Callable[[Tensor], Tensor]] = {"mixture": lambda x: forms.mixture_of_experts(x, *weights)}
    if device == "cuda":
        functions["mixture compiled"] = layer.compiled(functions["mixture"])
    entries, matches = {}, {}
    with torch.inference_mode():
        for name, function in functions.items():
            entry = f"{name} (function call)"
            entries[entry] = lambda function=function: function(problem.x)
            matches[entry] = experts_match(problem.x, *weights, function(problem.x))
        for name in layer.backends_for(problem.layer, problem.x):
            entries[f"{name} (module call)"] = lambda: problem.layer(problem.x)
        around = layer.backends_around(entries)
        matches |= layer.checked(problem, {name: entries[name] for name in around}, tokens, around)
        timings = interleaved(entries, around=around, stopwatch=stopwatch_for(device))
    baseline = min((name for name in timings if name.startswith("mixture")), key=lambda name: timings[name].median)
    return make_rows(
        timings,
        baseline,
        matches,
        section="gpu forward, against experts",
        **problem.labels(tokens),
    )


def training_rows(tokens: int, dtype: torch.dtype, device: str = "cuda", depth: int = 11) -> list[Row]:
    """Forward and backward with all gradients, against dense and dense-and-mask, compiled too, and experts."""
    problem = make_problem(tokens, dtype, device, depth)
    leaves = [problem.x.clone().requires_grad_(), *(weight.requires_grad_() for weight in experts_for(problem))]
    grad_y = torch.ones_like(problem.x)

    def experts() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forms.mixture_of_experts(*leaves), [leaves[0], *leaves[2:]], grad_y)

    more = {}
    if device == "cuda":
        torch._dynamo.reset()
        masked = partial(forms.dense_and_mask, trees=problem.layer.trees, depth=depth)
        more = {"dense compiled": layer.compiled(forms.dense), "dense-and-mask compiled": layer.compiled(masked)}
    return layer.training_rows(
        tokens,
        torch.get_num_threads(),
        problem=problem,
        section="gpu forward and backward",
        more_forms=more,
        other_steps={"mixture": experts},
        stopwatch=stopwatch_for(device),
    )


def model_rows(device: str = "cuda", batch: int = 128, tokens: int = 128, layers: int = 16) -> Iterator[list[Row]]:
    """The published geometry in bfloat16, compiled: inference, and a training step with float32 weights."""
    place = models.Place(device, torch.bfloat16, compile=device == "cuda", stopwatch=stopwatch_for(device))
    threads = torch.get_num_threads()
    yield models.inference_rows(batch, tokens, threads, layers=layers, place=place)
    yield models.training_rows(batch, tokens, threads, layers=layers, place=place)


@contextmanager
def tf32_products() -> Iterator[None]:
    """float32 products of torch, and those of kernels that follow its setting, on tensor cores."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def graph_rows(tokens: int, dtype: torch.dtype) -> list[Row]:
    """A forward pass replayed as a CUDA graph, so that launching costs nobody anything; GPU only."""
    problem = make_problem(tokens, dtype, "cuda")
    weights = problem.parameters
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "dense 4095 eager": lambda x: forms.dense(x, *weights),
        "dense 4095 compiled": layer.compiled(lambda x: forms.dense(x, *weights)),
    }
    functions |= {name: problem.layer for name in layer.backends_for(problem.layer, problem.x) if name == "triton"}
    entries, matches = {}, {}
    with torch.inference_mode():
        for name, function in functions.items():
            for _ in range(3):
                function(problem.x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = function(problem.x)
            graph.replay()
            entry = f"{name} (CUDA graph)"
            entries[entry] = graph.replay
            matches[entry] = problem.match(y) if name == "triton" else ""
        timings = interleaved(entries, stopwatch=event_seconds)
    return make_rows(
        timings,
        min((name for name in timings if name.startswith("dense")), key=lambda name: timings[name].median),
        matches,
        section="gpu forward, graphs",
        **problem.labels(tokens),
    )


@contextmanager
def _triton_by(regime: str) -> Iterator[None]:
    with use_backend("triton"), use_regime(regime):
        yield


def regime_rows(
    tokens: int, depth: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda", rounds: int = 7
) -> list[Row]:
    """The two ways of the Triton kernels through the trees, forward and with backward: what choosing rests on."""
    problem = make_problem(tokens, dtype, device, depth)
    leaves = [problem.x.clone().requires_grad_(), *(p.clone().requires_grad_() for p in problem.parameters)]
    grad_y = torch.randn_like(problem.y, memory_format=torch.contiguous_format)
    grad_y[~problem.clear] = 0  # rows near a tie may take either path
    call = partial(fff, trees=1, depth=depth, activation=problem.layer.activation)
    step = layer.training_step(call, leaves, grad_y)
    with use_backend("reference"):
        expected = step()

    @torch.inference_mode()
    def forward() -> Tensor:
        return problem.layer(problem.x)

    rows = []
    for point, function, match in (
        ("module call", forward, problem.match),
        ("op with autograd", step, lambda values: layer.gradients_match(values, expected)),
    ):
        around = {f"{regime} ({point})": partial(_triton_by, regime) for regime in REGIMES}
        matches = {}
        for name, place in around.items():
            with place():
                matches[name] = match(function())
        entries = dict.fromkeys(around, function)
        timings = interleaved(entries, rounds, around=around, stopwatch=stopwatch_for(device))
        rows += make_rows(
            timings,
            f"{REGIMES[0]} ({point})",
            matches,
            section="gpu regimes",
            **problem.labels(tokens),
        )
    return rows


def memory_rows(tokens: int = 16384) -> list[MemoryRow]:
    """Peak memory of forward and backward above inputs, parameters and their gradients; GPU only."""
    problem = make_problem(tokens, torch.bfloat16, "cuda")
    tree, activation = (problem.layer.trees, problem.layer.depth), problem.layer.activation
    calls: dict[str, Callable[..., Tensor]] = {"dense": forms.dense}
    calls["dense-and-mask"] = lambda *t: forms.dense_and_mask(*t, *tree)
    for name in layer.backends_for(problem.layer, problem.x):
        calls[name] = lambda *t, name=name: _with_backend(name, lambda: fff(*t, *tree, activation))
    rows = []
    for name, call in calls.items():
        leaves = [t.clone().requires_grad_() for t in (problem.x, *problem.parameters)]
        results = sum(t.numel() * t.element_size() for t in leaves)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(*leaves).sum().backward()
        peak = torch.cuda.max_memory_allocated() - before - results
        rows.append(MemoryRow(f"{name}, forward and backward on the GPU", tokens, peak / 2**20))
    return rows


def _with_backend(name: str, call: Callable[[], Tensor]) -> Tensor:
    with use_backend(name):
        return call()


def gpu_rows(
    device: str = "cuda", sizes: tuple[int, ...] = (1, 128, 1024, 16384), batch: int = 128, layers: int = 16
) -> Iterator[list[Row]]:
    """Every group of rows; on another device than a GPU those that need none."""
    depth = 11 if device == "cuda" else 5
    measured = gpu_ceilings(device, 8192 if device == "cuda" else 64)
    for dtype in DTYPES:
        flops = "bfloat16_flops_per_second" if dtype == torch.bfloat16 else "flops_per_second"
        ceilings = {**measured, "flops_per_second": measured[flops], "dtype": dtype}
        for tokens in sizes:
            yield forward_rows(tokens, dtype, ceilings, device, depth)
        yield expert_rows(max(sizes), dtype, device, depth)
        yield training_rows(max(sizes), dtype, device, depth)
    with tf32_products():
        rows = forward_rows(max(sizes), torch.float32, {**ceilings, "dtype": None}, device, depth)
        rows += training_rows(max(sizes), torch.float32, device, depth)
        yield [replace(row, dtype="float32, TF32 products") for row in rows]
    if device == "cuda":
        for tokens in (1, 128):
            yield graph_rows(tokens, torch.bfloat16)
        for tree_depth in (5, 7, 9, 11):
            for tokens in (128, 512, 2048, 4096, 16384):
                yield regime_rows(tokens, tree_depth)
    yield from model_rows(device, batch, 128 if device == "cuda" else 8, layers)
