"""Statistics of preference data, for the summary of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from malleable.datamodules.preference.rows import PreferenceTable
from malleable.datamodules.preference.tokenize import TokenizedRow
from malleable.datamodules.recommendation.summary import DataSummary
from malleable.datamodules.sample_ids import Ints

HIGH_SHARE = 0.1
"""Share of dropped or shortened rows above which there is a warning."""


def describe_drops(summary: DataSummary, number: int, dropped: Mapping[str, int]) -> None:
    """Add the numbers of rows that were read and dropped, and a warning if many were dropped.

    Args:
        summary: Summary of the data.
        number: Number of rows of the source.
        dropped: Number of dropped rows by reason.
    """
    total = sum(dropped.values())
    summary.facts["source"] = f"{number:,} rows"
    summary.facts["dropped"] = list_drops(dropped) or "none"
    if total > HIGH_SHARE * number:
        summary.warnings.append(f"{total:,} of {number:,} rows were dropped ({list_drops(dropped)}); check the data and the maximum lengths")


def list_drops(dropped: Mapping[str, int]) -> str:
    """Return a text with the number of dropped rows of each reason; empty if there are none."""
    return "; ".join(f"{reason}: {count:,}" for reason, count in sorted(dropped.items()) if count)


def describe_lengths(summary: DataSummary, table: PreferenceTable, rows: Sequence[TokenizedRow]) -> None:
    """Add the lengths of prompts and answers of the training rows, and the shares of shortened rows and of rows with several rejected answers.

    Args:
        summary: Summary of the data.
        table: Training rows.
        rows: The same rows, in the same order.
    """
    answers = table.answers.lengths
    first = table.first_answer[:-1]
    is_first = np.zeros(len(answers), dtype=bool)
    is_first[first] = True
    summary.facts["prompt tokens"] = _describe(table.prompts.lengths)
    if table.desirable is None:
        several = float((np.diff(table.first_answer) > 2).mean())
        summary.facts["chosen tokens"] = _describe(answers[is_first])
        summary.facts["rejected tokens"] = _describe(answers[~is_first])
        summary.facts["several rejected"] = f"{several:.1%} of rows"
    else:
        desirable = np.asarray(table.desirable) != 0
        summary.facts["desirable"] = f"{desirable.mean():.1%} of rows"
        for name, kind in (("desirable tokens", desirable), ("undesirable tokens", ~desirable)):
            summary.facts[name] = _describe(answers[first[kind]])
    cut = float(np.mean([row.cut for row in rows]))
    summary.facts["shortened"] = f"{cut:.1%} of rows"
    if merged := sum(row.merged for row in rows):
        summary.facts["merged"] = f"in {merged / len(rows):.1%} of rows, the last token of the prompt merged with an answer and is scored with it"
    if cut > HIGH_SHARE:
        summary.warnings.append(f"{cut:.1%} of training rows exceed max_length or max_prompt_length and were shortened; increase these limits")


def _describe(lengths: Ints) -> str:
    if not len(lengths):
        return "none"
    half, most = np.percentile(lengths, [50, 95], method="higher")
    return f"mean {lengths.mean():.1f}, median {half:,}, 95 % {most:,}, maximum {lengths.max():,}"
