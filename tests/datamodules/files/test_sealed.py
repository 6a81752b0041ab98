import re

import pytest

from malleable.datamodules.files.sealed import find_damage, is_intact, seal


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sealed/part").mkdir(parents=True)
    (tmp_path / "sealed/a").write_text("a")
    (tmp_path / "sealed/part/b").write_text("b")
    seal(tmp_path / "sealed", {"meta": 1})
    return tmp_path / "sealed"


def test_sealed_folder_is_intact(folder):
    assert is_intact(folder)
    assert find_damage(folder) is None


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("part/b", "c", r"is corrupt \(part/b\)"),
        ("a", None, r"is corrupt \(a\)"),
        ("manifest.json", "{", "is incomplete"),
        ("manifest.json", "[]", "is incomplete"),
        ("manifest.json", None, "is incomplete"),
    ],
)
def test_find_damage_describes_the_damage(folder, file, content, message):
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    assert not is_intact(folder)
    assert re.match(message, find_damage(folder))
