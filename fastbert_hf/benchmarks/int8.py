"""Trees with int8 weights against the same trees in float32, one forward pass of a layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert_hf import FastFeedForward, QuantizedFastFeedForward, QuantizedLeafFeedForward, use_backend
from fastbert_hf.benchmarks.layer import fed
from fastbert_hf.benchmarks.leaves import FRESH_ROWS, LEAF_DEPTH, leaf_width
from fastbert_hf.benchmarks.rows import Row, make_rows
from fastbert_hf.benchmarks.timing import interleaved
from fastbert_hf.leaf_layer import LeafFeedForward

ALLOWED = 2e-3  # relative distance of two backends: a hidden value close to halfway can be a step off


def make_layers(form: str, hidden: int) -> tuple[nn.Module, nn.Module]:
    """A layer of the form "leaves" or "nodes" in float32, and the same in int8."""
    torch.manual_seed(0)
    if form == "leaves":
        layer = LeafFeedForward(hidden, hidden, LEAF_DEPTH, leaf_width(hidden)).eval()
        return layer, QuantizedLeafFeedForward.from_float(layer)
    layer = FastFeedForward(hidden, hidden, 11).eval()
    return layer, QuantizedFastFeedForward.from_float(layer)


def check(quantized: nn.Module, layer: nn.Module, x: Tensor) -> str:
    """ "ok" or "MISMATCH", how far the result is from the reference's, and from that of float32."""
    with use_backend("reference"):
        expected = quantized(x)
    y, exact = quantized(x), layer(x)
    same = (y - expected).abs().amax(1) <= 0.1 * expected.abs().amax()  # others took another path at a tie
    distance = ((y - expected)[same].norm() / expected.norm()).item()
    lost = ((y - exact)[same].norm() / exact.norm()).item()
    is_right = distance <= ALLOWED and same.double().mean() > 0.99
    return f"{'ok' if is_right else 'MISMATCH'} {distance:.0e}, {lost:.2%} from float32"


def forward_rows(form: str, hidden: int, tokens: int, threads: int, rounds: int = 7) -> list[Row]:
    """Time one forward pass through the layer; the baseline is the layer in float32.

    Args:
        form: "leaves" or "nodes". hidden: H. tokens: N; with N = 1 every call gets a fresh token.
    """
    torch.set_num_threads(threads)
    layer, quantized = make_layers(form, hidden)
    generator = torch.Generator().manual_seed(1)
    x = F.layer_norm(torch.randn(FRESH_ROWS if tokens == 1 else tokens, hidden, generator=generator), (hidden,))
    with torch.inference_mode():
        entries = {"float32 (module call)": fed(layer, x, tokens), "int8 (module call)": fed(quantized, x, tokens)}
        matches = {"int8 (module call)": check(quantized, layer, x[:4096])}
        timings = interleaved(entries, rounds)
    name = "32 leaves" if form == "leaves" else "1x11"
    labels = {"case": f"H={hidden}, {name}", "tokens": tokens, "threads": threads}
    return make_rows(
        timings,
        "float32 (module call)",
        matches,
        section="trees in int8",
        dtype="float32",
        inputs="normed noise",
        **labels,
    )
