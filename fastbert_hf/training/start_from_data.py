"""Leaf trees that begin with what the data and a dense layer know.

Routers are principal components of the rows that reach them, with the median as threshold; leaves are the neurons of
a dense layer that explain most of its output among the rows of the leaf. Source: ours.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastbert_hf.encoder_fastbert import FastBertDenseFeedForward
from fastbert_hf.fff_reference import ACTIVATIONS, accumulation_dtype
from fastbert_hf.leaf_layer import ROUTER_SCALE, LeafFeedForward
from fastbert_hf.leaf_reference import leaves_per_tree
from fastbert_hf.modeling_fastbert import FastBertModel
from fastbert_hf.training.activations import sample_inputs
from fastbert_hf.training.leaf_balance import leaf_layers
from fastbert_hf.training.neuron_choice import Moments, choose_neurons, output_weights

MAX_ROWS = 65536
CANDIDATES = 4  # times a leaf's width: so many neurons are looked at closely; all of them explain no more
CHUNK = 4096  # rows whose dense activations are in memory at a time


class DenseWeights(NamedTuple):
    """A dense feed-forward layer of F neurons: out(activation(in(x))).

    Shapes, those of two `nn.Linear`: weight_in (F, H), bias_in (F,) or None, weight_out (H_out, F),
    bias_out (H_out,) or None.
    """

    weight_in: Tensor
    bias_in: Tensor | None
    weight_out: Tensor
    bias_out: Tensor | None

    @classmethod
    def of(cls, dense_in: nn.Linear, dense_out: nn.Linear) -> "DenseWeights":
        """The weights of the two projections, detached."""
        tensors = (dense_in.weight, dense_in.bias, dense_out.weight, dense_out.bias)
        return cls(*(None if tensor is None else tensor.detach() for tensor in tensors))

    def forward(self, x: Tensor, activation: str) -> Tensor:
        """(N, H) -> (N, H_out)."""
        return nn.functional.linear(self.hidden(x, activation), self.weight_out, self.bias_out)

    def hidden(self, x: Tensor, activation: str) -> Tensor:
        """The activations of the neurons: (N, H) -> (N, F)."""
        return ACTIVATIONS[activation](nn.functional.linear(x, self.weight_in, self.bias_in))


def dense_feed_forward(encoder: FastBertModel) -> list[FastBertDenseFeedForward]:
    """The dense feed-forward layers of an encoder.

    Raises:
        ValueError: a layer that is not dense, or gated.
    """
    layers = [layer.ffn for layer in encoder.layers]
    for number, layer in enumerate(layers):
        if not isinstance(layer, FastBertDenseFeedForward) or layer.gated:
            raise ValueError(f"feed-forward layer {number} of the model is not a plain dense one; nothing to convert")
    return layers


@torch.no_grad()
def initialize_from_data(
    layer: LeafFeedForward,
    x: Tensor,
    dense: DenseWeights | None = None,
    *,
    targets: Tensor | None = None,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
) -> None:
    """Set all parameters of a layer of leaf trees from rows of its input, and from a dense layer that it replaces.

    Router: the first principal component of the rows that reach it, scaled so that its logit has a standard deviation
    of 4 among them. Threshold: the split of these rows that is nearest to equal halves. Leaf, from a dense layer: the
    w neurons that together explain most of the layer's output among the leaf's rows, with output weights and an
    output bias that are fitted to them (`neuron_choice.py`), out of the 4 w of the largest variance of activation
    times squared norm of their output. Without a dense layer, leaves are random, N(0, initializer_range), biases
    zero. Of P trees, each divides the rows by every P-th principal component of all rows, and stands for every P-th
    neuron. A node that fewer than two rows reach uses those of its parent.

    Memory: a random sample of at most max_rows rows in float32, twice; beside it 4096 rows of F activations, and
    matrices of H x H and of 4 w x (4 w + H_out).

    Args:
        layer: on any device, of any dtype; in bfloat16 thresholds are rounded, and halves are equal up to that.
        x: (N, H) or (..., H), N >= 1. A tensor over a file that is mapped into memory is read in parts.
        dense: the layer to take neurons from, with the layer's activation; None for random leaves. Where its part for
            a tree has fewer than w neurons, the others are random and their output is zero.
        targets: (N, H_out), what the layer should put out for each row, where that is not what `dense` puts out: the
            choice and the output weights of neurons are fitted to it.
        seed: for the sample and all that is random. Equal arguments give equal parameters.
        max_rows: rows that are looked at, at most.

    Raises:
        ValueError: x has no row, another width, or a value that is not finite; dense has other widths, a value that
            is not finite, or a bias where the layer has none; targets of another shape, or without `dense`.
    """
    draw = torch.Generator().manual_seed(seed)
    if targets is not None:
        _check_targets(layer, x, dense, targets)
    rows, targets = _sample(layer, x, targets, max_rows, draw)
    if dense is not None:
        dense = _checked(layer, dense, rows)
    _reset(layer, draw)
    if layer.depth:
        components = _components(rows, torch.arange(len(rows), device=rows.device)) if layer.trees > 1 else None
    for tree in range(layer.trees):
        basis = None
        if layer.depth and layer.trees > 1:
            part = tree % min(layer.trees, components.shape[1])
            basis = components[:, part :: layer.trees]  # (H, about H / P)
        leaves, margins = _route(layer, tree, rows, basis)
        if dense is not None:
            _fill_leaves(layer, tree, rows, leaves, margins.sigmoid(), dense, targets)


def initialize_model_from_data(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    folder: str | Path,
    *,
    dense: Sequence[DenseWeights | None] | None = None,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
) -> None:
    """Set all leaf trees of a model from text: `initialize_from_data` for each layer, the first layer first.

    Every layer takes one pass over the text, through the layers below as they are by then. Its inputs are a file in
    `folder` while it is set.

    Args:
        model: on any device.
        batches: as for `sample_inputs`; it is gone through once for each layer, so it must not be an iterator.
        folder: for one file of max_rows * H * 4 bytes; it is made if it does not exist.
        dense: one entry for each layer of leaf trees, in the order of the layers.
        seed: as for `initialize_from_data`.
        max_rows: tokens that are looked at, at most, sampled from all of them.

    Raises:
        ValueError: the model has no leaf trees, `dense` has another length, `batches` is an iterator or empty, or
            what `initialize_from_data` raises.
    """
    layers = leaf_layers(model)
    if not layers:
        raise ValueError("the model has no leaf trees: fff_leaf_width is not set")
    if dense is not None and len(dense) != len(layers):
        raise ValueError(f"dense has {len(dense)} entries; expected {len(layers)}, one for each layer of leaf trees")
    if iter(batches) is batches:
        raise ValueError("batches is an iterator, which ends after the first layer; expected a list or a DataLoader")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number, layer in enumerate(layers):
        file = folder / f"layer-{number}-inputs.f32"
        try:
            rows = sample_inputs(model, layer, batches, file, max_rows=max_rows, seed=seed)
            weights = None if dense is None else dense[number]
            initialize_from_data(layer, torch.from_numpy(rows), weights, seed=seed, max_rows=max_rows)
        finally:
            file.unlink(missing_ok=True)


def _check_targets(layer: LeafFeedForward, x: Tensor, dense: DenseWeights | None, targets: Tensor) -> None:
    if dense is None:
        raise ValueError("targets are for the neurons of a dense layer; expected `dense` too")
    expected = (x.shape[:-1].numel(), layer.out_features)
    if targets.shape != expected:
        raise ValueError(f"targets has shape {tuple(targets.shape)}; expected {expected}, one for each row of x")


def _sample(
    layer: LeafFeedForward, x: Tensor, targets: Tensor | None, max_rows: int, draw: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """At most max_rows rows as the layer sees them, in the dtype in which it sums, (S, H), and their targets."""
    if max_rows < 1:
        raise ValueError(f"max_rows must be at least 1; got {max_rows}")
    if x.dim() < 1 or x.shape[-1] != layer.in_features or x.numel() == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (N, {layer.in_features}) with N >= 1")
    x = x.reshape(-1, x.shape[-1])
    for start in range(0, len(x), CHUNK):
        bad = ~x[start : start + CHUNK].isfinite().all(1)
        if bad.any():
            raise ValueError(f"row {start + int(bad.nonzero()[0])} of x is not finite")
    if len(x) > max_rows:
        kept = torch.randperm(len(x), generator=draw)[:max_rows].sort().values.to(x.device)
        x, targets = x[kept], None if targets is None else targets[kept.to(targets.device)]
    weight = layer.weight_in
    dtype = accumulation_dtype(weight.dtype)
    return x.to(weight.device, weight.dtype).to(dtype), None if targets is None else targets.to(weight.device, dtype)


def _checked(layer: LeafFeedForward, dense: DenseWeights, rows: Tensor) -> DenseWeights:
    """The dense layer in the dtype and on the device of the rows."""
    num_neurons = len(dense.weight_in)
    shapes = {
        "weight_in": (num_neurons, layer.in_features),
        "bias_in": (num_neurons,),
        "weight_out": (layer.out_features, num_neurons),
        "bias_out": (layer.out_features,),
    }
    for name, shape in shapes.items():
        tensor = getattr(dense, name)
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} of dense has shape {tuple(tensor.shape)}; expected {shape}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} of dense has a value that is not finite")
        if getattr(layer, name) is None:
            raise ValueError(f"dense has {name} and the layer has no biases; expected a layer made with bias=True")
    return DenseWeights(*(None if tensor is None else tensor.to(rows) for tensor in dense))


def _reset(layer: LeafFeedForward, draw: torch.Generator) -> None:
    """The layer's own random start, drawn on the CPU so that every device gets the same."""
    stds = {"router": layer.router_std, "weight_in": layer.initializer_range, "weight_out": layer.initializer_range}
    for name, parameter in layer.named_parameters():
        if name in stds:
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * stds[name])
        else:
            parameter.zero_()


# ---- routers ----


class _Node(NamedTuple):
    own: Tensor  # rows that reach it
    used: Tensor  # rows it looks at: its own, or those of the nearest node above that has two


def _children(node: _Node, goes_right: Tensor) -> list[_Node]:
    sides = (node.own[~goes_right], node.own[goes_right])
    return [_Node(own, own if len(own) > 1 else node.used) for own in sides]


def _route(layer: LeafFeedForward, tree: int, rows: Tensor, basis: Tensor | None) -> tuple[list[_Node], Tensor]:
    """Set the routers of one tree; its leaves, and (S,) the least |logit| on the path of each row."""
    first = tree * (leaves_per_tree(layer.depth) - 1)
    everything = torch.arange(len(rows), device=rows.device)
    margins = torch.full_like(rows[:, 0], torch.inf)
    nodes = [_Node(everything, everything)]
    for level in range(layer.depth):
        children = []
        for number, node in enumerate(nodes):
            router = first + 2**level - 1 + number
            _set_router(layer, router, rows, node.used, basis)
            logits = _dots(rows, node.own, layer.router[router]) - layer.threshold[router].to(rows)
            margins[node.own] = torch.minimum(margins[node.own], logits.abs())
            children += _children(node, logits > 0)
        nodes = children
    return nodes, margins


def _set_router(layer: LeafFeedForward, router: int, rows: Tensor, used: Tensor, basis: Tensor | None) -> None:
    """Direction and threshold of one router; rows that are all equal leave it its random direction."""
    direction = _components(rows, used, basis, count=1)[:, 0]  # (H,)
    spread = _dots(rows, used, direction).std(correction=0)
    scale = rows[used[0]].norm() * torch.finfo(rows.dtype).eps
    if spread > scale:
        layer.router[router] = direction * (ROUTER_SCALE / spread)
    layer.threshold[router] = _middle(_dots(rows, used, layer.router[router]))


def _dots(rows: Tensor, used: Tensor, direction: Tensor) -> Tensor:
    """(S, H), (n,), (H,) -> (n,)."""
    parts = [rows[part] @ direction.to(rows) for part in used.split(CHUNK)]
    return torch.cat(parts) if parts else rows.new_empty(0)


def _middle(values: Tensor) -> Tensor:
    """A threshold between two different values that parts them into halves as equal as possible."""
    values = values.sort().values
    steps = (values[1:] > values[:-1]).nonzero()[:, 0]  # the split after value i
    if len(steps) == 0:
        return values[0]
    split = steps[(2 * (steps + 1) - len(values)).abs().argmin()]
    return values[split] + (values[split + 1] - values[split]) / 2


def _components(rows: Tensor, used: Tensor, basis: Tensor | None = None, count: int | None = None) -> Tensor:
    """Principal components of some rows within the span of `basis`, the largest first: (H, count), signs fixed."""
    num_rows, width = len(used), rows.shape[1] if basis is None else basis.shape[1]
    parts = used.split(CHUNK)
    mean = sum(rows[part].sum(0) for part in parts) / num_rows

    def centred(part: Tensor) -> Tensor:
        x = rows[part] - mean
        return x if basis is None else x @ basis

    if count is not None and num_rows < width:  # the smaller of the two products
        x = torch.cat([centred(part) for part in parts])
        vectors = x.T @ torch.linalg.eigh(x.double() @ x.double().T).eigenvectors.flip(1)[:, :count].to(x)
        vectors = vectors / vectors.norm(dim=0).clamp(min=torch.finfo(x.dtype).tiny)
    else:
        covariance = rows.new_zeros(width, width, dtype=torch.float64)
        for part in parts:
            x = centred(part)
            covariance += x.T @ x
        vectors = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :count].to(rows)
    if basis is not None:
        vectors = basis @ vectors
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


# ---- leaves ----


def _fill_leaves(
    layer: LeafFeedForward,
    tree: int,
    rows: Tensor,
    leaves: list[_Node],
    confidence: Tensor,
    dense: DenseWeights,
    targets: Tensor | None,
) -> None:
    """Set the leaves of one tree from its part of the dense layer's neurons.

    Args:
        rows: (S, H). confidence: (S,). targets: (S, H_out), of all trees together; None: what `dense` puts out.
    """
    order = torch.arange(tree, max(tree, len(dense.weight_in)), layer.trees, device=rows.device)
    bias_out = None if dense.bias_out is None else dense.bias_out / layer.trees
    bias_in = None if dense.bias_in is None else dense.bias_in[order]
    part = DenseWeights(dense.weight_in[order], bias_in, dense.weight_out[:, order], bias_out)
    if targets is not None and layer.trees > 1:
        targets = _share(layer, rows, dense, part, targets)
    width = layer.leaf_width
    for number, leaf in enumerate(leaves):
        place = tree * len(leaves) + number
        chosen, weight_out, constant = _chosen_neurons(layer, rows, leaf.used, confidence, part, targets)
        neurons = slice(place * width, place * width + len(chosen))
        layer.weight_in[neurons] = part.weight_in[chosen].to(layer.weight_in.dtype)
        layer.weight_out[neurons] = weight_out.to(layer.weight_out.dtype)
        layer.weight_out[neurons.stop : (place + 1) * width] = 0
        if part.bias_in is not None:
            layer.bias_in[neurons] = part.bias_in[chosen].to(layer.bias_in.dtype)
        if layer.bias_out is not None:
            layer.bias_out[place] = constant.to(layer.bias_out.dtype)


def _share(layer: LeafFeedForward, rows: Tensor, dense: DenseWeights, part: DenseWeights, targets: Tensor) -> Tensor:
    """(S, H_out), what one of P trees should put out: its part of the dense layer, and a P-th of what that lacks."""
    shares = []
    for x, wanted in zip(rows.split(CHUNK), targets.split(CHUNK), strict=True):
        lacking = wanted - dense.forward(x, layer.activation)
        shares.append(part.forward(x, layer.activation) + lacking / layer.trees)
    return torch.cat(shares)


def _chosen_neurons(
    layer: LeafFeedForward,
    rows: Tensor,
    used: Tensor,
    confidence: Tensor,
    dense: DenseWeights,
    targets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The neurons (C,) of a leaf, their output weights (C, H_out), and its output bias (H_out,)."""
    size = dense.weight_out.square().sum(0)
    importance = _variance(rows, used, dense, layer.activation) * size
    count = min(layer.leaf_width, len(size))
    known = importance.argsort(descending=True, stable=True)[: CANDIDATES * count]
    moments = Moments(len(known), len(dense.weight_out), rows)
    for part in used.split(CHUNK):
        hidden, factor = dense.hidden(rows[part], layer.activation), confidence[part]
        if targets is None:
            outputs = nn.functional.linear(hidden, dense.weight_out, dense.bias_out)
        else:
            outputs = targets[part]
        moments.add(hidden[:, known] * factor.unsqueeze(1), outputs, factor)
    if layer.bias_out is not None:
        moments.centre()
    chosen = choose_neurons(moments, count).sort().values
    weights = output_weights(moments, chosen, dense.weight_out[:, known[chosen]].T / confidence[used].mean())
    return known[chosen], weights, moments.constant_for(chosen, weights)


def _variance(rows: Tensor, used: Tensor, dense: DenseWeights, activation: str) -> Tensor:
    """Variance of every neuron's activation among some rows: (F,)."""
    total = torch.zeros(len(dense.weight_in), dtype=torch.float64, device=rows.device)
    squares = total.clone()
    for part in used.split(CHUNK):
        hidden = dense.hidden(rows[part], activation).double()
        total += hidden.sum(0)
        squares += hidden.square().sum(0)
    return (squares / len(used) - (total / len(used)).square()).clamp(min=0).to(rows)
