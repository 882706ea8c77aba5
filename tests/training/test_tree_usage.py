"""Usage of leaf trees: tokens of each leaf, dead leaves by name, in numbers and as a picture."""

import json

import pytest
import torch

from fastbert_hf import FastBertConfig, FastBertModel
from fastbert_hf.training.figures import plot_tree_usage
from fastbert_hf.training.pretraining.run import pretrain
from fastbert_hf.training.tree_usage import (
    VisitCounts,
    counted_visits,
    dead_leaf_names,
    tree_layers,
    tree_usage,
    usage_log,
    visited_nodes,
)
from tests.training.conftest import TINY_MODEL
from tests.training.runs import arguments


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    return FastBertModel(FastBertConfig(**sizes, fff_depth=2, fff_trees=2, fff_leaf_width=3)).eval()


def test_the_path_to_a_leaf_is_that_of_its_decisions(model):
    layer = tree_layers(model)[0]
    with torch.no_grad():
        layer.threshold.normal_(generator=torch.Generator().manual_seed(1))
        x = torch.randn(40, 8, generator=torch.Generator().manual_seed(2))
        nodes = visited_nodes(layer, x)
        assert nodes.shape == (40, 2, 3) and set(nodes[:, :, 2].flatten().tolist()) <= {3, 4, 5, 6}
        for row, tree in ((row, tree) for row in range(40) for tree in range(2)):
            node = 0
            for level in range(3):
                assert nodes[row, tree, level] == node
                if level < 2:
                    router = tree * 3 + node
                    node = 2 * node + 1 + int(layer.router[router] @ x[row] > layer.threshold[router])
        assert torch.equal(nodes[:, :, 2] - 3, layer.route(x)[0])


def test_leaves_of_a_model_are_counted_without_changing_it(model):
    ids = torch.randint(1, 50, (4, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).last_hidden_state
        with counted_visits(model) as counts:
            assert torch.equal(model(ids).last_hidden_state, before)
    usage = tree_usage(counts)
    for layer in usage:
        assert layer["tokens"] == 36 and layer["nodes"] == 14
        assert [len(tree) for tree in layer["leaf_fractions"]] == [4, 4]
        assert all(sum(tree) == pytest.approx(1, abs=1e-5) for tree in layer["leaf_fractions"])


def counts_of(model, leaf_counts):
    """The visits of a layer's nodes, from those of its leaves; both layers alike."""
    counts = VisitCounts(tree_layers(model))
    for count in counts:
        leaves = torch.tensor(leaf_counts)
        count[:, 3:] = leaves
        count[:, 1:3] = leaves.unflatten(1, (2, 2)).sum(-1)
        count[:, 0] = leaves.sum(1)
    return counts


def test_dead_leaves_are_named(model):
    usage = tree_usage(counts_of(model, [[6, 2, 0, 0], [2, 2, 2, 2]]))
    assert usage[0]["leaf_fractions"] == [[0.75, 0.25, 0.0, 0.0], [0.25] * 4]
    assert usage[0]["dead_leaves"] == [[0, 2], [0, 3]] and usage[0]["dead_nodes"] == 3
    expected = ["layer 0, tree 0, leaf 2", "layer 0, tree 0, leaf 3", "layer 1, tree 0, leaf 2"]
    assert dead_leaf_names(usage) == [*expected, "layer 1, tree 0, leaf 3"]
    logs = usage_log(usage)
    assert logs["trees/layer_1_dead_leaves"] == 2 and logs["trees/layer_1_largest_leaf_fraction"] == 0.75
    assert dead_leaf_names(tree_usage(counts_of(model, [[1, 1, 1, 1]] * 2))) == []
    assert dead_leaf_names(tree_usage([torch.tensor([[1, 1, 0]])])) is None
    many = [{"dead_leaves": [[0, leaf] for leaf in range(30)]}]
    assert len(dead_leaf_names(many)) == 21 and dead_leaf_names(many)[-1] == "and 10 more"


def test_the_picture_shows_dead_leaves_in_a_colour_of_their_own(model, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    pictures = {}
    for name, counts in {"dead": [[6, 2, 0, 0]] * 2, "alive": [[6, 2, 1, 1]] * 2}.items():
        plot_tree_usage(tmp_path / f"{name}.png", tree_usage(counts_of(model, counts)))
        pixels = image.imread(tmp_path / f"{name}.png")[:, :, :3]
        pictures[name] = ((pixels[:, :, 0] > 0.95) & (pixels[:, :, 1:].max(-1) < 0.05)).mean()
    assert pictures["dead"] > 0.1 and pictures["alive"] == 0


def test_a_run_of_leaf_trees_reports_its_leaves(tiny, tmp_path):
    (tmp_path / "model.yaml").write_text(TINY_MODEL + "fff_leaf_width: 2\n", encoding="utf-8")
    changes = {"model_config": str(tmp_path / "model.yaml"), "max_steps": 2}
    _, summary = pretrain(*arguments(tiny, tmp_path / "out", **changes))
    usage = json.loads((tmp_path / "out" / "tree_usage.json").read_text())
    assert summary["dead_leaves"] == dead_leaf_names(usage)
    assert [len(layer["leaf_fractions"][0]) for layer in usage] == [4, 4]
    _, dense = pretrain(*arguments(tiny, tmp_path / "plain", max_steps=1))
    assert (
        dense["dead_leaves"] is None and "leaf_fractions" not in (tmp_path / "plain" / "tree_usage.json").read_text()
    )
