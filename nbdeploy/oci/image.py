"""The Image of a Bundle: base, packages, server, weights, code. Nothing is run and nothing is written to make it.

Layers stand in the order of how rarely they change: the base with its security updates, packages and their bytecode
with the lock, the server with nbdeploy, weights with training, code with every edit. The last layer is some kilobytes,
and an edit sends nothing else. Equal Bundles on equal bases give equal Images, byte for byte: names, times, owners and
the machine that builds leave no trace; only its version of Python does, in the bytecode.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nbdeploy_server.bundle import SMALL, Manifest, canonical

from nbdeploy.bundle import Bundle
from nbdeploy.errors import BundleError
from nbdeploy.installation import server_source
from nbdeploy.oci.base import Base, environment_of
from nbdeploy.oci.layers import MOST, Entry, Layer, tree
from nbdeploy.oci.packages import PLACE as SITE
from nbdeploy.oci.packages import SERVER
from nbdeploy.oci.push import CONFIG, MANIFEST
from nbdeploy.oci.reference import Reference
from nbdeploy.oci.weights import blob_entry, blobs

STORE = "opt/nbdeploy/store"
USER = "10001:10001"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NEVER = "1970-01-01T00:00:00Z"
_KEPT_APART = 32 << 10  # bytes from which a sample or a module is a layer of its own
_MOST_APART = 8
_LAYERS = 120  # in all: overlay file systems have room for 127


@dataclass(frozen=True)
class Image:
    """An image ready to be pushed.

    Attributes:
        layers: of the base and ours, in order.
        config, manifest: their exact bytes.
        digest: of the manifest.
        base: what it stands on.
    """

    layers: tuple[Layer, ...]
    config: bytes
    manifest: bytes
    digest: str
    base: Reference

    @property
    def size(self) -> int:
        """Bytes of all layers and the configuration, as a node pulls them."""
        return sum(layer.size for layer in self.layers) + len(self.config)


def build(
    bundle: Bundle,
    base: Base,
    environment: tuple[Layer, ...],
    *,
    on_bytes: Callable[[int], None] = lambda _count: None,
) -> Image:
    """Return the Image of a Bundle.

    Args:
        bundle: the Bundle, in a Store of this machine.
        base: see `base_of`.
        environment: layers of its packages and of bytecode, see `packages.layers`.
        on_bytes: hears how many bytes of weights were hashed, where their layers are made for the first time.

    Raises BundleInvalid where the Bundle is damaged, StoreError where a blob of it is missing.
    """
    manifest = bundle.manifest
    server = tree(
        (Entry.of(f"{SERVER}/nbdeploy_server/{name}", data) for name, data in server_source().items()), "server"
    )
    always = {ref.digest: ref.size for ref in manifest.small()}
    large = {digest: size for digest, size in manifest.refs().items() if digest not in always}
    most = min(MOST, _LAYERS - len(base.layers) - len(environment) - 2 - _MOST_APART)
    weights = blobs(bundle.store, large, STORE, most=most, on_bytes=on_bytes)
    ours = (*environment, server, *weights, *_code(bundle, manifest, always, large))
    layers = (*base.layers, *ours)
    config = canonical(_config(bundle, base, ours))
    content = canonical(_manifest(layers, config, bundle, base))
    return Image(layers, config, content, _digest(content), base.reference)


def _code(bundle: Bundle, manifest: Manifest, always: Mapping[str, int], large: Mapping[str, int]) -> tuple[Layer, ...]:
    """Return the layers of all that is run or read at load; the last one has what changes with every edit.

    The stamp vouches for the weights, so that a Replica need not hash them before it is ready: registry and node have
    done that. Files of an image have the modification time 0.
    """
    store, name = bundle.store, bundle.digest.partition(":")[2]
    kept = sorted(always.items(), key=lambda pair: (-pair[1], pair[0]))
    apart = [each for each in kept if each[1] >= _KEPT_APART and each[0] != manifest.skeleton.digest][:_MOST_APART]
    stamp = {digest: [size, 0] for digest, size in large.items() if size > SMALL}
    try:
        last = [
            Entry.of(f"{STORE}/bundles/sha256/{name}/manifest.json", store.bundle_path(bundle.digest).read_bytes()),
            Entry.of(f"{STORE}/verified/{name}.json", canonical(stamp)),
            *(_loaded(blob_entry(store, STORE, *each)) for each in kept if each not in apart),
        ]
        alone = [tree([_loaded(blob_entry(store, STORE, *each))], f"code {each[0][7:19]}") for each in sorted(apart)]
    except OSError as error:
        raise BundleError(f"{error.filename} cannot be read: {error.strerror}; deploy again") from error
    return (*alone, tree(last, "code"))


def _loaded(entry: Entry) -> Entry:
    """Take a small blob's content into memory."""
    return entry if isinstance(entry.source, bytes) else Entry.of(entry.name, entry.source.read_bytes())


def _config(bundle: Bundle, base: Base, ours: tuple[Layer, ...]) -> dict[str, Any]:
    """Return the image's configuration: the base's machine and variables, our way to start."""
    known = environment_of(base.config)
    variables = {
        **({} if known.get("PATH") else {"PATH": _PATH}),
        "NBDEPLOY_BUNDLE": bundle.digest,
        "NBDEPLOY_STORE": f"/{STORE}",
        "NBDEPLOY_SITE": f"/{SITE}",
        # the NVIDIA runtime reads these where a pod has GPUs; CUDA itself comes with the packages
        "NVIDIA_VISIBLE_DEVICES": "all",
        "NVIDIA_DRIVER_CAPABILITIES": "compute,utility",
    }
    program = f"/{SERVER}/nbdeploy_server/__main__.py"
    machine = {key: base.config[key] for key in ("architecture", "os", "variant", "os.version") if key in base.config}
    return {
        **machine,
        "created": _NEVER,
        "config": {
            "Entrypoint": ["python3", "-I", "-X", "faulthandler", program],
            "Env": [f"{name}={value}" for name, value in {**known, **variables}.items()],
            "ExposedPorts": {"8080/tcp": {}, "9090/tcp": {}},
            "Labels": _labels(bundle, base),
            "User": USER,
            "WorkingDir": "/tmp",  # noqa: S108 - the one folder that can be written in a pod
        },
        "history": _history(base, ours),
        "rootfs": {
            "type": "layers",
            "diff_ids": [layer.diff_id for layer in itertools.chain(base.layers, ours)],
        },
    }


def _labels(bundle: Bundle, base: Base) -> dict[str, str]:
    """Return the labels; the base goes by its digest, for its name depends on where it was mirrored."""
    manifest = bundle.manifest
    return {
        "nbdeploy.dev/bundle": bundle.digest,
        "nbdeploy.dev/python": manifest.requires["python"],
        "org.opencontainers.image.base.digest": base.reference.digest,
        "org.opencontainers.image.description": f"{manifest.predict['name']}, served by nbdeploy",
        "org.opencontainers.image.title": "nbdeploy model server",
    }


def _history(base: Base, ours: tuple[Layer, ...]) -> list[dict[str, Any]]:
    """Return one entry a layer; tools refuse an image whose history and layers do not fit."""
    known = [dict(each) for each in base.config.get("history") or ()]
    if sum(not each.get("empty_layer") for each in known) != len(base.layers):
        known = [{"created": _NEVER, "created_by": "base image"} for _ in base.layers]
    return [*known, *({"created": _NEVER, "created_by": f"nbdeploy: {layer.title}"} for layer in ours)]


def _manifest(layers: tuple[Layer, ...], config: bytes, bundle: Bundle, base: Base) -> dict[str, Any]:
    return {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {"mediaType": CONFIG, "digest": _digest(config), "size": len(config)},
        "layers": [{"mediaType": each.media_type, "digest": each.digest, "size": each.size} for each in layers],
        "annotations": {
            "nbdeploy.dev/bundle": bundle.digest,
            "org.opencontainers.image.base.digest": base.reference.digest,
        },
    }


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
