"""What the metrics of reports mean: one line each, and which direction is better."""

from __future__ import annotations

import re
from collections.abc import Iterable

HIGHER, LOWER, NEITHER = "↑", "↓", ""

# Definitions say @k where a key ends in a cut-off.
NOTES: dict[str, tuple[str, str]] = {
    "hr": (HIGHER, "share of test rows whose true item is among the first k recommended"),
    "ndcg": (HIGHER, "mean of 1 / log2(rank + 1) of the true item, 0 beyond k"),
    "mrr": (HIGHER, "mean of 1 / rank of the true answer, 0 beyond k"),
    "recall": (HIGHER, "share of the relevant items that are among the first k"),
    "recall_cap": (HIGHER, "the same, divided by the most that could be there"),
    "precision": (HIGHER, "share of the first k that are relevant"),
    "map": (HIGHER, "mean over rows of the precision at each relevant item among the first k"),
    "mr": (LOWER, "mean rank of the true answer"),
    "hits": (HIGHER, "share of queries whose true answer ranks among the first k"),
    "mrr_tail": (HIGHER, "MRR of the queries (head, relation, ?)"),
    "mrr_head": (HIGHER, "MRR of the queries (?, relation, tail)"),
    "div_ratio": (HIGHER, "different items among all recommendations, divided by their number"),
    "or_ratio": (LOWER, "share of all recommendations that the three most recommended items take"),
    "coverage": (HIGHER, "share of the catalogue that is recommended at all"),
    "gini": (LOWER, "Gini coefficient of how often items are recommended: 0 all alike, near 1 few items only"),
    "entropy": (HIGHER, "entropy in nats of how often items are recommended"),
    "valid_ratio": (HIGHER, "share of the k places that hold an item"),
    "mgu": (LOWER, "mean over genres of |share in recommendations - share in histories|"),
    "dgu": (LOWER, "largest minus smallest difference of a genre's share in recommendations and in histories"),
    "pop_mgu": (LOWER, "as MGU, for groups of items by popularity"),
    "pop_dgu": (LOWER, "as DGU, for groups of items by popularity"),
    "arp": (NEITHER, "mean number of training interactions of the recommended items"),
    "arp_ratio": (NEITHER, "the same divided by that of the items in histories: 1 is as popular as what users chose"),
    "aplt": (HIGHER, "share of recommendations outside the most popular fifth of the items"),
    "loss": (LOWER, "what training minimises, on test rows"),
    "perplexity": (LOWER, "exponential of the mean negative log-likelihood of a token"),
    "perplexity_ratio": (LOWER, "perplexity after the edit divided by that before"),
    "efficacy": (HIGHER, "% of edited facts whose new answer is likelier than the old one"),
    "generalization": (HIGHER, "the same of paraphrases, %"),
    "specificity": (HIGHER, "% of neighbouring facts whose own answer is likelier than the new one"),
    "efficacy_exact": (HIGHER, "% of edited facts whose new answer is the likeliest, token by token"),
    "generalization_exact": (HIGHER, "the same of paraphrases, %"),
    "specificity_exact": (HIGHER, "% of neighbouring facts whose own answer is the likeliest, token by token"),
    "efficacy_accuracy": (HIGHER, "% of the new answers' tokens that are the likeliest"),
    "generalization_accuracy": (HIGHER, "the same of paraphrases, %"),
    "specificity_accuracy": (HIGHER, "% of the neighbours' answer tokens that are the likeliest"),
    "efficacy_generated": (HIGHER, "% of edited facts for which the model writes the new answer"),
    "generalization_generated": (HIGHER, "the same of paraphrases, %"),
    "specificity_generated": (HIGHER, "% of neighbouring facts for which the model writes their own answer"),
    "score": (HIGHER, "harmonic mean of efficacy, generalization and specificity"),
    "fluency": (HIGHER, "entropy of word pairs and triples in what the model writes; falls when it repeats itself"),
    "consistency": (HIGHER, "similarity, %, of what the model writes of a subject and texts about its new answer"),
    "drift": (LOWER, "mean squared change, on other text, of the outputs of the edited layers"),
}


def arrow(metric: str) -> str:
    """Return ``↑`` where higher is better, ``↓`` where lower is, and nothing where neither is or the metric is unknown."""
    return NOTES.get(_name(metric), (NEITHER, ""))[0]


def marked(metric: str) -> str:
    """Return a metric's key with its arrow behind it."""
    return f"{metric} {arrow(metric)}".rstrip()


def is_secondary(key: str, headline: Iterable[str]) -> bool:
    """Return whether a logged key belongs to a known metric that is not a main one at any cut-off.

    Losses, perplexity and unknown keys are never secondary. Without main metrics, no key is.

    Args:
        key: Logged key, such as ``val_gini_10``.
        headline: Main metrics, such as ``hr_10``.
    """
    name, main = _name(key.removeprefix("val_").removeprefix("train_")), set(map(_name, headline))
    return bool(main) and name in NOTES and name not in {"loss", "perplexity"} | main


def definitions(metrics: Iterable[str]) -> list[list[str]]:
    """Return a row for each kind of metric: name with ``@k`` for a cut-off, direction, definition; unknown ones are left out."""
    names = dict.fromkeys((f"{_name(metric)}{'@k' if _name(metric) != metric else ''}", _name(metric)) for metric in metrics)
    words = {HIGHER: "higher is better", LOWER: "lower is better", NEITHER: ""}
    return [[shown, words[NOTES[name][0]], NOTES[name][1]] for shown, name in names if name in NOTES]


def _name(metric: str) -> str:
    return re.sub(r"_\d+$", "", metric)
