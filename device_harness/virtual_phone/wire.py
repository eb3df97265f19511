"""The packets of adb's transport protocol, and its key check (AOSP: ``adb/protocol.txt``)."""

from __future__ import annotations

import asyncio
import struct
from base64 import b64decode
from binascii import Error as Base64Error
from dataclasses import dataclass
from typing import Final

# From this version on no one looks at a packet's checksum.
VERSION: Final = 0x01000001
MAX_DATA: Final = 1 << 20
_HEAD: Final = struct.Struct("<6I")
# PKCS #1: the digest's algorithm, SHA-1, in front of the digest itself. The token is the digest.
_SHA1_PREFIX: Final = bytes.fromhex("3021300906052b0e03021a05000414")
_LARGEST_KEY: Final = 4096 // 32


class ProtocolError(ValueError):
    """The other side sends what is no packet of adb's protocol."""


@dataclass(frozen=True)
class Packet:
    """One packet.

    Attributes:
        command: its name, four letters such as ``WRTE``.
        first: the first argument.
        second: the second argument.
        data: the payload.
    """

    command: str
    first: int
    second: int
    data: bytes = b""

    def encode(self, checksum: bool) -> bytes:
        """The packet as it goes over the line.

        Args:
            checksum: whether the other side is so old that it looks at the sum of the payload.

        >>> Packet("OKAY", 1, 2).encode(False).hex()
        '4f4b415901000000020000000000000000000000b0b4bea6'
        """
        word = int.from_bytes(self.command.encode(), "little")
        total = sum(self.data) & 0xFFFFFFFF if checksum else 0
        size = len(self.data)
        return _HEAD.pack(word, self.first, self.second, size, total, word ^ 0xFFFFFFFF) + self.data


async def read_packet(reader: asyncio.StreamReader) -> Packet:
    """Reads one packet.

    Raises:
        ProtocolError: what was read is no packet.
        asyncio.IncompleteReadError: the line ended.
    """
    head = await reader.readexactly(_HEAD.size)
    word, first, second, length, _, magic = _HEAD.unpack(head)
    if magic != word ^ 0xFFFFFFFF or length > MAX_DATA:
        raise ProtocolError(f"no packet of adb begins with {head.hex()}")
    name = word.to_bytes(4, "little").decode("ascii", "replace")
    return Packet(name, first, second, await reader.readexactly(length))


def has_signed(key: bytes, token: bytes, signature: bytes) -> bool:
    """Whether the owner of an RSA key signed a token.

    Args:
        key: the public key as adb sends it: Android's structure in base64, a space and a name.
        token: the 20 bytes that were to be signed.
        signature: the answer.
    """
    try:
        structure = b64decode(key.split(b" ")[0].rstrip(b"\0"))
        words = int.from_bytes(structure[:4], "little")
        if not 0 < words <= _LARGEST_KEY:
            return False
        modulus = int.from_bytes(structure[8 : 8 + 4 * words], "little")
        (exponent,) = struct.unpack_from("<I", structure, 8 + 8 * words)
        plain = pow(int.from_bytes(signature, "big"), exponent, modulus).to_bytes(4 * words, "big")
    except (Base64Error, struct.error, ValueError, OverflowError):
        return False
    return plain.endswith(_SHA1_PREFIX + token)
