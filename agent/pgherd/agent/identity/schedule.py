"""When to renew. Pure, and light enough for the resident."""

from __future__ import annotations

import hashlib


def renewal_due_unix_ns(not_before_unix_ns: int, not_after_unix_ns: int, serial: str) -> int:
    """Two thirds into the certificate's life, up to a tenth of it earlier.

    The share comes from the serial: spread over the herd, the same at each asking.
    """
    life_ns = not_after_unix_ns - not_before_unix_ns
    share = int.from_bytes(hashlib.sha256(serial.encode()).digest()[:4], "big") / 2**32
    return not_before_unix_ns + int(life_ns * (2 / 3 - share / 10))
