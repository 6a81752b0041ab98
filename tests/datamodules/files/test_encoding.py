"""Encodings of text files: errors name file, line, byte and what to set."""

import gzip

import pytest

from malleable.datamodules.files.encoding import EncodingError, check_encoding
from malleable.datamodules.files.text_files import numbered_lines


@pytest.mark.parametrize(
    ("content", "encoding", "place", "advice"),
    [
        ("a\nThé\n".encode("cp1252"), None, "line 2, byte 3: not text in UTF-8 (invalid continuation byte 0xe9)", "`encoding: cp1252` of the source"),
        ("a\nThé\n".encode("cp1252"), "utf8", "line 2, byte 3: not text in UTF-8", "`encoding: cp1252` of the source"),
        ("é".encode("cp1252"), None, "line 1, byte 1: not text in UTF-8 (unexpected end of data 0xe9)", "`encoding: cp1252`"),
        (b"a\n\xe9\x81\x00\n", None, "line 2, byte 1: not text in UTF-8", "save it as UTF-8, or set the option `encoding`"),
        (b"\xef\xbb\xbfa\n\xe9\n", None, "line 2, byte 1: not text in UTF-8", "its byte-order mark is of this encoding"),
        (b"a\nb \x81\n", "cp1252", "line 2, byte 3: not text in CP1252", "save it as UTF-8, or set the option `encoding`"),
        ("a\nThé\n".encode("latin-1"), "ascii", "line 2, byte 3: not text in ASCII", "set the option `encoding`"),
        ("\ufeffa\nb\n".encode("utf-16-le") + b"x", None, "line 3: not text in UTF-16 (", "its byte-order mark"),
        ("あ\n".encode("shift_jis") + b"\x82", "shift_jis", "line 2", "set the option `encoding`"),
        ("a\nx 🎁 Í\n".encode(), "cp1252", "line 2, byte", "it is text in UTF-8: omit the option `encoding`"),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_decoding_error_contains_line_and_byte(tmp_path, content, encoding, place, advice, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(EncodingError) as raised:
        list(numbered_lines(path, encoding))
    assert str(raised.value).startswith(f"{path}, {place}")
    assert advice in str(raised.value)


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("cp125", r"^encoding: 'cp125' is unknown \(did you mean cp1252 or cp125\d or cp125\d\?\); set the option `encoding` of the source "),
        (
            "klingon",
            r"^encoding: 'klingon' is unknown; set the option `encoding` of the source \(--data\.source\.encoding\) to a name such as utf-8, ",
        ),
        ("base64", "is unknown"),
        ("utf_88", r"did you mean utf-8"),
    ],
)
def test_unknown_encoding_error_has_similar_names(encoding, message):
    with pytest.raises(ValueError, match=message):
        check_encoding(encoding)


@pytest.mark.parametrize("encoding", [None, "utf-8", "UTF8", "cp1252", "Shift_JIS", "windows-1252"])
def test_known_encodings(encoding):
    check_encoding(encoding)
