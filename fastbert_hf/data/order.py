"""In which order sequences are fed: endless, shuffled anew every epoch, and a function of seed and position alone."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class MicrobatchOrder(Sampler):
    """Endless microbatches of sequence numbers, for a DataLoader's `batch_sampler`.

    The microbatches of all processes together are one row, the same for any number of processes; process r of W takes
    number r, r + W, r + 2W, ... of it. A run goes on where it stopped from a single number.

    Args:
        sequences: how many there are, S.
        microbatch: sequences of a microbatch; what is left at the end of an epoch is not used in it.
        seed: changes the order.
        rank: this process.
        processes: how many there are.

    Attributes:
        start: number of the first microbatch, over all processes; set before iterating.

    Raises:
        ValueError: if there are fewer sequences than one microbatch.
    """

    def __init__(self, sequences: int, microbatch: int, seed: int, rank: int = 0, processes: int = 1):
        if sequences < microbatch:
            raise ValueError(
                f"the corpus is smaller than one microbatch: {sequences} sequences, {microbatch} are wanted"
            )
        self.sequences, self.microbatch, self.seed = sequences, microbatch, seed
        self.rank, self.processes = rank, processes
        self.start = 0

    @property
    def per_epoch(self) -> int:
        """Microbatches of one epoch, over all processes."""
        return self.sequences // self.microbatch

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the sequence numbers of this process's microbatches, without end."""
        number, shuffled = self.start + self.rank, (-1, np.empty(0, dtype=np.int64))
        while True:
            epoch, place = divmod(number, self.per_epoch)
            if shuffled[0] != epoch:
                shuffled = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.sequences)
            yield shuffled[1][place * self.microbatch : (place + 1) * self.microbatch].tolist()
            number += self.processes
