import pytest

from malleable.callbacks.report.metric_notes import NOTES, arrow, definitions, is_secondary, with_arrow
from malleable.lightning_modules.metrics.editing import RequestFigures
from malleable.lightning_modules.metrics.exposure import ExposureMetrics
from malleable.lightning_modules.metrics.link_prediction import LinkPredictionMetrics
from malleable.lightning_modules.metrics.ranking import RankingMetrics, ScoredRankingMetrics
from malleable.lightning_modules.recommendation.evaluation import recommendation_headline

HEADLINE = recommendation_headline((1, 5, 10))


def figures():
    """Keys of all metrics that modules log."""
    for metric in (RankingMetrics(), ScoredRankingMetrics(), ExposureMetrics(3, genres=[("x",)] * 3, popularity=[1, 2, 3]), LinkPredictionMetrics(2)):
        yield from metric.compute() if not isinstance(metric, LinkPredictionMetrics) else ("mr", "mrr", "hits_3", "mrr_tail", "mrr_head")
    yield from RequestFigures._fields
    yield from HEADLINE
    yield from ("fluency", "consistency", "perplexity")


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_every_metric_has_a_definition():
    assert {name for name in figures() if not definitions([name])} == set()
    assert all("\n" not in text and len(text) < 120 for _, text in NOTES.values())


def test_arrows():
    assert [arrow(name) for name in ("hr_10", "or_ratio_5", "arp_10", "mr", "unknown_3")] == ["↑", "↓", "", "↓", ""]
    assert with_arrow("hr_10") == "hr_10 ↑"
    assert with_arrow("unknown_3") == "unknown_3"


def test_a_cut_off_is_defined_once():
    rows = definitions(["hr_5", "hr_10", "mrr", "mrr_10", "mystery"])
    assert [row[0] for row in rows] == ["hr@k", "mrr", "mrr@k"]
    assert rows[0][1] == "higher is better"


def test_secondary_metrics():
    drawn = [
        name for name in ("train_loss", "val_loss", "val_hr_5", "val_gini_10", "train_rewards_margins", "lr") if not is_secondary(name, HEADLINE)
    ]
    assert drawn == ["train_loss", "val_loss", "val_hr_5", "train_rewards_margins", "lr"]
    assert not is_secondary("val_gini_10", ("gini_5",))
    assert not is_secondary("val_gini_10", ())
