"""The public names: found where they are said to be, documented, tested, and usable from the command line."""

import inspect
import re
import subprocess
import sys
from importlib import import_module

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from shared import ROOT

import malleable

FOLDERS = ("malleable.callbacks", "malleable.datamodules", "malleable.lightning_modules")
NAMES = sorted(set(malleable.__all__) - {"__version__"})
CLASSES = [name for name in NAMES if inspect.isclass(getattr(malleable, name))]
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py") if path.name != "test_public_api.py")
WORDS = set(re.findall(r"\w+", TESTS))
PLUGS = [name for name in CLASSES if issubclass(getattr(malleable, name), (LightningModule, LightningDataModule, Callback))]


def test_there_are_public_names():
    assert {"BaseModule", "SFT", "DPO", "SPRec", "RecommendationDataModule", "SelfPlayLoop", "RunReport"} <= set(PLUGS)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_importable_from_the_package_and_from_its_folder(name):
    homes = [folder for folder in FOLDERS if name in import_module(folder).__all__]
    assert len(homes) == 1
    assert getattr(import_module(homes[0]), name) is getattr(malleable, name)
    assert getattr(malleable, name).__module__.startswith(f"{homes[0]}.")
    assert name in dir(malleable)
    assert name in dir(import_module(homes[0]))


@pytest.mark.parametrize("module", ["malleable", *FOLDERS])
def test_an_unknown_name_is_an_attribute_error(module):
    with pytest.raises(AttributeError, match=f"No {module} attribute Nothing"):
        import_module(module).Nothing  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, malleable; sys.exit(' '.join({'torch', 'lightning', 'transformers', 'pandas'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_documented(name):
    assert inspect.getdoc(getattr(malleable, name)), f"{name} needs a docstring"


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_is_tested(name):
    is_base = any(issubclass(getattr(malleable, other), getattr(malleable, name)) for other in CLASSES if other != name)
    assert name in WORDS or is_base, f"write a test of {name}"


@pytest.mark.parametrize("name", PLUGS)
def test_a_class_can_be_configured(name):
    plug = getattr(malleable, name)
    kinds = {parameter.kind for parameter in inspect.signature(plug).parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}, "name every argument of the constructor"
    ArgumentParser(exit_on_error=False).add_class_arguments(plug, "plug", fail_untyped=True)


BASES = ("Source", "GraphSource", "EditSource", "TextSource", "PreferenceLoss", "EmbeddingLoss", "Regulariser", "NegativeSampler")


@pytest.mark.parametrize("base", BASES)
def test_parts_go_by_their_short_names_on_a_command_line(base):
    kind = getattr(malleable, base)
    names = [name for name in CLASSES if issubclass(getattr(malleable, name), kind) and not inspect.isabstract(getattr(malleable, name))]
    assert len(names) > 1
    for name in names:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--part", type=kind)
        required = [each.name for each in inspect.signature(getattr(malleable, name)).parameters.values() if each.default is each.empty]
        part = parser.parse_args([f"--part={name}", *(f"--part.{option}=file" for option in required)]).part
        assert part.class_path == f"malleable.{name}"


def test_a_name_that_two_kinds_of_parts_have_is_resolved_by_the_kind():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--negatives", type=malleable.NegativeSampler)
    assert parser.parse_args(["--negatives=Popularity"]).negatives.class_path == "malleable.datamodules.negative_samplers.Popularity"
    assert malleable.Popularity.__module__ == "malleable.lightning_modules.recommendation.baselines"
