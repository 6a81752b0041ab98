"""Encoding and delimiter of tables without options."""

import pytest

from malleable.datamodules.files.sniffing import find_mojibake, sniff_delimiter, sniff_encoding


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


@pytest.mark.parametrize(("text", "message"), [("user,item;item\n", "',' or ';'"), ("item\na;b\tc\n", "';' or tab")])
def test_an_ambiguous_delimiter_is_an_error(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"a.csv: the delimiter of .* is ambiguous: {message}; set the option `delimiter` of the source"):
        sniff_delimiter(tmp_path / "a.csv", {"user", "item"})


@pytest.mark.parametrize(
    ("text", "default", "expected"),
    [("a;b\n", ",", ";"), ("a,b;c\n", ",", ","), ("a,b\n", "\t", ","), ("a b\n", "\t", "\t"), ("user\na;b\n", "\t", "\t")],
)
def test_delimiters_of_headers_with_unknown_names(tmp_path, text, default, expected):
    (tmp_path / "a.csv").write_text(text)
    assert sniff_delimiter(tmp_path / "a.csv", {"user"}, default=default, has_header=True) == expected


@pytest.mark.parametrize(
    ("text", "encoding"),
    [("1,Зелёный\n", "cp1251"), ("1,お茶のセット\n", "shift_jis"), ("1,绿茶礼盒\n", "gb18030"), ("1,녹차세트\n", "euc_kr"), ("1,τσάι\n", "cp1253")],
)
def test_other_scripts_are_not_read_as_cp1252(tmp_path, text, encoding):
    path = tmp_path / "a.csv"
    path.write_bytes(b"id,title\n" + text.encode(encoding))
    with pytest.raises(ValueError, match=r"a.csv, line 2.*: not text in UTF-8") as raised:
        sniff_encoding(path)
    if "ambiguous" in str(raised.value):
        assert f"{encoding} ('{text[2:4]}" in str(raised.value)
    assert sniff_encoding(path, encoding) == encoding


@pytest.mark.parametrize("text", ["Les Misérables", "à l'été", "Größe Ä Ö Ü", "«É…»", "½ – ¾"])
def test_western_text_is_read_as_cp1252(tmp_path, text, caplog):
    (tmp_path / "a.csv").write_bytes(f"{text}\n".encode("cp1252"))
    assert sniff_encoding(tmp_path / "a.csv") == "cp1252"
    assert "check the accents (e.g. '" in caplog.text


def test_files_in_which_only_some_lines_are_utf_8_are_ambiguous(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"id,title\n" + "1,Les Misérables\n".encode() + "2,Café\n".encode("cp1252"))
    with pytest.raises(
        ValueError, match=r"a.csv: its encoding is ambiguous: line 2 is text in UTF-8 \('Misérables'\), but line 3, byte 6 is not; save"
    ):
        sniff_encoding(path)
    assert sniff_encoding(path, "cp1252") == "cp1252"


def test_other_encodings_can_also_be_wrong(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x\n茶 Tee\n", encoding="utf-8")
    assert "'茶' in line 2 is read as" in find_mojibake(path, "gb18030")
    assert find_mojibake(path, "utf-8") == find_mojibake(path, "cp037") == ""
