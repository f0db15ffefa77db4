"""uvicorn's protocol with our changes, over real sockets."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from nbdeploy_server.protocol import HandoverProtocol

REQUEST = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n"


class Owner:
    """What a protocol needs of its server."""

    draining = False
    orphaned = False

    def connections_changed(self, _count: int) -> None:
        """Count nothing."""


async def app(_scope: Any, receive: Any, send: Any) -> None:
    """Answer "ok"."""
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def answered(reader: asyncio.StreamReader) -> bytes:
    """Read one answer."""
    await reader.readuntil(b"\r\n\r\n")
    return await reader.readexactly(2)


async def talk() -> None:
    """Pipelined, idle, half-sent, idle for too long: one connection through all of them."""
    config = uvicorn.Config(app, http=HandoverProtocol, ws="none", lifespan="off", log_level="critical")
    config.load()
    server = uvicorn.Server(config)
    made: list[HandoverProtocol] = []

    def make() -> HandoverProtocol:
        made.append(HandoverProtocol(config=config, server_state=server.server_state, app_state={}, owner=Owner()))
        return made[-1]

    listener = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
    try:
        writer.write(REQUEST + REQUEST)  # the second is sent before the first is answered
        assert [await answered(reader), await answered(reader)] == [b"ok", b"ok"]
        made[0].close_if_idle(60.0)
        writer.write(REQUEST)
        assert await answered(reader) == b"ok"
        writer.write(REQUEST[:20])
        while not made[0]._midway:  # noqa: ASYNC110 - nothing tells when half a request has come
            await asyncio.sleep(0)
        made[0].close_if_idle(-1.0)  # half a request has come: not idle
        writer.write(REQUEST[20:])
        assert await answered(reader) == b"ok"
        made[0].close_if_idle(-1.0)
        assert await asyncio.wait_for(reader.read(), 10) == b""
    finally:
        writer.close()
        listener.close()


def test_idle_connections_end_and_others_do_not() -> None:
    """Only a connection that has asked nothing for long is closed; pipelined and half-sent requests are answered."""
    asyncio.run(talk())
