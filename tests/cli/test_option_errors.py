import pytest

from malleable.main import main
from malleable.option_errors import causes, explain, split_help_option

TINY = ["fit", "--config", "sprec/tiny.yaml"]


def error(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main([*TINY, *words, "--print_config"])
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--trainer.max_epochs", "x"], "--trainer.max_epochs: expected int, got x"),
        (["--trainer.max_epoch", "3"], "there is no option --trainer.max_epoch (did you mean --trainer.max_epochs or --trainer.min_epochs?)"),
        (["--model", "SPRecc"], "--model: there is no class SPRecc (did you mean SPRec?); give a class of malleable or an import path"),
        (["--model.loss", "Sigmod"], "--model.loss: there is no class Sigmod (did you mean Sigmoid?); give a class of malleable or an import path"),
        (["--model.decoding.num_beams", "x"], "--model.decoding.num_beams: expected int, got x"),
        (["--model.init_args.ks", "10"], "--model.ks: expected tuple, got 10; write it as --model.ks '[5, 10]'"),
        (["--model.language_model.scratch.hidden", "4"], "there is no option --model.language_model.scratch.hidden"),
        (["--data.split.knd", "x"], "--data.split.knd: Split has no option 'knd' (did you mean kind?); its options are kind, min_rating, "),
        (
            ["--data.source", "malleable.datamodules.sources.recommendation.movielens.Movielens"],
            "--data.source: malleable.datamodules.sources.recommendation.movielens has no Movielens (did you mean MovieLens?)",
        ),
        (
            ["--trainer.callbacks+=SelfPlayLoop", "--trainer.callbacks.round", "3"],
            "--trainer.callbacks.round: SelfPlayLoop has no option 'round' (did you mean rounds?); its options are rounds, rows_per_round, ",
        ),
    ],
)
def test_message_is_the_deepest_cause(capsys, words, expected):
    assert error(capsys, *words).startswith(f"error: {expected}")


def test_missing_model_has_a_remedy(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["fit"], ["test", "--seed_everything", "3"]):
        with pytest.raises(SystemExit):
            main(words)
        text = capsys.readouterr().err.splitlines()[-1]
        assert text.startswith(f"error: no model is given; write `malleable {words[0]} --config RECIPE` with a YAML file or a packaged")


def test_debugging_shows_the_whole_report(capsys, monkeypatch):
    monkeypatch.setenv("MALLEABLE_DEBUG", "1")
    with pytest.raises(SystemExit):
        main([*TINY, "--model.decoding.num_beams", "x"])
    assert "Problem with given class_path 'malleable.Decoding'" in capsys.readouterr().err


def test_report_without_structure_is_unchanged():
    assert explain("something is wrong") == "something is wrong"
    assert explain("") == ""


def test_causes_contain_option_and_class():
    report = "Parser key \"model\":\n  - Problem with given class_path 'a.B':\n      Parser key \"c\":\n        Expected a <class 'int'>\n"
    (cause,) = causes(report)
    assert (cause.key, cause.owner, cause.text, cause.depth) == ("model.c", "a.B", "Expected a <class 'int'>", 3)


@pytest.mark.parametrize("name", ["data.split", "data.source", "data.template", "model.decoding", "model.language_model.scratch", "model.loss"])
def test_options_of_a_nested_class_are_listed(capsys, name):
    with pytest.raises(SystemExit) as ended:
        main([*TINY, f"--{name}.help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: --{name}.OPTION VALUE")
    assert text.count(f"  --{name}.") >= 2


def test_help_of_an_unknown_option_is_an_error():
    with pytest.raises(ValueError, match=r"--model\.nothing\.help: the configuration has no class model.nothing"):
        main([*TINY, "--model.nothing.help"])


def test_help_of_a_given_class_is_handled_by_jsonargparse():
    words = ["fit", "--data.source.help", "MovieLens"]
    assert split_help_option(words) == (words, "")
    assert split_help_option(["fit", "--data.split.help", "--config", "x"]) == (["fit", "--config", "x"], "data.split")
