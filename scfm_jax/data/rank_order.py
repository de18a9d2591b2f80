"""The order of a cell's genes by value: exact, and most of it by a sort of 32-bit numbers."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int64, UInt32


def falling_bits(values: Float[np.ndarray, " n"]) -> UInt32[np.ndarray, " n"]:
    """Numbers that rise where values, taken as float32, fall."""
    bits = values.astype(np.float32).view(np.uint32)
    # Bits of positive floats rise with the value, those of negative ones fall.
    flipped = bits.view(np.int32) >> 31
    np.invert(flipped, out=flipped)
    flipped &= 0x7FFFFFFF
    bits ^= flipped.view(np.uint32)
    return bits


def order_rows(
    numbers: UInt32[np.ndarray, " total"], starts: Int64[np.ndarray, " n"], lengths: Int64[np.ndarray, " n"]
) -> Int64[np.ndarray, "n w"]:
    """Where each row's numbers stand, ascending, equal ones in their order.

    Parameters
    ----------
    numbers
        Of all rows.
    starts, lengths
        Of each row; w is the greatest length.

    Returns
    -------
    Indices into `numbers`. What is beyond a row's length means nothing and may be out of bounds.
    """
    width = int(lengths.max(initial=0))
    if not width:
        return np.zeros((len(starts), 0), np.int64)
    steps = np.arange(width)
    padding = steps >= lengths[:, None]
    at = starts[:, None] + steps
    number = numbers.take(at, mode="clip")
    # A key holds as much of the number as there is room for above its place in the row.
    low, place_bits = number.min(axis=1, keepdims=True), (width - 1).bit_length()
    span = number.max(axis=1, keepdims=True) - low
    lost = np.maximum(np.frexp(span.astype(np.float64))[1] + place_bits - 32, 0).astype(np.uint32)
    key = number - low
    key >>= lost
    key <<= np.uint32(place_bits)
    key |= steps.astype(np.uint32)
    key[padding] = 2**32 - 1
    key.sort(axis=1)
    key &= np.uint32((1 << place_bits) - 1)
    np.add(starts[:, None], key, out=at)
    if lost.any():
        number = numbers.take(at, mode="clip")
        number[padding] = 2**32 - 1
        # Numbers that differ in the lost bits alone may stand in the wrong order.
        wrong = np.flatnonzero((number[:, 1:] < number[:, :-1]).any(axis=1))
        at[wrong] = np.take_along_axis(at[wrong], number[wrong].argsort(axis=1, kind="stable"), axis=1)
    return at
