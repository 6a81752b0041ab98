"""What a user may give as a file, in the readers of every format."""

import gzip
import os
import subprocess
import sys

import pytest

from malleable.datamodules.editing.requests import read_requests
from malleable.datamodules.files import text_files
from malleable.datamodules.files.table_files import read_cells, read_parquet
from malleable.datamodules.files.text_files import parse_json, read_json, read_json_rows, read_lines
from malleable.datamodules.files.user_files import check_inside, check_tree, reading
from malleable.datamodules.graphs.labels import read_queries
from malleable.datamodules.graphs.triple_files import read_labels
from malleable.datamodules.language.texts import read_texts
from malleable.datamodules.sources.editing.fact_files import LRE
from malleable.datamodules.sources.recommendation.tables import Tables

READERS = {
    "lines": lambda path: list(read_lines(path)),
    "cells": lambda path: list(read_cells(path, ",")),
    "json": read_json,
    "rows": lambda path: list(read_json_rows(path)),
    "parquet": read_parquet,
    "texts": read_texts,
    "requests": read_requests,
    "labels": lambda path: list(read_labels(path)),
    "tables": lambda path: Tables(str(path), str(path)).load(),
    "queries": lambda path: read_queries(path, __import__("malleable").datamodules.batch.KnowledgeGraph(("a",), ("r",))),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_pipes_devices_and_folders_are_refused_before_they_are_opened(tmp_path, reader):
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "device.csv").symlink_to("/dev/zero")
    for name, kind in (("pipe", "a named pipe"), ("folder", "a folder"), ("device", "a device")):
        with pytest.raises(ValueError, match=rf"{name}.csv is {kind}, not a file"):
            reader(tmp_path / f"{name}.csv")
    with pytest.raises(FileNotFoundError, match=r"the file .*none.csv does not exist"):
        reader(tmp_path / "none.csv")


@pytest.mark.parametrize(
    "data",
    [b"abc", gzip.compress(b"abc" * 999)[:-9], gzip.compress(b"x" * 99)[:20], gzip.compress(b"abc" * 999)[:-8] + b"12345678"],
    ids=["text", "without end", "cut", "other checksum"],
)
def test_damaged_gzip(tmp_path, data):
    (tmp_path / "a.csv.gz").write_bytes(data)
    with pytest.raises(ValueError, match=r"a.csv.gz is damaged, or not (a )?gzip"):
        list(read_lines(tmp_path / "a.csv.gz"))


@pytest.mark.parametrize("line", [b"x" * 1000, b"1,2\n" * 100])
def test_a_decompression_bomb_is_refused(tmp_path, line, monkeypatch):
    monkeypatch.setattr(text_files, "_SMALL", 1 << 16)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(line * 20_000))
    with pytest.raises(ValueError, match=r"a.csv.gz expands to more than 100 times its size"):
        list(read_lines(tmp_path / "a.csv.gz"))


def test_an_endless_line_is_refused(tmp_path):
    with (tmp_path / "a.csv").open("wb") as file:
        file.truncate(text_files.LINE_LIMIT + (1 << 20))
    with pytest.raises(ValueError, match=r"a.csv has a line of more than 16 MiB"):
        list(read_lines(tmp_path / "a.csv"))


@pytest.mark.parametrize("text", ["[" * 65 + "]" * 65, '{"a":' * 65 + "1" + "}" * 65, "[" * 100_000, "1" * 5000, '"\\ud800"', '{"\\udfff": 1}'])
def test_json_beyond_the_limits(text):
    with pytest.raises(ValueError, match=r"^here: not JSON"):
        parse_json(text, "here")


def test_json_within_the_limits():
    assert parse_json("[" * 64 + "]" * 64, "here")
    assert parse_json("[" + "[]," * 200 + "[]]", "here")
    assert parse_json('"\\ud83d\\ude00"', "here") == "\U0001f600"


def test_errors_of_libraries_contain_the_file(tmp_path):
    from safetensors import safe_open

    (tmp_path / "a.safetensors").write_bytes(b"xyz")
    with pytest.raises(ValueError, match=r"a.safetensors is damaged, or not (a )?safetensors"), reading(tmp_path / "a.safetensors"):
        safe_open(tmp_path / "a.safetensors", "pt")
    (tmp_path / "a.parquet").write_bytes(b"PAR1xyz")
    with pytest.raises(ValueError, match=r"a.parquet is damaged, or not a Parquet file"):
        read_parquet(tmp_path / "a.parquet")
    with pytest.raises(PermissionError, match=r"there cannot be read: permission denied: change the permissions"), reading("there"):
        raise PermissionError(13, "Permission denied")
    with pytest.raises(KeyError), reading("there"):
        raise KeyError("a bug")


def test_links_to_files_outside_the_folder_are_refused(tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (folder / "own").write_text("x")
    (folder / "sub" / "link").symlink_to("../own")
    check_tree(folder)
    (folder / "sub" / "out").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"is a link to .*, outside its folder"):
        check_tree(folder)
    (folder / "sub" / "out").unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(ValueError, match="is neither a file nor a folder"):
        check_tree(folder)


def test_a_snapshot_of_the_hub_may_link_to_its_repository(tmp_path):
    (tmp_path / "models--x" / "blobs").mkdir(parents=True)
    (tmp_path / "models--x" / "snapshots" / "1").mkdir(parents=True)
    (tmp_path / "models--x" / "blobs" / "b").write_text("x")
    link = tmp_path / "models--x" / "snapshots" / "1" / "config.json"
    link.symlink_to("../../blobs/b")
    check_inside(link, link.parent)


def test_facts_of_other_types_are_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"name": "x", "prompt_templates": "{} is", "samples": []}')
    with pytest.raises(ValueError, match=r"a.json, relation 1: field prompt_templates: expected a list"):
        LRE(str(tmp_path / "a.json")).tables()


def test_module_imports_standard_library_only():
    code = "import sys, malleable.datamodules.files.user_files; sys.exit(' '.join({'torch', 'pandas', 'pyarrow', 'yaml'} & sys.modules.keys()) or 0)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
