"""A TCP proxy that loses: a fraction of what it reads, in either direction, never arrives, and its connection is cut.

So requests are torn, and answers are lost after what they answer was committed.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Iterator


class LossyProxy:
    """Runs on a thread of its own; `loss` may be changed at any time."""

    def __init__(self, port: int, seed: int, loss: float) -> None:
        self._target, self._dice = port, random.Random(seed)
        self.loss = loss
        self.forwarded = self.cut_requests = self.cut_answers = 0
        self.port = 0
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.close()
            return
        pumps = [
            asyncio.ensure_future(self._pump(reader, there_writer, is_answer=False)),
            asyncio.ensure_future(self._pump(there_reader, writer, is_answer=True)),
        ]
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in pumps:
            pump.cancel()
        for end in (writer, there_writer):
            end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_answer: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if self._dice.random() < self.loss:
                    self.cut_answers += is_answer
                    self.cut_requests += not is_answer
                    return
                writer.write(data)
                await writer.drain()
                self.forwarded += 1

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


@contextlib.contextmanager
def lossy_proxy(port: int, seed: int, loss: float) -> Iterator[LossyProxy]:
    proxy = LossyProxy(port, seed, loss)
    try:
        yield proxy
    finally:
        proxy.close()
