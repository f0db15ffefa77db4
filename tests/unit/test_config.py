"""Settings come from the right place, and a mistake in them is told with its file, its key and what is allowed."""

from __future__ import annotations

import os
import stat
import textwrap
from typing import TYPE_CHECKING

import pytest

from nbdeploy.config import EngineSettings, Settings, home, settings
from nbdeploy.errors import ConfigError, StoreError, UsageError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def user_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test a configuration folder of its own, on each platform; return its config.toml."""
    import platformdirs

    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "user" / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "user" / "data"))
    return platformdirs.user_config_path("nbdeploy", appauthor=False) / "config.toml"


@pytest.fixture
def notebooks(tmp_path: Path) -> Path:
    """Return a folder for notebooks, inside a project."""
    folder = tmp_path / "project" / "notebooks"
    folder.mkdir(parents=True)
    return folder


def write(path: Path, text: str) -> Path:
    """Write a file with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text), "utf-8")
    return path


def test_nothing_configured_deploys_on_this_machine(notebooks: Path) -> None:
    """Without any file or variable, the engine is local and ten Revisions are kept."""
    assert settings(notebooks, {}) == Settings()
    assert settings(None, {}).engine() == EngineSettings("local")


def test_the_documented_file_is_read(notebooks: Path) -> None:
    """The example of the documentation gives what it says, and "local" is there without being named."""
    write(
        notebooks / "nbdeploy.toml",
        """
        default_engine = "gpu-cluster"
        revisions_kept = 3
        [engines.gpu-cluster]
        kind = "kubernetes"
        context = "prod"
        namespace = "models"
        registry = "registry.example.com/team"
        node_selector = { accelerator = "nvidia-t4" }
        tolerations = [{ key = "gpu", operator = "Exists" }]
        [cost]
        "nvidia-t4" = 0.35
        a100 = 3
        """,
    )
    found = settings(notebooks, {})
    assert found.engine() == EngineSettings(
        "kubernetes",
        context="prod",
        namespace="models",
        registry="registry.example.com/team",
        node_selector={"accelerator": "nvidia-t4"},
        tolerations=({"key": "gpu", "operator": "Exists"},),
    )
    assert found.cost == {"nvidia-t4": 0.35, "a100": 3.0}
    assert found.revisions_kept == 3
    assert set(found.engines) == {"local", "gpu-cluster"}


def test_later_sources_win_key_by_key(notebooks: Path, user_config: Path) -> None:
    """User file, then project, then variables; an engine and the prices are merged, not replaced."""
    write(
        user_config,
        """
        default_engine = "gpu"
        [engines.gpu]
        kind = "kubernetes"
        context = "home"
        registry = "r.example.com"
        [cost]
        a = 1
        b = 1
        """,
    )
    write(notebooks / "nbdeploy.toml", 'revisions_kept = 5\n[engines.gpu]\ncontext = "prod"\n[cost]\nb = 2\n')
    found = settings(notebooks, {"NBDEPLOY_DEFAULT_ENGINE": "local", "NBDEPLOY_REVISIONS_KEPT": "7"})
    assert found.engines["gpu"] == EngineSettings("kubernetes", context="prod", registry="r.example.com")
    assert (found.default_engine, found.revisions_kept, found.cost) == ("local", 7, {"a": 1.0, "b": 2.0})
    assert settings(None, {}).engine().context == "home"


def test_the_nearest_pyproject_with_our_table_counts(notebooks: Path) -> None:
    """A pyproject.toml above the notebook is found, one without our table is passed over, nbdeploy.toml goes first."""
    write(notebooks.parent / "pyproject.toml", "[tool.nbdeploy]\nrevisions_kept = 4\n")
    write(notebooks / "pyproject.toml", '[project]\nname = "other"\n')
    assert settings(notebooks, {}).revisions_kept == 4
    write(notebooks / "nbdeploy.toml", "revisions_kept = 6\n")
    assert settings(notebooks, {}).revisions_kept == 6


def test_a_kind_is_an_engine_without_settings() -> None:
    """`kubernetes` can be chosen, as the default too, with nothing configured; other names cannot."""
    assert settings(None, {"NBDEPLOY_DEFAULT_ENGINE": "kubernetes"}).engine() == EngineSettings("kubernetes")
    with pytest.raises(UsageError, match=r"no engine 'kubernets': did you mean kubernetes\?"):
        Settings().engine("kubernets")


def test_words_on_engines_name_the_file(notebooks: Path, user_config: Path) -> None:
    """An unknown engine, or one whose settings lack something: how to choose another, and which file to mend."""
    with pytest.raises(UsageError, match=r"--engine NAME.*\[engines.gpu\].*in .*config\.toml"):
        settings(notebooks, {}).engine("gpu")
    write(notebooks / "nbdeploy.toml", '[engines.gpu]\nkind = "kubernetes"\n')
    found = settings(notebooks, {})
    with pytest.raises(ConfigError) as known, found.located("gpu"):
        raise ConfigError("engines.gpu.registry is missing")
    here = notebooks / "nbdeploy.toml"
    assert str(known.value) == f"engines.gpu.registry is missing. The settings of gpu are in {here}."
    with pytest.raises(ConfigError) as unknown, found.located("kubernetes"):
        raise ConfigError("engines.kubernetes.registry is missing.")
    assert str(unknown.value).endswith(
        f"The settings of kubernetes belong into {user_config}. There are settings for gpu: --engine gpu"
    )


def test_an_engine_named_as_a_kind_needs_no_kind(notebooks: Path) -> None:
    """[engines.kubernetes] is of the kind kubernetes, and cannot be another."""
    write(notebooks / "nbdeploy.toml", '[engines.kubernetes]\nnamespace = "models"\n')
    assert settings(notebooks, {}).engines["kubernetes"] == EngineSettings("kubernetes", namespace="models")
    write(notebooks / "nbdeploy.toml", '[engines.local]\nkind = "kubernetes"\n')
    with pytest.raises(ConfigError, match=r'engines.local.kind must be "local"'):
        settings(notebooks, {})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            'defualt_engine = "local"',
            ["defualt_engine is no setting", "did you mean default_engine?", "revisions_kept"],
        ),
        ('default_engine = "gpu"', ["default_engine: There is no engine 'gpu'", "kubernetes, local"]),
        ("default_engine = 3", ["default_engine must be a text", "it is 3"]),
        ("revisions_kept = 0", ["revisions_kept must be a whole number from 1"]),
        ("revisions_kept = true", ["revisions_kept must be a whole number from 1"]),
        ("engines = 1", ["engines must be tables of engines"]),
        ("[cost]\nt4 = -1", ["cost must be prices per GPU-hour"]),
        ("[cost]\nt4 = nan", ["cost must be prices per GPU-hour"]),
        ('[engines.a]\ncontext = "x"', ["engines.a.kind is missing", "kubernetes, local"]),
        ('[engines.a]\nkind = "kubernets"', ["engines.a.kind", "did you mean kubernetes?"]),
        ('[engines.a]\nkind = "kubernetes"\nnamspace = "x"', ["engines.a.namspace", "did you mean namespace?"]),
        ('[engines.a]\nkind = "kubernetes"\nnode_selector = "x"', ["engines.a.node_selector must be a table"]),
        ('[engines.a]\nkind = "kubernetes"\ntolerations = ["x"]', ["engines.a.tolerations must be a list of tables"]),
        ('[engines.a]\nkind = "kubernetes"\nhost = ""', ["engines.a.host must be a text that is not empty"]),
        ("default_engine =", ["is not valid TOML", "Invalid value"]),
    ],
)
def test_a_mistake_names_file_key_and_what_is_allowed(notebooks: Path, text: str, told: list[str]) -> None:
    """Each wrong setting is refused in one line that says where it is and what may stand there."""
    path = write(notebooks / "nbdeploy.toml", text)
    with pytest.raises(ConfigError) as error:
        settings(notebooks, {})
    for part in [str(path), *told]:
        assert part in str(error.value)


def test_a_mistake_in_pyproject_names_its_table(notebooks: Path) -> None:
    """The table is named beside the file, for pyproject.toml has many."""
    path = write(notebooks / "pyproject.toml", "[tool]\nnbdeploy = 3\n")
    with pytest.raises(ConfigError, match="must be a table") as error:
        settings(notebooks, {})
    assert f"{path} [tool.nbdeploy]" in str(error.value)


def test_a_file_that_cannot_be_read_is_told(notebooks: Path) -> None:
    """A folder in its place, or bytes that are no UTF-8, give an error with the file's name."""
    path = notebooks / "nbdeploy.toml"
    path.mkdir()
    with pytest.raises(ConfigError, match=r"nbdeploy\.toml cannot be read"):
        settings(notebooks, {})
    path.rmdir()
    path.write_bytes(b"# \xff\n")
    with pytest.raises(ConfigError, match="not text in UTF-8"):
        settings(notebooks, {})


def test_variables_are_checked_like_files() -> None:
    """An unknown variable is refused with the near one; those read elsewhere and Kubernetes' own are let pass."""
    with pytest.raises(ConfigError, match=r"NBDEPLOY_DEFAULT_ENGIN is unknown: did you mean NBDEPLOY_DEFAULT_ENGINE\?"):
        settings(None, {"NBDEPLOY_DEFAULT_ENGIN": "local"})
    with pytest.raises(ConfigError, match=r"NBDEPLOY_REVISIONS_KEPT: revisions_kept must be a whole number"):
        settings(None, {"NBDEPLOY_REVISIONS_KEPT": "many"})
    harmless = {
        "NBDEPLOY_HOME": "x",
        "NBDEPLOY_KEY": "x",
        "NBDEPLOY_DEFAULT_ENGINE": "",
        "NBDEPLOY_SENTIMENT_SERVICE_HOST": "10.0.0.1",
        "NBDEPLOY_SENTIMENT_SERVICE_PORT_HTTP": "80",
        "NBDEPLOY_SENTIMENT_PORT": "tcp://10.0.0.1:80",
        "NBDEPLOY_SENTIMENT_PORT_80_TCP_ADDR": "10.0.0.1",
    }
    assert settings(None, harmless) == Settings()


def test_home_is_made_private(tmp_path: Path) -> None:
    """The home and its folders are made with mode 0700, and one that others could read is closed."""
    folder = home({"NBDEPLOY_HOME": str(tmp_path / "a" / "b")})
    assert folder == tmp_path / "a" / "b"
    assert {path.name for path in folder.iterdir()} == {"store", "jobs", "endpoints"}
    folder.chmod(0o755)
    home({"NBDEPLOY_HOME": str(folder)})
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())} == {0o700}


def test_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default it is in the user's data folder; ~ and relative paths are resolved."""
    assert home({}).is_relative_to(tmp_path / "user")
    assert home({"NBDEPLOY_HOME": "~/here"}) == tmp_path / "user" / "here"
    monkeypatch.chdir(tmp_path)
    assert home({"NBDEPLOY_HOME": "near"}) == tmp_path / "near"


def test_home_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    """A file in its place, above it, or as one of its folders, and an unknown user's home: said, with what to do."""
    write(tmp_path / "file", "")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match=r"a file is in its place.*set NBDEPLOY_HOME"):
            home({"NBDEPLOY_HOME": str(place)})
    write(tmp_path / "home" / "store", "")
    with pytest.raises(StoreError, match="store cannot be used"):
        home({"NBDEPLOY_HOME": str(tmp_path / "home")})
    with pytest.raises(StoreError, match="no such user"):
        home({"NBDEPLOY_HOME": "~nobody-of-this-name/x"})


@pytest.mark.skipif(os.name == "nt", reason="modes and owners of POSIX")
def test_home_of_another_or_read_only_is_told(tmp_path: Path) -> None:
    """The home of another user, and a folder without write permission, are refused in words."""
    if os.geteuid() == 0:
        os.chown(tmp_path, 12345, -1)
        with pytest.raises(StoreError, match="belongs to another user \\(uid 12345\\)"):
            home({"NBDEPLOY_HOME": str(tmp_path)})
        return
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(StoreError, match=r"cannot be written|cannot be made"):
        home({"NBDEPLOY_HOME": str(tmp_path / "closed")})
