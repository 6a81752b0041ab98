"""Options that have no effect in combination with others: refused on the command line, warned of in files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from malleable.early import config_names
from malleable.layers import given_options
from malleable.recipes import find_recipe

log = logging.getLogger(__name__)


class Rule(NamedTuple):
    """When an option has no effect.

    Attributes:
        option: Dotted name, without the parts ``init_args``. Of callbacks: ``trainer.callbacks.SelfPlayLoop.negatives.temperature``.
        unused: Whether a configuration makes it so; it gets values by dotted name.
        reason: What takes its place, for the message.
    """

    option: str
    unused: Callable[[Values], bool]
    reason: str


class Values:
    """Values of a configuration by dotted name, without the parts ``init_args``; ``None`` where there is nothing.

    Args:
        config: The configuration of a command, as plain data.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        callbacks = (config.get("trainer") or {}).get("callbacks") or []
        listed = [callback for callback in (callbacks if isinstance(callbacks, list) else [callbacks]) if isinstance(callback, Mapping)]
        self.callbacks = {_class_name(callback): callback for callback in listed}

    def __call__(self, name: str) -> Any:
        """Return a value."""
        place: Any = self.config
        parts = name.split(".")
        if parts[:2] == ["trainer", "callbacks"]:
            place, parts = self.callbacks.get(parts[2]), parts[3:]
        for part in parts:
            if not isinstance(place, Mapping):
                return None
            inner = place.get("init_args")
            place = inner.get(part) if isinstance(inner, Mapping) and part in inner else place.get(part)
        return place

    def packs(self) -> bool:
        """Whether any part of training sees packed histories."""
        phases = (self(f"trainer.callbacks.SelfPlayLoop.{phase}.view") for phase in ("warmup", "sft", "dpo"))
        return self("data.train_view") in ("packed", None) or "packed" in phases


LOOP = "trainer.callbacks.SelfPlayLoop"


def _no_text(value: Values) -> bool:
    return bool(value("data.tokenizer") == "none")


def _no_sampling(value: Values) -> bool:
    return value(f"{LOOP}.negatives.decode") in ("greedy", "beam_k_random")


def _loops(value: Values) -> bool:
    return "SelfPlayLoop" in value.callbacks


def _has(name: str) -> Callable[[Values], bool]:
    return lambda value: value(name) is not None


def _is(name: str, expected: str) -> Callable[[Values], bool]:
    return lambda value: value(name) == expected


def _narrow_beam(value: Values) -> bool:
    beams, ks = value("model.decoding.num_beams"), value("model.ks")
    return beams is not None and bool(ks) and bool(beams < max(ks))


RULES = (
    Rule("data.vocab_size", _has("data.tokenizer"), "the tokenizer is given by data.tokenizer"),
    Rule("data.pack_length", lambda value: not value.packs(), "nothing is packed: data.train_view is answer, and no phase has view: packed"),
    Rule("data.max_prompt_length", _no_text, "data.tokenizer is none, so there are no prompts"),
    Rule("data.template", _no_text, "data.tokenizer is none, so there are no prompts"),
    Rule("data.split.fractions", _is("data.split.kind", "leave_last_out"), "data.split.kind is leave_last_out"),
    Rule("model.decoding.num_beams", _is("model.decoding.grounding", "embedding"), "model.decoding.grounding is embedding"),
    Rule("model.decoding.num_beams", _narrow_beam, "a beam is at least as wide as the largest of model.ks, whose lists it fills"),
    Rule("model.decoding.renormalize", _is("model.decoding.grounding", "embedding"), "model.decoding.grounding is embedding"),
    Rule("model.decoding.max_new_tokens", _is("model.decoding.grounding", "trie"), "model.decoding.grounding is trie"),
    Rule("model.language_model.scratch", _has("model.language_model.name"), "the model is given by model.language_model.name"),
    Rule("model.tuning.lr", _has("model.optimizer"), "the optimizer is given by model.optimizer"),
    Rule("model.tuning.weight_decay", _has("model.optimizer"), "the optimizer is given by model.optimizer"),
    Rule("model.tuning.warmup_steps", _has("model.lr_scheduler"), "the schedule is given by model.lr_scheduler"),
    Rule("model.tuning.decay", _has("model.lr_scheduler"), "the schedule is given by model.lr_scheduler"),
    Rule("model.tuning.lr", _loops, "SelfPlayLoop sets it: lr of its phases"),
    Rule("model.tuning.warmup_steps", _loops, "SelfPlayLoop sets it: warmup_steps of its phases"),
    Rule("model.tuning.decay", _loops, "SelfPlayLoop sets it: decay of its phases"),
    Rule(
        "trainer.max_epochs",
        lambda value: _loops(value) and value("trainer.max_epochs") != -1,
        "SelfPlayLoop sets it: rounds, and epochs of its phases",
    ),
    Rule(f"{LOOP}.negatives.temperature", _no_sampling, "negatives.decode is not sample"),
    Rule(f"{LOOP}.negatives.top_p", _no_sampling, "negatives.decode is not sample"),
    Rule(f"{LOOP}.negatives.max_new_tokens", _is(f"{LOOP}.negatives.grounding", "trie"), "negatives.grounding is trie"),
    Rule("checkpoint.mode", lambda value: value("checkpoint.monitor") is None, "nothing is monitored: give checkpoint.monitor, too"),
)


def check_unused(words: Sequence[str], config: Mapping[str, Any], files: bool = True) -> None:
    """Refuse options of a command line that have no effect, and warn of those in its files.

    Args:
        words: The command and its options.
        config: The configuration that they come to, as plain data.
        files: Warn of options in files.

    Raises:
        ValueError: If an option of the command line has no effect; the message says why.
    """
    options, values = given_options(words), Values(config)
    in_files = list(_file_options(words)) if files else []
    for rule in RULES:
        # On a command line an option of a callback without its class is one of the callback named last.
        given = next((name for name in (rule.option, rule.option.replace(f"{LOOP}.", "trainer.callbacks.")) if _sets(name, options)), None)
        file = next((file for file, found in in_files if _sets(rule.option, found)), None)
        if not (given or file) or not rule.unused(values):
            continue
        if given:
            raise ValueError(f"--{given} has no effect: {rule.reason}; leave it out")
        log.warning("%s: %s has no effect: %s", file, rule.option, rule.reason)


def _sets(name: str, options: set[str]) -> bool:
    """Whether options set a value or a part of it; what it is part of may have other reasons to be set."""
    return any(option == name or option.startswith(f"{name}.") for option in options)


def _file_options(words: Sequence[str]) -> Iterator[tuple[str, set[str]]]:
    for name in config_names(list(words)):
        content = {} if name.lstrip().startswith("{") else yaml.safe_load(find_recipe(name).read_text(encoding="utf-8-sig"))
        # A saved configuration lists every option, used or not.
        if isinstance(content, dict) and "ckpt_path" not in content:
            yield name, set(_names(content))


def _names(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all values; a callback's begin with its class."""
    for key, value in tree.items():
        name = f"{prefix}{str(key).removesuffix('+')}"
        if key == "init_args" and isinstance(value, Mapping):
            yield from _names(value, prefix)
        elif name == "trainer.callbacks" and isinstance(value, list):
            for callback in value:
                if isinstance(callback, Mapping) and isinstance(callback.get("init_args"), Mapping):
                    yield from _names(callback["init_args"], f"{name}.{_class_name(callback)}.")
        elif isinstance(value, Mapping):
            yield from _names(value, f"{name}.")
        elif key != "class_path":
            yield name


def _class_name(value: Mapping[str, Any]) -> str:
    return str(value.get("class_path")).rpartition(".")[2]
