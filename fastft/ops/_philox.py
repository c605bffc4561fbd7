"""Reference of the dropout mask: Philox4x32-7 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

Seven rounds are the fewest that the paper found to pass BigCrush.
"""

import torch

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
ROUNDS = 7


def _mulhilo(m: int, c):
    """High and low 32 bits of m · c (int64 tensors holding 32-bit values), through 48-bit partial products."""
    high = (m * (c >> 16) + (m * (c & 0xFFFF) >> 16)) >> 16
    return high, (m * c) & _LOW


def philox4x32(counter, key):
    """Four int64 tensors of 32-bit words from four counter words and two key words (tensors that broadcast)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        hi0, lo0 = _mulhilo(_M0, c0)
        hi1, lo1 = _mulhilo(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def threshold(p: float) -> int:
    """16-bit lanes below it are dropped (Python's round: half to even)."""
    return round(p * 65536)


def dropout_mask(seed, tokens: int, features: int, p: float):
    """Packed mask, uint8 [T, ceil(K/8)]: bit j of byte (t, i) is 1 if element (t, 8 i + j) is kept.

    Args:
        seed: int64 [1] on the device of the mask.
    """
    t = torch.arange(tokens, device=seed.device)[:, None]
    i = torch.arange((features + 7) // 8, device=seed.device)[None, :]
    words = philox4x32((t & _LOW, t >> 32, i, torch.zeros_like(i)), (seed & _LOW, (seed >> 32) & _LOW))
    byte = torch.zeros(tokens, i.shape[1], dtype=torch.int64, device=seed.device)
    for j in range(8):
        lane = (words[j // 2] >> (16 * (j % 2))) & 0xFFFF
        inside = 8 * i + j < features
        byte |= ((lane >= threshold(p)) & inside).to(torch.int64) << j
    return byte.to(torch.uint8)


def unpack_mask(mask, features: int):
    """bool [T, K] of a packed mask."""
    bits = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return ((mask[:, :, None] >> bits) & 1).bool().flatten(1)[:, :features]
