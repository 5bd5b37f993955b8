"""Scalars for TensorBoard, without a library: those that write its files take seconds to import.

An event file is a sequence of TFRecords: length, its checksum, an `Event` protocol buffer, its
checksum (tensorflow/core/lib/io/record_writer.h, core/util/event.proto).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping


def scalar_events(step: int, wall_time: float, scalars: Mapping[str, float]) -> bytes:
    """The content of an event file with one value of each scalar.

    Args:
      step: an integer >= 0.
      wall_time: seconds since 1970.
      scalars: values by tag; TensorBoard keeps them as float32.
    """
    values = b"".join(
        _field(1, _field(1, tag.encode()) + b"\x15" + struct.pack("<f", value))
        for tag, value in scalars.items()
    )
    time = b"\x09" + struct.pack("<d", wall_time)
    version = time + _field(3, b"brain.Event:2")
    return _record(version) + _record(time + b"\x10" + _varint(step) + _field(5, values))


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


def _record(content: bytes) -> bytes:
    length = struct.pack("<Q", len(content))
    return length + _masked_checksum(length) + content + _masked_checksum(content)


def _masked_checksum(content: bytes) -> bytes:
    """CRC-32C (Castagnoli), rotated and shifted as TFRecords have it."""
    register = 0xFFFFFFFF
    for byte in content:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    checksum = register ^ 0xFFFFFFFF
    masked = (checksum >> 15 | checksum << 17) + 0xA282EAD8
    return struct.pack("<I", masked & 0xFFFFFFFF)
