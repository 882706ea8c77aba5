"""The parts of distillation's loss, and the start of a student, against what they are by definition."""

import pytest
import torch
from transformers.modeling_outputs import ModelOutput

from fastbert_hf import (
    FastBertConfig,
    FastBertForMultipleChoice,
    FastBertForSequenceClassification,
    FastBertModel,
    FastFeedForward,
    LeafFeedForward,
)
from fastbert_hf.training.activations import sample_inputs, sample_inputs_of_all
from fastbert_hf.training.distillation.layer_fit import DenseFeedForward, FitSettings
from fastbert_hf.training.distillation.objective import (
    HiddenScale,
    divergence,
    embedding_parts,
    head_parts,
    hidden_error,
)
from fastbert_hf.training.distillation.student import student_of
from fastbert_hf.training.distillation.student_fit import add_constant, fitted, scale_outputs
from fastbert_hf.training.start_from_data import DenseWeights, dense_feed_forward

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def teacher():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2}
    return FastBertModel(
        FastBertConfig(**sizes, ffn_type="dense", intermediate_size=24, initializer_range=0.3)
    ).eval()


def test_the_hidden_error_of_a_constant_is_one_and_padding_does_not_count():
    states = [draw(3, 5, 4, seed=1) * torch.tensor([0.2, 1.0, 3.0, 30.0]) + 5, draw(3, 5, 4, seed=2)]
    scale = HiddenScale(2, 4)
    for row in range(3):  # in parts
        scale.add([state[row : row + 1] for state in states], MASK[row : row + 1])
    variance = scale.variance()
    rows = [state[MASK.bool()] for state in states]
    torch.testing.assert_close(variance, torch.stack([row.var(0, correction=0) for row in rows]))
    constant = [row.mean(0).expand(3, 5, 4) for row in rows]
    torch.testing.assert_close(hidden_error(constant, states, MASK, variance), torch.ones(2))
    wild = [state.masked_fill(MASK.unsqueeze(-1) == 0, 1e6) for state in states]
    assert torch.equal(hidden_error(wild, states, MASK, variance), torch.zeros(2))


def test_a_dimension_that_hardly_varies_does_not_rule_the_error():
    state = draw(1, 1000, 5) * torch.tensor([1e-9, 1.0, 2.0, 3.0, 4.0])
    scale = HiddenScale(1, 5)
    scale.add([state], torch.ones(1, 1000))
    median = state[0].var(0, correction=0).median()
    torch.testing.assert_close(scale.variance()[0, 0], 0.01 * median)


def test_embeddings_are_compared_by_direction():
    wanted = draw(6, 8, seed=3)
    parts = embedding_parts(3 * wanted, wanted)
    assert all(abs(value) < 1e-6 for value in parts.values())
    own = draw(6, 8, seed=4)
    parts = embedding_parts(own, wanted)
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(parts["cosine_distance"], 1 - cosine(own, wanted).mean())
    both = [cosine(e.unsqueeze(0), e.unsqueeze(1), dim=-1) for e in (own, wanted)]
    torch.testing.assert_close(parts["similarity_error"], (both[0] - both[1]).square().mean())


def test_the_divergence_is_that_of_the_definition():
    own, wanted = draw(5, 3, seed=5), draw(5, 3, seed=6)
    p, q = wanted.softmax(-1), own.softmax(-1)
    torch.testing.assert_close(divergence(own, wanted), (p * (p / q).log()).sum(-1).mean())
    assert divergence(wanted + 7, wanted).abs() < 1e-6
    assert divergence(own[:0], wanted[:0]) == 0


def classifier(**changes):
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return FastBertForSequenceClassification(FastBertConfig(**sizes, **changes, fff_depth=1))


def test_each_of_several_labels_is_a_distribution_of_its_own():
    own, wanted = draw(5, 3, seed=5), draw(5, 3, seed=6)
    model = classifier(num_labels=3, problem_type="multi_label_classification")

    def found(student):
        (part,) = head_parts(model, ModelOutput(logits=student), ModelOutput(logits=wanted), {}).values()
        return part

    p, q = wanted.sigmoid(), own.sigmoid()
    definition = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(found(own), definition.mean())
    assert found(wanted).abs() < 1e-6


def test_several_scores_are_compared_by_their_squared_error():
    own, wanted = draw(5, 3, seed=5), draw(5, 3, seed=6)
    model = classifier(num_labels=3, problem_type="regression")
    parts = head_parts(model, ModelOutput(logits=own), ModelOutput(logits=wanted), {})
    assert parts.keys() == {"score_error"}
    torch.testing.assert_close(parts["score_error"], (own - wanted).square().mean())


def test_students_of_a_teacher_without_biases():
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    bare = FastBertModel(
        FastBertConfig(**sizes, ffn_type="dense", intermediate_size=6, use_bias=False, fff_bias=False)
    )
    for form in ("leaf:1x2", "tree:1x2"):
        layer = student_of(bare, form).encoder.layers[0].ffn
        assert layer.bias_in is not None and student_of(bare, form).model.config.fff_bias
    with pytest.raises(ValueError, match="'dense:2' has biases and the model has none"):
        student_of(bare, "dense:2")


def test_a_head_without_a_loss_is_refused():
    config = FastBertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, fff_depth=1)
    with pytest.raises(ValueError, match="FastBertForMultipleChoice cannot be distilled"):
        head_parts(FastBertForMultipleChoice(config), None, None, {})


@pytest.mark.parametrize("layer", [
    lambda: DenseFeedForward(6, 4, 5, "gelu"),
    lambda: LeafFeedForward(6, 4, depth=2, leaf_width=3),
    lambda: FastFeedForward(6, 4, depth=2, trees=2),
])  # fmt: skip
def test_outputs_are_scaled_dimension_by_dimension(layer):
    torch.manual_seed(1)
    layer = layer().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x, factors = draw(9, 6), torch.tensor([0.5, 2.0, 1.0, 10.0], dtype=torch.float64)
    before = layer(x).detach()
    scale_outputs(layer, factors)
    torch.testing.assert_close(layer(x).detach(), before * factors.float())


@pytest.mark.parametrize("form", ["dense:12", "leaf:2x12"])
def test_a_fitted_layer_gives_what_the_dense_one_does_in_its_own_units(form):
    dense = DenseWeights(draw(12, 6, seed=1), draw(12, seed=2), draw(4, 12, seed=3), draw(4, seed=4))
    dense = dense._replace(weight_out=dense.weight_out * torch.tensor([[0.01], [1.0], [5.0], [100.0]]))
    x = draw(2000, 6, seed=5)
    wanted = dense.forward(x, "gelu")
    settings = FitSettings(steps=400, rows_per_step=128, learning_rate=1e-2)
    layer, mean, error = fitted(form, dense, x, wanted.clone(), "gelu", settings)
    assert 0 < error < 0.2
    x, wanted = x[-100:], wanted[-100:]  # those that are held back
    with torch.no_grad():
        errors = (layer(x) + mean - wanted).square().mean(0) / wanted.var(0, correction=0)
    torch.testing.assert_close(errors.mean().item(), error, rtol=1e-2, atol=0)
    assert errors.max() < 0.3  # in the smallest dimension as in the largest


@pytest.mark.parametrize("fields", [
    {"ffn_type": "dense", "intermediate_size": 7},
    {"fff_depth": 2, "fff_trees": 2},
    {"fff_depth": 2, "fff_leaf_width": 3},
], ids=str)  # fmt: skip
def test_a_constant_is_added_to_what_a_layer_puts_out(fields):
    torch.manual_seed(2)
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    layer = FastBertModel(FastBertConfig(**sizes, norm_scheme="post", use_bias=True, **fields)).eval().layers[0]
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x, constant = draw(2, 5, 8), 5 * draw(8, seed=1)
    layer.ffn_norm = torch.nn.Identity()  # what goes into it
    with torch.no_grad():
        before = layer(x)
        add_constant(layer, constant)
        torch.testing.assert_close(layer(x), before + constant, rtol=1e-5, atol=1e-4)


def test_one_pass_samples_the_rows_of_every_layer(tmp_path):
    model = teacher()
    batches = [{"input_ids": torch.randint(50, (3, 5)), "attention_mask": MASK} for _ in range(4)]
    layers = dense_feed_forward(model)
    together = sample_inputs_of_all(
        model, layers, batches, [tmp_path / f"{i}" for i in range(3)], max_rows=30, seed=3
    )
    for number, layer in enumerate(layers):
        alone = sample_inputs(model, layer, batches, tmp_path / "alone", max_rows=30, seed=3)
        assert (alone == together[number]).all() and len(alone) == 30


def test_a_student_begins_with_the_weights_of_its_teacher():
    model = teacher()
    student = student_of(model, "leaf:2x3")
    weights = model.state_dict()
    same = [name for name, value in student.model.state_dict().items() if name in weights]
    assert all(torch.equal(student.model.state_dict()[name], weights[name]) for name in same)
    assert {name for name in weights if ".ffn." not in name} == set(same)
    short = student_of(model, "layers:2")
    assert short.teacher_layers == [1, 2] and model.config.num_hidden_layers == 3
    for number, source in enumerate(short.teacher_layers):
        for name, value in model.layers[source].state_dict().items():
            assert torch.equal(short.model.layers[number].state_dict()[name], value)
