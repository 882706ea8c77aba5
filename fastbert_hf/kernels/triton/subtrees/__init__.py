"""Many tokens: subtrees as matrix products, tokens sorted by the subtree they enter.

A tree of more than seven levels is cut in two parts. Every node of the upper part is computed for every token,
and the path picked afterwards; then tokens are sorted by the lower part they enter, and each of its nodes is computed
for the tokens of that group alone: 126 of 4095 nodes, on tensor cores. Output and gradients take products over the
same nodes, with zeros for those off the path. Sums are float32, logits are never rounded to TF32.
"""

from .call import Subtrees

__all__ = ["Subtrees"]
