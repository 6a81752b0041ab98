"""Options of callbacks by class: ``--trainer.callbacks.SelfPlayLoop.rounds 3``."""

import pytest
import yaml

from malleable.callback_options import split_callback_options
from malleable.main import main

RECIPE = ("fit", "--config", "sprec/tiny.yaml")
LOOP = "--trainer.callbacks.SelfPlayLoop"


def callbacks(config):
    return {each["class_path"].rpartition(".")[2]: each.get("init_args") for each in config["trainer"]["callbacks"]}


def test_only_the_callback_of_the_class_is_changed(boring, resolved):
    before = resolved(*RECIPE)
    words = [f"{LOOP}.rounds", "3", f"{LOOP}.warmup.epochs=2", f"{LOOP}.negatives.decode", "greedy", "--trainer.callbacks.RunReport.dirpath", "x"]
    after = resolved(*RECIPE, *words)
    assert [each["class_path"] for each in after["trainer"]["callbacks"]] == [each["class_path"] for each in before["trainer"]["callbacks"]]
    old, new = callbacks(before), callbacks(after)
    assert (new["SelfPlayLoop"]["rounds"], new["SelfPlayLoop"]["warmup"]["epochs"], new["RunReport"]["dirpath"]) == (3, 2, "x")
    assert new["SelfPlayLoop"]["negatives"]["init_args"]["decode"] == "greedy"
    assert new["SelfPlayLoop"]["warmup"] == {**old["SelfPlayLoop"]["warmup"], "epochs": 2}
    assert new["Baselines"] == old["Baselines"]


def test_option_overrides_all_files(boring, resolved):
    more = {"trainer": {"callbacks+": [{"class_path": "ExposureReport"}]}}
    (boring / "more.yaml").write_text(yaml.safe_dump(more))
    words = ["fit", f"{LOOP}.rounds", "3", "--config", "sprec/tiny.yaml", "--trainer.callbacks.ExposureReport.k=4", "--config", "more.yaml"]
    found = callbacks(resolved(*words))
    assert (found["SelfPlayLoop"]["rounds"], found["ExposureReport"]["k"]) == (3, 4)


def test_options_of_callbacks_on_the_command_line(boring, resolved):
    words = ["--trainer.callbacks+=ExposureReport", "--trainer.callbacks+=RunReport", "--trainer.callbacks.ExposureReport.k", "2"]
    found = callbacks(resolved("fit", "--config", "boring.yaml", *words, "--trainer.callbacks.dirpath", "last"))
    assert (found["ExposureReport"]["k"], found["RunReport"]["dirpath"]) == (2, "last")


def test_another_class_within_a_callback_starts_from_its_own_defaults(boring, resolved):
    found = callbacks(resolved(*RECIPE, f"{LOOP}.negatives", "Uniform"))["SelfPlayLoop"]["negatives"]
    assert found["class_path"].endswith("Uniform")
    assert "decode" not in (found.get("init_args") or {})


def test_saved_configuration_contains_the_option(run, tmp_path):
    run("fit", "--trainer.callbacks+=RunReport", "--trainer.callbacks.RunReport.dirpath", "there", "--trainer.max_steps", "1")
    (path,) = tmp_path.rglob("config_fit.yaml")
    assert callbacks(yaml.safe_load(path.read_text()))["RunReport"]["dirpath"] == "there"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            [f"{LOOP}.round", "3"],
            "--trainer.callbacks.SelfPlayLoop.round: SelfPlayLoop has no option 'round' (did you mean rounds?); its options are rounds, ",
        ),
        ([f"{LOOP}.rounds", "x"], "--trainer.callbacks.SelfPlayLoop.rounds: expected int, got x"),
        (
            ["--trainer.callbacks.SelfPlay.rounds", "3"],
            "--trainer.callbacks.SelfPlay.rounds: the configuration has no callback SelfPlay (did you mean SelfPlayLoop?); the callbacks are "
            "SelfPlayLoop, Baselines, RunReport; add one: --trainer.callbacks+=SelfPlay --trainer.callbacks.rounds VALUE",
        ),
        (
            ["--trainer.callbacks.rounds", "3"],
            "--trainer.callbacks.rounds: RunReport has no option 'rounds'; its options are dirpath, headline. For another callback, write "
            "--trainer.callbacks.CLASS.rounds",
        ),
        (
            ["--trainer.callbacks+=RunReport", "--trainer.callbacks.RunReport.dirpath", "x"],
            "--trainer.callbacks.RunReport.dirpath: the configuration has 2 ",
        ),
    ],
)
def test_errors_contain_the_option(boring, capsys, words, expected):
    with pytest.raises(SystemExit) as ended:
        main([*RECIPE, *words, "--print_config"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {expected}")


def test_a_value_is_needed():
    with pytest.raises(ValueError, match=r"--trainer\.callbacks\.Baselines\.x needs a value: --trainer\.callbacks\.Baselines\.x VALUE"):
        split_callback_options(["fit", "--trainer.callbacks.Baselines.x", "--config", "y"])
    with pytest.raises(ValueError, match="needs a value"):
        split_callback_options(["fit", "--trainer.callbacks.Baselines.x"])


def test_order_of_other_options_is_kept():
    words = ["fit", "--trainer.callbacks.settings.method", "memit", "--trainer.callbacks.A.b=-1", "--trainer.callbacks+=A"]
    assert split_callback_options(words) == (["fit", "--trainer.callbacks.settings.method", "memit", "--trainer.callbacks+=A"], ["--callback=A.b=-1"])
