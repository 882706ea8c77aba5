"""Which neurons of a dense layer stand for all of them among some rows, and with what output weights.

Neurons are chosen one after the other, each time the one that explains most of what is still missing (orthogonal
matching pursuit: Pati et al. 1993). Their output weights are then fitted by least squares, drawn towards those that
they have (ridge regression).
"""

import torch
from torch import Tensor

PRIOR_ROWS = 128  # for so many rows count the output weights of the dense layer, towards which the fit is drawn
DEPENDENT = 1e-3  # a neuron with less than this part of its variance left says what the chosen ones say
CONSTANT = 1e-10  # and one with less than this part of its mean square as variance, what the constant says


class Moments:
    """Sums of products over rows: all that the choice and the fit need of them.

    Args:
        neurons: K. width: H_out. like: what sums are made like; they are float64.
    """

    def __init__(self, neurons: int, width: int, like: Tensor):
        self.hidden = like.new_zeros(neurons, neurons, dtype=torch.float64)
        self.outputs = like.new_zeros(neurons, width, dtype=torch.float64)
        self.hidden_constant = like.new_zeros(neurons, dtype=torch.float64)
        self.outputs_constant = like.new_zeros(width, dtype=torch.float64)
        self.constant = 0.0
        self.rows = 0
        self._centred = False

    @property
    def squares(self) -> Tensor:
        """(K,), sums of squares of the activations, centred or not."""
        squares = self.hidden.diagonal()
        return squares + self.hidden_constant.square() / self.constant if self._centred else squares

    def add(self, hidden: Tensor, outputs: Tensor, constant: Tensor) -> None:
        """Count rows: activations (n, K), what they should give (n, H_out), and the factor of a constant (n,)."""
        hidden, outputs, constant = hidden.double(), outputs.double(), constant.double()
        self.hidden += hidden.T @ hidden
        self.outputs += hidden.T @ outputs
        self.hidden_constant += constant @ hidden
        self.outputs_constant += constant @ outputs
        self.constant += constant.square().sum().item()
        self.rows += len(hidden)

    def centre(self) -> None:
        """Leave to a constant what a constant can explain; `constant_for` says which one."""
        self.hidden -= torch.outer(self.hidden_constant, self.hidden_constant) / self.constant
        self.outputs -= torch.outer(self.hidden_constant, self.outputs_constant) / self.constant
        self._centred = True

    def constant_for(self, chosen: Tensor, weights: Tensor) -> Tensor:
        """(H_out,), the best constant beside some neurons: chosen (C,), weights (C, H_out)."""
        return (self.outputs_constant - self.hidden_constant[chosen] @ weights) / self.constant


def choose_neurons(moments: Moments, count: int) -> Tensor:
    """(count,) int64, the numbers of neurons in the order of choice; where none explains more, the first ones."""
    hidden, outputs = moments.hidden, moments.outputs
    left = hidden.diagonal().clone()  # of each neuron's square, beside the chosen ones
    enough = torch.maximum(DEPENDENT * left, CONSTANT * moments.squares)
    explains = outputs.square().sum(1)  # times `left`
    rows, targets = hidden.new_zeros(len(hidden), count), outputs.new_zeros(count, outputs.shape[1])
    free = torch.ones_like(left, dtype=torch.bool)
    chosen = []
    for step in range(count):  # a Cholesky decomposition that takes the neurons in the order of choice
        usable = free & (left > enough)
        score = torch.where(usable, explains / torch.where(usable, left, 1.0), 0.0)
        number = int(torch.where(free, score, -1.0).argmax())
        chosen.append(number)
        free[number] = False
        if not usable[number]:
            continue
        root, before = left[number].sqrt(), rows[:, :step]
        row = (hidden[:, number] - before @ before[number]) / root
        target = (outputs[number] - before[number] @ targets[:step]) / root
        dots = outputs @ target - before @ (targets[:step] @ target)
        explains += row * (row * target.square().sum() - 2 * dots)
        left -= row.square()
        rows[:, step], targets[step] = row, target
    return torch.tensor(chosen, dtype=torch.int64, device=hidden.device)


def output_weights(moments: Moments, chosen: Tensor, start: Tensor) -> Tensor:
    """(C, H_out), the output weights with which the chosen neurons (C,) come closest: near `start`, (C, H_out)."""
    hidden, start = moments.hidden[chosen][:, chosen], start.double()
    missing = moments.outputs[chosen] - hidden @ start
    mean_square = moments.squares[chosen].sum() / max(1, len(chosen) * moments.rows)
    ridge = (PRIOR_ROWS * mean_square).clamp(min=1e-30)
    return start + torch.linalg.solve(hidden + ridge * torch.eye(len(hidden)).to(hidden), missing)
