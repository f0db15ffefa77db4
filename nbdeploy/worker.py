"""The worker: a detached process that carries one Job from its Capture to a ready Endpoint.

    locked → verified → starting → ready

It outlives the kernel that started it. SIGTERM cancels: what served before goes on serving, nothing half-made stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nbdeploy_server import parity, wire
from nbdeploy_server.bundle import Manifest
from nbdeploy_server.errors import BundleInvalid

from nbdeploy import changes, environment, wheels
from nbdeploy.bundle import Bundle
from nbdeploy.client import Client
from nbdeploy.engines.base import Engine, HasHistory, HasKey, HasTarget, check_owner, get_engine
from nbdeploy.errors import (
    CancelledError,
    EndpointNotFoundError,
    NbdeployError,
    ParityError,
    VerificationError,
)
from nbdeploy.jobs import Job, Journal
from nbdeploy.process import Identity
from nbdeploy.spec import Revision, Status
from nbdeploy.store import Store
from nbdeploy.verdict import Verdict, judge
from nbdeploy.verification import Place, clean_run, kernel_place


def main(argument: dict[str, Any]) -> None:
    """Entry of the process: {"job": folder}."""
    job = Job(Path(argument["job"]))
    journal = Journal(job)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the notebook's interrupt detaches; it never reaches the worker
    try:
        signal.signal(signal.SIGTERM, _cancel)
        job.record_worker(Identity.of(os.getpid()))  # from here on it can be cancelled
        card = Work(job, journal).run()
        signal.signal(signal.SIGTERM, _too_late)  # it serves, and was proved
        journal.write("job", "done", card=card)
    except NbdeployError as error:
        if _Cancel.asked:  # whatever the interrupted code made of it
            journal.write("job", "cancelled", "The deploy was cancelled.", error="CancelledError")
        else:
            journal.write("job", "failed", str(error), error=type(error).__name__)
    except Exception as error:  # noqa: BLE001 - a fault of nbdeploy itself: the cell must hear of it all the same
        import traceback

        traceback.print_exc()
        if _Cancel.asked:
            journal.write("job", "cancelled", "The deploy was cancelled.", error="CancelledError")
            return
        words = f"nbdeploy failed: {type(error).__name__}: {error}. The traceback is in {job.folder / 'worker.log'}."
        journal.write("job", "failed", words, error="DeployError")
    finally:
        job.forget_secrets()
        journal.close()


class _Cancel:
    """Whether a cancel has come; its exception may be lost where it is raised, as in a finalizer."""

    asked = False

    @classmethod
    def heed(cls) -> None:
        """Raise it again between two steps."""
        if cls.asked:
            raise CancelledError("The deploy was cancelled.")


def _cancel(_signal: int, _frame: object) -> None:
    signal.signal(signal.SIGTERM, _too_late)  # once: what is being undone must not be interrupted again
    _Cancel.asked = True
    raise CancelledError("The deploy was cancelled.")


def _too_late(_signal: int, _frame: object) -> None:
    """Ignore a cancel. Not SIG_IGN: processes started meanwhile would inherit that."""


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let a cancel come too late: what undoes a deploy must run to its end."""
    before = signal.signal(signal.SIGTERM, _too_late)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Work:
    """The steps of one Job."""

    def __init__(self, job: Job, journal: Journal) -> None:
        spec = job.spec
        self._job = job
        self._journal = journal
        self._spec = spec
        self._home = Path(spec["home"])
        self._store = Store(self._home / "store")
        self._manifest: dict[str, Any] = spec["manifest"]
        self._engine: Engine = get_engine(spec["kind"], self._home, spec["engine_settings"])
        self._began = time.time() - spec["captured_seconds"]
        self._runs: int = spec["runs"]
        self._notes: list[str] = []  # of the engine, for the card
        self._applied: Revision | None = None

    def run(self) -> dict[str, Any]:
        """Carry out every step; returns the card."""
        self._check_owner()
        rows = self._lock()
        _Cancel.heed()
        verdict = self._verify(rows)
        _Cancel.heed()
        if self._spec["dry_run"]:
            return self._card(None, verdict, None, self._earlier())
        earlier = self._earlier()
        with self._undone_if_it_fails(earlier):
            status = self._start(earlier)
            request_ms, verdict = self._ask(status, verdict)
            _Cancel.heed()
        return self._card(status, verdict, request_ms, earlier)

    # -- steps --------------------------------------------------------------------------------------------------

    def _check_owner(self) -> None:
        """Refuse to deploy over what another notebook or owner has under this name."""
        if not self._spec["replace"] and not self._spec["dry_run"]:
            check_owner(self._engine, self._spec["name"], self._spec["owner"], self._spec["notebook"])

    def _lock(self) -> list[dict[str, Any]]:
        self._journal.write("locked", "running")
        rows = self._lock_rows(self._spec["modules"])
        self._journal.write("locked", "done", f"{len(rows)} packages")
        return rows

    def _lock_rows(self, modules: list[str]) -> list[dict[str, Any]]:
        """Lock what these modules need; editable and local distributions become wheels in the Bundle."""
        needed = environment.needed(modules, also=(*environment.ALWAYS, *self._spec["pip"]))
        known = {row["path"] for row in self._manifest["files"]}
        packed: dict[str, str] = {}
        for distribution in needed:
            if not distribution.travels:
                continue
            folder = self._job.folder / "wheels"
            folder.mkdir(exist_ok=True)
            wheel = wheels.wheel(distribution, folder)
            packed[distribution.name] = wheel.name
            if wheel.name not in known:
                ref = self._store.put_file(wheel)
                self._manifest["files"].append(
                    {"path": wheel.name, "digest": ref.digest, "size": ref.size, "kind": "wheel"}
                )
        return environment.lock(needed, packed)

    def _finish_manifest(self, rows: list[dict[str, Any]]) -> Bundle:
        digest = self._store.put_bundle({**self._manifest, "distributions": rows})
        return Bundle(self._store, digest, self._job.secret_values())

    def _verify(self, rows: list[dict[str, Any]]) -> Verdict:
        """Prove the Bundle in a clean process; what that really imported is locked too."""
        self._bundle = self._finish_manifest(rows)
        if not self._spec["verify"]:
            self._journal.write("verified", "done", "skipped (--no-verify)")
            return Verdict("unverified", note="the clean-process check was skipped (--no-verify)")
        self._journal.write("verified", "running", "starting a clean process")
        report = self._clean_run(self._bundle)
        verdict = judge(report, has_sample=self._manifest["sample"] is not None)
        if verdict.needs_second_process:
            verdict = judge(report, has_sample=True, second=self._clean_run(self._bundle))
            self._runs += 2
        self._runs += report.get("runs", 0)
        if verdict.error:
            raise (ParityError if verdict.state == "different" else VerificationError)(verdict.error)
        more = self._lock_rows(sorted({*self._spec["modules"], *report["modules"]} - {"nbdeploy_server"}))
        count = len(more) - len(rows)
        if [row["name"] for row in more] != [row["name"] for row in rows]:
            earlier, self._bundle = self._bundle, self._finish_manifest(more)
            _move_stamp(self._store, earlier.digest, self._bundle.digest)
            rows[:] = more
        verdict = self._verify_installed(verdict)
        # Else the number of packages told next would not be the one that the step "locked" told.
        found = f" · imports {count} more package{'s' if count > 1 else ''}: {len(more)} locked" if count > 0 else ""
        self._journal.write("verified", "done", f"{verdict.words}{found}")
        return verdict

    def _clean_run(self, bundle: Bundle, place: Place | None = None) -> dict[str, Any]:
        here = place or kernel_place(self._spec["folder"])
        return clean_run(self._job, bundle, here, self._spec["variables"])

    def _verify_installed(self, verdict: Verdict) -> Verdict:
        """Prove the Bundle where only the lock is installed: what a Replica elsewhere will have."""
        if not isinstance(self._engine, HasTarget):
            return verdict
        from nbdeploy.installation import installed

        target, manifest = self._engine.target, self._bundle.manifest

        def on_progress(words: str) -> None:
            self._journal.write("verified", "running", words)

        gpus = self._spec["revision"]["resources"]["gpus"]
        rows = environment.targeted(manifest.distributions, gpus=gpus, torch_index=target.index)
        with self._bundle.wheels() as wheels:
            room = installed(rows, wheels, self._home, index=target.index, on_progress=on_progress)
        on_progress("asking in the locked environment")
        place = Place(str(room.python), room.path)
        report = self._clean_run(self._bundle, place)
        found = judge(report, has_sample=manifest.sample is not None)
        if found.needs_second_process:
            found = judge(report, has_sample=True, second=self._clean_run(self._bundle, place))
            self._runs += 2
        self._runs += report.get("runs", 0)
        if found.error and not (verdict.random and found.state == "different"):
            raise (ParityError if found.state == "different" else VerificationError)(
                f"In an environment with exactly the {len(rows)} locked packages: {found.error}"
            )
        if found.state == "equal":
            return verdict.reached("locked environment", found.max_difference)
        return verdict

    def _earlier(self) -> list[Revision]:
        try:
            found = self._engine.revisions(self._spec["name"]) if isinstance(self._engine, HasHistory) else []
        except EndpointNotFoundError:
            return []
        return found

    def _manifest_before(self, earlier: list[Revision] | None) -> Manifest | None:
        """Return what served before, where its Bundle is still here."""
        if not earlier:
            return None
        with contextlib.suppress(BundleInvalid):
            return Bundle(self._store, earlier[-1].bundle).manifest
        return None

    def _start(self, earlier: list[Revision]) -> Status:
        journal = self._journal
        number = (earlier[-1].number if earlier else 0) + 1
        if not isinstance(self._engine, HasTarget):  # else an Image is pushed first, a step of its own
            journal.write("starting", "running", "starting a Replica", revision=number)

        def on_progress(words: str, data: Mapping[str, Any]) -> None:
            rest = {name: value for name, value in data.items() if name not in {"step", "state"}}
            state = data.get("state", "running")
            journal.write(data.get("step", "starting"), state, words, **{**rest, "revision": number})
            if state == "note":
                self._notes.append(words)

        revision = Revision.from_json({**self._spec["revision"], "bundle": self._bundle.digest, "number": number})
        self._applied = revision
        status = self._engine.apply(revision, self._bundle, on_progress)
        journal.write("starting", "done", _replicas(status))
        return status

    @contextlib.contextmanager
    def _undone_if_it_fails(self, earlier: list[Revision]) -> Iterator[None]:
        """A Revision that serves, but is cancelled or fails its real request, gives way to what was before."""
        try:
            yield
        except BaseException:
            with _uninterrupted(), contextlib.suppress(NbdeployError):
                self._undo(earlier)
            raise

    def _undo(self, earlier: list[Revision]) -> None:
        now = self._earlier()
        if not now or now[-1] != self._applied:
            return  # it never came to serve, or somebody has changed the Endpoint since
        if earlier:
            back = dataclasses.replace(earlier[-1], number=now[-1].number + 1, created=time.time())
            self._engine.apply(back, None, _silent)
        else:
            self._engine.delete(self._spec["name"])

    def _ask(self, status: Status, verdict: Verdict) -> tuple[float | None, Verdict]:
        """Ready means: a real request through the Endpoint's URL answered the sample correctly."""
        reader = self._bundle.reader()
        manifest = reader.manifest
        replicas = _replicas(status)
        if manifest.sample is None:
            self._journal.write("ready", "done", f"{replicas} · no sample to ask with")
            return None, verdict
        self._journal.write("ready", "running", "asking through the URL")
        key = self._engine.key(status.name) if isinstance(self._engine, HasKey) else ""
        arguments = wire.unpack(reader.read(manifest.sample))["arguments"]
        with Client(status.url, key, timeout=manifest_timeout(self._spec)) as client:
            client.parameters()  # opens the connection, so that the time told is the request's own
            began = time.perf_counter()
            answer = client.call(arguments)
            milliseconds = (time.perf_counter() - began) * 1e3
        self._runs += 2  # this one, and the warm-up of the Replica
        verdict = self._compare(manifest, reader, answer, verdict)
        self._journal.write("ready", "done", f"{replicas} · real request {milliseconds:.1f} ms")
        return milliseconds, verdict

    @staticmethod
    def _compare(manifest: Any, reader: Any, answer: Any, verdict: Verdict) -> Verdict:
        if manifest.answer is None:
            return verdict
        found = parity.compare(wire.unpack(reader.read(manifest.answer)), answer)
        if found.equal:
            return verdict.reached("replica", found.max_difference)
        if verdict.state in {"equal", "unverified"}:
            # Seeds stand only in warm-up and verification: a request draws its own random numbers.
            note = f"a request through the URL answered otherwise than the notebook: {found.reason}"
            if verdict.state == "equal" and not verdict.random:
                raise ParityError(
                    f"The Endpoint answers otherwise than the notebook, {found.reason} at answer{found.path}: the "
                    f"notebook gave {found.expected}, the Endpoint {found.actual}. Something in predict depends on "
                    "what was called before, or on the process it runs in."
                )
            return verdict.with_note(note)
        return verdict

    def _card(
        self, status: Status | None, verdict: Verdict, request_ms: float | None, earlier: list[Revision] | None = None
    ) -> dict[str, Any]:
        spec, receipt = self._spec, dict(self._spec["receipt"])
        manifest = self._bundle.manifest
        receipt["distributions"] = len(manifest.distributions)
        receipt["notes"] = [*receipt["notes"], *verdict.notes, *self._notes, *_idle_gpu(spec["revision"], manifest)]
        signature = self._manifest["signature"]
        return {
            "name": spec["name"],
            "engine": spec["engine"],
            "revision": status.revision if status else 0,
            "url": status.url if status else "",
            "notebook_url": None,
            "call": spec["call"],
            "parameters": [
                {"name": row["name"], "required": row["required"], "schema": row["schema"]}
                for row in signature["parameters"]
            ],
            "streams": signature["streams"],
            "sample": spec["sample"] or None,
            "runs": self._runs,
            "receipt": receipt,
            "parity": {
                "state": verdict.state,
                "max_difference": verdict.max_difference,
                "places": list(verdict.places),
                "note": verdict.note,
            },
            "changed": changes.content(self._manifest_before(earlier), manifest, receipt["blobs"]),
            "request_ms": request_ms,
            "public": spec["revision"]["serving"]["public"],
            "key_command": f"nbdeploy key {spec['name']}",
            "replicas": {"ready": status.ready if status else 0, "desired": status.desired if status else 0},
            "cost": {"now_per_hour": None, "max_per_hour": None},
            "seconds": round(time.time() - self._began, 3),
            "dry_run": spec["dry_run"],
            "bundle": self._bundle.digest,
        }


def _idle_gpu(revision: Mapping[str, Any], manifest: Manifest) -> list[str]:
    """Say that GPUs were asked for, but nothing in the notebook was on one."""
    gpus = revision["resources"]["gpus"]
    if not gpus or any(blob.device != "cpu" for blob in manifest.blobs):
        return []
    return [
        (
            f"--gpu {gpus}: no tensor of the model was on a GPU in this notebook, so it answers on the CPU unless "
            'predict or --setup moves it there: model.to("cuda")'
        )
    ]


def _silent(_words: str, _data: Mapping[str, Any]) -> None:
    """Take progress that nobody watches."""


def _replicas(status: Status) -> str:
    return f"{status.ready} of {status.desired} replica{'s' if status.desired != 1 else ''}"


def manifest_timeout(spec: Mapping[str, Any]) -> float:
    """Return how long a request may take, in seconds."""
    return float(spec["revision"]["serving"]["timeout"]) + 5


def _move_stamp(store: Store, earlier: str, later: str) -> None:
    """The check of the first manifest holds for the second: they name the same blobs."""
    old = store.root / "verified" / f"{earlier.partition(':')[2]}.json"
    if old.exists():
        old.rename(old.with_name(f"{later.partition(':')[2]}.json"))
    shutil.rmtree(store.bundle_path(earlier).parent, ignore_errors=True)
