"""Checks for options that have no effect in combination with other options: an error on the command line, a warning in files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from malleable.argument_checks import config_names
from malleable.layers import given_options
from malleable.recipes import find_recipe

log = logging.getLogger(__name__)


class Rule(NamedTuple):
    """Condition under which an option has no effect.

    Attributes:
        option: Dotted name without the key ``init_args``; for callbacks e.g. ``trainer.callbacks.SelfPlayLoop.negatives.temperature``.
        unused: Function that returns whether the option has no effect with the values of a configuration.
        reason: Reason that is shown in the message.
    """

    option: str
    unused: Callable[[Values], bool]
    reason: str


class Values:
    """Values of a configuration by dotted name without the key ``init_args``; ``None`` for missing values.

    Args:
        config: Configuration of a command, as plain data.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        callbacks = (config.get("trainer") or {}).get("callbacks") or []
        listed = [callback for callback in (callbacks if isinstance(callbacks, list) else [callbacks]) if isinstance(callback, Mapping)]
        self.callbacks = {_class_name(callback): callback for callback in listed}

    def __call__(self, name: str) -> Any:
        """Return the value of a dotted name."""
        value: Any = self.config
        parts = name.split(".")
        if parts[:2] == ["trainer", "callbacks"]:
            value, parts = self.callbacks.get(parts[2]), parts[3:]
        for part in parts:
            if not isinstance(value, Mapping):
                return None
            inner = value.get("init_args")
            value = inner.get(part) if isinstance(inner, Mapping) and part in inner else value.get(part)
        return value

    def uses_packing(self) -> bool:
        """Return whether any phase of training uses packed histories."""
        phases = (self(f"trainer.callbacks.SelfPlayLoop.{phase}.view") for phase in ("warmup", "sft", "dpo"))
        return self("data.train_view") in ("packed", "packed_sequence", None) or "packed" in phases


LOOP = "trainer.callbacks.SelfPlayLoop"


def _has_no_tokenizer(value: Values) -> bool:
    return bool(value("data.tokenizer") == "none")


def _has_no_sampling(value: Values) -> bool:
    return value(f"{LOOP}.negatives.decode") in ("greedy", "beam_k_random")


def _has_self_play(value: Values) -> bool:
    return "SelfPlayLoop" in value.callbacks


def _is_set(name: str) -> Callable[[Values], bool]:
    return lambda value: value(name) is not None


def _equals(name: str, expected: str) -> Callable[[Values], bool]:
    return lambda value: value(name) == expected


def _has_narrow_beam(value: Values) -> bool:
    beams, ks = value("model.decoding.num_beams"), value("model.ks")
    return beams is not None and bool(ks) and bool(beams < max(ks))


RULES = (
    Rule("data.vocab_size", _is_set("data.tokenizer"), "the tokenizer is given by data.tokenizer"),
    Rule("data.pack_length", lambda value: not value.uses_packing(), "data.train_view is answer or sequence, and no phase has view: packed"),
    Rule("data.max_prompt_length", _has_no_tokenizer, "data.tokenizer is none, so there are no prompts"),
    Rule("data.template", _has_no_tokenizer, "data.tokenizer is none, so there are no prompts"),
    Rule("data.split.fractions", _equals("data.split.kind", "leave_last_out"), "data.split.kind is leave_last_out"),
    Rule("model.decoding.num_beams", _equals("model.decoding.grounding", "embedding"), "model.decoding.grounding is embedding"),
    Rule("model.decoding.num_beams", _has_narrow_beam, "the search uses at least as many beams as the largest value of model.ks"),
    Rule("model.decoding.renormalize", _equals("model.decoding.grounding", "embedding"), "model.decoding.grounding is embedding"),
    Rule("model.decoding.max_new_tokens", _equals("model.decoding.grounding", "trie"), "model.decoding.grounding is trie"),
    Rule("model.language_model.scratch", _is_set("model.language_model.name"), "the model is given by model.language_model.name"),
    Rule("model.tuning.lr", _is_set("model.optimizer"), "the optimizer is given by model.optimizer"),
    Rule("model.tuning.weight_decay", _is_set("model.optimizer"), "the optimizer is given by model.optimizer"),
    Rule("model.tuning.warmup_steps", _is_set("model.lr_scheduler"), "the schedule is given by model.lr_scheduler"),
    Rule("model.tuning.decay", _is_set("model.lr_scheduler"), "the schedule is given by model.lr_scheduler"),
    Rule("model.tuning.lr", _has_self_play, "SelfPlayLoop uses the lr of its phases instead"),
    Rule("model.tuning.warmup_steps", _has_self_play, "SelfPlayLoop uses the warmup_steps of its phases instead"),
    Rule("model.tuning.decay", _has_self_play, "SelfPlayLoop uses the decay of its phases instead"),
    Rule(
        "trainer.max_epochs",
        lambda value: _has_self_play(value) and value("trainer.max_epochs") != -1,
        "SelfPlayLoop computes the number of epochs from its rounds and the epochs of its phases",
    ),
    Rule(f"{LOOP}.negatives.temperature", _has_no_sampling, "negatives.decode is not sample"),
    Rule(f"{LOOP}.negatives.top_p", _has_no_sampling, "negatives.decode is not sample"),
    Rule(f"{LOOP}.negatives.max_new_tokens", _equals(f"{LOOP}.negatives.grounding", "trie"), "negatives.grounding is trie"),
    Rule("checkpoint.mode", lambda value: value("checkpoint.monitor") is None, "it needs checkpoint.monitor, which is not set"),
)


def check_unused(argv: Sequence[str], config: Mapping[str, Any], files: bool = True) -> None:
    """Raise an error for options of the command line that have no effect, and warn of such options in configuration files.

    Args:
        argv: Command and options.
        config: The resulting configuration, as plain data.
        files: Whether to check options in files.

    Raises:
        ValueError: If an option of the command line has no effect. The message contains the reason.
    """
    options, values = given_options(argv), Values(config)
    in_files = list(_file_options(argv)) if files else []
    for rule in RULES:
        # On the command line, an option of a callback without the class name belongs to the last callback.
        given = next((name for name in (rule.option, rule.option.replace(f"{LOOP}.", "trainer.callbacks.")) if _is_given(name, options)), None)
        file = next((file for file, found in in_files if _is_given(rule.option, found)), None)
        if not (given or file) or not rule.unused(values):
            continue
        if given:
            raise ValueError(f"--{given} has no effect: {rule.reason}; omit it")
        log.warning("%s: %s has no effect: %s", file, rule.option, rule.reason)


def _is_given(name: str, options: set[str]) -> bool:
    """Return whether options contain a dotted name or a part of its value. Unlike in :func:`is_given`, a parent of the name does not count."""
    return any(option == name or option.startswith(f"{name}.") for option in options)


def _file_options(argv: Sequence[str]) -> Iterator[tuple[str, set[str]]]:
    for name in config_names(list(argv)):
        content = {} if name.lstrip().startswith("{") else yaml.safe_load(find_recipe(name).read_text(encoding="utf-8-sig"))
        # Files with the key `ckpt_path` are saved configurations, which contain all options, also those without effect.
        if isinstance(content, dict) and "ckpt_path" not in content:
            yield name, set(_names(content))


def _names(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all values. The names of options of callbacks contain the class name."""
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
