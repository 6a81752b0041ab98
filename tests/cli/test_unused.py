"""Options without effect are named: refused on the command line, warned of in files."""

import pytest
import yaml
from jsonargparse import Namespace

from malleable.layers import _log_dropped, drop_replaced_arguments
from malleable.unused import RULES, Values, check_unused

SAMPLER = {"class_path": "SelfPlay", "init_args": {"decode": "greedy", "grounding": "trie"}}
LOOP = {"class_path": "malleable.SelfPlayLoop", "init_args": {"negatives": SAMPLER, "warmup": {"view": "answer"}}}
CONFIG = {
    "model": {
        "class_path": "SPRec",
        "init_args": {
            "ks": [1, 10],
            "decoding": {"grounding": "trie", "num_beams": 5},
            "language_model": {"name": "x"},
            "optimizer": {"class_path": "SGD"},
            "lr_scheduler": {"class_path": "X"},
        },
    },
    "data": {"init_args": {"tokenizer": "none", "train_view": "answer", "split": {"kind": "leave_last_out"}}},
    "trainer": {"callbacks": [LOOP]},
    "checkpoint": {"monitor": None},
}
EMBEDDING = CONFIG | {"model": {"init_args": {"decoding": {"grounding": "embedding"}}}}


def short(option):
    return option.replace("SelfPlayLoop.", "")


@pytest.mark.parametrize("number", range(len(RULES)), ids=[f"{rule.option}-{number}" for number, rule in enumerate(RULES)])
def test_every_rule_refuses_on_the_command_line_and_warns_in_files(number, tmp_path, monkeypatch, caplog):
    rule = RULES[number]
    config = next(config for config in (CONFIG, EMBEDDING) if rule.unused(Values(config)))
    with pytest.raises(ValueError, match=rf"--{short(rule.option)} has no effect: .*; omit it"):
        check_unused(["fit", f"--{short(rule.option)}", "1"], config)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(nested(rule.option)))
    check_unused(["fit", "--config", "own.yaml"], config)
    assert f"own.yaml: {rule.option} has no effect: " in caplog.text
    caplog.clear()
    check_unused(["fit", "--config", "own.yaml"], config, files=False)
    (tmp_path / "saved.yaml").write_text(yaml.safe_dump(nested(rule.option) | {"ckpt_path": None}))
    check_unused(["fit", "--config", "saved.yaml"], config)
    assert not caplog.text


def nested(option):
    """A configuration file with one option."""
    tree = 1
    parts = option.split(".")
    if parts[1] == "callbacks":
        for part in reversed(parts[3:]):
            tree = {part: tree}
        return {"trainer": {"callbacks+": [{"class_path": parts[2], "init_args": tree}]}}
    for part in reversed(parts[1:]):
        tree = {part: tree}
    return {parts[0]: {"class_path": "X", "init_args": tree} if parts[0] in ("model", "data") else tree}


def test_options_with_effect_are_accepted(caplog):
    sampler = {"class_path": "SelfPlay", "init_args": {"decode": "sample"}}
    used = {
        "model": {"init_args": {"ks": [1, 5], "decoding": {"grounding": "trie", "num_beams": 5}, "language_model": {"name": None}}},
        "data": {"init_args": {"tokenizer": None, "train_view": "answer", "split": {"kind": "global_time"}}},
        "trainer": {
            "callbacks": [
                {
                    "class_path": "SelfPlayLoop",
                    "init_args": {"warmup": {"view": "packed"}, "negatives": sampler},
                }
            ]
        },
        "checkpoint": {"monitor": "val_loss"},
    }
    names = {rule.option for rule in RULES if not rule.unused(Values(used))}
    assert {
        "data.pack_length",
        "data.vocab_size",
        "model.decoding.num_beams",
        "checkpoint.mode",
        "trainer.callbacks.SelfPlayLoop.negatives.top_p",
    } <= names
    check_unused(["fit", "--data.pack_length=64", "--model.decoding.num_beams", "5", "--trainer.callbacks.negatives.top_p", "0.9"], used)
    check_unused(["fit", "--data.pack_length=64"], {"data": {"init_args": {}}})
    assert not caplog.text


def test_dropped_settings_of_a_replaced_class_are_logged(caplog):
    caplog.set_level("INFO")
    _log_dropped.cache_clear()
    config = Namespace(model=Namespace(class_path="malleable.NFE", init_args=Namespace(dimension=3, gamma=1.0)))
    drop_replaced_arguments(config, {"model": "ComplEx"})
    assert "model: ComplEx replaces NFE, whose settings are dropped: dimension, gamma" in caplog.text
