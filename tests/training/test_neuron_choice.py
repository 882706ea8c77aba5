"""The choice of neurons against the plain definition: every remaining one tried, by least squares."""

import pytest
import torch

from fastbert_hf.training import neuron_choice
from fastbert_hf.training.neuron_choice import Moments, choose_neurons, output_weights


def problem(neurons=12, rows=200, seed=0):
    """Correlated activations with means, what they should give, and the factor of the constant."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, neurons, generator=draw) @ torch.randn(neurons, neurons, generator=draw)
    outputs = torch.randn(rows, 5, generator=draw) + mixed @ torch.randn(neurons, 5, generator=draw)
    return mixed.relu(), outputs, 0.5 + torch.rand(rows, generator=draw) / 2


def moments_of(hidden, outputs, factor, centre=True):
    moments = Moments(hidden.shape[1], outputs.shape[1], hidden)
    for part in range(0, len(hidden), 64):
        rows = slice(part, part + 64)
        moments.add(hidden[rows], outputs[rows], factor[rows])
    if centre:
        moments.centre()
    return moments


def left_by(features, outputs):
    solution = torch.linalg.lstsq(features.double(), outputs.double()).solution
    return (outputs - features.double() @ solution).square().sum().item()


@pytest.mark.parametrize("centre", [True, False])
def test_each_neuron_is_the_one_that_explains_most(centre):
    hidden, outputs, factor = problem()
    constant = factor[:, None] if centre else factor.new_zeros(len(factor), 0)
    expected = []
    for _ in range(6):
        rest = [number for number in range(12) if number not in expected]
        errors = [left_by(torch.cat([constant, hidden[:, [*expected, number]]], 1), outputs) for number in rest]
        expected.append(rest[min(range(len(rest)), key=errors.__getitem__)])
    assert choose_neurons(moments_of(hidden, outputs, factor, centre), 6).tolist() == expected


def test_weights_and_constant_are_those_of_least_squares(monkeypatch):
    monkeypatch.setattr(neuron_choice, "PRIOR_ROWS", 0)
    hidden, outputs, factor = problem()
    moments, chosen = moments_of(hidden, outputs, factor), torch.tensor([1, 4, 5])
    weights = output_weights(moments, chosen, torch.ones(3, 5))
    features = torch.cat([hidden[:, chosen], factor[:, None]], 1).double()
    expected = torch.linalg.lstsq(features, outputs.double()).solution
    torch.testing.assert_close(weights, expected[:3])
    torch.testing.assert_close(moments.constant_for(chosen, weights), expected[3])


def test_the_weights_of_the_dense_layer_count_as_so_many_rows():
    start = torch.ones(3, 5)
    hidden, outputs, factor = problem(rows=neuron_choice.PRIOR_ROWS)
    chosen = torch.tensor([1, 4, 5])
    moved = []
    for times in (1, 8, 64):
        moments = moments_of(hidden.repeat(times, 1), outputs.repeat(times, 1), factor.repeat(times))
        exact = torch.linalg.solve(moments.hidden[chosen][:, chosen], moments.outputs[chosen])
        gap = (output_weights(moments, chosen, start) - exact).norm() / (start - exact).norm()
        moved.append(gap.item())
    assert moved[0] > 0.3 and moved[0] > 3 * moved[1] > 9 * moved[2]


def test_rows_that_say_nothing_leave_the_weights_as_they_are():
    start = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    for hidden in (torch.zeros(3, 4), torch.ones(1, 4)):
        moments = moments_of(hidden, torch.ones(len(hidden), 5), torch.ones(len(hidden)))
        chosen = choose_neurons(moments, 2)
        assert chosen.tolist() == [0, 1]
        torch.testing.assert_close(output_weights(moments, chosen, start), start.double())


def test_a_copy_of_a_neuron_is_taken_last():
    hidden, outputs, factor = problem()
    hidden[:, 7] = 2 * hidden[:, 3]
    order = choose_neurons(moments_of(hidden, outputs, factor), 12).tolist()
    assert order[-1] in (3, 7) and sorted(order) == list(range(12))
