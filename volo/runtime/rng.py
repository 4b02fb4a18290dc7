"""Randomness as a function of named integers.

Every draw of a run comes from a generator keyed by its purpose and position: (seed, purpose, epoch,
sample index) or (seed, purpose, epoch, step, chunk). So a draw depends on nothing that happened before it, which
is what lets a run resume at any step and give the same augmentation on any number of workers and ranks.
"""

import zlib

import numpy as np


def generator(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """Return the generator of ``purpose`` at the integer position ``key`` (each 0 or more) under ``seed``."""
    return np.random.Generator(np.random.PCG64(sequence(seed, purpose, *key)))


def torch_seed(seed: int, purpose: str, *key: int) -> int:
    """Return a 63-bit seed for a ``torch.Generator``, keyed as in :func:`generator`."""
    return int(sequence(seed, purpose, *key).generate_state(1, np.uint64)[0]) >> 1


def sequence(seed: int, purpose: str, *key: int) -> np.random.SeedSequence:
    # The purpose enters as a checksum of its name: Python's own hash() differs from process to process. An array of
    # 32-bit words is what numpy makes of whole numbers one by one, which takes it twice as long.
    entropy = (seed, zlib.crc32(purpose.encode()), *key)
    return np.random.SeedSequence(np.array(entropy, np.uint32) if max(entropy) < 1 << 32 else entropy)
