"""Peak memory of one forward pass above its inputs and its output, each form in a process of its own."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

FORMS = ("native", "reference", "leaf trees, native", "leaf trees, reference", "dense", "dense-and-mask")

PROGRAM = """
import sys
import torch
from fastbert_hf import LeafFeedForward, use_backend
from fastbert_hf.benchmarks import forms, layer

form, tokens = sys.argv[1], int(sys.argv[2])
ffn = layer.make_layer()
weights = [p.detach() for p in (ffn.weight_in, ffn.bias_in, ffn.weight_out)]
if form.startswith("leaf trees, "):
    form, ffn = form.removeprefix("leaf trees, "), LeafFeedForward(layer.WIDTH, layer.WIDTH, 5, 192)
if form not in ("dense", "dense-and-mask"):
    use_backend(form)
calls = {
    "dense": lambda x: forms.dense(x, *weights),
    "dense-and-mask": lambda x: forms.dense_and_mask(x, *weights, trees=1, depth=11),
}
call = calls.get(form, ffn)

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name + ":"))

with torch.inference_mode():
    x = layer.make_inputs(tokens)
    call(x[:64])
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from what is resident now
    y = call(x)
    print((status("VmHWM") - before) / 1024 - y.numel() * y.element_size() / 2**20)
"""


@dataclass
class MemoryRow:
    """Megabytes (2^20 bytes) that a form needs beyond its inputs and its output of N rows."""

    form: str
    tokens: int
    megabytes: float


def memory_rows(tokens: int = 16384, forms: Sequence[str] = FORMS) -> list[MemoryRow]:
    """Measure every form that runs here, each in a process of its own; empty where the system is not Linux."""
    rows = []
    for form in forms:
        command = [sys.executable, "-c", PROGRAM, form, str(tokens)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode == 0:
            rows.append(MemoryRow(form, tokens, float(result.stdout.split()[-1])))
    return rows


def format_memory(rows: list[MemoryRow]) -> str:
    """A Markdown table."""
    lines = ["| forward | N | MB above inputs and output |", "|---|---|---|"]
    return "\n".join(lines + [f"| {row.form} | {row.tokens} | {row.megabytes:.1f} |" for row in rows])
