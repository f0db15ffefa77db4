"""A TCP relay: `relay.py LISTEN_HOST LISTEN_PORT TO_HOST TO_PORT` prints its port, then forwards until it is ended.

The registry of the test cluster listens on 127.0.0.1 alone, since its clients speak plain HTTP only there. Two of
these, one on this machine and one beside a pod's program, make it 127.0.0.1:5000 for that pod too. Standard library
only: it runs in the bare base image.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy one direction to its end."""
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.write_eof()


async def serve(host: str, port: int, to: tuple[str, int]) -> None:
    """Listen, and connect each client on."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection(*to)
            with contextlib.closing(far_writer):
                await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))

    async with await asyncio.start_server(accept, host, port) as server:
        print(server.sockets[0].getsockname()[1], flush=True)  # noqa: T201 - it is a program
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2]), (sys.argv[3], int(sys.argv[4]))))
