"""The answers of receivers that others run: read to a bound."""

from __future__ import annotations

from typing import Final

import httpx

# Ask for this: what comes inflated has no bound until it has been inflated.
UNPACKED: Final = {"accept-encoding": "identity"}


async def read_at_most(answer: httpx.Response, bytes_max: int) -> bytes:
    """The beginning of a streamed answer's body as it is on the wire, at most `bytes_max`; the rest stays unread.

    Raises httpx.HTTPError. The caller bounds the time.
    """
    content = bytearray()
    async for chunk in answer.aiter_raw():
        content += chunk[: bytes_max - len(content)]
        if len(content) >= bytes_max:
            break
    return bytes(content)
