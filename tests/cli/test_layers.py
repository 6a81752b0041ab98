import pytest
import yaml
from jsonargparse import Namespace

from malleable.layers import drop_replaced_arguments, mark_replacements

ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.5, "weight_decay": 0.7}}


def write(path, **content):
    path.write_text(yaml.safe_dump(content))
    return path.name


@pytest.fixture
def adamw(boring):
    """A recipe with an optimizer whose numbers differ from every default."""
    recipe = yaml.safe_load((boring / "boring.yaml").read_text())
    recipe["model"]["init_args"]["optimizer"] = ADAMW
    write(boring / "adamw.yaml", **recipe)
    return boring


def optimizer(config):
    return config["model"]["init_args"]["optimizer"]


def test_recipe_is_read_completely(adamw, resolved):
    assert optimizer(resolved("fit", "--config", "adamw.yaml"))["init_args"]["weight_decay"] == 0.7


@pytest.mark.parametrize("spelling", ["torch.optim.SGD", "SGD", {"class_path": "torch.optim.SGD"}])
def test_another_class_in_a_second_file_starts_from_its_own_defaults(adamw, resolved, spelling):
    write(adamw / "sgd.yaml", model={"init_args": {"optimizer": spelling}})
    found = optimizer(resolved("fit", "--config", "adamw.yaml", "--config", "sgd.yaml"))
    assert found["class_path"] == "torch.optim.SGD"
    assert (found["init_args"]["lr"], found["init_args"]["weight_decay"]) == (0.001, 0.0)  # those of torch.optim.SGD


@pytest.mark.parametrize(
    "words",
    [
        ("--model.optimizer", "SGD"),
        ("--model.optimizer=torch.optim.SGD",),
        ("--model.optimizer.class_path", "torch.optim.SGD"),
        ("--model.init_args.optimizer", "SGD"),
        ("--model.optimizer", '{"class_path": "torch.optim.SGD"}'),
        ("--config", '{"model": {"init_args": {"optimizer": "torch.optim.SGD"}}}'),
    ],
)
def test_another_class_on_the_command_line_starts_from_its_own_defaults(adamw, resolved, words):
    found = optimizer(resolved("fit", "--config", "adamw.yaml", *words))
    assert found["class_path"] == "torch.optim.SGD"
    assert (found["init_args"]["lr"], found["init_args"]["weight_decay"]) == (0.001, 0.0)


def test_arguments_after_a_class_change_are_kept(adamw, resolved):
    found = optimizer(resolved("fit", "--config", "adamw.yaml", "--model.optimizer", "SGD", "--model.optimizer.momentum", 0.3))
    assert (found["init_args"]["momentum"], found["init_args"]["weight_decay"]) == (0.3, 0.0)


@pytest.mark.parametrize("words", [("--model.optimizer", "AdamW"), ("--model.optimizer.class_path", "torch.optim.AdamW"), ()])
def test_the_same_class_keeps_its_arguments(adamw, resolved, words):
    found = optimizer(resolved("fit", "--config", "adamw.yaml", *words, "--model.optimizer.eps", 0.1))
    assert (found["init_args"]["lr"], found["init_args"]["weight_decay"], found["init_args"]["eps"]) == (0.5, 0.7, 0.1)


def test_the_same_class_in_a_second_file_keeps_its_arguments(adamw, resolved):
    write(
        adamw / "eps.yaml",
        model={"class_path": "boring.BoringModule", "init_args": {"optimizer": {"class_path": "AdamW", "init_args": {"eps": 0.1}}}},
    )
    config = resolved("fit", "--config", "adamw.yaml", "--config", "eps.yaml")
    assert config["model"]["init_args"]["goal"] == 2.0
    assert (optimizer(config)["init_args"]["lr"], optimizer(config)["init_args"]["eps"]) == (0.5, 0.1)


def test_another_model_does_not_inherit_arguments(boring, resolved):
    assert resolved("fit", "--config", "boring.yaml", "--model", "boring.TrainingFree")["model"]["init_args"]["goal"] == 1.0


def test_a_fragment_file_with_another_class_does_not_inherit_arguments(adamw, resolved):
    write(adamw / "sgd.yaml", class_path="torch.optim.SGD")
    found = optimizer(resolved("fit", "--config", "adamw.yaml", "--model.optimizer", "sgd.yaml"))
    assert (found["init_args"]["lr"], found["init_args"]["weight_decay"]) == (0.001, 0.0)


def test_callbacks_are_appended(boring, resolved):
    write(boring / "a.yaml", trainer={"callbacks": [{"class_path": "lightning.pytorch.callbacks.DeviceStatsMonitor"}]})
    write(boring / "b.yaml", trainer={"callbacks+": [{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}]})
    callbacks = resolved("fit", "--config", "boring.yaml", "--config", "a.yaml", "--config", "b.yaml")["trainer"]["callbacks"]
    assert [callback["class_path"].rpartition(".")[2] for callback in callbacks] == ["DeviceStatsMonitor", "LearningRateMonitor"]


def test_replace_is_inserted_before_options():
    words = ["fit", "--model.optimizer", "SGD", "--model.goal=2", "--allow_untrained", "--config", "a.yaml"]
    assert mark_replacements(words) == [
        "fit",
        *("--replace=model.optimizer=SGD", "--model.optimizer", "SGD"),
        *("--replace=model.goal=2", "--model.goal=2"),
        "--allow_untrained",
        *("--replace=config=a.yaml", "--config", "a.yaml"),
    ]


def test_value_without_class_drops_nothing():
    config = Namespace(model=Namespace(class_path="a.B", init_args=Namespace(x=1)))
    drop_replaced_arguments(config, {"model": {"x": 2, "y": "[unclosed"}, "other": 3})
    assert config.model.init_args.x == 1


@pytest.mark.parametrize("name", ["no.such.module.B", "a..b", "malleable.layers.nothing"])
def test_a_class_that_cannot_be_imported_counts_as_another(name):
    config = Namespace(model=Namespace(class_path="torch.optim.SGD", init_args=Namespace(x=1)))
    drop_replaced_arguments(config, {"model": name})
    assert "init_args" not in config.model


def test_invalid_yaml_is_left_to_the_parser(boring, capsys):
    from malleable.main import main

    with pytest.raises(SystemExit):
        main(["fit", "--config", "boring.yaml", "--model.goal", "[1"])
    assert "goal" in capsys.readouterr().err
