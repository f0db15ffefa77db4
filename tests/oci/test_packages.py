"""Packages come from the lock, for the cluster's machines, with the same digests from every machine that makes them."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import tarfile
from typing import TYPE_CHECKING, Any

import pytest

from nbdeploy import environment
from nbdeploy.errors import DeployError
from nbdeploy.oci import packages
from nbdeploy.oci.packages import Environment, cuda_bytes, cuda_words
from tests.wheelhouse import make_wheel, row, wheelhouse

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["wheelhouse"]

MANYLINUX = "cp311-cp311-manylinux_2_17_x86_64"
PYTHON, PLATFORM = "3.11", "x86_64-manylinux_2_28"


def layers(rows: list[dict[str, Any]], root: Path, **options: Any) -> Environment:
    """Make layers for the usual platform."""
    settings: dict[str, Any] = {"python": PYTHON, "platform": PLATFORM, "on_progress": print, **options}
    return packages.layers(rows, None, root, **settings)


def content(made: Environment) -> list[dict[str, bytes]]:
    """Return the files of each layer of packages."""
    found = []
    for layer in made.layers:
        if layer.title.startswith("bytecode"):
            continue
        assert layer.open is not None
        data = b"".join(layer.open())
        assert len(data) == layer.size
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            files = [info for info in archive if info.isfile()]
            found.append({info.name: (archive.extractfile(info) or io.BytesIO()).read() for info in files})
    return found


def test_same_digests_from_two_homes_and_two_caches(
    tmp_path: Path, wheelhouse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two installs in different folders, of different times, with different caches: every byte is equal."""
    make_wheel(wheelhouse, "apple", "1.0", {"apple.py": b"x = 1\n"}, entry_points="[console_scripts]\nrun = apple:x\n")
    make_wheel(
        wheelhouse, "pear", "2.0", {"pear/__init__.py": b"", "pear/core.so": os.urandom(20_100_000)}, tag=MANYLINUX
    )
    rows = [row("apple", "1.0"), row("pear", "2.0")]
    made = []
    for name in ("a", "deeper/in/b"):
        monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / name / "cache"))
        made.append(layers(rows, tmp_path / name / "sites"))
    assert made[0] == made[1]
    assert [layer.title for layer in made[0].layers] == [
        *("pear 2.0", "apple 1.0"),
        *("bytecode of 2 packages", "bytecode of the server"),
    ]
    assert content(made[0]) == content(made[1])


@pytest.mark.slow
def test_same_digests_of_real_packages(tmp_path: Path) -> None:
    """What the server needs, from the index: two installs are equal, and no file names the machine that made them."""
    rows = environment.lock(environment.needed(["numpy"]))
    first, second = (layers(rows, tmp_path / name / "sites") for name in ("a", "deeper/in/b"))
    assert first == second
    assert first.layers[0].title.startswith("numpy ")
    files = {name: data for each in content(first) for name, data in each.items()}
    assert "opt/nbdeploy/site/uvicorn/__init__.py" in files
    assert not [name for name, data in files.items() if str(tmp_path).encode() in data]
    assert not [name for name in files if name.endswith((".pyc", "INSTALLER", "REQUESTED", ".lock"))]


def test_what_varies_is_left_out_and_nothing_else(tmp_path: Path, wheelhouse: Path) -> None:
    """Scripts with this machine's Python and notes of the installer go, from RECORD too; programs and data stay."""
    make_wheel(
        wheelhouse,
        "apple",
        "1.0",
        {
            "apple.py": b"x = 1\n",
            "shared/a.py": b"",
            "apple-1.0.data/scripts/machine": b"\x7fELF program",
            "apple-1.0.data/scripts/tool": b"#!python\nprint()\n",
            "apple-1.0.data/data/share/apple.txt": b"data",
        },
        entry_points="[console_scripts]\nrun = apple:x\n",
    )
    make_wheel(wheelhouse, "pear", "1.0", {"shared/b.py": b"", "-odd, name.py": b"y"})
    made = layers([row("apple", "1.0"), row("pear", "1.0")], tmp_path / "sites")
    files = {name.removeprefix("opt/nbdeploy/site/"): data for each in content(made) for name, data in each.items()}
    info = {f"{name}-1.0.dist-info/{file}" for name in ("apple", "pear") for file in ("METADATA", "RECORD", "WHEEL")}
    own = {"apple.py", "shared/a.py", "shared/b.py", "-odd, name.py", "bin/machine", "share/apple.txt"}
    assert set(files) == info | own | {"apple-1.0.dist-info/entry_points.txt"}
    record = files["apple-1.0.dist-info/RECORD"].decode()
    assert "bin/machine" in record
    for gone in ("bin/run", "bin/tool", "INSTALLER", "REQUESTED"):
        assert gone not in record
    assert '"-odd, name.py"' in files["pear-1.0.dist-info/RECORD"].decode()


def test_second_time_nothing_is_run_or_read(tmp_path: Path, wheelhouse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same lock again needs neither uv nor a package: its layers are known, and can be sent."""
    make_wheel(wheelhouse, "apple", "1.0", {"apple.py": b"x = 1\n"})
    words: list[str] = []
    first = layers([row("apple", "1.0")], tmp_path / "sites", on_progress=words.append)
    monkeypatch.setenv("UV_FIND_LINKS", str(tmp_path / "gone"))
    again = layers([row("apple", "1.0")], tmp_path / "sites", on_progress=words.append)
    assert again == first
    assert content(again) == content(first)
    assert [text.partition(" ")[0] for text in words] == ["installing", "packing", "compiling"]


def test_damaged_cache_is_made_again(tmp_path: Path, wheelhouse: Path) -> None:
    """Whatever happened to the folder, the next layers are right."""
    make_wheel(wheelhouse, "apple", "1.0", {"apple.py": b"x = 1\n", "core.py": b""})
    first = layers([row("apple", "1.0")], tmp_path / "sites")
    folder = next((tmp_path / "sites").glob("[!.]*"))

    def again() -> None:
        made = layers([row("apple", "1.0")], tmp_path / "sites")
        assert made == first
        assert content(made) == content(first)

    for text in ("", '{"layers": [{}]}', "[]", '{"layers": 5, "note": ""}'):
        (folder / "layers.json").write_text(text)
        again()
    (folder / "site" / "core.py").unlink()
    again()
    module = folder / "site" / "apple.py"
    module.unlink()
    module.write_text("x = 2\n")
    again()


def test_package_without_wheel_is_named(tmp_path: Path, wheelhouse: Path) -> None:
    """A package that is only there as source, or for other machines, is named with the platform it lacks."""
    make_wheel(wheelhouse, "apple", "1.0", {"apple.py": b""})
    make_wheel(wheelhouse, "macpie", "1.0", {"macpie.py": b""}, tag="cp311-cp311-macosx_11_0_arm64")
    with gzip.open(wheelhouse / "sourcepie-1.0.tar.gz", "wb") as out, tarfile.open(fileobj=out, mode="w") as archive:
        text = b"Metadata-Version: 2.1\nName: sourcepie\nVersion: 1.0\n"
        info = tarfile.TarInfo("sourcepie-1.0/PKG-INFO")
        info.size = len(text)
        archive.addfile(info, io.BytesIO(text))
    for name in ("macpie", "sourcepie"):
        with pytest.raises(DeployError, match=rf"^{name} cannot be had for Python 3.11 on x86_64-manylinux_2_28"):
            layers([row("apple", "1.0"), row(name, "1.0")], tmp_path / "sites")
    assert not list((tmp_path / "sites").glob("[!.]*"))


def test_other_processor_gets_its_own_wheels(tmp_path: Path, wheelhouse: Path) -> None:
    """Machines with ARM get wheels for ARM, whatever this machine is."""
    for machine in ("x86_64", "aarch64"):
        tag = f"cp311-cp311-manylinux_2_17_{machine}"
        make_wheel(wheelhouse, "apple", "1.0", {"apple/made_for": machine.encode()}, tag=tag)
    for platform in ("x86_64-manylinux_2_28", "aarch64-manylinux_2_28"):
        files = content(layers([row("apple", "1.0")], tmp_path / "sites", platform=platform))[0]
        assert files["opt/nbdeploy/site/apple/made_for"].decode() == platform.partition("-")[0]


@pytest.fixture
def cuda(wheelhouse: Path, tmp_path: Path) -> Path:
    """A wheelhouse with torch as a build for CUDA; returns an index beside it that has torch for CPUs."""
    make_wheel(wheelhouse, "torch", "2.7.1", {"torch/cuda.so": b"c" * 9000}, requires=("nvidia-cudnn",), tag=MANYLINUX)
    make_wheel(wheelhouse, "nvidia-cudnn", "9.0", {"nvidia/cudnn.so": b"n" * 5000}, tag=MANYLINUX)
    make_wheel(wheelhouse, "triton", "3.3", {"triton.py": b"t"})
    page = tmp_path / "index" / "torch"
    wheel = make_wheel(page, "torch", "2.7.1+cpu", {"torch/cpu.so": b"cpu"}, tag=MANYLINUX)
    (page / "index.html").write_text(f'<a href="{wheel.name.replace("+", "%2B")}">{wheel.name}</a>')
    return page.parent


CUDA_ROWS = [row("nvidia-cudnn", "9.0"), row("torch", "2.7.1"), row("triton", "3.3")]


def test_cuda_for_machines_without_gpu_is_told_in_bytes(tmp_path: Path, cuda: Path) -> None:
    """Noted with the way out; with GPUs it is nobody's concern."""
    made = layers(CUDA_ROWS, tmp_path / "sites")
    assert "torch_index" in made.note
    assert "0.0 GB of the image" in made.note
    assert layers(CUDA_ROWS, tmp_path / "sites").note == made.note
    assert layers(CUDA_ROWS, tmp_path / "sites", gpus=1).note == ""
    assert cuda_words(cuda_bytes({"torch": 900_000_000, "nvidia-cudnn": 2_000_000_000, "numpy": 5})).startswith(
        "torch is a build for CUDA: 2.9 GB of the image serve no purpose without a GPU."
    )
    assert cuda_words(cuda_bytes({"torch": 200_000_000, "numpy": 5})) == ""


def test_cuda_is_told_before_it_is_fetched() -> None:
    """The lock of an index tells the sizes of wheels, so that they can be said before gigabytes are downloaded."""
    sizes = {"torch": 900_000_000, "nvidia-cudnn": 600_000_000, "numpy": 20_000_000}
    lock = "".join(
        f'[[packages]]\nname = "{name}"\nversion = "1.0"\nwheels = [{{ url = "https://a/b.whl", size = {size} }}]\n'
        for name, size in sizes.items()
    )
    words = cuda_words(cuda_bytes(packages._wheel_sizes(lock)), "of wheels")
    assert words.startswith("torch is a build for CUDA: 1.5 GB of wheels serve no purpose without a GPU.")


def test_torch_index_brings_cpu_wheels(tmp_path: Path, cuda: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an index of CPU wheels torch comes from there and CUDA's libraries stay away, whatever build runs here."""
    monkeypatch.delenv("UV_NO_INDEX")
    index = cuda.as_uri()
    for version in ("2.7.1", "2.7.1+cu128"):
        rows = [row("nvidia-cudnn", "9.0"), row("torch", version), row("triton", "3.3")]
        made = layers(rows, tmp_path / version, torch_index=index)
        files = content(made)[0]
        assert "opt/nbdeploy/site/torch/cpu.so" in files
        assert not [name for name in files if "nvidia" in name or "triton" in name]
        assert made.note == ""


def test_cuda_libraries_that_others_need_stay(tmp_path: Path) -> None:
    """Only what torch alone brought is left out: a package that requires a CUDA library itself keeps it."""
    site = tmp_path / "site"
    wheels = tmp_path / "wheels"
    for name, requires in (
        ("torch", ("nvidia-a", "triton")),
        ("boost", ("nvidia-b", "torch")),
        ("nvidia-b", ("cuda-c",)),
    ):
        make_wheel(wheels, name, "1.0+cu128" if name == "torch" else "1.0", {}, requires=requires)
    for name in ("nvidia-a", "triton", "cuda-c"):
        make_wheel(wheels, name, "1.0", {})
    install(site, wheels)
    rows = [row(name, "1.0") for name in ("boost", "cuda-c", "nvidia-a", "nvidia-b", "triton")]
    rows.append(row("torch", "1.0+cu128"))
    kept = environment.without_cuda(rows, path=[str(site)])
    assert {each["name"]: each["version"] for each in kept} == dict.fromkeys(
        ("boost", "cuda-c", "nvidia-b", "torch"), "1.0"
    )


def install(site: Path, wheels: Path) -> None:
    """Install every wheel of a folder into a folder."""
    from uv import find_uv_bin

    command = [find_uv_bin(), "pip", "install", "-q", "--offline", "--no-deps", "--target", site, *wheels.iterdir()]
    subprocess.run(command, check=True)
