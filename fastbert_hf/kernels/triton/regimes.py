"""Which of the two ways through the trees a call takes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

REGIMES = ("walk", "subtrees")
VARIABLE = "FASTBERT_TRITON_REGIME"
LEAST_ROWS, LEAST_DEPTH = 2048, 7


def choose_regime(rows: int, depth: int) -> str:
    """Choose how a call walks, forward or backward.

    The walk gathers 2 (D+1) rows of parameters a token: 37 KB at H = 768, D = 11 in bfloat16, which only caches can
    serve; on paper 2.7 times the speed of dense at N = 16384, and 1.4 times with backward. Subtrees compute ten times
    the nodes on tensor cores but load each row of parameters once for a tile of 64 tokens; with few tokens most of a
    tile is padding, and a sort and small kernels come before. The threshold comes from these bytes and operations
    (docs/log.md); it is not yet measured on a GPU.

    Args:
        rows: N.
        depth: D.

    Returns:
        "walk" or "subtrees"; what the environment variable FASTBERT_TRITON_REGIME says, where it is set.

    Raises:
        ValueError: the variable names no regime.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted:
        if wanted not in REGIMES:
            raise ValueError(f"{VARIABLE} must be one of {', '.join(REGIMES)}; got {wanted!r}")
        return wanted
    return "subtrees" if rows >= LEAST_ROWS and depth >= LEAST_DEPTH else "walk"


@contextmanager
def use_regime(name: str) -> Iterator[None]:
    """Take one way for every call of a `with` block, by the environment variable.

    Args:
        name: "walk" or "subtrees".
    """
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
