import json
import runpy

import pytest
import torch
from boring import BoringDataModule, BoringModule
from hostile import HOSTILE, is_inert
from launch import launch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from tiny_data import quiet_trainer
from tiny_graph import TinyGraphData, tiny_graph

from malleable.callbacks.report.embeddings import EmbeddingReport, patterns_section, relations_section, uncertainty_section
from malleable.callbacks.report.page import markdown
from malleable.callbacks.report.plots import save_figure
from malleable.callbacks.report.report import RunReport
from malleable.datamodules.batch import KnowledgeGraph
from malleable.lightning_modules.functional.graphs.flows import NFE1
from malleable.lightning_modules.functional.graphs.points import Translation
from malleable.lightning_modules.graphs.nfe import NFE
from malleable.lightning_modules.graphs.point_embeddings import TransE
from malleable.lightning_modules.graphs.settings import EmbeddingTuning, Init
from malleable.lightning_modules.metrics.link_prediction import LinkPredictionMetrics, QueryEntities

DEGREE = (0, *range(1, 12))


def make(kind=NFE, **settings):
    torch.manual_seed(0)
    module = kind(**{"dimension": 4, "graph": tiny_graph(), "init": Init("normal", 1.0), "tuning": EmbeddingTuning(lr=0.05), **settings})
    module.configure_model()
    return module


def graph_of(**changes):
    return KnowledgeGraph(**(vars(tiny_graph()) | changes))


def exported(folder):
    return load_file(folder / "embeddings" / "embeddings.safetensors")["entity.mu"]


def test_files_and_sections_of_a_run(tmp_path):
    module, data = make(), TinyGraphData(batch_size=24)
    trainer = quiet_trainer(tmp_path, max_epochs=3, callbacks=[RunReport(), EmbeddingReport()], enable_checkpointing=False)
    trainer.fit(module, data)
    folder = tmp_path / "run"
    page = (folder / "report" / "report.md").read_text()
    assert "## Uncertainty of entities" in page
    assert "## Patterns of relations" in page
    assert "## Figures of relations" not in page
    (figures,) = trainer.test(module, data, verbose=False)
    page = (folder / "report" / "report.md").read_text()
    assert "3 of 3 relations are tested" in page
    assert (folder / "report" / "uncertainty_of_entities.png").is_file()
    assert torch.equal(exported(folder), module.tables[0].weight[:, :4])
    assert json.loads((folder / "embeddings" / "labels.json").read_text())["relations"] == ["next", "second", "opposite"]
    assert {"test_mrr", "test_mr", "test_hits_1", "test_hits_10"} <= figures.keys()


def test_the_exported_weights_are_the_tested_ones(tmp_path):
    best = ModelCheckpoint(dirpath=tmp_path, monitor="val_mr", mode="max")  # the worst one, so that it is not the last
    module, data = make(), TinyGraphData(batch_size=24)
    trainer = quiet_trainer(tmp_path, max_epochs=8, callbacks=[EmbeddingReport(), best])
    trainer.fit(module, data)
    last = exported(tmp_path / "run")
    assert torch.equal(last, module.tables[0].weight[:, :4])
    trainer.test(module, data, ckpt_path=best.best_model_path, verbose=False)
    assert torch.equal(exported(tmp_path / "run"), module.tables[0].weight[:, :4])
    assert not torch.equal(exported(tmp_path / "run"), last)


def test_test_without_fit_exports_nothing(tmp_path):
    report = EmbeddingReport()
    quiet_trainer(tmp_path, callbacks=[report]).test(make(), TinyGraphData(), verbose=False)
    assert not (tmp_path / "run" / "embeddings").exists()
    assert [section.title for section in report.report_sections()] == ["Uncertainty of entities", "Patterns of relations", "Figures of relations"]


def test_custom_folder(tmp_path):
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[EmbeddingReport(str(tmp_path / "tables"))], enable_checkpointing=False).fit(
        make(), TinyGraphData()
    )
    assert (tmp_path / "tables" / "labels.json").is_file()


@pytest.mark.parametrize(("module", "data", "settings"), [(BoringModule, BoringDataModule, {}), (make, TinyGraphData, {"fast_dev_run": True})])
def test_other_modules_and_fast_dev_run_are_ignored(tmp_path, module, data, settings):
    report = EmbeddingReport()
    trainer = quiet_trainer(tmp_path, callbacks=[report], **{"max_epochs": 1, "enable_checkpointing": False, **settings})
    trainer.fit(module(), data())
    assert report.report_sections() == []
    assert not list(tmp_path.rglob("embeddings"))


SCRIPT = """
import os
import torch
from tiny_data import quiet_trainer
from tiny_graph import TinyGraphData
from malleable.callbacks.report.embeddings import EmbeddingReport
from malleable.callbacks.report.report import RunReport
from malleable.lightning_modules.graphs.nfe import NFE

ranks = int(os.environ.get("WORLD_SIZE", 1))
settings = {"strategy": "ddp", "devices": ranks} if ranks > 1 else {}
torch.manual_seed(0)
trainer = quiet_trainer(f"ranks{ranks}", logger=False, callbacks=[RunReport(), EmbeddingReport()], **settings)
trainer.test(NFE(dimension=4), TinyGraphData(), verbose=False)
"""


@pytest.mark.ddp
@pytest.mark.slow
def test_two_ranks_give_the_same_report_as_one(tmp_path):
    """Figures of relations count the queries of both."""
    (tmp_path / "run.py").write_text(SCRIPT)
    runpy.run_path("run.py")
    launch([tmp_path / "run.py"], cwd=tmp_path)
    one, two = ((tmp_path / name / "report" / "report.md").read_text().partition("## Run")[0] for name in ("ranks1", "ranks2"))
    assert "## Figures of relations" in one
    assert one == two


@pytest.mark.parametrize("settings", [{"k": 0}, {"max_relations": 0}])
def test_refusals(settings):
    with pytest.raises(ValueError, match=r"(k|max_relations) must be >= 1, got 0"):
        EmbeddingReport(**settings)


class TestUncertainty:
    def test_rank_correlation(self, tmp_path):
        """Deviations that fall with the degree, of all entities but the unseen one."""
        module = make(dimension=3)
        with torch.no_grad():
            module.tables[0].weight[:, 3:] = 1 / torch.tensor([0.1, *range(1, 12)])[:, None]
        section = uncertainty_section(module, graph_of(degree=DEGREE))
        assert "is 0.167 (0.0909 to 1) over the 11 entities of the training triples" in section.text
        assert "; 10 (10 to 10) over the 1 that occur only in validation or test" in section.text
        assert section.text.endswith("is -1.00.")
        save_figure(tmp_path / "figure.png", section.figure)
        assert (tmp_path / "figure.png").is_file()

    def test_points_have_none(self):
        section = uncertainty_section(make(TransE), tiny_graph())
        assert section.text == "entities of Translation are points without uncertainty; use NFE with kind nfe1, nfe2, nfe3 or sigma."
        assert section.figure is None

    def test_without_degrees(self):
        section = uncertainty_section(make(), graph_of(degree=()))
        assert "The numbers of training triples of the entities are unknown" in section.text
        assert section.figure is None


class TestPatterns:
    def mirrored(self):
        """The third relation undoes itself."""
        module = make(dimension=8)
        with torch.no_grad():
            module.tables[1].weight[2, 8:] = -1
        return module

    def test_clear_ones_are_listed(self):
        header, rows = patterns_section(self.mirrored(), tiny_graph(), 10, 10).table
        assert header == ("relations", "pattern", "difference")
        assert rows[0][:2] == ("opposite", "symmetric")
        assert rows[0][2] < 1e-9
        assert all(row[2] < 1 for row in rows)

    def test_none_is_clear(self):
        section = patterns_section(make(dimension=64), tiny_graph(), 10, 10)
        assert section.table is None
        assert "No difference is below 1; the clearest pattern is " in section.text

    def test_labels_are_not_interpreted(self):
        graph = graph_of(relations=tuple(f"{number} {HOSTILE}" for number in range(3)))
        assert is_inert(markdown("Page", [patterns_section(make(dimension=64, graph=graph), graph, 10, 10)]))

    def test_among_the_most_frequent(self):
        frequent, rare = (patterns_section(self.mirrored(), graph_of(frequency=counts), 10, 2) for counts in ((1, 2, 3), (3, 2, 1)))
        assert "the 2 most frequent of 3 relations are searched" in frequent.text
        assert frequent.table[1][0][0] == "opposite"
        assert rare.table is None or all("opposite" not in row[0] for row in rare.table[1])

    def test_an_interaction_without_maps(self, monkeypatch):
        def flow(self, relation):
            raise NotImplementedError("Such relations make no map")

        for kind in (NFE1, Translation):
            monkeypatch.setattr(kind, "flow", flow)
        assert patterns_section(make(), tiny_graph(), 10, 10).text == "Such relations make no map."


class TestRelations:
    def metric(self):
        """Relation r answers at rank r + 1 for tails and 1 for heads; relation 2 is never asked, nor is 5 for heads."""
        metric = LinkPredictionMetrics(12)
        relation, rank = torch.tensor([(r, r + 1) for r in (0, 1, 3, 4, 5)] + [(6 + r, 1) for r in (0, 1, 3, 4)]).unbind(1)
        row, none = torch.arange(9), torch.zeros(0, dtype=torch.long)
        metric.update(-torch.arange(12.0).expand(9, 12), QueryEntities(rank - 1, row), QueryEntities(none, none), relation, row)
        metric.compute()
        return metric

    def test_all_of_few(self):
        graph = KnowledgeGraph(("a",), tuple("uvwxyz"))
        section = relations_section(self.metric(), graph, 5)
        header, rows = section.table
        assert header == [
            *("relation", "queries (tail)", "mrr (tail)", "hits_1 (tail)", "hits_10 (tail)"),
            *("queries (head)", "mrr (head)", "hits_1 (head)", "hits_10 (head)"),
        ]
        assert "5 of 6 relations are tested" in section.text
        assert [row[0] for row in rows] == ["u", "v", "x", "y", "z"]
        assert rows[2] == ["x", 1, pytest.approx(1 / 4), 0, 1, 1, 1, 1, 1]
        assert rows[4][:6] == ["z", 1, pytest.approx(1 / 6), 0, 1, 0]

    def test_best_and_worst_of_many(self):
        graph = KnowledgeGraph(("a",), tuple("uvwxyz"))
        _, rows = relations_section(self.metric(), graph, 2).table
        assert [row[0] for row in rows] == ["u", "v", "… 1 more", "y", "z"]
        assert rows[2][1:] == [None] * 8
