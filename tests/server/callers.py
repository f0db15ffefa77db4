"""Callers of Replicas that lose a request where the server does, and a router in between."""

from __future__ import annotations

import selectors
import socket
import threading


class Switch:
    """A router: sends each new connection to the Replica that is chosen just then, as a Service does."""

    def __init__(self) -> None:
        self.target = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = int(self._listener.getsockname()[1])
        self._pumps: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            near, _ = self._listener.accept()
            if not self.target:
                near.close()
                return
            far = socket.create_connection(("127.0.0.1", self.target))
            self._pumps.append(threading.Thread(target=self._pump, args=(near, far)))
            self._pumps[-1].start()

    @staticmethod
    def _pump(near: socket.socket, far: socket.socket) -> None:
        with near, far, selectors.DefaultSelector() as selector:
            selector.register(near, selectors.EVENT_READ, far)
            selector.register(far, selectors.EVENT_READ, near)
            while True:
                for key, _ in selector.select(30):
                    data = key.fileobj.recv(65536)  # type: ignore[union-attr] # sockets were registered
                    if not data:
                        return
                    key.data.sendall(data)

    def close(self) -> None:
        """Take no more, and wait for what is open."""
        self.target = 0
        socket.create_connection(("127.0.0.1", self.port)).close()
        for thread in (self._thread, *self._pumps):
            thread.join(30)
        self._listener.close()


class Caller:
    """A client that keeps its connection, never tries again, and reconnects only when it was told to."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket: socket.socket | None = None
        self.connections = 0

    def ask(self, body: bytes) -> tuple[int, bytes]:
        """Return status and body."""
        if self._socket is None:
            self._socket = socket.create_connection(("127.0.0.1", self._port), timeout=30)
            self.connections += 1
        head = b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self._socket.sendall(head % len(body) + body)
        data = b""
        while b"\r\n\r\n" not in data:
            got = self._socket.recv(65536)
            assert got, "the connection was closed instead of an answer"
            data += got
        top, _, rest = data.partition(b"\r\n\r\n")
        lines = top.lower().split(b"\r\n")
        length = next(int(line.partition(b":")[2]) for line in lines if line.startswith(b"content-length"))
        while len(rest) < length:
            rest += self._socket.recv(65536)
        if b"connection: close" in lines:
            self.close()
        return int(top.split()[1]), rest

    def wait_for_end(self) -> None:
        """Wait until the server closes the connection, on which nothing is asked."""
        assert self._socket is not None
        assert self._socket.recv(1) == b""

    def close(self) -> None:
        """Let go."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
