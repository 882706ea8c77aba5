"""Leaf trees: one layer and a whole encoder, against dense layers of the width that they replace and of their own.

The layer's geometries are those of two models people use: MiniLM (H = 384, a dense layer of 1536) and BERT-base
(H = 768, a dense layer of 3072), with 32 leaves of a sixteenth of the dense layer's neurons.
"""

import ctypes
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert_hf import FastBertConfig, FastBertModel, use_backend
from fastbert_hf.benchmarks.layer import (
    TIE_MARGIN,
    backends_around,
    compiled,
    fed,
    gradients_match,
    training_step,
    verdict,
)
from fastbert_hf.benchmarks.models import NoFeedForward, with_feed_forward
from fastbert_hf.benchmarks.rows import Row, make_rows
from fastbert_hf.benchmarks.timing import interleaved
from fastbert_hf.leaf_layer import LeafFeedForward
from fastbert_hf.leaf_op import LEAF_BACKENDS, leaf_trees

LEAF_DEPTH = 5
FRESH_ROWS = 4096  # with one token a call, every call gets the next of so many
MINILM = {"vocab_size": 30522, "hidden_size": 384, "num_attention_heads": 12, "max_position_embeddings": 512}
BERT_SHAPE = {
    "norm_scheme": "post",
    "use_bias": True,
    "type_vocab_size": 2,
    "position_embedding_type": "absolute",
    "final_norm": False,
}


def dense_width(hidden: int) -> int:
    """Neurons of the dense layer of a BERT of that width: 4 H."""
    return 4 * hidden


def leaf_width(hidden: int) -> int:
    """Neurons w of a leaf: a sixteenth of the dense layer's."""
    return dense_width(hidden) // 16


class LeafProblem:
    """A layer of leaf trees, its inputs and what its output should be.

    Args:
        hidden: H. tokens: N. dtype: of parameters and inputs.
    """

    def __init__(self, hidden: int, tokens: int, dtype: torch.dtype = torch.float32):
        generator = torch.Generator().manual_seed(1)
        torch.manual_seed(0)
        self.layer = LeafFeedForward(hidden, hidden, LEAF_DEPTH, leaf_width(hidden)).to(dtype).eval()
        self.x = F.layer_norm(torch.randn(tokens, hidden, generator=generator), (hidden,)).to(dtype)
        with torch.no_grad(), use_backend("reference"):
            outputs = torch.ops.fastbert.leaf_trees_v1(self.x, *self.layer.op_arguments())
        self.y = outputs[0]
        self.clear = outputs[3].abs().amin(1) > TIE_MARGIN  # others may take either leaf

    def labels(self, tokens: int) -> dict[str, str | int]:
        """The fields that rows of this problem share."""
        return {
            "case": f"H={self.layer.in_features}, {2**LEAF_DEPTH} leaves of {self.layer.leaf_width}",
            "tokens": tokens,
            "threads": torch.get_num_threads(),
            "dtype": str(self.x.dtype).removeprefix("torch."),
            "inputs": "normed noise",
        }

    def bound_seconds(self, rows: int, ceilings: dict[str, float]) -> float:
        """What `rows` rows need at least: every used byte once, every multiplication and addition."""
        layer, hidden = self.layer, self.layer.in_features
        leaves = min(rows, 2**layer.depth)
        values = 2 * rows * hidden + (2 * leaves * layer.leaf_width + layer.depth) * hidden
        flops = 2 * rows * hidden * (2 * layer.leaf_width + layer.depth)
        seconds = flops / ceilings["flops_per_second"]
        return max(values * self.x.element_size() / ceilings["bytes_per_second"], seconds)


def dense_layer(x: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, bias_out: Tensor) -> Tensor:
    """BERT's own feed-forward layer, as nn.Linear computes it: (N, H) -> (N, H)."""
    return F.linear(F.gelu(F.linear(x, weight_in, bias_in)), weight_out, bias_out)


def dense_parameters(hidden: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Random parameters of a dense layer of `width` neurons."""
    generator = torch.Generator().manual_seed(2)
    shapes = ((width, hidden), (width,), (hidden, width), (hidden,))
    return [(torch.randn(shape, generator=generator) * 0.02).to(dtype) for shape in shapes]


def dense_entries(problem: LeafProblem, tokens: int, compile_dense: bool) -> dict[str, Callable]:
    """The dense layer that is replaced and the one as narrow as a leaf, eager and compiled."""
    hidden, entries = problem.layer.in_features, {}
    torch._dynamo.reset()
    for width in (dense_width(hidden), leaf_width(hidden)):
        parameters = dense_parameters(hidden, width, problem.x.dtype)
        forms = {"eager": dense_layer} | ({"compiled": compiled(dense_layer)} if compile_dense else {})
        for variant, form in forms.items():
            call = partial(_on_parameters, form, parameters)
            entries[f"dense {width} {variant} (function call)"] = fed(call, problem.x, tokens)
    return entries


def _on_parameters(form: Callable, parameters: list[Tensor], x: Tensor) -> Tensor:
    return form(x, *parameters)


def c_call(layer: LeafFeedForward, x: Tensor, rows_per_call: int) -> Callable[[], Tensor]:
    """The native kernel called through ctypes, arguments prepared, on fresh rows of x each time."""
    from fastbert_hf.kernels.native.kernels import ACTIVATION_CODES, DTYPE_CODES
    from fastbert_hf.kernels.native.library import load_library

    forward, parameters = load_library().fff_leaf_forward, layer.op_arguments()[:6]
    y = torch.empty(rows_per_call, layer.out_features, dtype=x.dtype)
    stride = rows_per_call * x.shape[1] * x.element_size()
    starts = itertools.cycle([x.data_ptr() + i * stride for i in range(x.shape[0] // rows_per_call)])
    sizes = (rows_per_call, x.shape[1], layer.out_features, layer.trees, layer.leaf_width)
    codes = (layer.depth, ACTIVATION_CODES[layer.activation], DTYPE_CODES[x.dtype], torch.get_num_threads())
    rest = [ctypes.c_void_p(t.data_ptr()) for t in (*parameters, y)] + [None] * 4
    rest += [ctypes.c_int64(v) for v in sizes] + [ctypes.c_int(v) for v in codes]

    def call() -> Tensor:
        forward(next(starts), *rest)
        return y

    return call


def backends_for(problem: LeafProblem) -> list[str]:
    """Names of the backends that compute this problem here."""
    layer = problem.layer
    call = (problem.x, layer.weight_in, layer.weight_out, layer.trees, layer.depth, layer.activation)
    return [name for name, b in LEAF_BACKENDS.items() if b.unavailable() is None and b.supports(*call) is None]


def _checked(problem: LeafProblem, entries: dict[str, Callable], tokens: int, around: dict) -> dict[str, str]:
    """Run the entries of the trees once and compare them with the reference."""
    matches = {}
    for name, call in entries.items():
        with around.get(name, nullcontext)():
            first = call()
        if not name.startswith("dense"):
            clear = problem.clear[:tokens]
            matches[name] = verdict(first[clear], problem.y[:tokens][clear])
    return matches


def forward_rows(
    hidden: int,
    tokens: int,
    threads: int,
    ceilings: dict[str, float],
    *,
    dtype: torch.dtype = torch.float32,
    section: str = "leaf trees, forward",
    rounds: int = 7,
    compile_dense: bool = True,
) -> list[Row]:
    """Time one forward pass; the baseline is the fastest dense layer of 4 H neurons.

    Args:
        hidden: H. tokens: N; with N = 1 every call gets a fresh token. threads, ceilings, rounds: as for
            `layer.forward_rows`.
    """
    torch.set_num_threads(threads)
    problem = LeafProblem(hidden, FRESH_ROWS if tokens == 1 else tokens, dtype)
    with torch.inference_mode():
        entries = dense_entries(problem, tokens, compile_dense)
        for name in backends_for(problem):
            entries[f"{name} (module call)"] = fed(problem.layer, problem.x, tokens)
        if "native (module call)" in entries:
            entries["native (C call)"] = c_call(problem.layer, problem.x, tokens)
        around = backends_around(entries)
        matches = _checked(problem, entries, tokens, around)
        timings = interleaved(entries, rounds, around=around)
    wide = f"dense {dense_width(hidden)} "
    baseline = min((n for n in timings if n.startswith(wide)), key=lambda n: timings[n].median)
    bound = problem.bound_seconds(tokens, ceilings)
    bounds = {name: bound for name in matches} if dtype == torch.float32 else {}
    return make_rows(timings, baseline, matches, bounds, section=section, **problem.labels(tokens))


def training_rows(hidden: int, tokens: int, threads: int, rounds: int = 5) -> list[Row]:
    """Forward and backward, gradients of input and parameters; the baseline is plain dense of 4 H neurons."""
    torch.set_num_threads(threads)
    problem = LeafProblem(hidden, tokens)
    layer = problem.layer
    grad_y = torch.randn_like(problem.y)
    grad_y[~problem.clear] = 0
    leaves = [problem.x.clone().requires_grad_(), *(p.detach().clone().requires_grad_() for p in layer.parameters())]
    trees = partial(leaf_trees, trees=layer.trees, depth=layer.depth, activation=layer.activation)
    entries = {}
    for width in (dense_width(hidden), leaf_width(hidden)):
        parameters = [p.requires_grad_() for p in dense_parameters(hidden, width, torch.float32)]
        entries[f"dense {width} (function call)"] = training_step(dense_layer, [leaves[0], *parameters], grad_y)
    for name in backends_for(problem):
        entries[f"{name} (op with autograd)"] = training_step(trees, leaves, grad_y)
    around, results = backends_around(entries), {}
    for name, call in entries.items():
        with around.get(name, nullcontext)():
            results[name] = call()
    expected = results["reference (op with autograd)"]
    matches = {
        name: gradients_match(values, expected) for name, values in results.items() if not name.startswith("dense")
    }
    timings = interleaved(entries, rounds, around=around)
    baseline = f"dense {dense_width(hidden)} (function call)"
    section = "leaf trees, forward and backward"
    return make_rows(timings, baseline, matches, section=section, **problem.labels(tokens))


def _encoder(**fields) -> FastBertModel:
    torch.manual_seed(0)
    config = FastBertConfig(**MINILM, **BERT_SHAPE, num_hidden_layers=6, **fields)
    return FastBertModel(config).eval()


def encoder_rows(batch: int, tokens: int, threads: int, rounds: int = 5) -> list[Row]:
    """A forward pass in MiniLM-L6's geometry, random weights; the baseline is the dense model."""
    torch.set_num_threads(threads)
    hidden = MINILM["hidden_size"]
    narrow = leaf_width(hidden)
    encoders = {
        "dense 1536": _encoder(ffn_type="dense", intermediate_size=dense_width(hidden)),
        f"dense {narrow}": _encoder(ffn_type="dense", intermediate_size=narrow),
        f"leaf trees, {narrow} of {32 * narrow}": _encoder(fff_depth=LEAF_DEPTH, fff_leaf_width=narrow),
        "published form 1x10": _encoder(fff_depth=10),
        "no feed-forward": with_feed_forward(_encoder(fff_depth=0), lambda ffn: NoFeedForward()),
    }
    ids = torch.randint(1, MINILM["vocab_size"], (batch, tokens), generator=torch.Generator().manual_seed(0))
    name = f"leaf trees, {narrow} of {32 * narrow}"
    with torch.inference_mode():
        entries = {f"{key} (module call)": partial(encoder, ids) for key, encoder in encoders.items()}
        value = encoders[name](ids)[0]
        with use_backend("reference"):
            expected = encoders[name](ids)[0]
        per_token = (value - expected).abs().amax(-1) / expected.abs().amax()
        same = per_token <= 2e-5  # others took another leaf somewhere
        matches = {f"{name} (module call)": f"{verdict(value[same], expected[same])}, {int((~same).sum())} rerouted"}
        timings = interleaved(entries, rounds, least_seconds=0.1)
    return make_rows(
        timings,
        "dense 1536 (module call)",
        matches,
        section="leaf trees, whole encoder",
        case=f"MiniLM-L6, {batch} x {tokens}",
        tokens=batch * tokens,
        threads=threads,
        dtype="float32",
        inputs="random ids",
    )
