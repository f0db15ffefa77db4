"""Gzip with the same bytes on every machine, for small layers.

Compressed bytes of the standard library depend on the zlib that a Python was built with (zlib, zlib-ng, the system's
own), and with them the digest of a layer. This encoder is slow, some 2 MB/s, and always the same: greedy matches of
four bytes or more, looked up by their first four, written with the fixed Huffman codes of RFC 1951.
"""

from __future__ import annotations

import zlib

_WINDOW = 32768  # bytes that a match may reach back
_LONGEST = 258  # bytes of one match
_SHORTEST = 4


def gzipped(data: bytes) -> bytes:
    """Return the data as a gzip file without name and time."""
    bits = "".join(("110", *_tokens(data), _CODES[256]))  # the last block, of fixed codes
    body = int(bits[::-1], 2).to_bytes((len(bits) + 7) // 8, "little")
    trailer = zlib.crc32(data).to_bytes(4, "little") + (len(data) & 0xFFFFFFFF).to_bytes(4, "little")
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + body + trailer


def _tokens(data: bytes) -> list[str]:
    """Return the bits of each token, first bit first."""
    seen: dict[bytes, int] = {}
    tokens: list[str] = []
    position = literal = 0
    while position + _SHORTEST <= len(data):
        key = data[position : position + _SHORTEST]
        before = seen.get(key, -_WINDOW)
        seen[key] = position
        if before < 0 or position - before > _WINDOW:
            position += 1
            continue
        length = _common(data, before, position)
        tokens.extend(map(_CODES.__getitem__, data[literal:position]))
        tokens.append(_LENGTHS[length])
        tokens.append(_distance(position - before))
        position += length
        literal = position
    tokens.extend(map(_CODES.__getitem__, data[literal:]))
    return tokens


def _common(data: bytes, before: int, position: int) -> int:
    """Return how many bytes are equal from both positions on."""
    most = min(_LONGEST, len(data) - position)
    if data[before : before + most] == data[position : position + most]:
        return most
    length = _SHORTEST
    while data[before + length] == data[position + length]:
        length += 1
    return length


def _code(symbol: int) -> str:
    """Return the fixed code of a literal, the end (256) or a length (257 to 287)."""
    if symbol < 144:  # noqa: PLR2004 - the four ranges of RFC 1951, 3.2.6
        return f"{0x30 + symbol:08b}"
    if symbol < 256:  # noqa: PLR2004
        return f"{0x190 + symbol - 144:09b}"
    return f"{symbol - 256:07b}" if symbol < 280 else f"{0xC0 + symbol - 280:08b}"  # noqa: PLR2004


def _extra(value: int, bits: int) -> str:
    """Return extra bits, lowest first."""
    return f"{value:0{bits}b}"[::-1] if bits else ""


def _lengths() -> list[str]:
    """Return the bits of each match length from 0 to 258; those below 3 have none."""
    table = [""] * (_LONGEST + 1)
    length = 3
    for symbol in range(257, 285):
        bits = max(0, (symbol - 261) // 4)
        for value in range(1 << bits):
            table[min(length, _LONGEST)] = _code(symbol) + _extra(value, bits)
            length += 1
    table[_LONGEST] = _code(285)
    return table


def _distance(distance: int) -> str:
    """Return the bits of a distance from 1 to 32768."""
    rest = distance - 1
    bits = max(0, rest.bit_length() - 2)
    symbol = 2 * bits + (rest >> bits)
    return f"{symbol:05b}" + _extra(rest & ((1 << bits) - 1), bits)


_CODES = [_code(symbol) for symbol in range(257)]
_LENGTHS = _lengths()
