"""Definitions of the metrics in reports, and whether higher or lower values are better."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping

HIGHER, LOWER, NEITHER = "↑", "↓", ""

# Keys have no cut-off. In definitions, k is the cut-off.
NOTES: dict[str, tuple[str, str]] = {
    "hr": (HIGHER, "share of test rows whose true item is among the first k recommended"),
    "ndcg": (HIGHER, "mean of 1 / log2(rank + 1) of the true item, 0 beyond k"),
    "mrr": (HIGHER, "mean of 1 / rank of the true answer, 0 beyond k"),
    "recall": (HIGHER, "share of the relevant items that are among the first k"),
    "recall_cap": (HIGHER, "recall divided by its maximum possible value"),
    "precision": (HIGHER, "share of the first k that are relevant"),
    "map": (HIGHER, "mean over rows of the precision at each relevant item among the first k"),
    "mr": (LOWER, "mean rank of the true answer"),
    "hits": (HIGHER, "share of queries whose true answer ranks among the first k"),
    "mrr_tail": (HIGHER, "MRR of the queries (head, relation, ?)"),
    "mrr_head": (HIGHER, "MRR of the queries (?, relation, tail)"),
    "div_ratio": (HIGHER, "number of distinct recommended items divided by the number of recommendations"),
    "or_ratio": (LOWER, "share of the three most recommended items in all recommendations"),
    "coverage": (HIGHER, "share of the catalogue that is recommended at least once"),
    "gini": (LOWER, "Gini coefficient of the numbers of recommendations of items: 0 if all are equal, near 1 if few items are recommended"),
    "entropy": (HIGHER, "entropy of the distribution of recommendations over items, in nats"),
    "valid_ratio": (HIGHER, "share of the k positions that have an item"),
    "mgu": (LOWER, "mean over genres of |share in recommendations - share in histories|"),
    "dgu": (LOWER, "largest minus smallest value of (share in recommendations - share in histories) over genres"),
    "pop_mgu": (LOWER, "mean over groups of items by popularity of |share in recommendations - share in histories|"),
    "pop_dgu": (LOWER, "largest minus smallest value of (share in recommendations - share in histories) over groups of items by popularity"),
    "arp": (NEITHER, "mean number of training interactions of the recommended items"),
    "arp_ratio": (NEITHER, "ARP divided by the mean number of training interactions of the items in histories"),
    "aplt": (HIGHER, "share of recommendations outside the most popular fifth of the items"),
    "loss": (LOWER, "training loss, on test rows"),
    "perplexity": (LOWER, "exponential of the mean negative log-likelihood of a token"),
    "rewards_accuracies": (HIGHER, "share of pairs whose chosen answer has the higher reward of the loss"),
    "rewards_margins": (HIGHER, "mean reward of the chosen answer minus that of the rejected one"),
    "rewards_chosen": (NEITHER, "mean reward of chosen answers"),
    "rewards_rejected": (NEITHER, "mean reward of rejected answers"),
    "logps_accuracies": (HIGHER, "share of pairs whose chosen answer is more probable"),
    "mean_logps_accuracies": (HIGHER, "share of pairs whose chosen answer has the higher mean log-probability per token"),
    "logps_chosen": (NEITHER, "mean log-probability of chosen answers, in nats"),
    "logps_rejected": (NEITHER, "mean log-probability of rejected answers, in nats"),
    "logps": (NEITHER, "mean log-probability of answers, in nats"),
    "tokens": (NEITHER, "mean number of tokens of answers"),
    "logps_desirable": (NEITHER, "sum of the log-probabilities of desirable answers, divided by the number of rows"),
    "tokens_desirable": (NEITHER, "number of tokens of desirable answers, divided by the number of rows"),
    "reference_chosen": (NEITHER, "logps_chosen under the reference"),
    "reference_rejected": (NEITHER, "logps_rejected under the reference"),
    "tokens_chosen": (NEITHER, "mean number of tokens of chosen answers"),
    "tokens_rejected": (NEITHER, "mean number of tokens of rejected answers"),
    "margins_dpo": (NEITHER, "mean margin of rewards of DPO per token: beta times the gap"),
    "margins_simpo": (NEITHER, "mean margin of rewards of SimPO: beta times the difference of mean log-probabilities per token"),
    "gap_accuracies": (HIGHER, "share of pairs that the model separates more than the reference"),
    "gap_mean": (NEITHER, "moving average of the gap: difference of mean log-probabilities per token, minus that of the reference"),
    "gap_std": (NEITHER, "moving average of the standard deviation of the gap"),
    "gap_z": (NEITHER, "mean absolute value of the standardised gap"),
    "target_margin": (NEITHER, "mean margin of alpha-DPO, in nats per token"),
    "target_margin_min": (NEITHER, "smallest margin of an optimizer step"),
    "target_margin_max": (NEITHER, "largest margin of an optimizer step"),
    "gradient_weight": (NEITHER, "mean weight of the gradient of a pair, in [0, 1]"),
    "reward_shift": (NEITHER, "moving average of the rewards"),
    "log_odds": (HIGHER, "mean log odds ratio of chosen and rejected answers"),
    "kl": (NEITHER, "estimated divergence KL(reference || model) of an answer, in nats"),
    "answer_tokens": (NEITHER, "mean number of tokens of sampled answers"),
    "answers_ended": (HIGHER, "share of sampled answers that ended within the maximum length"),
    "distinct": (HIGHER, "share of different n-grams of tokens among all n-grams of sampled answers"),
    "perplexity_ratio": (LOWER, "perplexity after the edit divided by the perplexity before it"),
    "efficacy": (HIGHER, "% of edited facts whose new answer is more probable than the old one"),
    "generalization": (HIGHER, "efficacy, measured on paraphrases of the prompt, %"),
    "specificity": (HIGHER, "% of neighbouring facts whose true answer is more probable than the new one"),
    "efficacy_exact": (HIGHER, "% of edited facts for which each token of the new answer is the most probable one"),
    "generalization_exact": (HIGHER, "efficacy_exact, measured on paraphrases of the prompt, %"),
    "specificity_exact": (HIGHER, "% of neighbouring facts for which each token of the true answer is the most probable one"),
    "efficacy_accuracy": (HIGHER, "% of the tokens of new answers that are the most probable ones"),
    "generalization_accuracy": (HIGHER, "efficacy_accuracy, measured on paraphrases of the prompt, %"),
    "specificity_accuracy": (HIGHER, "% of the tokens of the true answers of neighbouring facts that are the most probable ones"),
    "efficacy_generated": (HIGHER, "% of edited facts for which the model generates the new answer"),
    "generalization_generated": (HIGHER, "efficacy_generated, measured on paraphrases of the prompt, %"),
    "specificity_generated": (HIGHER, "% of neighbouring facts for which the model generates the true answer"),
    "score": (HIGHER, "harmonic mean of efficacy, generalization and specificity"),
    "fluency": (HIGHER, "entropy of bigrams and trigrams of generated text; lower for repetitive text"),
    "consistency": (HIGHER, "similarity, %, of text generated about a subject and texts about its new answer"),
    "drift": (LOWER, "mean squared change of the outputs of the edited layers on unrelated text"),
}

# Metrics that are computed from totals over all rows. They are not means of values of single rows.
TOTALS = {
    *("div_ratio", "or_ratio", "coverage", "gini", "entropy", "valid_ratio", "mgu", "dgu", "pop_mgu", "pop_dgu", "arp", "arp_ratio", "aplt", "score"),
}
Inputs = Mapping[str, Mapping[str, str]]


def arrow(metric: str) -> str:
    """Return ``↑`` if higher values are better, ``↓`` if lower values are better, and an empty string if neither holds or the metric is unknown."""
    return NOTES.get(_name(metric), (NEITHER, ""))[0]


def with_arrow(metric: str) -> str:
    """Return the key of a metric, followed by its arrow."""
    return f"{metric} {arrow(metric)}".rstrip()


def is_secondary(key: str, headline: Iterable[str]) -> bool:
    """Return whether a logged key is a known metric that is not among the main metrics at any cut-off.

    Losses, perplexity, margins and accuracies of rewards, and unknown keys are never secondary. If there are no main metrics, no key is secondary.

    Args:
        key: Logged key, such as ``val_gini_10``.
        headline: Main metrics, such as ``hr_10``.
    """
    name, main = _name(key.removeprefix("val_").removeprefix("train_")), set(map(_name, headline))
    return bool(main) and name in NOTES and name not in {"loss", "perplexity", "rewards_margins", "rewards_accuracies"} | main


def definitions(metrics: Iterable[str]) -> list[list[str]]:
    """Return one row for each known metric: name, with ``@k`` if it has a cut-off, direction and definition."""
    names = dict.fromkeys((f"{_name(metric)}{'@k' if _name(metric) != metric else ''}", _name(metric)) for metric in metrics)
    directions = {HIGHER: "higher is better", LOWER: "lower is better", NEITHER: ""}
    return [[shown, directions[NOTES[name][0]], NOTES[name][1]] for shown, name in names if name in NOTES]


def differing_inputs(metric: str, first: Inputs, second: Inputs, ignored: Container[str] = ()) -> str:
    """Return a text with the inputs of a metric that differ between two evaluations; empty if they are equal or if the metric has none.

    Args:
        metric: Name of the metric, such as ``mgu_10``.
        first: Inputs of the metrics of one evaluation, see :meth:`~malleable.lightning_modules.metrics.exposure.ExposureMetrics.inputs`.
        second: Inputs of the other evaluation.
        ignored: Kinds of inputs that are not compared.
    """
    one, two = (inputs.get(_name(metric), {}) for inputs in (first, second))
    kinds = [kind for kind in dict.fromkeys((*one, *two)) if kind not in ignored and one.get(kind) != two.get(kind)]
    return ", ".join(f"{kind} {one.get(kind, 'unknown')} and {two.get(kind, 'unknown')}" for kind in kinds)


def is_total(metric: str) -> bool:
    """Return whether a metric is computed from totals over all rows."""
    return _name(metric) in TOTALS


def _name(metric: str) -> str:
    return re.sub(r"_\d+$", "", metric)
