"""The channel between a Replica and its supervisor, over a real socket pair."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any, cast

from nbdeploy_server import channel
from nbdeploy_server.replica import Server
from nbdeploy_server.settings import ReplicaSettings


def test_a_supervisor_that_is_behind_gets_every_message_whole() -> None:
    """Messages larger than the socket takes at once come whole and in order, whatever is said meanwhile."""
    ours, theirs = socket.socketpair()
    got: list[dict[str, Any]] = []
    behind, done = threading.Event(), threading.Event()

    def supervisor() -> None:
        behind.wait(30)
        lines = channel.Lines()
        while len(got) < 4 and (found := channel.receive(theirs)):
            got.extend(lines.feed(found[0]))
        done.set()

    async def replica() -> None:
        settings = ReplicaSettings("", "", "", "one", 1, shared=channel.Page.create())
        server = Server(settings, ours, cast(Any, None), 0.0)
        ours.setblocking(False)
        texts = ["a" * 3_000_000, "b", "c" * 100_000, "d"]
        assert all(server._say({"op": "metrics", "text": text}) for text in texts)
        with socket.socket() as idle:
            assert not server._say({"op": "back"}, (idle.fileno(),))  # a connection is not put behind a long text
        behind.set()
        while not done.is_set():  # noqa: ASYNC110 - the other end is a thread
            await asyncio.sleep(0.01)

    reader = threading.Thread(target=supervisor)
    reader.start()
    try:
        asyncio.run(asyncio.wait_for(replica(), 30))
    finally:
        behind.set()
        ours.close()
        reader.join(30)
        theirs.close()
    assert [(len(one["text"]), one["text"][0]) for one in got] == [(3_000_000, "a"), (1, "b"), (100_000, "c"), (1, "d")]
