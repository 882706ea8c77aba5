"""Loading a checkpoint of the published size: how much private memory it takes, and how long.

    python -m tests.hub.published_size

writes random numbers in the published key table (755 MB) to a temporary folder and loads them in its own process.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.hub.conftest import FIXTURES, ROOT
from tests.processes import CHILD_SECONDS

HIDDEN, LAYERS, HEADS, VOCABULARY, NODES = 768, 16, 12, 32768, 4095

MEASURE = """
import json, re, sys, threading, time
import fastbert_hf, transformers

def private_bytes():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

folder, auto_class = sys.argv[1:]
before = most = private_bytes()
done = threading.Event()

def watch():
    global most
    while not done.wait(0.002):
        most = max(most, private_bytes())

watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
model = getattr(transformers, auto_class).from_pretrained(folder)
seconds = time.perf_counter() - start
done.set()
watcher.join()
unique = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
print(json.dumps({
    "unique_bytes": unique, "seconds": seconds,
    "peak": (max(most, private_bytes()) - before) / unique, "after": (private_bytes() - before) / unique,
}))
"""


def published_tensors() -> dict[str, torch.Tensor]:
    """Random tensors under the names and in the shapes of the published file, the tied pair twice."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.02

    embedding = "encoder.embedding."
    tensors = {f"{embedding}word_embedding.weight": random(VOCABULARY, HIDDEN)}
    tensors["decoder.weight"] = tensors[f"{embedding}word_embedding.weight"].clone()
    tensors[f"{embedding}pos_embedding.scale_factor"] = torch.tensor([HIDDEN**-0.5])
    norms = [f"{embedding}norm", "encoder.final_norm"]
    for layer in (f"encoder.layers.{index}." for index in range(LAYERS)):
        norms += [f"{layer}norm1", f"{layer}norm2"]
        tensors[f"{layer}attn.self_attention.query_key_value.weight"] = random(3 * HIDDEN, HIDDEN)
        tensors[f"{layer}attn.self_attention.norm_factor"] = torch.tensor((HIDDEN // HEADS) ** -0.5)
        tensors[f"{layer}attn.dense.weight"] = random(HIDDEN, HIDDEN)
        tensors[f"{layer}ffn.linear_in.weight"] = random(NODES, HIDDEN)
        tensors[f"{layer}ffn.linear_in.bias"] = random(NODES)
        tensors[f"{layer}ffn.linear_out.weight"] = random(HIDDEN, NODES)
    for norm in norms:
        tensors |= {f"{norm}.weight": torch.ones(HIDDEN), f"{norm}.bias": torch.zeros(HIDDEN)}
    return tensors


def write_published(folder: Path) -> None:
    """config.json and model.safetensors of the published geometry."""
    save_file(published_tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((FIXTURES / "mlm-1x3" / "config.json").read_text())
    arch = config["arch"]
    arch |= {"hidden_size": HIDDEN, "num_transformer_layers": LAYERS, "intermed_depth": 11, "intermed_size": 1}
    arch["attention"]["num_attention_heads"] = HEADS
    arch["embedding"] |= {"vocab_size": VOCABULARY, "embedding_dim": HIDDEN, "max_seq_length": 128}
    (folder / "config.json").write_text(json.dumps(config))


def measure(folder: Path, auto_class: str) -> dict[str, float]:
    """Private memory (RssAnon) beyond that of the imports, as a multiple of the weights' bytes, and seconds."""
    command = [sys.executable, "-c", MEASURE, str(folder), auto_class]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=CHILD_SECONDS)
    return json.loads(result.stdout)


def describe(auto_class: str, figures: dict[str, float]) -> str:
    return (
        f"{auto_class}: {figures['unique_bytes'] / 1e6:.1f} MB of unique weights; private memory grew by "
        f"{figures['after']:.3f} times that, {figures['peak']:.3f} at its peak; {figures['seconds']:.1f} s"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        write_published(Path(temporary))
        for name in ("AutoModel", "AutoModelForMaskedLM"):
            print(describe(name, measure(Path(temporary), name)), flush=True)
