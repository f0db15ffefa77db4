"""The process of a Replica in a container: told by environment variables, watched through its probes' port.

The order of things is the point here: signals and probes before anything heavy, nbdeploy's variables gone before the
user's code runs, the port of the users only when it can be answered.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nbdeploy_server import failure, metrics, variables
from nbdeploy_server.errors import SettingsInvalid
from nbdeploy_server.probes import Probes
from nbdeploy_server.progress import Progress
from nbdeploy_server.sockets import bind

if TYPE_CHECKING:
    import socket

    from nbdeploy_server.front import Front

CANNOT_START = 3  # exit status: the last words in the log say why
TERMINATION_LOG = Path("/dev/termination-log")  # Kubernetes tells what is written there as the reason of the end


def main(environ: MutableMapping[str, str]) -> NoReturn:
    """Serve what the variables name until the process is told to end; never returns.

    Exit status: 0 drained, 3 cannot start, 130 and 143 ended by a signal before it was ready.
    """
    began = time.monotonic()
    for stream in (sys.stdout, sys.stderr):  # into a pipe: what predict prints shall be in the logs at once
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr] # text files, as `python` opens them
    # The first process of a container is not ended by a signal that nothing handles.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end_early)
    try:
        order = variables.read(environ)
        variables.clear(environ)
        progress = Progress(order.settings.revision)
        gpus = order.settings.gpus
        listener = bind(order.host, order.port, "NBDEPLOY_PORT")
        probes_listener = bind(order.host, order.probes_port, "NBDEPLOY_PROBES_PORT")
        probes = Probes(probes_listener, progress, lambda: metrics.machine_text(gpus))
        _make_room(environ, Path(order.settings.unpacked))
        front = _load(order, progress)
    except BaseException as error:  # noqa: BLE001 - sys.exit in the user's code too is a reason that the user must read
        _cannot_start(error)
    _serve(order, front, listener, probes, began)


def _end_early(number: int, _frame: Any) -> None:
    os._exit(128 + number)


def _load(order: variables.Order, progress: Progress) -> Front:
    """Load the model. Here the heavy packages are imported, with the probes answering already."""
    from nbdeploy_server.loading import prepare

    front = prepare(order.settings, progress.enter)
    front.progress = progress
    return front


def _serve(order: variables.Order, front: Front, sock: socket.socket, probes: Probes, began: float) -> NoReturn:
    from nbdeploy_server.connections import runner
    from nbdeploy_server.listening import Listener

    async def serve() -> None:
        listener = Listener(front, sock, order.drain_seconds)
        probes.scrape = listener.scrape
        await listener.serve(began)

    status = 0
    try:
        runner()(serve())
    except BaseException:  # noqa: BLE001 - said, and the process ended: threads of user code must not keep it
        traceback.print_exc()
        status = 1
    # Threads of the user's code must not keep a drained Replica alive; logs are flushed first.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _make_room(environ: MutableMapping[str, str], unpacked: Path) -> None:
    """Give the process a home, a user's name and a folder of its own where the container has none for its user id."""
    try:
        unpacked.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = unpacked.stat().st_uid
    except OSError as error:
        raise SettingsInvalid(
            f"{unpacked} cannot be written: {error.strerror}; give the container a writable /tmp, or another folder "
            "with NBDEPLOY_UNPACKED"
        ) from error
    if owner not in {os.getuid(), 0} or unpacked.is_symlink():  # code is run out of it
        raise SettingsInvalid(f"{unpacked} belongs to somebody else; name another folder with NBDEPLOY_UNPACKED")
    try:
        home = pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:  # torch's compiler, among others, asks for a user's name and fails without one
        environ.setdefault("USER", "nbdeploy")
        home = ""
    if not os.access(environ.get("HOME") or home, os.W_OK):  # where packages keep their caches
        environ["HOME"] = tempfile.gettempdir()


def _cannot_start(error: BaseException) -> NoReturn:
    """Tell the reason last in the log, and to Kubernetes where it listens, and end."""
    sys.stdout.flush()
    if not isinstance(error, SettingsInvalid):
        traceback.print_exception(error)
    words = failure.last_words(error)
    print(words, file=sys.stderr, flush=True)  # noqa: T201 - the Replica's log
    with contextlib.suppress(OSError):
        descriptor = os.open(TERMINATION_LOG, os.O_WRONLY)  # never made: elsewhere there is none
        os.write(descriptor, words.encode(errors="replace"))
        os.close(descriptor)
    os._exit(CANNOT_START)
