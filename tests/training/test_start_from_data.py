"""Leaf trees that begin from data: equal halves, good leaves, equal results, and every kind of bad input."""

import pytest
import torch
from torch import nn

from fastbert_hf import FastBertConfig, FastBertModel, LeafFeedForward
from fastbert_hf.training import start_from_data
from fastbert_hf.training.activations import RowSample, sample_inputs
from fastbert_hf.training.start_from_data import (
    DenseWeights,
    initialize_from_data,
    initialize_model_from_data,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clustered(count, width=12, seed=0):
    """Rows with a mean and unequal directions, as hidden states have."""
    return draw(count, width, seed=seed) * torch.linspace(0.3, 3, width) + draw(width, seed=9)


def dense_layer(neurons=40, width=12, out=6, seed=1):
    parts = [draw(*shape, seed=seed + n) for n, shape in enumerate([(neurons, width), (neurons,), (out, neurons)])]
    return DenseWeights(parts[0] * 0.4, parts[1] * 0.3, parts[2] * 0.3, draw(out, seed=seed + 3))


def parameters(layer):
    return {name: value.clone() for name, value in layer.state_dict().items()}


def error(layer, dense, x):
    wanted = dense.forward(x, layer.activation)
    return ((layer(x) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()).item()


@pytest.mark.parametrize("trees", [1, 3])
def test_every_leaf_gets_an_equal_share(trees):
    layer = LeafFeedForward(12, 6, depth=4, leaf_width=2, trees=trees)
    x = clustered(1600)
    initialize_from_data(layer, x)
    leaves, confidence = layer.route(x)
    for tree in range(trees):
        assert torch.bincount(leaves[:, tree], minlength=16).tolist() == [100] * 16
    assert 0.5 < confidence.mean() < 1


def test_routers_are_principal_components_with_logits_of_deviation_four():
    layer = LeafFeedForward(12, 6, depth=2, leaf_width=2)
    x = clustered(1000)
    initialize_from_data(layer, x)
    layer.requires_grad_(False)
    top = torch.linalg.svd(x - x.mean(0)).Vh[0]
    assert torch.cosine_similarity(layer.router[0], top, dim=0).abs() == pytest.approx(1, abs=1e-4)
    right = x @ layer.router[0] > layer.threshold[0]
    for node, rows in ((0, x), (1, x[~right]), (2, x[right])):
        logits = rows @ layer.router[node] - layer.threshold[node]
        assert logits.std() == pytest.approx(4, rel=1e-2) and logits.median().abs() < 0.1


def test_few_rows_take_the_smaller_product_to_the_same_components():
    x = clustered(9)
    used = torch.arange(9)
    small = start_from_data._components(x, used, count=1)
    whole = start_from_data._components(x, used)[:, :1]
    torch.testing.assert_close(small, whole, atol=1e-4, rtol=1e-4)


def test_several_trees_look_at_different_directions():
    layer = LeafFeedForward(12, 6, depth=3, leaf_width=2, trees=2)
    initialize_from_data(layer, clustered(800))
    first, second = layer.router.unflatten(0, (2, -1))
    assert (first @ second.T).abs().max() < 1e-2 * first.norm(dim=1).max() * second.norm(dim=1).max()


def test_a_leaf_as_wide_as_the_dense_layer_is_the_dense_layer():
    dense, x = dense_layer(neurons=8), clustered(500)
    layer = LeafFeedForward(12, 6, depth=0, leaf_width=8)
    initialize_from_data(layer, x, dense)
    torch.testing.assert_close(layer(x), dense.forward(x, "gelu"), atol=1e-5, rtol=1e-5)
    wider = LeafFeedForward(12, 6, depth=0, leaf_width=11)
    initialize_from_data(wider, x, dense)
    torch.testing.assert_close(wider(x), dense.forward(x, "gelu"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trees", [1, 2, 3])
def test_trees_of_depth_zero_share_the_neurons_of_the_dense_layer(trees):
    dense, x = dense_layer(neurons=9), clustered(500)
    layer = LeafFeedForward(12, 6, depth=0, leaf_width=-(-9 // trees), trees=trees)
    initialize_from_data(layer, x, dense)
    torch.testing.assert_close(layer(x), dense.forward(x, "gelu"), atol=1e-5, rtol=1e-5)


def test_more_trees_than_neurons_use_each_neuron_once():
    dense, x = dense_layer(neurons=2), clustered(200)
    layer = LeafFeedForward(12, 6, depth=0, leaf_width=1, trees=3)
    initialize_from_data(layer, x, dense)
    torch.testing.assert_close(layer(x), dense.forward(x, "gelu"), atol=1e-5, rtol=1e-5)


def test_leaves_fit_better_than_random_ones_and_better_with_their_own_neurons():
    x, dense = clustered(16000), dense_layer(neurons=256)
    layer = LeafFeedForward(12, 6, depth=3, leaf_width=16)
    initialize_from_data(layer, x, dense)
    chosen = error(layer, dense, x)
    shallow = LeafFeedForward(12, 6, depth=0, leaf_width=16)
    initialize_from_data(shallow, x, dense)
    initialize_from_data(layer, x)
    assert chosen < 0.9 * error(shallow, dense, x) and chosen < 0.7 * error(layer, dense, x)


def test_equal_arguments_give_equal_parameters_and_another_seed_others():
    x, dense = clustered(900), dense_layer()
    results = []
    for seed in (0, 0, 1):
        layer = LeafFeedForward(12, 6, depth=3, leaf_width=4, trees=2)
        torch.manual_seed(len(results))  # the global state plays no part
        initialize_from_data(layer, x, dense, seed=seed, max_rows=300)
        results.append(parameters(layer))
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name
    assert not torch.equal(results[0]["router"], results[2]["router"])


def test_no_more_rows_than_allowed_are_looked_at(monkeypatch):
    seen = []
    original = start_from_data._route
    monkeypatch.setattr(start_from_data, "_route", lambda *args: seen.append(len(args[2])) or original(*args))
    initialize_from_data(LeafFeedForward(12, 6, depth=1, leaf_width=1), clustered(500), max_rows=128)
    assert seen == [128]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_fewer_rows_than_leaves(count):
    layer = LeafFeedForward(12, 6, depth=4, leaf_width=3, trees=2)
    initialize_from_data(layer, clustered(count), dense_layer())
    assert all(value.isfinite().all() for value in layer.parameters())
    assert (layer.router.norm(dim=1) > 0).all()
    assert layer(clustered(50, seed=3)).isfinite().all()


def test_rows_that_are_all_equal():
    layer = LeafFeedForward(12, 6, depth=3, leaf_width=3)
    initialize_from_data(layer, clustered(1).expand(64, 12), dense_layer())
    assert all(value.isfinite().all() for value in layer.parameters())
    assert (layer.router.norm(dim=1) > 0).all()


def test_rows_that_repeat_are_split_between_different_values():
    x = torch.cat([clustered(1).expand(60, 12), clustered(40, seed=5)])
    layer = LeafFeedForward(12, 6, depth=1, leaf_width=1)
    initialize_from_data(layer, x)
    same = layer.route(x)[0][:60, 0]
    assert (same == same[0]).all() and min(torch.bincount(layer.route(x)[0][:, 0], minlength=2)) > 0


def test_bfloat16_layers_have_nearly_equal_halves():
    """Every parameter is rounded by at most eps / 2, a part of its value."""
    eps = torch.finfo(torch.bfloat16).eps
    layer = LeafFeedForward(12, 6, depth=3, leaf_width=4, dtype=torch.bfloat16)
    x, dense = clustered(4000), dense_layer()
    initialize_from_data(layer, x, dense)
    counts = torch.bincount(layer.route(x.bfloat16())[0][:, 0], minlength=8)
    # a threshold of at most 2 moves by at most eps; with a deviation of 4, 1/10 of the logits lie in a unit about it;
    # each of the three levels moves that part of the 1000 rows of two leaves, and an odd row goes to one side
    assert layer.threshold.abs().max() <= 2
    assert (counts - 500).abs().max() <= 3 * 1000 * eps / 10 + 1
    exact = LeafFeedForward(12, 6, depth=3, leaf_width=4)
    initialize_from_data(exact, x, dense)
    # outputs change by eps / 2 of their size, and the square of their error, which is smaller, by twice as much
    expected = error(exact, dense, x)
    assert error(layer.float(), dense, x) == pytest.approx(expected, rel=eps / expected**0.5)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, d: (x[:0], d), "expected \\(N, 12\\) with N >= 1"),
        (lambda x, d: (x[:, :5], d), "expected \\(N, 12\\)"),
        (lambda x, d: (x.index_fill(0, torch.tensor([7]), torch.nan), d), "row 7 of x is not finite"),
        (lambda x, d: (x.index_fill(0, torch.tensor([19]), torch.inf), d), "row 19 of x is not finite"),
        (lambda x, d: (x, d._replace(weight_out=d.weight_out.T)), "weight_out of dense has shape \\(40, 6\\)"),
        (lambda x, d: (x, d._replace(bias_in=d.bias_in * torch.nan)), "bias_in of dense has a value that is not"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(change, message):
    layer = LeafFeedForward(12, 6, depth=2, leaf_width=2)
    before = parameters(layer)
    x, dense = change(clustered(20), dense_layer())
    with pytest.raises(ValueError, match=message):
        initialize_from_data(layer, x, dense)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_a_layer_without_biases_takes_a_dense_layer_without_biases_only():
    layer = LeafFeedForward(12, 6, depth=2, leaf_width=2, bias=False)
    dense = dense_layer()
    with pytest.raises(ValueError, match="the layer has no biases"):
        initialize_from_data(layer, clustered(20), dense)
    initialize_from_data(layer, clustered(20), dense._replace(bias_in=None, bias_out=None))


def test_a_sample_of_rows_is_uniform_bounded_and_independent_of_the_parts(tmp_path):
    rows = torch.arange(1000.0).unsqueeze(1)
    kept = []
    for parts in (7, 64, 1000):
        sample = RowSample(tmp_path / f"{parts}", 100, 1, seed=3)
        for part in rows.split(parts):
            sample.add(part)
        kept.append(sample.rows()[:, 0].tolist())
        assert (tmp_path / f"{parts}").stat().st_size == 400
    assert kept[0] == kept[1] == kept[2] and len(set(kept[0])) == 100
    assert 400 < sum(kept[0]) / 100 < 600 and max(kept[0]) > 900


# ---- whole models


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    return FastBertModel(FastBertConfig(**sizes, fff_depth=2, fff_leaf_width=4, max_position_embeddings=16)).train()


def text(batches=6):
    ids = torch.randint(1, 50, (batches, 4, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 0, 5:] = 0
    return [{"input_ids": i, "attention_mask": m, "labels": i} for i, m in zip(ids, mask)]


def test_inputs_are_those_of_the_module_without_padding(model, tmp_path):
    layer, seen = ffn_layers(model)[1], []
    kept = sample_inputs(model, layer, text(), tmp_path / "rows", max_rows=1000)
    assert model.training
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.eval()
    for batch in text():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    expected = torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(seen, text())])
    torch.testing.assert_close(torch.from_numpy(kept.copy()), expected)
    with pytest.raises(ValueError, match="batches is empty"):
        sample_inputs(model, layer, [], tmp_path / "rows")


def ffn_layers(model):
    return [module for module in model.modules() if isinstance(module, LeafFeedForward)]


def test_every_layer_of_a_model_starts_from_its_own_inputs(model, tmp_path):
    dense = [dense_layer(out=12), None]
    initialize_model_from_data(model, text(), tmp_path / "new", dense=dense, max_rows=180)
    assert model.training and not list((tmp_path / "new").iterdir())
    for number, layer in enumerate(ffn_layers(model)):
        kept = sample_inputs(model, layer, text(), tmp_path / "rows", max_rows=1000)
        counts = torch.bincount(layer.route(torch.from_numpy(kept.copy()))[0][:, 0], minlength=4)
        assert counts.max() - counts.min() < 30, number  # of 210 rows 180 were looked at
    state = parameters(model)
    initialize_model_from_data(model, text(), tmp_path, dense=dense, max_rows=180)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_models_and_text_that_do_not_fit_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="iterator"):
        initialize_model_from_data(model, iter(text()), tmp_path)
    with pytest.raises(ValueError, match="dense has 1 entries; expected 2"):
        initialize_model_from_data(model, text(), tmp_path, dense=[None])
    with pytest.raises(ValueError, match="no leaf trees"):
        initialize_model_from_data(nn.Linear(2, 2), text(), tmp_path)


@pytest.mark.parametrize("trees", [1, 2])
def test_leaves_are_fitted_to_other_targets_than_the_dense_layer_gives(trees):
    dense, x = dense_layer(), clustered(2000)
    targets = dense.forward(x, "gelu") + 2 * x[:, :6].tanh()
    layers = [LeafFeedForward(12, 6, depth=2, leaf_width=16, trees=trees) for _ in range(2)]
    for layer, wanted in zip(layers, (None, targets)):
        initialize_from_data(layer, x, dense, targets=wanted)
    with torch.no_grad():
        plain, told = (
            ((layer(x) - targets).square().sum() / targets.var(0).sum() / len(x)).item() for layer in layers
        )
    assert told < 0.7 * plain


def test_targets_go_with_their_rows_when_rows_are_drawn():
    dense, x = dense_layer(), clustered(3000)
    layers = [LeafFeedForward(12, 6, depth=2, leaf_width=8) for _ in range(2)]
    for layer, targets in zip(layers, (None, dense.forward(x, "gelu"))):
        initialize_from_data(layer, x, dense, targets=targets, max_rows=500, seed=3)
    for name, value in layers[0].state_dict().items():
        torch.testing.assert_close(layers[1].state_dict()[name], value, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("targets, dense, message", [
    (draw(9, 6), None, "expected `dense` too"),
    (draw(8, 6), dense_layer(), r"targets has shape \(8, 6\); expected \(9, 6\)"),
    (draw(9, 5), dense_layer(), r"targets has shape \(9, 5\); expected \(9, 6\)"),
])  # fmt: skip
def test_targets_that_do_not_fit_are_named(targets, dense, message):
    with pytest.raises(ValueError, match=message):
        initialize_from_data(LeafFeedForward(12, 6, depth=1, leaf_width=2), draw(9, 12), dense, targets=targets)
