"""Damages files: bytes, texts, and the values within JSON, YAML, safetensors, Parquet and checkpoints."""

import copy
import gzip
import json
import random
import re
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

VALUES = [
    None, True, -1, 0, 1e308, float("nan"), float("inf"), 10**400, 2**63, "", " ", "x", "\ud800", "\0", "../../x", "<b>", [], {}, [[]], ["x"], [None],
    {"x": 1}, {"class_path": "os.system"}, "=1+1", "1" * 70, [1, "x", None],
]  # fmt: skip
MARKS = [",", "\t", '"', "'", "\n", "\r", "\r\n", "::", "|", "[", "{", "]", "}", ":", "\\", "\0", "\ufeff", "\u2028", "#", "&a ", "*a", "!!python/x "]
NUMBERS = ["nan", "inf", "-1", "1e999", "9" * 30, "9" * 5000, "0x10", "1_0", "", "-0", "1.5", "\u0661"]
ENCODINGS = ["utf-16", "utf-8-sig", "utf-32", "utf-16-le", "latin-1", "cp037"]


def damaged(content: bytes, name: str, draw: random.Random) -> bytes:
    """Return a file's content with a random change, small or large."""
    if name.endswith(".gz") and draw.random() < 0.6:
        return gzip.compress(damaged(gzip.decompress(content), name.removesuffix(".gz"), draw), 1)
    ways = [flip, cut, repeat, remove, swap, insert, overwrite, replace]
    if not name.endswith((".parquet", ".safetensors", ".ckpt", ".npy", ".arrow", ".gguf", ".gz", ".tgz")):
        ways += [encode, mark, mark, number, number, nest, lengthen]
    inside = next((way for ends, way in INSIDE.items() if name.endswith(ends)), None)
    if inside is not None and draw.random() < 0.5:
        try:
            return inside(content, draw)
        except (ValueError, TypeError, KeyError, IndexError, OverflowError, pa.ArrowException):
            pass  # nothing of that kind to change
    return draw.choice(ways)(content, draw)


def _span(content, draw):
    start = draw.randrange(len(content) + 1)
    return start, min(len(content), start + draw.choice([1, 2, 8, 64, 1024]))


def flip(content, draw):
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 4, 16])):
        if data:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def cut(content, draw):
    return content[: draw.randrange(len(content) + 1)]


def repeat(content, draw):
    start, end = _span(content, draw)
    return content[:end] + content[start:end] * draw.choice([1, 3, 100]) + content[end:]


def remove(content, draw):
    start, end = _span(content, draw)
    return content[:start] + content[end:]


def swap(content, draw):
    (a, b), (c, d) = sorted([_span(content, draw), _span(content, draw)])
    return content if c < b else content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def insert(content, draw):
    start, _ = _span(content, draw)
    return content[:start] + draw.choice([b"\0", b"\0" * 64, b"\xff", b"\xff\xfe", draw.randbytes(9)]) + content[start:]


def overwrite(content, draw):
    start, end = _span(content, draw)
    return content[:start] + draw.choice([b"\xff", b"\0", b"\x7f"]) * (end - start) + content[end:]


def replace(content, draw):
    return draw.choice(
        [b"", b"\n\n", b" ", b"{}", b"[]", b"null", b"1", b'"x"', b"\x1f\x8b", b"PK\x03\x04", b"GGUF", b"\x80\x04.", draw.randbytes(500)]
    )


def encode(content, draw):
    return content.decode("utf-8", "replace").replace("e", "é", 1).encode(draw.choice(ENCODINGS), "replace")


def mark(content, draw):
    text = content.decode("utf-8", "replace")
    for _ in range(draw.choice([1, 1, 2, 5])):
        place = draw.randrange(len(text) + 1)
        text = text[:place] + draw.choice(MARKS) * draw.choice([1, 1, 2, 50]) + text[place:]
    return text.encode()


def number(content, draw):
    text = content.decode("utf-8", "replace")
    found = list(re.finditer(r"\d+(?:\.\d+)?", text))
    if not found:
        return mark(content, draw)
    match = draw.choice(found)
    return (text[: match.start()] + draw.choice(NUMBERS) + text[match.end() :]).encode()


def nest(content, draw):
    start, _ = _span(content, draw)
    depth = draw.choice([70, 2000, 100_000])
    opening, closing = draw.choice([(b"[", b"]"), (b'{"a":', b"}"), (b"(", b")")])
    return content[:start] + opening * depth + closing * draw.choice([0, depth]) + content[start:]


def lengthen(content, draw):
    start, _ = _span(content, draw)
    return content[:start] + draw.choice([b"a", b",", b"\n", b'"', b" "]) * draw.choice([10_000, 1_000_000]) + content[start:]


def value(content, draw):
    """Return plain data with a random node replaced, removed or doubled."""
    content = copy.deepcopy(content)
    nodes = list(_nodes(content))
    if not nodes:
        return draw.choice(VALUES)
    parent, key = draw.choice(nodes)
    way = draw.randrange(6)
    if way == 0:
        del parent[key]
    elif way == 1 and isinstance(parent, dict):
        parent[draw.choice(["x", "", key * 2 if isinstance(key, str) else key])] = parent.pop(key)
    elif way == 2 and isinstance(parent, list):
        parent.append(parent[key])
    else:
        parent[key] = draw.choice(VALUES)
    return content


def _nodes(content):
    for key, part in content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ():
        yield content, key
        yield from _nodes(part)


def in_json(content, draw):
    return json.dumps(value(json.loads(content), draw)).encode()


def in_json_lines(content, draw):
    lines = content.split(b"\n")
    place = draw.randrange(len(lines))
    lines[place] = in_json(lines[place], draw)
    return b"\n".join(lines)


def in_yaml(content, draw):
    return yaml.safe_dump(value(yaml.safe_load(content), draw)).encode()


def in_safetensors(content, draw):
    size = struct.unpack("<Q", content[:8])[0]
    header = json.dumps(value(json.loads(content[8 : 8 + size]), draw)).encode()
    return struct.pack("<Q", draw.choice([len(header)] * 5 + [2**40, 0])) + header + content[8 + size :]


def in_parquet(content, draw):
    table = pq.read_table(pa.BufferReader(content))
    place = draw.randrange(table.num_columns)
    rows = table.num_rows
    columns = [
        pa.nulls(rows), pa.array([True] * rows), pa.array([[1]] * rows), pa.array([{"x": 1}] * rows), pa.array([b"\xff"] * rows),
        pa.array([1.5] * rows),
        pa.array([float("nan")] * rows), pa.array([float("inf")] * rows), pa.array([2.0**60] * rows), pa.array([-1] * rows), pa.array([2**62] * rows),
        pa.array([""] * rows), pa.array(["x"] * rows), pa.array([None, *["x"] * (rows - 1)]), pa.array([10**15] * rows, pa.timestamp("s")),
        pa.array(["x"] * rows).dictionary_encode(), pa.array([1] * rows, pa.int8()), pa.array([1] * rows, pa.duration("s")),
        pa.array([1] * rows, pa.date32()), pa.array([1] * rows).cast(pa.decimal128(20, 0)),
    ]  # fmt: skip
    way = draw.randrange(8)
    if way == 0:
        table = table.remove_column(place)
    elif way == 1:
        table = table.append_column(table.column_names[place], table.column(place))
    elif way == 2:
        table = table.slice(0, 0)
    else:
        table = table.set_column(place, table.column_names[place], draw.choice(columns))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def in_checkpoint(content, draw):
    import io

    changed = value(torch.load(io.BytesIO(content), weights_only=True), draw)
    if draw.random() < 0.3 and isinstance(changed, dict) and changed.get("state_dict"):
        name = draw.choice(list(changed["state_dict"]))
        changed["state_dict"][name] = draw.choice(
            [torch.zeros(0), torch.zeros(3, 5), torch.tensor(float("nan")), torch.zeros(2).to_sparse(), "x", None]
        )
    file = io.BytesIO()
    torch.save(changed, file)
    return file.getvalue()


def in_array(content, draw):
    import io

    file = io.BytesIO()
    np.save(file, np.zeros(draw.choice([0, 1, 7]), draw.choice(["i4", "f8", "S3"])))
    return file.getvalue()


INSIDE = {
    ".jsonl": in_json_lines,
    ".json": in_json,
    ".yaml": in_yaml,
    ".safetensors": in_safetensors,
    ".parquet": in_parquet,
    ".ckpt": in_checkpoint,
    ".npy": in_array,
}
