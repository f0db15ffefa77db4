"""An Image says the same on every machine, holds what its Bundle names and nothing else, and any tool can read it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import uuid
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from nbdeploy_server.bundle import Bundle as Reader
from nbdeploy_server.bundle import blob_path, canonical
from nbdeploy_server.errors import BundleInvalid

from nbdeploy import capture, environment
from nbdeploy.bundle import Bundle
from nbdeploy.errors import RegistryError
from nbdeploy.oci import packages
from nbdeploy.oci.base import Base, base_of, default_base
from nbdeploy.oci.image import Image, build
from nbdeploy.oci.layers import Layer
from nbdeploy.oci.push import push
from nbdeploy.oci.reference import Reference
from nbdeploy.oci.registry import Registry
from nbdeploy.store import Store
from tests.conftest import wait_until
from tests.server.conftest import cell
from tests.server.containers import taken_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.cluster.running import Cluster
    from tests.oci.servers import DockerRegistry

SOURCE = """
import numpy as np
weights = np.arange(600_000, dtype="float32")
bias = [np.full(100, i) for i in range(300)]
def predict(x: float) -> float:
    return float(x + weights[7] + sum(b[0] for b in bias))
"""
DOCKER = "application/vnd.docker."


def make_bundle(home: Path, source: str = SOURCE, *, locked: tuple[str, ...] = ()) -> Bundle:
    """Capture a cell's predict function into a Store of this home."""
    store = Store(home / "store")
    request = capture.Request(predict=cell(source)["predict"], sample={"x": 1.0}, folder=home)
    taken = capture.take(request, store)
    rows = environment.lock(environment.needed(locked)) if locked else []
    return Bundle(store, store.put_bundle({**taken.manifest, "distributions": rows}))


def make_base(client: Registry, repository: str = "python", **environ: str) -> dict[str, str]:
    """Push an index of two platforms as Docker writes them; return the digests of their manifests."""
    digests = {}

    def put(data: bytes) -> dict[str, Any]:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        client.upload(repository, digest, len(data), lambda: [data])
        return {"digest": digest, "size": len(data)}

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("etc"))
    layer = out.getvalue()
    for machine in ("amd64", "arm64"):
        config = {
            "architecture": machine,
            "os": "linux",
            "config": {
                "Env": ["PATH=/usr/local/bin:/usr/bin", *(f"{key}={value}" for key, value in environ.items())],
                "Cmd": ["python3"],
                "Labels": {"maintainer": "somebody"},
            },
            "history": [{"created_by": "ADD"}, {"created_by": "CMD", "empty_layer": True}],
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{DOCKER}distribution.manifest.v2+json",
            "config": {"mediaType": f"{DOCKER}container.image.v1+json", **put(canonical(config))},
            "layers": [{"mediaType": f"{DOCKER}image.rootfs.diff.tar", **put(layer)}],
        }
        data = canonical(manifest)
        digests[f"linux/{machine}"] = f"sha256:{hashlib.sha256(data).hexdigest()}"
        client.put_manifest(repository, digests[f"linux/{machine}"], data, str(manifest["mediaType"]))
    rows = [
        {
            "mediaType": f"{DOCKER}distribution.manifest.v2+json",
            "digest": digest,
            "size": 1,
            "platform": {"os": name.partition("/")[0], "architecture": name.partition("/")[2]},
        }
        for name, digest in digests.items()
    ]
    kind = f"{DOCKER}distribution.manifest.list.v2+json"
    client.put_manifest(repository, "3.11", canonical({"schemaVersion": 2, "mediaType": kind, "manifests": rows}), kind)
    return digests


@pytest.fixture
def base(registry: DockerRegistry, connect: Callable[..., Registry]) -> Base:
    """A base in a registry of the test's own."""
    make_base(connect(registry.host), PYTHON_VERSION="3.11.9")
    return base_of(f"{registry.host}/python:3.11", "linux/amd64", connect, python="3.11")


def unpack(layers: tuple[Layer, ...], folder: Path) -> None:
    """Lay out layers of ours as a node does, times and modes included."""
    for layer in layers:
        if layer.open is not None:
            with tarfile.open(fileobj=io.BytesIO(b"".join(layer.open()))) as archive:
                archive.extractall(folder, filter="fully_trusted")  # noqa: S202 - written by us


def test_same_bundle_same_digest_in_two_homes(tmp_path: Path, base: Base) -> None:
    """Neither the home, nor times and modes of its files, nor what else lies in its Store leaves a trace."""
    bundle = make_bundle(tmp_path / "a")
    other = tmp_path / "deeper" / "in" / "b"
    shutil.copytree(tmp_path / "a", other, copy_function=shutil.copyfile)
    shutil.rmtree(other / "store" / "layers", ignore_errors=True)
    Store(other / "store").put_bytes(b"of another Bundle")
    first = build(bundle, base, ())
    second = build(Bundle(Store(other / "store"), bundle.digest), base, ())
    assert first == second
    assert first.digest == f"sha256:{hashlib.sha256(first.manifest).hexdigest()}"
    assert str(tmp_path) not in first.config.decode() + first.manifest.decode()


def test_edit_of_predict_sends_kilobytes(tmp_path: Path, base: Base) -> None:
    """With 300 arrays, an edit of predict changes one layer, the configuration and the manifest: under 100 kB."""
    before = build(make_bundle(tmp_path), base, ())
    after = build(make_bundle(tmp_path, SOURCE.replace("x +", "1.5 * x +")), base, ())
    known = {layer.digest for layer in before.layers}
    new = [layer for layer in after.layers if layer.digest not in known]
    assert [layer.title for layer in new] == ["code"]
    assert after.layers[-1] == new[0]
    assert new[0].size + len(after.config) + len(after.manifest) < 100_000


def test_large_sample_is_sent_once(tmp_path: Path, base: Base) -> None:
    """A sample of 200 kB is a layer of its own, so that an edit leaves it where it is."""
    source = "def predict(text: str) -> int:\n    return len(text)\n"
    images = []
    for code in (source, source.replace("len(text)", "len(text) + 0")):
        store = Store(tmp_path / "store")
        request = capture.Request(predict=cell(code)["predict"], sample={"text": "ab" * 100_000}, folder=tmp_path)
        bundle = Bundle(store, store.put_bundle({**capture.take(request, store).manifest, "distributions": []}))
        images.append(build(bundle, base, ()))
    known = {layer.digest for layer in images[0].layers}
    assert [layer.title for layer in images[1].layers if layer.digest not in known] == ["code"]


def test_store_in_the_image_is_whole_and_vouched_for(tmp_path: Path, base: Base) -> None:
    """It holds what the Bundle names and no more; a Replica need not hash weights, and a full check still does."""
    bundle = make_bundle(tmp_path / "home")
    make_bundle(tmp_path / "home", "def predict(x: float) -> float:\n    return x\n")
    image = build(bundle, base, ())
    unpack(image.layers, tmp_path / "root")
    root = tmp_path / "root" / "opt" / "nbdeploy"
    store, name = root / "store", bundle.digest.partition(":")[2]
    reader = Reader.open(store, bundle.digest)
    expected = {blob_path(store, digest) for digest in reader.manifest.refs()}
    expected |= {store / "bundles" / "sha256" / name / "manifest.json", store / "verified" / f"{name}.json"}
    assert {path for path in store.rglob("*") if path.is_file()} == expected
    assert {path.stat().st_mtime_ns for path in expected} == {0}
    assert {path.stat().st_mode & 0o777 for path in expected} == {0o644}
    assert {path.stat().st_mode & 0o777 for path in store.rglob("*") if path.is_dir()} == {0o755}
    assert (root / "server" / "nbdeploy_server" / "bundle.py").is_file()
    assert not [path for path in (root / "server").rglob("*") if path.is_file() and path.suffix != ".py"]
    reader.check()
    large = max(reader.manifest.refs().items(), key=lambda pair: pair[1])
    blob_path(store, large[0]).write_bytes(bytes(large[1]))
    os.utime(blob_path(store, large[0]), (0, 0))
    Reader.open(store, bundle.digest).check()  # the stamp vouches: not hashed again
    with pytest.raises(BundleInvalid, match="damaged"):
        Reader.open(store, bundle.digest).check(full=True)


def test_configuration_starts_the_server_and_keeps_the_base(tmp_path: Path, base: Base) -> None:
    """Variables of the base stay, its command goes; layers, their digests and the history fit each other."""
    bundle = make_bundle(tmp_path)
    image = build(bundle, base, ())
    config, manifest = json.loads(image.config), json.loads(image.manifest)
    assert config["config"]["Entrypoint"] == [
        *("python3", "-I", "-X", "faulthandler"),
        "/opt/nbdeploy/server/nbdeploy_server/__main__.py",
    ]
    assert config["config"]["Env"][:2] == ["PATH=/usr/local/bin:/usr/bin", "PYTHON_VERSION=3.11.9"]
    assert f"NBDEPLOY_BUNDLE={bundle.digest}" in config["config"]["Env"]
    assert (config["config"]["User"], config["config"]["WorkingDir"]) == ("10001:10001", "/tmp")  # noqa: S108
    assert "Cmd" not in config["config"]
    assert config["config"]["Labels"]["nbdeploy.dev/bundle"] == bundle.digest
    assert (config["architecture"], config["os"]) == ("amd64", "linux")
    assert config["rootfs"]["diff_ids"] == [layer.diff_id for layer in image.layers]
    assert [row["digest"] for row in manifest["layers"]] == [layer.digest for layer in image.layers]
    assert sum(not row.get("empty_layer") for row in config["history"]) == len(image.layers)
    assert image.size == sum(row["size"] for row in manifest["layers"]) + len(image.config)
    assert {row["mediaType"].partition(".tar")[0] for row in manifest["layers"]} == {
        "application/vnd.oci.image.layer.v1"
    }


def test_base_is_pinned_for_the_platform(registry: DockerRegistry, connect: Callable[..., Registry]) -> None:
    """An index leads to the platform's own image, known by its digest; its layers are not read."""
    client = connect(registry.host)
    digests = make_base(client)
    for platform, digest in digests.items():
        found = base_of(f"{registry.host}/python:3.11", platform, lambda _host: client)
        assert str(found.reference) == f"{registry.host}/python@{digest}"
        assert found.config["architecture"] == platform.partition("/")[2]
        assert [(layer.media_type, layer.open) for layer in found.layers] == [
            ("application/vnd.oci.image.layer.v1.tar", None)
        ]
        again = base_of(str(found.reference), platform, lambda _host: client)
        assert again.reference == found.reference
        assert [layer.digest for layer in again.layers] == [layer.digest for layer in found.layers]


def test_unfit_base_is_told(registry: DockerRegistry, connect: Callable[..., Registry]) -> None:
    """No such image, no such platform, another Python: each in words, with the setting to change."""
    client = connect(registry.host)
    digests = make_base(client, PYTHON_VERSION="3.12.4")
    name = f"{registry.host}/python"
    with pytest.raises(RegistryError, match=r"There is no base image .*python:3.9\. Set base_image"):
        base_of(f"{name}:3.9", "linux/amd64", connect)
    with pytest.raises(
        RegistryError, match=r"not made for linux/s390x, only for linux/amd64, linux/arm64\. Set platform"
    ):
        base_of(f"{name}:3.11", "linux/s390x", connect)
    with pytest.raises(RegistryError, match="is made for linux/arm64, the cluster's machines are linux/amd64"):
        base_of(f"{name}@{digests['linux/arm64']}", "linux/amd64", connect)
    with pytest.raises(RegistryError, match=r"has Python 3\.12\.4, this notebook runs 3\.11: .*python:3\.11-slim"):
        base_of(f"{name}:3.11", "linux/amd64", connect, python="3.11")
    assert base_of(f"{name}:3.11", "linux/amd64", connect, python="3.12").layers
    assert default_base("3.12") == "docker.io/library/python:3.12-slim"


def run(*command: str | Path) -> str:
    """Run a tool and return what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[0]}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def pushed(
    cluster: Cluster, tmp_path: Path, connect: Callable[..., Registry]
) -> Iterator[tuple[Reference, Image, Bundle]]:
    """A real Image, with all its packages, in the cluster's registry."""
    opened: dict[str, Registry] = {}

    def opener(host: str) -> Registry:
        return opened.setdefault(host, connect(host))

    bundle = make_bundle(tmp_path / "home", locked=("numpy",))
    made = packages.layers(
        bundle.manifest.distributions,
        None,
        tmp_path / "home" / "store" / "environments",
        python="3.11",
        platform="x86_64-manylinux_2_28",
    )
    image = build(bundle, base_of(cluster.base_image, "linux/amd64", opener, python="3.11"), made.layers)
    reference = Reference.parse(f"{cluster.registry}/test-image-{uuid.uuid4().hex}:1")
    push(image, reference, opener)
    yield reference, image, bundle
    address = f"http://{reference.host}/v2/{reference.repository}/manifests/{image.digest}"
    httpx.delete(address, timeout=30.0, trust_env=False)


@pytest.mark.slow
def test_tools_of_others_read_and_run_it(pushed: tuple[Reference, Image, Bundle], tmp_path: Path) -> None:
    """Skopeo inspects and copies it without a changed byte, umoci unpacks it, and under plain runc it answers."""
    reference, image, bundle = pushed
    plain = f"docker://{reference}"
    shown = json.loads(run("skopeo", "inspect", "--tls-verify=false", plain))
    assert shown["Digest"] == image.digest
    assert shown["Labels"]["nbdeploy.dev/bundle"] == bundle.digest
    layout = tmp_path / "layout"
    policy = ("--insecure-policy", "copy", "--src-tls-verify=false", "--preserve-digests")
    run("skopeo", *policy, plain, f"oci:{layout}:1")
    assert (layout / "blobs" / "sha256" / image.digest.partition(":")[2]).read_bytes() == image.manifest
    run("umoci", "unpack", "--image", f"{layout}:1", tmp_path / "bundle")
    root = tmp_path / "bundle" / "rootfs"
    Reader.open(root / "opt/nbdeploy/store", bundle.digest).check(full=True)
    with served(tmp_path / "bundle", tmp_path / "log") as (users, probes):
        wait_until(lambda: status(f"{probes}/readyz") == 200)
        answer = httpx.post(f"{users}/predict", json={"x": 1.0}, timeout=30.0, trust_env=False)
        assert answer.status_code == 200, answer.text
        assert answer.json() == 1.0 + 7.0 + sum(range(300))


def status(url: str) -> int:
    """Return the status of an answer, 0 for none."""
    try:
        return httpx.get(url, timeout=5.0, trust_env=False).status_code
    except httpx.TransportError:
        return 0


@contextlib.contextmanager
def served(bundle: Path, log: Path) -> Iterator[tuple[str, str]]:
    """Run an unpacked image under runc: on the host's network, with a read-only root; yields its two addresses."""
    config = json.loads((bundle / "config.json").read_text())
    ports = [taken_port(), taken_port()]
    config["process"]["env"] += [f"NBDEPLOY_PORT={ports[0]}", f"NBDEPLOY_PROBES_PORT={ports[1]}"]
    config["process"]["rlimits"] = [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}]
    config["process"]["terminal"] = False
    config["root"]["readonly"] = True
    config["linux"]["namespaces"] = [row for row in config["linux"]["namespaces"] if row["type"] != "network"]
    config["mounts"] = [row for row in config["mounts"] if row["type"] not in {"sysfs", "cgroup"}]
    config["mounts"].append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]})  # noqa: S108
    (bundle / "config.json").write_text(json.dumps(config))
    name = f"nbdeploy-{uuid.uuid4().hex}"
    runc = ["runc", "--root", str(bundle.parent / "runc")]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*runc, "run", "--bundle", str(bundle), name], stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            yield f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}"
        except BaseException as error:
            error.add_note(log.read_text(errors="replace"))
            raise
        finally:
            subprocess.run([*runc, "kill", name, str(int(signal.SIGKILL))], capture_output=True, check=False)
            process.wait(30.0)
            subprocess.run([*runc, "delete", "--force", name], capture_output=True, check=False)
