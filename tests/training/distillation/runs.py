"""Tiny runs of `fastbert distill`: a random BERT, and the command."""

import torch
import transformers
from transformers import BertConfig

from fastbert_hf.cli import distill as command
from fastbert_hf.data.tokenizer import load_tokenizer

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
OPTIONS = {
    "fff_depth": 2, "fff_leaf_width": 6, "fit_steps": 30, "fit_rows": 2000, "fit_rows_per_step": 64,
    "max_steps": 12, "batch_size": 8, "held_out_texts": 24, "learning_rate": 3e-3, "logging_steps": 4,
    "disable_tqdm": True, "measure_speed": False,
}  # fmt: skip


def save_bert(tiny, folder, head="Model", **changes):
    """A random BERT with the tiny tokenizer; its weights are large enough that layers do something."""
    tokenizer = load_tokenizer(tiny / "tokenizer")
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 32, "initializer_range": 0.3}
    model = getattr(transformers, f"Bert{head}")(BertConfig(**sizes, pad_token_id=tokenizer.pad_token_id, **changes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def distill(model, text, folder, **changes):
    """Run the command; its summary."""
    options = {"model_name_or_path": model, "train_file": text, "output_dir": folder, **OPTIONS, **changes}
    options = {name: value for name, value in options.items() if value is not None}
    return command.main([token for name, value in options.items() for token in (f"--{name}", str(value))])
