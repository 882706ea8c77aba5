"""Small encoders without a tokenizer, text of random numbers for them, and how far two of them are apart."""

import torch

from fastbert_hf import FastBertConfig, FastBertModel

SIZES = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def teacher(norm_scheme):
    torch.manual_seed(0)
    dense = {"ffn_type": "dense", "intermediate_size": 24, "use_bias": True, "dense_gated": False}
    config = FastBertConfig(**SIZES, **dense, norm_scheme=norm_scheme, final_norm=norm_scheme == "pre")
    model = FastBertModel(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def text(count=12, seed=1):
    draw = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        lengths = torch.randint(3, 9, (4, 1), generator=draw)
        mask = (torch.arange(8) < lengths).long()
        batches.append({"input_ids": torch.randint(5, 30, (4, 8), generator=draw), "attention_mask": mask})
    return batches


@torch.no_grad()
def last_error(student, wanted, batches):
    errors = []
    for batch in batches:
        mask = batch["attention_mask"].bool()
        own, theirs = (model.eval()(**batch).last_hidden_state[mask] for model in (student, wanted))
        errors.append((own - theirs).square().mean())
    return torch.stack(errors).mean().item()
