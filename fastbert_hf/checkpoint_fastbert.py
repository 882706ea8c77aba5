# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""Whether the tensors of a checkpoint fit a model: a missing or unknown tensor is an error, not a line in a log."""

from torch import nn


class CheckpointMismatchError(ValueError, RuntimeError):
    """The tensors of a checkpoint do not fit the model.

    A ValueError as for every wrong value here, and a RuntimeError because Transformers raises one for wrong shapes.
    """


def misfits(model: nn.Module, info: dict, head_prefixes: tuple[str, ...], replace_mismatched: bool) -> list[str]:
    """What does not fit, in words; empty if all is well.

    Args:
        model: the loaded model; its configuration names the class that was saved, in `architectures`.
        info: the loading info of `from_pretrained`.
        head_prefixes: how the tensors of any head begin. This model's own may be missing where another class was
            saved: they are new. Those of heads it does not have are superfluous.
        replace_mismatched: whether tensors of another shape were to be replaced by new ones.
    """
    own_heads = tuple(prefix for prefix in head_prefixes if hasattr(model, prefix.removesuffix(".")))
    other_heads = tuple(prefix for prefix in head_prefixes if prefix not in own_heads)
    has_new_head = type(model).__name__ not in (model.config.architectures or ())
    excused = {"missing": own_heads if has_new_head else (), "unexpected": other_heads}
    problems = []
    for kind, prefixes in excused.items():
        names = sorted(name for name in info[f"{kind}_keys"] if not name.startswith(prefixes))
        if names:
            problems.append(f"{len(names)} {kind} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})")
    for name, stored, expected in sorted(info["mismatched_keys"]):
        if not replace_mismatched:
            problems.append(f"{name} is {tuple(stored)}, expected {tuple(expected)}")
    return problems
