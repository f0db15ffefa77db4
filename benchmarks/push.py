"""Push of weights to a local registry, beside skopeo, oras and python-dxf, each in fresh processes, in shuffled rounds.

    python benchmarks/push.py [--gigabytes 3] [--shards 3] [--rounds 5] [--clients nbdeploy skopeo ...]

Goals: the fastest; at most 1.2 s of processor time per GiB; memory grows by at most 64 MB. nbdeploy sends each shard as
an archive that is made on the way from the Store's file; the others are given the same archives as files, whose writing
is not counted, and skopeo a finished layout. nbdeploy (its Store keeps them) and skopeo know the digests before;
oras and python-dxf hash as they go. The registry is Debian's, emptied before each push, without TLS: it hashes too, and
is the floor for everybody. Wants docker-registry, skopeo, and requirements/bench.in.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _measure import Cost, memory, middle, ratio, record, show, tmpfs

GIB = 1 << 30
CPU_GOAL, MEMORY_GOAL = 1.2, 64.0  # seconds per GiB, MB
CLIENTS = ("nbdeploy", "skopeo", "oras", "oras-chunked", "python-dxf")
PACKAGES = {"oras": "oras", "oras-chunked": "oras", "python-dxf": "dxf"}
TAR = "application/vnd.oci.image.layer.v1.tar"
REPOSITORY = "bench/weights"
CONFIG = """version: 0.1
log: {{accesslog: {{disabled: true}}, level: error}}
storage:
  filesystem: {{rootdirectory: {root}}}
  maintenance: {{uploadpurging: {{enabled: false}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""


@dataclass(frozen=True)
class Run:
    """One push: its cost, the peak of its memory in bytes, and how much of that came after its imports (or 0)."""

    cost: Cost
    peak: int
    growth: int = 0


def put(folder: Path, data: bytes) -> dict[str, Any]:
    """Write a blob of the layout and return its descriptor."""
    name = hashlib.sha256(data).hexdigest()
    (folder / name).write_bytes(data)
    return {"digest": f"sha256:{name}", "size": len(data)}


def make(work: Path, size: int, shards: int) -> None:
    """Write the shards, and their archives as blobs of an OCI layout; layers.json says what is what."""
    from nbdeploy.oci.layers import Archive, Entry

    blobs, rows = work / "layout" / "blobs" / "sha256", []
    blobs.mkdir(parents=True)
    for number in range(shards):
        path, left = work / f"shard{number}", size // shards
        with path.open("wb") as file:
            while left:
                left -= file.write(os.urandom(min(left, 1 << 20)))
        archive = Archive([Entry(f"opt/shard{number}", path, path.stat().st_size)])
        digest = archive.digest()
        with (blobs / digest[7:]).open("wb") as file:
            file.writelines(archive.chunks())
        rows.append({"mediaType": TAR, "digest": digest, "size": archive.size})
    rootfs = {"type": "layers", "diff_ids": [row["digest"] for row in rows]}
    config = put(blobs, json.dumps({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": rootfs}).encode())
    config["mediaType"] = "application/vnd.oci.image.config.v1+json"
    kind = "application/vnd.oci.image.manifest.v1+json"
    manifest = {"schemaVersion": 2, "mediaType": kind, "config": config, "layers": rows}
    listed = {"mediaType": kind, **put(blobs, json.dumps(manifest).encode())}
    listed["annotations"] = {"org.opencontainers.image.ref.name": "1"}
    (work / "layout" / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}', encoding="utf-8")
    (work / "layout" / "index.json").write_text(
        json.dumps({"schemaVersion": 2, "manifests": [listed]}), encoding="utf-8"
    )
    (work / "layers.json").write_text(json.dumps({**manifest, "digest": listed["digest"]}), encoding="utf-8")


@contextlib.contextmanager
def registry(work: Path) -> Iterator[str]:
    """Run an empty registry; yields its host."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    root, config = work / "registry", work / "registry.yml"
    config.write_text(CONFIG.format(root=root, port=port), encoding="utf-8")
    environment = {**os.environ, "OTEL_TRACES_EXPORTER": "none"}
    command = [shutil.which("docker-registry") or "docker-registry", "serve", str(config)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + 30
        while True:
            with socket.socket() as one:
                if one.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if process.poll() is not None or time.monotonic() > limit:
                raise RuntimeError("the registry did not start")
            time.sleep(0.01)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(root, ignore_errors=True)


def ours(work: Path, host: str) -> None:
    """Push with nbdeploy; prints by how many bytes this process grew."""
    from nbdeploy.oci.layers import Archive, Entry, Layer
    from nbdeploy.oci.push import push
    from nbdeploy.oci.reference import Reference
    from nbdeploy.oci.registry import Registry

    content = json.loads((work / "layers.json").read_text(encoding="utf-8"))
    blobs = work / "layout" / "blobs" / "sha256"
    layers = []
    for number, row in enumerate(content["layers"]):
        path = work / f"shard{number}"
        archive = Archive([Entry(f"opt/shard{number}", path, path.stat().st_size)])
        layers.append(Layer(TAR, row["digest"], row["digest"], row["size"], path.name, open=archive.chunks))

    @dataclass(frozen=True)
    class Image:
        layers: tuple[Layer, ...]
        config: bytes
        manifest: bytes
        digest: str

    config = (blobs / content["config"]["digest"][7:]).read_bytes()
    image = Image(tuple(layers), config, (blobs / content["digest"][7:]).read_bytes(), content["digest"])
    client = Registry(host)
    client.has_manifest(REPOSITORY, "1")  # what is imported by now is no cost of the weights
    before = memory("VmHWM")
    push(image, Reference.parse(f"{host}/{REPOSITORY}:1"), lambda _: client)
    print(memory("VmHWM") - before)


def theirs(name: str, work: Path, host: str) -> None:
    """Push with another client, as its documentation says."""
    content = json.loads((work / "layers.json").read_text(encoding="utf-8"))
    files = [work / "layout" / "blobs" / "sha256" / row["digest"][7:] for row in content["layers"]]
    if name == "python-dxf":
        from dxf import DXF

        client = DXF(host, REPOSITORY, insecure=True)
        for file in files:
            client.push_blob(str(file))
        return
    import oras.client

    more = {"do_chunked": True} if name == "oras-chunked" else {}
    named = [f"{file}:{TAR}" for file in files]
    target = f"{host}/{REPOSITORY}:1"
    oras.client.OrasClient(hostname=host, insecure=True).push(
        target=target, files=named, disable_path_validation=True, **more
    )


def measure(name: str, work: Path) -> Run:
    """Push once, in a fresh process, to an empty registry."""
    with registry(work) as host:
        if name == "skopeo":
            command = ["skopeo", "copy", "--preserve-digests", "--insecure-policy", "--dest-tls-verify=false"]
            command += [f"oci:{work / 'layout'}:1", f"docker://{host}/{REPOSITORY}:1"]
        else:
            command = [sys.executable, __file__, "--child", json.dumps([name, str(work), host])]
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{name} ended with status {process.returncode}")
        growth = int(said.splitlines()[-1]) if name == "nbdeploy" else 0
        return Run(Cost(wall, used.ru_utime + used.ru_stime), used.ru_maxrss << 10, growth)


def able(name: str) -> bool:
    """Tell whether a client is installed; says so if not."""
    package = PACKAGES.get(name)
    found = shutil.which(name) if package is None else importlib.util.find_spec(package)
    if not found and name != "nbdeploy":
        print(f"{name} is not installed: left out")
    return bool(found) or name == "nbdeploy"


def report(runs: dict[str, list[Run]], size: int) -> dict[str, Any]:
    """Print the ratios and return all figures."""
    figures: dict[str, Any] = {"bytes": size}
    for name, found in runs.items():
        wall, cpu = middle([run.cost.wall for run in found]), middle([run.cost.cpu for run in found])
        peak = max(run.peak for run in found) / 1e6
        figures[name] = {"seconds": wall, "cpu_seconds_per_gib": cpu / size * GIB, "peak_mb": peak}
        raw = f"{wall:.2f} s, CPU {cpu / size * GIB:.2f} s/GiB, peak {peak:.0f} MB"
        if name == "nbdeploy":
            growth = max(run.growth for run in found) / 1e6
            figures[name]["growth_mb"] = growth
            show("nbdeploy: CPU seconds per GiB", cpu / size * GIB, CPU_GOAL, raw)
            show("nbdeploy: growth of memory, MB", growth, MEMORY_GOAL)
        else:
            times, costs = ratio([run.cost for run in runs["nbdeploy"]], [run.cost for run in found])
            figures[name] |= {"wall_ratio": times, "cpu_ratio": costs}
            show(f"nbdeploy / {name}: wall", times, 1.0, raw)
            show(f"nbdeploy / {name}: CPU", costs)
    return figures


def main() -> None:
    """Measure all clients and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", nargs="*", default=list(CLIENTS), choices=CLIENTS)
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, folder, host = json.loads(options.child)
        if name == "make":
            make(Path(folder), int(options.gigabytes * 1e9), options.shards)
        else:
            ours(Path(folder), host) if name == "nbdeploy" else theirs(name, Path(folder), host)
        return
    names = ["nbdeploy", *(name for name in options.clients if name != "nbdeploy" and able(name))]
    with tempfile.TemporaryDirectory(prefix="nbdeploy-bench-", dir=tmpfs()) as folder:
        how = ["--gigabytes", str(options.gigabytes), "--shards", str(options.shards)]
        # in a process of its own: what this one has held would count as the peak of the children it starts
        subprocess.run([sys.executable, __file__, *how, "--child", json.dumps(["make", folder, ""])], check=True)
        runs: dict[str, list[Run]] = {name: [] for name in names}
        for _ in range(options.rounds):
            for name in random.sample(names, len(names)):
                runs[name].append(measure(name, Path(folder)))
        layers = json.loads((Path(folder) / "layers.json").read_text(encoding="utf-8"))["layers"]
    figures = report(runs, sum(row["size"] for row in layers))
    if not options.no_record:
        installed = {"oras": "oras", "oras-chunked": "oras", "python-dxf": "python-dxf"}
        record("push", figures, sorted({installed[name] for name in names if name in installed} | {"urllib3"}))


if __name__ == "__main__":
    main()
