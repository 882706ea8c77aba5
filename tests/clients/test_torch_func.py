"""What docs/limits.md says of torch.func and of second derivatives."""

import pytest
import torch
from torch.func import functional_call, grad, jacrev, jvp, vmap

from fastbert_hf import FastBertForMaskedLM, FastFeedForward
from tests.clients.helpers import random_batch, tiny_model


def layer() -> FastFeedForward:
    torch.manual_seed(0)
    return FastFeedForward(8, 8, depth=3, trees=2, initializer_range=0.3)


@torch.no_grad()
def test_functional_call_and_vmap_give_the_numbers_of_a_plain_call():
    model = tiny_model(FastBertForMaskedLM, num_hidden_layers=1)
    ids = random_batch(3, 8)["input_ids"]
    expected = model(ids).logits
    parameters = dict(model.named_parameters())
    torch.testing.assert_close(functional_call(model, parameters, (ids,)).logits, expected)
    mapped = vmap(lambda row: model(row[None]).logits[0])(ids)
    torch.testing.assert_close(mapped, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_vmap_over_the_parameters_is_an_ensemble():
    first, second, x = layer(), layer(), torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    second.weight_in.mul_(-1)
    stacked = {name: torch.stack([p, dict(second.named_parameters())[name]]) for name, p in first.named_parameters()}
    given = vmap(lambda parameters: functional_call(first, parameters, (x,)))(stacked)
    torch.testing.assert_close(given, torch.stack([first(x), second(x)]), rtol=1e-5, atol=1e-5)


def test_derivatives_by_torch_func_and_second_derivatives_raise():
    """Never a wrong number in silence."""
    run, x = layer(), torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    with pytest.raises(RuntimeError, match="setup_context"):
        grad(lambda rows: run(rows).sum())(x)
    with pytest.raises(RuntimeError, match="setup_context"):
        jacrev(run)(x)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative; use reverse mode"):
        jvp(run, (x,), (x,))
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(run(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()
