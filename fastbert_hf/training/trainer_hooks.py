"""What a subclass of Trainer overrides, checked against the installed transformers before it is relied on."""

import dis
import functools
import inspect
from collections.abc import Iterator
from types import CodeType

import transformers
from transformers import Trainer

READS = {"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"}  # of which Python versions have one or more


def check_hooks(subclass: type[Trainer], trainer: type[Trainer] = Trainer) -> None:
    """Check that Trainer still has and uses everything that a subclass takes over.

    Most of it is private: a release may rename it, and the subclass's method would then never be called, silently.

    Args:
        subclass: its `HOOKS` names the methods that it overrides, its `SETTINGS` the attributes that it sets and
            Trainer's code reads.
        trainer: the class that is looked at.

    Raises:
        ValueError: naming what is gone, and the version of transformers.
    """
    used = _names_used(trainer)
    gone = [name for name in subclass.HOOKS if not hasattr(trainer, name) or name not in used]
    gone += [name for name in subclass.SETTINGS if name not in used]
    if gone:
        raise ValueError(
            f"transformers {transformers.__version__} no longer uses Trainer.{', Trainer.'.join(gone)}, which "
            f"{subclass.__name__} relies on; expected a version in which it does, 5.10 to 5.23 for instance"
        )


@functools.cache  # a command that fine-tunes many times asks each time
def _names_used(trainer: type[Trainer]) -> frozenset[str]:
    """Every attribute that the methods of a class read."""
    members = (inspect.unwrap(member) if callable(member) else member for member in vars(trainer).values())
    functions = filter(inspect.isfunction, members)
    return frozenset(name for function in functions for name in _attributes_read(function.__code__))


def _attributes_read(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in READS:
            yield instruction.argval
    for constant in code.co_consts:  # functions and comprehensions inside it
        if inspect.iscode(constant):
            yield from _attributes_read(constant)
