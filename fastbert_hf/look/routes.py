"""Which way tokens take through the trees of a model, how certain, and what else goes there."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastbert_hf.fff_layer import FastFeedForward
from fastbert_hf.leaf_layer import LeafFeedForward
from fastbert_hf.leaf_reference import confidence_of
from fastbert_hf.pretrained_fastbert import FastBertPreTrainedModel
from fastbert_hf.training.distillation.texts import tokenized
from fastbert_hf.training.module_inputs import watched_inputs
from fastbert_hf.training.tree_usage import tree_layers, visited_nodes

SHOWN_TREES = 8  # of a layer at most: a page of hundreds is of no use
SHOWN_LEAVES = 64  # of larger trees only the leaves that the texts take are described
SHOWN_TOKENS = 8  # of a leaf

TreeLayer = FastFeedForward | LeafFeedForward


def decision_logits(layer: TreeLayer, x: Tensor) -> Tensor:
    """The logits of the decisions on the way of each row: above 0 goes right.

    Args:
        layer: of either form. x: (..., H).

    Returns:
        (N, P, D) float32.
    """
    rows = x.reshape(-1, x.shape[-1]).to(layer.weight_in.dtype)  # (..., H) -> (N, H)
    nodes = visited_nodes(layer, rows)[:, :, : layer.depth]  # (N, P, D)
    if isinstance(layer, FastFeedForward):
        weights, offsets, per_tree = layer.weight_in, layer.bias_in, 2 ** (layer.depth + 1) - 1
    else:
        weights, offsets, per_tree = layer.router, -layer.threshold, 2**layer.depth - 1
    numbers = nodes + per_tree * torch.arange(layer.trees, device=nodes.device)[:, None]
    logits = torch.einsum("nh,npdh->npd", rows.float(), weights[numbers].float())
    return logits if offsets is None else logits + offsets[numbers].float()


def taken_leaves(layer: TreeLayer, x: Tensor) -> Tensor:
    """The leaf that each row takes in each tree, from the left: (..., H) -> (N, P) int64."""
    return visited_nodes(layer, x)[:, :, -1] - (2**layer.depth - 1)


@contextmanager
def observed(model: FastBertPreTrainedModel, look: Callable[[TreeLayer, Tensor], Any]) -> Iterator[list[list[Any]]]:
    """While a model runs, collect what `look` says of each layer with trees and its input: a list for each layer."""
    layers = tree_layers(model)
    found: list[list[Any]] = [[] for _ in layers]

    with watched_inputs(layers, lambda number, x: found[number].append(look(layers[number], x))):
        yield found


def look_inside(
    model: FastBertPreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    usage_texts: Sequence[str] = (),
    max_seq_length: int = 128,
) -> dict[str, Any]:
    """Find which leaf each token of some texts takes in each layer, and what else goes there.

    Args:
        model: with trees of either form; it is run as it stands, so call eval() first.
        tokenizer: its tokenizer.
        texts: what is looked at, token by token.
        usage_texts: what the usage of leaves, and the commonest tokens of each, are counted on.
        max_seq_length: longer texts are cut, and those that are longer than the model reads.

    Returns:
        What `page.render_page` takes, lists and numbers only. `form`: "leaf" or "published". `layers`: for each its
        `depth`, `trees`, `shown_trees`, `neurons`, `neurons_per_token`, and `usage`: what `describe_leaves` says of
        each shown tree, nothing without `usage_texts`. `texts`: for each its `text`, its `tokens`, and `layers`: for
        each shown tree the `leaves` (T,), the `confidence` (T,) of the least certain decision, which scales what a
        leaf adds, and the `logits` (T, D) of all decisions.

    Raises:
        ValueError: the model has no trees, or no text is given.
    """
    layers = tree_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no trees; expected a model with trees (ffn_type='fff')")
    if not texts:
        raise ValueError("no text is given; expected at least one")
    max_seq_length = min(max_seq_length, model.config.longest_sequence)
    looked_at = [_routes(model, tokenizer, text, max_seq_length) for text in texts]
    counted = _count(model, tokenizer, usage_texts, max_seq_length) if usage_texts else None
    described = []
    for number, layer in enumerate(layers):
        shown = min(layer.trees, SHOWN_TREES)
        about = {"depth": layer.depth, "trees": layer.trees, "shown_trees": shown, "usage": []}
        about |= {"neurons": layer.neurons, "neurons_per_token": layer.neurons_per_token}
        for tree in range(shown if counted else 0):
            leaves = range(2**layer.depth)
            if len(leaves) > SHOWN_LEAVES:
                leaves = sorted({leaf for text in looked_at for leaf in text["layers"][number][tree]["leaves"]})
            ids, taken = counted[0], counted[1][number][:, tree]
            about["usage"].append(describe_leaves(ids, taken, leaves, lambda i: label_of(tokenizer, i)))
        described.append(about)
    form = "leaf" if isinstance(layers[0], LeafFeedForward) else "published"
    return {"form": form, "layers": described, "texts": looked_at}


def _rounded(values: list[float]) -> list[float]:
    """To four digits, whatever the size: the smallest logit keeps its sign, which is the decision."""
    return [float(f"{value:.4g}") for value in values]


@torch.no_grad()
def _routes(
    model: FastBertPreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, max_seq_length: int
) -> dict:
    batch = tokenizer(text, truncation=True, max_length=max_seq_length, return_tensors="pt").to(model.device)
    with observed(model, lambda layer, x: (taken_leaves(layer, x), decision_logits(layer, x))) as found:
        model(**batch)
    layers = []
    for ((leaves, logits),) in found:
        confidence = confidence_of(logits.abs().amin(dim=2)) if logits.shape[2] else torch.ones(leaves.shape)
        shown = range(min(leaves.shape[1], SHOWN_TREES))
        layers.append(
            [
                {
                    "leaves": leaves[:, tree].tolist(),
                    "confidence": _rounded(confidence[:, tree].tolist()),
                    "logits": [_rounded(row) for row in logits[:, tree].tolist()],
                }
                for tree in shown
            ]
        )
    return {
        "text": text,
        "tokens": [label_of(tokenizer, i) for i in batch["input_ids"][0].tolist()],
        "layers": layers,
    }


@torch.no_grad()
def _count(
    model: FastBertPreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_seq_length: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Ids (N,) of all tokens of some texts, without padding, and the leaves (N, P) they take in each layer."""
    ids = []
    with observed(model, lambda layer, x: taken_leaves(layer, x).cpu().numpy()[:, :SHOWN_TREES]) as found:
        for batch in tokenized(texts, tokenizer, max_seq_length):
            model(**batch.to(model.device))
            real = batch["attention_mask"].reshape(-1).bool().cpu().numpy()
            ids.append(batch["input_ids"].reshape(-1).cpu().numpy()[real])
            for leaves in found:
                leaves[-1] = leaves[-1][real]
    return np.concatenate(ids), [np.concatenate(leaves) for leaves in found]


def describe_leaves(
    ids: np.ndarray, taken: np.ndarray, leaves: Sequence[int], label: Callable[[int], str]
) -> dict[str, Any]:
    """Which tokens take the leaves of a tree.

    Args:
        ids: (N,) vocabulary numbers. taken: (N,) the leaf that each takes.
        leaves: those to describe. label: the name of a vocabulary number.

    Returns:
        `tokens`: N. `used`: how many leaves are taken at all. `effective`: 2^entropy, as many leaves as would be
        equally used. `leaves`: leaf -> its `count`, its `common` tokens ([token, count here, count everywhere], the
        most frequent first), and its `typical` ones, ordered by count * log(share of the token that goes here / share
        of all tokens that do).
    """
    everywhere, total = np.bincount(ids), len(ids)
    sizes = np.bincount(taken)
    shares = sizes[sizes > 0] / total
    about = {"tokens": total, "used": len(shares), "effective": round(float(2 ** -(shares @ np.log2(shares))), 2)}
    described = {}
    for leaf in leaves:
        tokens, counts = np.unique(ids[taken == leaf], return_counts=True)
        gain = counts * np.log(counts * total / (everywhere[tokens] * max(1, counts.sum())))
        lists = {}
        for name, order in (("common", counts), ("typical", gain)):
            best = np.argsort(-order, kind="stable")[:SHOWN_TOKENS]
            best = best[gain[best] > 0] if name == "typical" else best
            lists[name] = [[label(int(t)), int(n), int(everywhere[t])] for t, n in zip(tokens[best], counts[best])]
        described[leaf] = {"count": int(counts.sum()), **lists}
    return about | {"leaves": described}


def label_of(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as a reader knows it; as the vocabulary spells it where nothing would be seen."""
    return tokenizer.decode([token]).strip() or str(tokenizer.convert_ids_to_tokens(token))
