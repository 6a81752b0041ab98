"""The page on a first own dataset: its configuration and its commands are true."""

import csv
import inspect
import re
from dataclasses import asdict

import pytest
import small_shop
import yaml
from shared import ROOT

import malleable
from malleable.callbacks.report.metric_notes import NOTES
from malleable.datamodules.recommendation.splits import Split
from malleable.datamodules.recommendation.titles import clean_title
from malleable.lightning_modules.language.item_decoding import Decoding

PAGE = (ROOT / "configs" / "YOUR_DATA.md").read_text(encoding="utf-8")
CONFIGURATION = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1]
QUIET = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"]


def test_values_that_are_commented_out_are_the_defaults():
    """A line `# name: value` below `split:` or in `decoding: {...}` is a default of the class."""
    commented = dict(re.findall(r"^ +# (\w+): ([^#\n]+?) *(?:#.*)?$", CONFIGURATION, re.MULTILINE))
    defaults = asdict(Split())
    assert {name for name in commented if name in defaults} >= {"min_item_events", "kind", "repeats", "history_length"}
    for name in commented.keys() & defaults.keys():
        assert yaml.safe_load(commented[name]) == defaults[name], name
    assert yaml.safe_load(commented["decoding"]).items() <= asdict(Decoding()).items()


def test_its_options_of_callbacks_exist():
    named = re.findall(r"--trainer\.callbacks\.([A-Z]\w*[a-z]\w*)\.(\w+)", PAGE)
    assert ("SelfPlayLoop", "rounds") in named
    for name, option in named:
        assert option in inspect.signature(getattr(malleable, name)).parameters


def test_titles_are_cleaned_as_it_says():
    assert clean_title("Fran\u00e7ois\u2019s &amp; e\u0301tag\u00e8re\u200b") == "Fran\u00e7ois's & \u00e9tag\u00e8re"
    assert clean_title("Kettle, The") == "The Kettle"
    assert clean_title("\uff34ea o\ufb03ce") == "\uff34ea o\ufb03ce"
    assert clean_title("\u201cMug\u201d  <br/> large") == '"Mug" large'


def test_its_metrics_are_known():
    named = re.findall(r"`(\w+)_10`", PAGE)
    assert named
    assert set(named) <= set(NOTES)


def test_the_readme_leads_there():
    assert "(configs/YOUR_DATA.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_configuration_trains_predicts_and_compares(tmp_path, monkeypatch, capsys):
    from malleable.main import main

    monkeypatch.chdir(tmp_path)
    small_shop.write(tmp_path)
    (tmp_path / "events.csv").rename("orders.csv")
    (tmp_path / "items.csv").rename("products.csv")
    short = CONFIGURATION.replace("epochs: 80", "epochs: 2").replace("pack_length: 128", "pack_length: 16")
    (tmp_path / "shop.yaml").write_text(short.replace("rows_per_round: 512", "rows_per_round: 8"))
    (tmp_path / "customers.txt").write_text("u3\n")
    main(["fit", "--config", "shop.yaml", *QUIET])
    main(["predict", "--config", "shop.yaml", *QUIET, "--ckpt_path", "last", "--data.predict_users", "customers.txt"])
    (path,) = tmp_path.rglob("predictions.csv")
    assert {row["user_id"] for row in csv.DictReader(path.open(newline=""))} == {"u3"}
    main(["test", "--config", "shop.yaml", *QUIET, "--model", "ItemKNN", "--trainer.callbacks", "[RunReport]"])
    capsys.readouterr()
    main(["compare", "shop", "shop/version_2"])
    text = capsys.readouterr().out
    assert "difference (95 %)" in text
    assert "shop: using runs/shop/version_0 (SPRec, fit), the latest fit" in text
