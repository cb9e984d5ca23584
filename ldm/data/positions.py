"""Randomness as a function of position: sample p and its random numbers do not depend on who asks, or when.

Training runs along one endless stream of positions 0, 1, 2, ...; an epoch of n samples is n consecutive positions.
Nothing here has state, so that a resumed run needs only the number of the next position.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch

ROUNDS = 6


def draw_key(seed: int, position: int, stream: str) -> int:
    """Return a 63-bit key that depends on every bit of (seed, position, stream)."""
    digest = blake2b(f"{seed}/{stream}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, position: int, stream: str) -> torch.Generator:
    """Return a CPU generator for one kind of random numbers (noise, caption, ...) at one position."""
    return torch.Generator().manual_seed(draw_key(seed, position, stream))


def generators(seed: int, positions: Sequence[int], stream: str) -> list[torch.Generator]:
    """Return one generator per position; see `generator`."""
    return [generator(seed, position, stream) for position in positions]


def permuted(index: int, length: int, key: int) -> int:
    """Return the image of `index` under a permutation of ``range(length)``, in constant memory.

    A balanced Feistel network permutes the smallest power of four that holds `length`; walking its cycle until it
    is back inside the range makes it a permutation of the range itself (Black & Rogaway 2002, "cycle walking").
    At most four steps are expected, since the power of four is less than 4 * length.
    """
    if not 0 <= index < length:
        raise ValueError(f"index {index} is outside range({length})")
    half_bits = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for round_number in range(ROUNDS):
            left, right = right, left ^ (_mix(right + (round_number << 56) + key) & mask)
        index = left << half_bits | right
        if index < length:
            return index


def _mix(value: int) -> int:
    """Return 64 well-mixed bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    value &= 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31


def sample_index(seed: int, position: int, length: int) -> int:
    """Return the index, below `length`, of the sample at `position`; each epoch has each sample once, reshuffled."""
    epoch, offset = divmod(position, length)
    return permuted(offset, length, draw_key(seed, epoch, "order"))


def step_positions(
    global_step: int, batch_size: int, micro_step: int = 0, micro_steps: int = 1, rank: int = 0, world: int = 1
) -> range:
    """Return the positions that one process takes in one micro-step of optimiser step `global_step`.

    Together all processes and micro-steps take ``[global_step * batch_size, (global_step + 1) * batch_size)``.
    """
    share, left_over = divmod(batch_size, micro_steps * world)
    if left_over or not share:
        raise ValueError(
            f"data.batch_size {batch_size} cannot be shared equally by {world} processes x {micro_steps} "
            f"accumulation steps; use a multiple of {world * micro_steps}"
        )
    start = global_step * batch_size + (micro_step * world + rank) * share
    return range(start, start + share)
