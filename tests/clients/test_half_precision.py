"""bfloat16 and float16 models, and automatic mixed precision, run forward and backward with every head."""

import copy

import pytest
import torch

from fastbert_hf import (
    FastBertForMaskedLM,
    FastBertForMultipleChoice,
    FastBertForQuestionAnswering,
    FastBertForSequenceClassification,
    FastBertForTokenClassification,
    FastFeedForward,
)
from fastbert_hf.encoder_fastbert import visible_keys
from tests.clients.helpers import random_batch, tiny_model

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
HALVES = (torch.bfloat16, torch.float16)


def masked_lm_batch():
    inputs = random_batch(3, 8)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


HEADS = {
    "masked_lm": (FastBertForMaskedLM, masked_lm_batch),
    "classification": (
        FastBertForSequenceClassification,
        lambda: {**random_batch(3, 8), "labels": torch.tensor([0, 1, 0])},
    ),
    "tokens": (
        FastBertForTokenClassification,
        lambda: {**random_batch(3, 8), "labels": torch.arange(24).view(3, 8) % 2},
    ),
    "spans": (
        FastBertForQuestionAnswering,
        lambda: {
            **random_batch(3, 8),
            "start_positions": torch.tensor([0, 3, 1]),
            "end_positions": torch.tensor([2, 4, 7]),
        },
    ),
    "choices": (
        FastBertForMultipleChoice,
        lambda: {
            **{name: tensor.unflatten(0, (2, 2)) for name, tensor in random_batch(4, 8).items()},
            "labels": torch.tensor([1, 0]),
        },
    ),
}


def routes(model: torch.nn.Module, inputs: dict) -> list[torch.Tensor]:
    """Visited nodes of every layer in one forward pass."""
    visited = []
    hooks = [
        module.register_forward_pre_hook(lambda module, arguments: visited.append(module.route(arguments[0])))
        for module in model.modules()
        if isinstance(module, FastFeedForward)
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return visited


def loss_and_gradients(model: torch.nn.Module, inputs: dict):
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_every_head_trains_in_half_precision_near_float32(head, dtype):
    """Wide decision margins keep the paths of both dtypes equal; that they are is part of the claim."""
    model_class, batch = HEADS[head]
    full = tiny_model(model_class, **NO_DROPOUT, fff_depth=2).train()
    with torch.no_grad():
        for name, parameter in full.named_parameters():
            parameter.copy_(parameter.to(dtype))  # both models hold the same numbers
            if name.endswith("bias_in"):  # about half of the nodes send every token left, the others right
                signs = torch.where(torch.arange(parameter.shape[0]) % 3 == 0, 4.0, -2.0)
                parameter.copy_(signs)
    half = copy.deepcopy(full).to(dtype)
    inputs = batch()
    for given, expected in zip(routes(half, inputs), routes(full, inputs), strict=True):
        assert torch.equal(given, expected)

    outputs, gradients = loss_and_gradients(half, inputs)
    expected_outputs, expected_gradients = loss_and_gradients(full, inputs)
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(outputs.loss.float(), expected_outputs.loss, rtol=8 * epsilon, atol=8 * epsilon)
    for name, expected in expected_gradients.items():
        given = gradients[name]
        assert given.dtype == dtype and given.isfinite().all(), name
        error = (given.float() - expected).norm()
        assert error <= 16 * epsilon * expected.norm() + epsilon, (name, error, expected.norm())
    assert any(expected.norm() > 0.01 for expected in expected_gradients.values())


@pytest.mark.parametrize("head", HEADS)
def test_a_training_step_under_autocast_leaves_float32_parameters_and_gradients(head):
    model_class, batch = HEADS[head]
    model = tiny_model(model_class, **NO_DROPOUT).train()
    inputs = batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    dtypes = []
    model.fastbert.layers[0].ffn.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    losses = []
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert set(dtypes) == {torch.bfloat16}
    assert losses[-1] < losses[0]


def test_autocast_without_gradients_gives_the_numbers_of_autocast_with_them():
    model = tiny_model(FastBertForMaskedLM)
    inputs = random_batch(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**inputs).logits
        with torch.no_grad():
            given = model(**inputs).logits
    torch.testing.assert_close(given, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_model_loads_in_the_dtype_that_is_asked_for(dtype, saved):
    folder = saved(tiny_model(FastBertForMaskedLM))
    model = FastBertForMaskedLM.from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    with torch.no_grad():
        assert model(**random_batch(3, 8)).logits.dtype == dtype


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@torch.no_grad()
def test_attention_in_half_precision_is_near_float32_with_padding_and_fully_masked_rows(dtype, attention):
    model = tiny_model(FastBertForMaskedLM, num_hidden_layers=1).to(dtype)
    model.set_attn_implementation(attention)
    inputs = random_batch(3, 8)
    inputs["attention_mask"][-1] = 0
    assert model(**inputs).logits.isfinite().all()

    layer = model.fastbert.layers[0].attention
    hidden = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = visible_keys(inputs["attention_mask"])[:, None, None]
    given = layer(hidden, mask)[0].float()
    expected = layer.float()(hidden.float(), mask)[0]
    assert (given - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()
