from pathlib import Path

import pytest

from malleable import recipes
from malleable.main import main
from malleable.recipes import FOLDER, find_recipe, recipe_name, recipe_names, summary


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A package with two recipes and a fragment, and an empty working directory."""
    for name in ("sprec/movielens", "sprec/tiny", "base/ddp"):
        path = tmp_path / "package" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# About {name}.\n# More.\nmodel: x\n")
    monkeypatch.setattr(recipes, "FOLDER", tmp_path / "package")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "package"


@pytest.mark.parametrize("name", ["sprec/tiny.yaml", "sprec/tiny", "base/ddp.yaml"])
def test_a_packaged_file_is_found_by_name(packaged, name):
    assert find_recipe(name) == packaged / f"{name.removesuffix('.yaml')}.yaml"


def test_the_working_directory_comes_first(packaged):
    Path("sprec").mkdir()
    Path("sprec/tiny.yaml").write_text("# Mine.\n")
    assert find_recipe("sprec/tiny.yaml").read_text() == "# Mine.\n"


@pytest.mark.parametrize("name", ["sprec/movielense.yaml", "sprec/movilens", "sperc/movielens.yaml"])
def test_an_unknown_name_lists_similar_ones(packaged, name):
    with pytest.raises(FileNotFoundError, match=r"no recipe .* did you mean .*sprec/movielens\.yaml.*`malleable recipes`"):
        find_recipe(name)


def test_unknown_name_without_similar_names(packaged):
    with pytest.raises(FileNotFoundError, match=r"or in the package; `malleable recipes` lists all"):
        find_recipe("zzz.yaml")


def test_fragments_are_no_recipes(packaged):
    assert recipe_names() == ["sprec/movielens.yaml", "sprec/tiny.yaml"]


def test_a_summary_is_the_first_comment(packaged):
    assert summary("sprec/tiny.yaml") == "About sprec/tiny."


def test_list_contains_names_and_summaries(capsys):
    main(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(recipe_names())
    for line, name in zip(lines, recipe_names(), strict=True):
        assert line.startswith(name)
        assert line.endswith(summary(name))


def test_run_names_of_recipes(packaged):
    Path("mine").mkdir()
    Path("mine/own.yaml").write_text("")
    assert recipe_name(packaged / "sprec" / "tiny.yaml") == "sprec/tiny"
    assert recipe_name(packaged / "base" / "ddp.yaml") is None
    assert recipe_name(Path("mine/own.yaml")) == "mine/own"
    assert recipe_name(packaged.parent / "elsewhere.yaml") == "elsewhere"


def test_the_package_has_recipes():
    assert (FOLDER / "base" / "fit.yaml").is_file()


def test_show_prints_a_recipe(packaged, capsys):
    main(["recipes", "show", "sprec/tiny"])
    assert capsys.readouterr().out == "# About sprec/tiny.\n# More.\nmodel: x\n"


@pytest.mark.parametrize(("target", "file"), [([], "tiny.yaml"), (["mine.yaml"], "mine.yaml"), (["."], "tiny.yaml")])
def test_a_recipe_is_copied(packaged, capsys, target, file):
    main(["recipes", "copy", "sprec/tiny.yaml", *target])
    assert Path(file).read_text() == "# About sprec/tiny.\n# More.\nmodel: x\n"
    assert f"malleable fit --config {file}" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="exists; give another name"):
        main(["recipes", "copy", "sprec/tiny.yaml", *target])


@pytest.mark.parametrize("words", [["sho", "sprec/tiny"], ["show"], ["copy", "a", "b", "c"]])
def test_other_arguments_are_refused(words):
    with pytest.raises(ValueError, match="`show NAME` or `copy NAME"):
        main(["recipes", *words])
