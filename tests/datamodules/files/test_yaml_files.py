import pytest

from malleable.datamodules.files.yaml_files import DEPTH_LIMIT, SIZE_LIMIT, parse_yaml, read_yaml

# Nine aliases on each of nine levels: some hundred bytes that stand for 9**9 values.
ALIASES = "\n".join(["a0: &a0 [x]", *(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 10))])
MERGES = "\n".join(["m0: &m0 {k: 1}", *(f"m{level}: &m{level} {{<<: [{', '.join([f'*m{level - 1}'] * 9)}]}}" for level in range(1, 10))])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALIASES, "x.yaml: YAML that cannot be read: more than 100000 values, including those repeated by aliases"),
        (MERGES, "x.yaml: YAML that cannot be read: more than 100000 keys in one mapping, including merged keys"),
        ("[" * (DEPTH_LIMIT + 1) + "]" * (DEPTH_LIMIT + 1), "x.yaml: YAML that cannot be read: lists and mappings are nested more than 64 deep"),
        ("[" * 5000 + "]" * 5000, "x.yaml: YAML that cannot be read: maximum recursion depth exceeded"),
        ("a: &a [*a]", "x.yaml: YAML that cannot be read: lists and mappings are nested more than 64 deep"),
    ],
    ids=["aliases", "merges", "deep", "very deep", "itself"],
)
def test_yaml_bombs_are_refused_quickly(text, message):
    with pytest.raises(ValueError, match=r"^x\.yaml") as caught:
        parse_yaml(text, "x.yaml")
    assert str(caught.value).startswith(message)


def test_large_files_are_refused(tmp_path):
    path = tmp_path / "large.yaml"
    path.write_text("# " + "x" * 1000 + "\n" + "a: 1 # comment\n" * (SIZE_LIMIT // 14))
    with pytest.raises(ValueError, match=r"large\.yaml is larger than 4 MiB; give a configuration file"):
        read_yaml(path)


def test_aliases_and_merges_of_common_size_are_read():
    assert parse_yaml("base: &b {x: 1}\nown: {<<: *b, y: 2}\nagain: *b\n", "x.yaml") == {"base": {"x": 1}, "own": {"x": 1, "y": 2}, "again": {"x": 1}}


def test_tags_that_would_run_code_are_refused():
    with pytest.raises(ValueError, match=r"x\.yaml, line 1, column 4: not YAML: could not determine a constructor"):
        parse_yaml("a: !!python/object/apply:os.system [ls]", "x.yaml")
