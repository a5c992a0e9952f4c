"""A shared library without a compiler: ELF for x86-64 Linux, with nothing in it but names."""

from __future__ import annotations

import struct
from pathlib import Path

_HEADER_BYTES, _SEGMENT_BYTES, _SYMBOL_BYTES, _TAG_BYTES = 64, 56, 24, 16
_LOAD, _DYNAMIC, _STACK = 1, 2, 0x6474E551
_HASH, _STRTAB, _SYMTAB, _STRSZ, _SYMENT = 4, 5, 6, 10, 11
_GLOBAL_FUNCTION, _ABSOLUTE = 0x12, 0xFFF1


def write_library(path: Path, functions: tuple[str, ...]) -> None:
    """Write a library that a program needing ``functions`` can be loaded with, as long as it calls none of them."""
    count = len(functions) + 1  # the first symbol is always the undefined one
    symbols_at = _HEADER_BYTES + 3 * _SEGMENT_BYTES
    hash_at = symbols_at + _SYMBOL_BYTES * count
    dynamic_at = -(-(hash_at + 4 * (3 + count)) // 8) * 8
    strings_at = dynamic_at + 6 * _TAG_BYTES

    strings, symbols = b"\0", bytes(_SYMBOL_BYTES)
    for name in functions:
        symbols += struct.pack("<IBBHQQ", len(strings), _GLOBAL_FUNCTION, 0, _ABSOLUTE, 0, 0)
        strings += name.encode() + b"\0"
    # One bucket that begins at symbol 1; each symbol's link is the next one.
    hashes = struct.pack(f"<{3 + count}I", 1, count, 1, 0, *range(2, count), 0)
    tags = {_HASH: hash_at, _STRTAB: strings_at, _SYMTAB: symbols_at, _STRSZ: len(strings), _SYMENT: _SYMBOL_BYTES}
    dynamic = b"".join(struct.pack("<QQ", *tag) for tag in (*tags.items(), (0, 0)))
    whole_bytes = strings_at + len(strings)

    path.write_bytes(
        struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 3, 62, 1, 0, _HEADER_BYTES, 0, 0, 64, 56, 3, 0, 0, 0)
        + _segment(_LOAD, 0, whole_bytes, 4096)
        + _segment(_DYNAMIC, dynamic_at, len(dynamic), 8)
        + _segment(_STACK, 0, 0, 8)  # without it the loader asks for an executable stack
        + symbols
        + hashes.ljust(dynamic_at - hash_at, b"\0")
        + dynamic
        + strings
    )


def _segment(kind: int, at: int, nbytes: int, alignment: int) -> bytes:
    """Write a readable and writable segment, because the loader writes addresses into the dynamic section."""
    return struct.pack("<IIQQQQQQ", kind, 6, at, at, at, nbytes, nbytes, alignment)
