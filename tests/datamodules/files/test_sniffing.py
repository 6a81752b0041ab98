"""Encoding and delimiter of tables without options."""

import pytest

from malleable.datamodules.files.sniffing import sniff_delimiter, sniff_encoding


@pytest.mark.parametrize(
    ("content", "other", "expected"),
    [
        (b"abc", None, None),
        (b"abc", "cp1251", None),
        ("é".encode(), "cp1251", None),
        ("é".encode("utf-16"), "cp1251", None),
        ("é\n".encode("cp1252"), None, "cp1252"),
        ("é\n".encode("cp1252"), "latin-1", "latin-1"),
        ("ab".encode("utf-16-le"), "utf-16-le", "utf-16-le"),
        (b"", None, None),
    ],
)
def test_encodings(tmp_path, content, other, expected):
    (tmp_path / "a").write_bytes(content)
    assert sniff_encoding(tmp_path / "a", other) == expected


@pytest.mark.parametrize("content", [b"\x81\n", b"\xef\xbb\xbf\xe9\n", b"\xff\xfe1"])
def test_files_that_are_not_text(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=r"a, line 1.*: not text in UTF-"):
        sniff_encoding(tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "default", "expected"),
    [
        ("user;item\n1,2\n", ",", ";"),
        ("user,item;x\n", ",", ","),
        ("user,item;item\n", ";", ";"),
        ('"user"\t"item"\n', ",", "\t"),
        ("user|item\n", ",", "|"),
        ("\n\nitem\n\na;b\n", ",", ";"),
        ("item\na;b,c\n", ",", ","),
        ("item\na|b\n", ",", ","),
        ("Tea; green;x\n", ",", ","),
        ("", ",", ","),
    ],
)
def test_delimiters(tmp_path, text, default, expected):
    (tmp_path / "a.csv").write_text(text)
    assert sniff_delimiter(tmp_path / "a.csv", {"user", "item"}, default) == expected
