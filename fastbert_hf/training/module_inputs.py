"""Looking at what reaches modules while a model runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def watched_inputs(modules: Sequence[nn.Module], watch: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While a model runs, call `watch` with each module's number and its first argument, before the module computes.

    Args:
        modules: parts of the model. watch: what it raises ends the model's forward pass.
    """
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, number=number: watch(number, inputs[0]))
        for number, module in enumerate(modules)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
