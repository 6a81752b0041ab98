"""Files of strangers run no code: checkpoints, and configurations beside them."""

import pickle

import pytest
import torch
import yaml
from boring import BoringModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from malleable.lightning_modules.stored_weights import foreign_classes

EVIL = "open('ran', 'w')\n\n\nclass X:\n    pass\n"


@pytest.fixture
def checkpoint(run, boring):
    """A checkpoint of a run, and a module that leaves a file where it is imported."""
    run("fit")
    (boring / "evil.py").write_text(EVIL)
    (found,) = (boring / "runs").rglob("last*.ckpt")
    return found


def with_arguments(checkpoint, **arguments):
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"].update(arguments)
    torch.save(content, checkpoint)


@pytest.mark.parametrize("value", [{"class_path": "evil.X"}, {"class_path": "evil.X", "init_args": {}}, "evil.X", [{"a": {"class_path": "evil.X"}}]])
def test_classes_named_by_a_checkpoint_are_not_imported(run, boring, checkpoint, value):
    with_arguments(checkpoint, goal=value, _class_path="boring.BoringModule")
    with pytest.raises(MisconfigurationException, match=r"contains the class evil.X, which is not part of malleable; importing it could run code"):
        run("test", "--ckpt_path", checkpoint)
    assert not (boring / "ran").exists()


def test_classes_named_by_the_configuration_of_a_run_are_not_imported(run, boring, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"] = {}
    torch.save(content, checkpoint)
    saved = checkpoint.parents[1] / "config_fit.yaml"
    saved.write_text(yaml.safe_dump({"model": {"class_path": "boring.BoringModule", "init_args": {"goal": {"class_path": "evil.X"}}}}))
    with pytest.raises(MisconfigurationException, match=r"config_fit.yaml of its run, contains the class evil.X"):
        run("test", "--ckpt_path", checkpoint)
    assert not (boring / "ran").exists()


def test_code_in_a_checkpoint_is_refused(run, boring, checkpoint):
    class Code:
        def __reduce__(self):
            return (open, (str(boring / "ran"), "w"))

    checkpoint.write_bytes(pickle.dumps({"state_dict": {}, "x": Code()}))
    for command in ("fit", "test"):
        with pytest.raises(ValueError, match=r"contains more than tensors and plain data|cannot be read as a checkpoint"):
            run(command, "--ckpt_path", checkpoint)
    with pytest.raises(MisconfigurationException, match=r"--weights_only false is not allowed"):
        run("test", "--ckpt_path", checkpoint, "--weights_only", "false")
    assert not (boring / "ran").exists()


@pytest.mark.parametrize(
    "content", [b"", b"text", torch.zeros(3), [1], {"state_dict": [1]}, {"hyper_parameters": [1], "state_dict": {}}, {"state_dict": {1: 2}}]
)
def test_invalid_checkpoint_error_contains_the_file(run, boring, content):
    if isinstance(content, bytes):
        (boring / "a.ckpt").write_bytes(content)
    else:
        torch.save(content, boring / "a.ckpt")
    with pytest.raises(ValueError, match=r"a.ckpt (is not a checkpoint|cannot be read as a checkpoint)"):
        run("test", "--ckpt_path", "a.ckpt")


def test_error_for_weights_of_another_size(run, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    name = next(iter(content["state_dict"]))
    content["state_dict"] = {name: torch.zeros(7, 3), "other": torch.zeros(1)}
    torch.save(content, checkpoint)
    with pytest.raises(
        MisconfigurationException,
        match=rf"does not fit BoringModule: tensors of another shape: 1, such as {name} \(7, 3\) .*unexpected tensors: 1, such as other",
    ):
        run("test", "--ckpt_path", checkpoint)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"loss": {"class_path": "malleable.x.Y"}, "layer": {"class_path": "torch.nn.ReLU"}}, []),
        ({"name": "gpt2.gguf", "path": "a/b.yaml", "text": "Heat. Alien", "number": 1.5, "short": {"class_path": "SGD"}}, []),
        ({"loss": {"class_path": "evil.X"}}, ["evil.X"]),
        ({"loss": ["json.decoder", {"a": "os.system"}]}, ["json.decoder", "os.system"]),
    ],
)
def test_foreign_classes(arguments, found):
    assert foreign_classes(arguments) == found
    assert foreign_classes(arguments, found) == []


def test_load_from_checkpoint_refuses_foreign_classes(run, boring, checkpoint):
    assert isinstance(BoringModule.load_from_checkpoint(checkpoint), BoringModule)
    with pytest.raises(ValueError, match="weights_only=False would run code"):
        BoringModule.load_from_checkpoint(checkpoint, weights_only=False)
    with_arguments(checkpoint, goal={"class_path": "evil.X"})
    with pytest.raises(ValueError, match=r"names evil.X, which is not part of malleable"):
        BoringModule.load_from_checkpoint(checkpoint)
    assert not (boring / "ran").exists()
