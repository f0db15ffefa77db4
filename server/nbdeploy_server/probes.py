"""The probes' port of a Replica in a container: /livez, /readyz and /metrics, answered by threads of their own.

It is up before anything heavy is imported, and predict cannot keep it from answering: only code that holds the
interpreter's lock without a break can, for as long as it does. Users' requests never come here.
"""

from __future__ import annotations

import http.server
import json
import socket
import socketserver
import threading
from collections.abc import Callable
from typing import Any

from nbdeploy_server.progress import Progress

PATIENCE = 5.0  # seconds that a prober may take to ask
BACKLOG = 128
_PLAIN = "text/plain; version=0.0.4; charset=utf-8"  # the type of Prometheus' text


class Probes:
    """Answers probes from the moment it is made, until the process ends.

    Attributes:
        scrape: returns the Prometheus text, called in a thread of a probe; raises TimeoutError where the event loop
            does not answer.
    """

    def __init__(self, listener: socket.socket, progress: Progress, scrape: Callable[[], str]) -> None:
        self.scrape = scrape
        self._progress = progress
        self._server = _Server(listener, self)
        threading.Thread(target=self._server.serve_forever, name="probes", daemon=True).start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Return status, content type and body for a path."""
        if path == "/livez":
            stuck = self._progress.stuck
            body: dict[str, Any] = {"status": "stuck", "seconds": round(stuck, 1)} if stuck else {"status": "live"}
            return 503 if stuck else 200, "application/json", json.dumps(body).encode()
        if path == "/readyz":
            report = self._progress.report()
            return 200 if report["phase"] == "ready" else 503, "application/json", json.dumps(report).encode()
        if path == "/metrics":
            try:
                return 200, _PLAIN, self.scrape().encode()
            except TimeoutError:  # no numbers are better than old ones: a dead source must not read as zero load
                return 503, "text/plain; charset=utf-8", b"the event loop does not answer\n"
        return 404, "text/plain; charset=utf-8", b"here are /livez, /readyz and /metrics\n"


class _Server(socketserver.ThreadingTCPServer):
    """HTTPServer without its look-up of this machine's name, which may wait for a DNS server."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, listener: socket.socket, probes: Probes) -> None:
        self.address_family = listener.family
        super().__init__(listener.getsockname()[:2], _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.server_address = listener.getsockname()
        self.probes = probes
        listener.listen(BACKLOG)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of probers that left."""


class _Handler(http.server.BaseHTTPRequestHandler):
    timeout = PATIENCE
    server: _Server

    def do_GET(self) -> None:
        status, kind, body = self.server.probes.answer(self.path.partition("?")[0])
        self.send_response_only(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: Any) -> None:
        """Keep probes out of the logs."""
