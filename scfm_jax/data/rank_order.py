"""The order of a cell's genes by value: exact, and most of it by a sort of 32-bit numbers."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int64, UInt32

_LAST = np.uint32(2**32 - 1)  # sorts behind all that is real


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
        Of all rows, and at least w more behind the start of the last.
    starts, lengths
        Of each row; w is the greatest length.

    Returns
    -------
    Indices into `numbers`. What is beyond a row's length means nothing and may be out of bounds.
    """
    width = int(lengths.max(initial=0))
    if not width:
        return np.zeros((len(starts), 0), np.int64)
    steps, shortest = np.arange(width), int(lengths.min())
    padding = steps[shortest:] >= lengths[:, None]
    number = np.lib.stride_tricks.sliding_window_view(numbers, width)[starts]
    # A key holds as much of the number as there is room for above its place in the row.
    low, place_bits = number.min(axis=1, keepdims=True), (width - 1).bit_length()
    span = number.max(axis=1, keepdims=True) - low
    lost = np.maximum(np.frexp(span.astype(np.float64))[1] + place_bits - 32, 0).astype(np.uint32)
    key = number - low
    key >>= lost
    key <<= np.uint32(place_bits)
    key |= steps.astype(np.uint32)
    key[:, shortest:][padding] = _LAST
    key.sort(axis=1)
    at = (key & np.uint32((1 << place_bits) - 1)).astype(np.int64)
    at += starts[:, None]
    if lost.any():
        _mend(at, key, place_bits, numbers, lengths)
    return at


def _mend(
    at: Int64[np.ndarray, "n w"],
    key: UInt32[np.ndarray, "n w"],
    place_bits: int,
    numbers: UInt32[np.ndarray, " total"],
    lengths: Int64[np.ndarray, " n"],
) -> None:
    """Put in order, in place, what differs in the lost bits alone: `key` has it in the order of places."""
    width, flat, kept = key.shape[1], at.ravel(), (key >> np.uint32(place_bits)).ravel()
    equal = np.flatnonzero(kept[1:] == kept[:-1])
    row, column = np.divmod(equal + 1, width)
    equal = equal[(column > 0) & (column < lengths[row])]
    wrong = numbers[flat[equal]] > numbers[flat[equal + 1]]
    alone = (np.diff(equal, prepend=-2) > 1) & (np.diff(equal, append=key.size + 1) > 1)
    pair = equal[wrong & alone]
    flat[pair], flat[pair + 1] = flat[pair + 1], flat[pair]
    rows = np.unique(equal[wrong & ~alone] // width)
    number = numbers.take(at[rows], mode="clip")
    number[np.arange(width) >= lengths[rows, None]] = _LAST
    at[rows] = np.take_along_axis(at[rows], number.argsort(axis=1, kind="stable"), axis=1)
