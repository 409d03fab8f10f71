"""Random numbers of single rows, from `Inputs.seeds_B`: the same whenever they are asked for.

Shapes: B rows, X numbers of each.
"""

from __future__ import annotations

import torch

# SplitMix64 (Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators"): the increment
# and the two factors of its mixing function, as int64.
_INCREMENT = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST_FACTOR = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND_FACTOR = 0x94D049BB133111EB - (1 << 64)


def drawn_integers(seeds_B: torch.Tensor, number: int, below: int) -> torch.Tensor:
    """(B, number) int64 from 0 to before ``below``, as good as uniform.

    A row's numbers depend on its seed alone, on every device. Generators of torch would have to be
    made for each row.

    Args:
        seeds_B: int64.
        number: how many of each row.
        below: far less than 2^63.
    """
    steps_X = torch.arange(1, number + 1, device=seeds_B.device)
    mixed_BX = seeds_B[:, None] + steps_X * _INCREMENT  # wraps, as all products below
    mixed_BX = (mixed_BX ^ _shifted(mixed_BX, 30)) * _FIRST_FACTOR
    mixed_BX = (mixed_BX ^ _shifted(mixed_BX, 27)) * _SECOND_FACTOR
    mixed_BX = mixed_BX ^ _shifted(mixed_BX, 31)
    return _shifted(mixed_BX, 1) % below


def _shifted(bits: torch.Tensor, by: int) -> torch.Tensor:
    """Shifted to the right as unsigned numbers; torch would repeat the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
