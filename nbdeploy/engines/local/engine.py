"""LocalEngine: Endpoints of this machine."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbdeploy.bundle import Bundle
from nbdeploy.engines.base import OnProgress, check_fixed_number
from nbdeploy.engines.local.layout import Launch, Layout, SupervisorRecord
from nbdeploy.engines.local.logfile import read
from nbdeploy.engines.loopback import bound
from nbdeploy.errors import EndpointNotFoundError, EngineError, UsageError
from nbdeploy.process import Identity, clean_environment, kernel_path, launch, let_go
from nbdeploy.spec import Phase, Revision, Status, check_name, label

_GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, and NVIDIA under WSL
ORDER_TIMEOUT = 5.0  # seconds for orders that a supervisor answers at once
SETTLE_TIMEOUT = 30.0  # seconds for a supervisor to give a change up
START_TIMEOUT = 30.0  # seconds for a supervisor to start
KEPT = 10  # Revisions


class LocalEngine:
    """Replicas as processes of this machine, one supervisor per Endpoint."""

    def __init__(self, home: Path, *, name: str = "local", environ: dict[str, str] | None = None) -> None:
        self.name = name
        self._home = home
        self._environ = dict(os.environ) if environ is None else environ

    # -- the protocol -------------------------------------------------------------------------------------------

    def apply(self, revision: Revision, bundle: Bundle | None, on_progress: OnProgress) -> Status:
        """Make the Endpoint serve this Revision (see Engine.apply)."""
        self.check(revision)
        layout = Layout(self._home, check_name(revision.name))
        with layout.locked():
            layout.create()
            self._refuse_late(layout, revision)
            try:
                layout.add_revision(revision, self._launch(layout, revision, bundle))
                if revision.stopped:
                    self._stop(layout)
                    layout.commit(revision.number)
                else:
                    order = {"op": "apply", "revision": revision.number}
                    self._order(self._supervisor(layout), order, None, on_progress)
            except BaseException:
                self._settle(layout, revision.number)
                raise
            layout.prune(KEPT)
        return self.status(revision.name)

    def status(self, name: str) -> Status:
        """Return what is known of an Endpoint."""
        layout = self._existing(name)
        try:
            return self._status(name, layout)
        except FileNotFoundError:
            raise self._not_found(name) from None  # deleted while we look
        except (ValueError, KeyError, TypeError, UsageError) as error:  # what broken or foreign files give
            reason = f"its files cannot be read ({type(error).__name__}: {error}); nbdeploy delete {name} removes it"
            return Status(name=name, engine=self.name, phase=Phase.FAILED, reason=reason)

    def _status(self, name: str, layout: Layout) -> Status:
        serving = layout.serving()
        revisions = layout.revisions() if serving else layout.all_revisions()
        if not revisions:
            raise self._not_found(name)
        wanted = revisions[-1]
        status = Status(
            name=name,
            engine=self.name,
            revision=serving,
            owner=wanted.owner,
            notebook=wanted.notebook,
            autoscaling=wanted.autoscaling,
            public=wanted.serving.public,
            key_file="" if wanted.serving.public else str(layout.folder / "key"),
            url=self._url(layout),
            desired=0 if wanted.stopped else max(1, wanted.autoscaling.min_replicas),
        )
        if wanted.stopped:
            return dataclasses.replace(status, phase=Phase.IDLE, reason=f"stopped; nbdeploy start {name}")
        record = layout.supervisor()
        if record is None or not record.identity.alive():
            return dataclasses.replace(status, phase=Phase.FAILED, reason=self._why_dead(name, record))
        try:
            answer = self._order(record, {"op": "status"}, ORDER_TIMEOUT)["status"]
        except EngineError as error:
            return dataclasses.replace(status, phase=Phase.FAILED, reason=str(error))
        return dataclasses.replace(
            status,
            phase=Phase(answer["phase"]),
            reason=answer["reason"],
            ready=answer["ready"],
            desired=answer["desired"] or status.desired,
            in_flight=answer["in_flight"],
            memory_bytes=answer["memory_bytes"],
            revision=answer["revision"] or status.revision,
        )

    def scrape(self, name: str) -> dict[str, str]:
        """Return the Prometheus text of each Replica that answers within 2 s."""
        record = self._supervised(self._existing(name))
        if record is None or not record.identity.alive():
            return {}
        return dict(self._order(record, {"op": "scrape"}, ORDER_TIMEOUT)["metrics"])

    def logs(self, name: str, *, follow: bool) -> Iterator[str]:
        """Yield what the Replicas printed."""
        return read(self._existing(name).logs, follow=follow)

    def list(self) -> list[Status]:
        """Return every Endpoint of this machine's home."""
        folder = self._home / "endpoints"
        if not folder.is_dir():
            return []
        found = []
        for path in sorted(folder.iterdir()):
            with contextlib.suppress(EndpointNotFoundError):  # deleted, or not yet serving, while we look
                found.append(self.status(path.name))
        return found

    def delete(self, name: str) -> None:
        """Stop the Endpoint and remove its folder."""
        layout = self._existing(name)
        with layout.locked(wait=30):
            gone = not layout.exists()  # somebody else's delete came first
            self._remove(layout)
        if gone:
            raise self._not_found(name)

    # -- optional protocols -------------------------------------------------------------------------------------

    def check(self, revision: Revision) -> None:
        """Refuse what this Engine cannot run."""
        check_fixed_number("local", revision)
        if revision.base_image:
            raise UsageError(
                "--base-image is for engines that run containers; the local engine runs Replicas in the notebook's own "
                "environment. Leave it out, or choose another engine."
            )
        if revision.resources.gpus and not any(Path(device).exists() for device in _GPUS):
            raise UsageError(
                "--gpu: this machine has no GPU that is ready for use. Leave it out, or choose another engine."
            )
        self._check_port(revision)

    def _check_port(self, revision: Revision) -> None:
        """Find out that a fixed port is taken before anything is captured."""
        port = revision.serving.port
        if not port or Layout(self._home, revision.name).read("endpoint.json").get("port") == port:
            return
        bound(port).close()

    def key(self, name: str) -> str:
        """Return the Endpoint's key, "" where it is public."""
        layout = self._existing(name)
        revisions = layout.revisions()
        return "" if revisions and revisions[-1].serving.public else layout.key()

    def revisions(self, name: str) -> builtins.list[Revision]:
        """Return the Revisions, oldest first."""
        return self._existing(name).revisions()

    # -- parts --------------------------------------------------------------------------------------------------

    def _existing(self, name: str) -> Layout:
        layout = Layout(self._home, name)
        if label(name) != name:  # also keeps ".." and "/" out of paths
            raise self._not_found(name)
        if not self._made(layout):
            self._remove_half_made(layout)
            if not layout.exists():
                raise self._not_found(name)
        return layout

    def _not_found(self, name: str) -> EndpointNotFoundError:
        import difflib

        folder = self._home / "endpoints"
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        near = difflib.get_close_matches(name, [one for one in names if one != name], 1)
        hint = f" Did you mean {near[0]!r}?" if near else " `nbdeploy ls` lists those there are."
        return EndpointNotFoundError(f"There is no Endpoint {name!r} on this machine.{hint}")

    @staticmethod
    def _made(layout: Layout) -> bool:
        try:
            return layout.serving() > 0
        except (ValueError, TypeError, OSError):
            return layout.exists()  # broken: status says so

    def _remove_half_made(self, layout: Layout) -> None:
        """Remove what a first deploy left that was killed before its Revision served; nothing if one is under way."""
        lock = layout.try_lock()
        if lock is None:
            return
        with lock:
            if not self._made(layout):
                self._remove(layout)

    @staticmethod
    def _supervised(layout: Layout) -> SupervisorRecord | None:
        """Return who supervises; None also where that cannot be read."""
        try:
            return layout.supervisor()
        except (ValueError, KeyError, TypeError):
            return None

    @staticmethod
    def _refuse_late(layout: Layout, revision: Revision) -> None:
        """Refuse a Revision whose number another deploy took meanwhile; the very same one may be applied again."""
        if revision.number > layout.serving() or layout.revision(revision.number) == revision:
            return
        raise EngineError(
            f"Another deploy or change of {revision.name} came first (it made revision {layout.serving()}). "
            "Look at it, then deploy again."
        )

    def _settle(self, layout: Layout, number: int) -> None:
        """Leave no trace of a Revision that did not come to serve; one that just did in spite of all stays whole."""
        record = self._supervised(layout)
        if record is not None and record.identity.alive():
            with contextlib.suppress(EngineError):
                self._order(record, {"op": "settle"}, SETTLE_TIMEOUT)
        if layout.serving() == 0:
            self._remove(layout)
        elif number > layout.serving():
            layout.remove_revision(number)

    def _launch(self, layout: Layout, revision: Revision, bundle: Bundle | None) -> Launch:
        """How Replicas are started: as the deploying kernel was, or as an earlier Revision of this Bundle was."""
        if bundle is None:
            earlier = [one for one in layout.revisions() if one.bundle == revision.bundle]
            if not earlier:
                raise EngineError(f"There is no earlier Revision of {revision.name} with this Bundle to go on from.")
            return layout.launch(earlier[-1].number)
        import sys

        notebook = [Path(revision.notebook).parent] if revision.notebook else []
        environment = clean_environment(self._environ, revision.variables)
        return Launch(sys.executable, tuple(kernel_path(notebook)), {**environment, **bundle.secrets})

    def _supervisor(self, layout: Layout) -> SupervisorRecord:
        """Return the running supervisor, after starting one if need be."""
        record = self._supervised(layout)
        if record is not None and record.identity.alive():
            return record
        if record is not None:
            shutil.rmtree(Path(record.control).parent, ignore_errors=True)
        (layout.folder / "supervisor.json").unlink(missing_ok=True)
        with (layout.logs / "supervisor.log").open("ab") as output:
            process = launch(
                "nbdeploy.engines.local.supervisor:main",
                {"home": str(self._home), "name": layout.name},
                path=kernel_path(),
                environment=clean_environment(self._environ),
                folder=layout.folder,
                output=output,
            )
        let_go(process)
        limit = time.monotonic() + START_TIMEOUT
        while time.monotonic() < limit:
            record = layout.supervisor()
            if record is not None:
                return record
            if process.returncode is not None:  # set by the thread that reaps it
                break
            time.sleep(0.005)
        Identity.of(process.pid).end_group()
        last = (layout.logs / "supervisor.log").read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
        raise EngineError("The supervisor did not start. Its last words:\n  " + "\n  ".join(last))

    def _stop(self, layout: Layout) -> None:
        record = self._supervised(layout)
        if record is None:
            return
        if not record.identity.is_here():
            raise EngineError(
                f"{layout.name} runs on another machine ({record.identity.host}); stop or delete it from there."
            )
        if record.identity.alive():
            with contextlib.suppress(EngineError):
                self._order(record, {"op": "stop"}, ORDER_TIMEOUT)
            limit = time.monotonic() + 20
            while record.identity.alive() and time.monotonic() < limit:
                time.sleep(0.01)
            record.identity.end()
        for replica in layout.replicas():  # left by a supervisor that was killed
            replica.end_group()
        shutil.rmtree(Path(record.control).parent, ignore_errors=True)
        (layout.folder / "supervisor.json").unlink(missing_ok=True)

    def _remove(self, layout: Layout) -> None:
        self._stop(layout)
        bundles = self._bundles(layout)
        shutil.rmtree(layout.folder, ignore_errors=True)
        others = (Layout(self._home, path.name) for path in (self._home / "endpoints").iterdir())
        for digest in bundles.difference(*(self._bundles(other) for other in others)):
            # The files laid out for its Replicas; blobs stay in the Store, where a next deploy finds them.
            shutil.rmtree(layout.store / "unpacked" / digest.partition(":")[2], ignore_errors=True)

    @staticmethod
    def _bundles(layout: Layout) -> set[str]:
        """Return the digests that an Endpoint's Revisions need; none where its folder is not ours."""
        try:
            return {revision.bundle for revision in layout.revisions()}
        except (ValueError, KeyError, TypeError, OSError):
            return set()

    @staticmethod
    def _url(layout: Layout) -> str:
        port = layout.read("endpoint.json").get("port", 0)
        return f"http://127.0.0.1:{port}" if port else ""

    @staticmethod
    def _why_dead(name: str, record: SupervisorRecord | None) -> str:
        if record is not None and not record.identity.is_here():
            return f"runs on another machine ({record.identity.host})"
        what = "machine restarted" if record is not None and record.identity.rebooted() else "its supervisor is gone"
        return f"{what}; nbdeploy start {name}"

    @staticmethod
    def _order(
        record: SupervisorRecord, order: dict[str, Any], timeout: float | None, on_progress: OnProgress | None = None
    ) -> dict[str, Any]:
        """Send one order to a supervisor and follow its answer; closing the socket cancels it."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout)
            try:
                sock.connect(record.control)
                sock.sendall(json.dumps(order).encode() + b"\n")
                with sock.makefile("r", encoding="utf-8") as lines:
                    for line in lines:
                        message: dict[str, Any] = json.loads(line)
                        if message["op"] == "failed":
                            raise EngineError(message["reason"])
                        if message["op"] == "done":
                            return message
                        if on_progress is not None:
                            on_progress(message["text"], {})
            except OSError as error:
                raise EngineError(f"The supervisor does not answer ({error}): is it stopped, or overloaded?") from error
        raise EngineError("The supervisor ended while it worked. Deploy again.")
