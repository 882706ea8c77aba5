"""Tiny random models, a WordPiece tokenizer, and processes in which the package cannot be imported."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from fastbert_hf import FastBertConfig
from tests.processes import CHILD_SECONDS

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["the", "tree", "leaf", "root", "node", "fast", "slow", "walks", "left", "right", "visits", "one", ".", "?"]
VOCABULARY = [*SPECIAL_TOKENS, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]

FORMS = {"nodes": {}, "leaves": {"fff_leaf_width": 5}}  # fields of a configuration

# run ahead of every script of `run_without_package`
BLOCK_PACKAGE = """
import sys

class _NoPackage:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "fastbert_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, _NoPackage())
try:
    import fastbert_hf
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("fastbert_hf can be imported here")
"""


def tiny_config(**overrides) -> FastBertConfig:
    """Two layers of two trees of depth 3; weights large enough that paths and outputs differ between tokens."""
    sizes = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "fff_depth": 3,
        "fff_trees": 2,
        "classifier_head_dim": 16,
        "initializer_range": 0.2,
    }
    return FastBertConfig(**{**sizes, **overrides})


def tiny_model(model_class: type, seed: int = 0, **overrides) -> torch.nn.Module:
    """A random model in evaluation mode; the trees' biases are random too."""
    torch.manual_seed(seed)
    model = model_class(tiny_config(**overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias_in"):
                parameter.normal_(std=0.1)
    return model


def random_batch(batch: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Token ids without special tokens, and a mask padded right in the first row and left in the second."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(len(SPECIAL_TOKENS), len(VOCABULARY), (batch, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, (length + 1) // 2 :] = 0
    if batch > 1:
        attention_mask[1, : length // 3] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def run_without_package(script: str, *arguments: object, cwd: Path, timeout: int = CHILD_SECONDS) -> str:
    """Run a script in a process of its own in which `import fastbert_hf` fails; its standard output.

    The script runs in `cwd`, which also holds the cache of code loaded from model folders.
    """
    kernels_stay_behind = 'import os; os.environ["FASTBERT_BACKEND"] = "auto"\n'
    return run_python(kernels_stay_behind + BLOCK_PACKAGE + script, *arguments, cwd=cwd, timeout=timeout)


def run_python(script: str, *arguments: object, cwd: Path, timeout: int = CHILD_SECONDS) -> str:
    """Run a script in a process of its own, in `cwd`; its standard output."""
    settings = {"HF_MODULES_CACHE": str(cwd / "hf_modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **settings}
    environment.pop("PYTHONPATH", None)
    process = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert process.returncode == 0, f"{process.stdout[-2000:]}\n{process.stderr[-6000:]}"
    return process.stdout
