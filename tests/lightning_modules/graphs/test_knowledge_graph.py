"""What all knowledge-graph embeddings share: tables, the optimizer step, answers by label, checkpoints."""

import json
import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from tiny_data import quiet_trainer
from tiny_graph import PEOPLE, TinyGraphData, collate_queries, grouped_rows, query_rows, tiny_graph, tiny_triples

from malleable.datamodules.batch import KnowledgeGraph
from malleable.lightning_modules.graphs import answers as graph_answers
from malleable.lightning_modules.graphs.knowledge_graph import select_rows
from malleable.lightning_modules.graphs.nfe import NFE
from malleable.lightning_modules.graphs.point_embeddings import DistMult, TransE
from malleable.lightning_modules.graphs.settings import EmbeddingTuning, Init, LinkRanking
from malleable.lightning_modules.losses.embedding import DURA, F2, BCESum, KvsAll, NegativeSampling, Softmax

ROWS = query_rows(tiny_triples())


def make(kind=NFE, seed=0, **settings):
    torch.manual_seed(seed)
    module = kind(**{"dimension": 6, "graph": tiny_graph(), "init": Init(scale=0.8), **settings})
    module.configure_model()
    return module


class TestTables:
    @pytest.mark.parametrize(
        ("init", "spread"),
        [
            (Init(), 0.1 / math.sqrt(3)),
            (Init("normal", 0.3), 0.3),
            (Init("xavier_uniform", 1.0), math.sqrt(2 / (12 + 500))),
            (Init("xavier_normal", 2.0), 2 * math.sqrt(2 / (12 + 500))),
        ],
    )
    def test_start(self, init, spread):
        """Each part by itself: fans are its rows and its width."""
        module = make(init=init, dimension=500)
        for part in module.tables[0].weight.chunk(2, 1):
            assert part.std().item() == pytest.approx(spread, rel=0.05)

    def test_are_created_once(self):
        module = make()
        before = module.tables[0].weight
        module.configure_model()
        assert module.tables[0].weight is before

    def test_must_exist(self):
        with pytest.raises(MisconfigurationException, match=r"NFE has no weights yet: pass graph=\.\.\. and call configure_model\(\), or load"):
            NFE().compute_loss(collate_queries(ROWS))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"dimension": 0}, "dimension must be >= 1, got 0"),
            ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1"),
            ({"tuning": EmbeddingTuning(sparse=True)}, r"tuning\.sparse needs a loss that samples entities"),
            ({"tuning": EmbeddingTuning(sparse=True), "loss": NegativeSampling(), "gamma_trainable": True}, r"and a fixed gamma"),
        ],
    )
    def test_refusals(self, settings, message):
        with pytest.raises(ValueError, match=message):
            NFE(**settings)


class TestLoss:
    def test_padding_rows_are_not_counted(self):
        for loss in (BCESum(), Softmax(), KvsAll()):
            module = make(loss=loss)
            batch = collate_queries([*ROWS[:5], ROWS[0]])
            batch.sample_id[-1] = -1
            plain = module.compute_loss(collate_queries(ROWS[:5]))
            filled = module.compute_loss(batch)
            torch.testing.assert_close(filled.loss, plain.loss)
            assert filled.weight == plain.weight == 5

    def test_a_batch_of_repeats_alone(self):
        batch = collate_queries(ROWS[:2])
        batch.sample_id = torch.tensor([-1, -2])
        output = make().compute_loss(batch)
        assert (output.loss, output.weight) == (0, 0)

    def test_trainable_gamma_gets_its_gradient(self):
        module = make(gamma=1.0, gamma_trainable=True)
        loss = module.compute_loss(collate_queries(ROWS)).loss
        loss.backward()
        with torch.no_grad():
            module.gamma += 1e-3
            later = module.compute_loss(collate_queries(ROWS)).loss
        assert module.gamma.grad.item() == pytest.approx((later - loss).item() / 1e-3, rel=1e-2)
        assert "gamma" in dict(module.named_parameters())

    def test_dropout_is_of_training_only(self):
        module, batch = make(dropout=0.5), collate_queries(ROWS)
        assert module.compute_loss(batch).loss != module.compute_loss(batch).loss
        module.eval()
        assert module.compute_loss(batch).loss == module.compute_loss(batch).loss == make().compute_loss(batch).loss

    @pytest.mark.parametrize("regulariser", [F2(0.1), DURA(0.1)])
    def test_a_penalty_is_a_mean_over_true_tails(self, regulariser):
        rows = grouped_rows([*ROWS[:6], {**ROWS[0], "target": [7]}])
        module = make(regulariser=regulariser)
        grouped = module.compute_loss(collate_queries(rows)).extras["penalty"]
        apart = module.compute_loss(collate_queries([*ROWS[:6], {**ROWS[0], "target": [7]}])).extras["penalty"]
        torch.testing.assert_close(grouped, apart)

    @pytest.mark.parametrize("shared", [False, True])
    def test_sparse_updates_change_scored_rows_only(self, shared):
        loss = NegativeSampling(2, shared=shared)
        gradients = []
        for sparse in (True, False):
            module = make(loss=loss, tuning=EmbeddingTuning(lr=0.1, sparse=sparse))
            torch.manual_seed(1)
            module.compute_loss(collate_queries(ROWS[:1])).loss.backward()
            assert all(table.weight.grad.is_sparse == sparse for table in module.tables)
            gradients.append([table.weight.grad.to_dense() for table in module.tables])
            before = module.tables[0].weight.detach().clone()
            module.default_optimizer(module.parameter_groups()).step()
            assert ((module.tables[0].weight != before).any(1) == (gradients[-1][0] != 0).any(1)).all()
        torch.testing.assert_close(*gradients)

    def test_sampled_entities_change_with_the_step_and_not_in_evaluation(self, tmp_path, monkeypatch):
        seeds = {True: [], False: []}

        class Recorded(NegativeSampling):
            def draw(self, positives, num_entities):
                seeds[torch.is_grad_enabled()].append(int(positives.seed))
                return super().draw(positives, num_entities)

        for seed in ("5", "6"):
            monkeypatch.setenv("PL_GLOBAL_SEED", seed)
            trainer = quiet_trainer(tmp_path, max_epochs=2, limit_train_batches=4, enable_checkpointing=False)
            trainer.fit(NFE(dimension=4, loss=Recorded(2)), TinyGraphData(batch_size=4, global_batch_size=8))
        # Two batches in each step.
        assert seeds[True][::2] == seeds[True][1::2]
        assert len(set(seeds[True])) == len(seeds[True]) / 2 == 8
        assert len(set(seeds[False])) == 2

    def test_a_module_without_a_trainer_samples_with_the_generator(self):
        module, batch = make(loss=NegativeSampling(8)), collate_queries(ROWS)
        assert module.compute_loss(batch).loss != module.compute_loss(batch).loss
        module.eval()
        assert module.compute_loss(batch).loss == module.compute_loss(batch).loss

    def test_learns_from_sampled_entities(self, tmp_path):
        module = NFE(dimension=16, gamma=2.0, loss=NegativeSampling(8), tuning=EmbeddingTuning(lr=0.05, sparse=True))
        trainer = quiet_trainer(tmp_path, max_epochs=40, enable_checkpointing=False, limit_val_batches=0)
        trainer.fit(module, TinyGraphData(batch_size=24))
        assert trainer.test(module, TinyGraphData(), verbose=False)[0]["test_mrr"] > 0.7


class TestSchedule:
    def test_decays_once_an_epoch(self, tmp_path):
        module = make(tuning=EmbeddingTuning(lr=0.1, lr_decay=0.5))
        trainer = quiet_trainer(tmp_path, max_epochs=3, enable_checkpointing=False)
        trainer.fit(module, TinyGraphData())
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)
        assert isinstance(trainer.optimizers[0], torch.optim.Adam)

    def test_a_given_scheduler_is_stepped_every_step(self, tmp_path):
        def halve(optimizer):
            return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

        module = make(lr_scheduler=halve, optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0))
        trainer = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=3, limit_val_batches=0, enable_checkpointing=False)
        trainer.fit(module, TinyGraphData())
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5**3)


class TestEvaluation:
    def test_entity_keys_are_computed_in_every_evaluation(self, tmp_path):
        """Computed once within a validation, and again after training went on."""
        module, data = make(tuning=EmbeddingTuning(lr=0.05)), TinyGraphData(batch_size=24)
        trainer = quiet_trainer(tmp_path, max_epochs=5, enable_checkpointing=False)
        trainer.fit(module, data)
        logged = trainer.callback_metrics["val_mrr"].item()
        metrics = module.configure_metrics()
        for start in range(0, 10, 4):
            module.evaluate(collate_queries(ROWS[:10][start : start + 4]), metrics)
        assert logged == metrics["ranking"].compute()["mrr"].item()
        assert module._keys is None
        assert {"val_loss", "val_mr", "val_hits_10", "val_mrr_head", "val_mrr_tail"} <= set(trainer.callback_metrics)

    def test_taking_rows(self):
        batch = collate_queries(grouped_rows([*ROWS[:6], {**ROWS[0], "target": [7]}]))
        part = select_rows(batch, torch.arange(len(batch)) < 2)
        assert part.sample_id.tolist() == batch.sample_id[:2].tolist()
        assert part.target.tolist() == [ROWS[0]["target"][0], 7, ROWS[1]["target"][0]]
        assert part.target_row.tolist() == [0, 0, 1]
        rest = select_rows(batch, torch.arange(len(batch)) >= 2)
        assert len(rest.target) + len(part.target) == len(batch.target)
        assert rest.known_row.min() == 0

    def test_predictions_exclude_known_answers(self):
        module = make(ranking=LinkRanking(top_k=99))
        batch = collate_queries(ROWS[:3])
        found = module.predict_step(batch)
        assert found.item_ids.shape == (3, PEOPLE)
        assert found.item_ids[:, -1].tolist() == [-1, -1, -1]
        assert (found.scores[:, -1] == -torch.inf).all()
        for row in range(3):
            known = set(batch.known[batch.known_row == row].tolist())
            assert set(found.item_ids[row, :-1].tolist()) == set(range(PEOPLE)) - known
        module.ranking.exclude_known = False
        everything = module.predict_step(batch)
        assert sorted(everything.item_ids[0].tolist()) == list(range(PEOPLE))
        assert (everything.scores.diff() <= 0).all()

    def test_predictions_of_relations_are_in_their_rows(self):
        module = make(ranking=LinkRanking(top_k=2))
        batch = collate_queries(ROWS[:4])
        batch.relation = torch.tensor([-1, 1, -1, 4])
        batch.tail = torch.tensor([7, -1, 8, -1])
        batch.known, batch.known_row = torch.tensor([2, 1, 0]), torch.tensor([0, 2, 2])
        found = module.predict_step(batch)
        for row in (0, 2):
            by_label = module.predict_relations(int(batch.head[row]), int(batch.tail[row]), k=3)
            known = batch.known[batch.known_row == row].tolist()
            expected = [(answer.id, pytest.approx(answer.score)) for answer in by_label if answer.id not in known]
            assert [pair for pair in zip(*(part[row].tolist() for part in found), strict=True) if pair[0] >= 0] == expected
        assert found.item_ids[2].tolist() == [2, -1]
        assert found.item_ids[1].tolist() == [answer.id for answer in module.predict_tails(int(batch.head[1]), 1, k=2)]
        assert found.item_ids[3].tolist() == [answer.id for answer in module.predict_heads(1, int(batch.head[3]), k=2)]

    def test_labels_of_predictions(self):
        module = make(ranking=LinkRanking(top_k=4))
        batch = collate_queries(ROWS[:3])
        batch.relation = torch.tensor([-1, 1, 5])
        batch.tail = torch.tensor([7, -1, -1])
        batch.known, batch.known_row = batch.known[:0], batch.known_row[:0]
        (relations, tails, heads) = module.describe(batch, module.predict_step(batch))
        names = [f"person {entity}" for entity in batch.head.tolist()]
        assert [query for query, _ in (relations, tails, heads)] == [
            (names[0], "?", "person 7"),
            (names[1], "second", "?"),
            ("?", "opposite", names[2]),
        ]
        by_label = (
            module.predict_relations(names[0], "person 7"),
            module.predict_tails(names[1], "second", k=4),
            module.predict_heads("opposite", names[2], k=4),
        )
        for (_, answers), expected in zip((relations, tails, heads), by_label, strict=True):
            assert answers == [(answer.label, pytest.approx(answer.score, rel=1e-5), answer.uncertainty) for answer in expected]
        assert len(module.answer_fields) == len(tails[1][0])

    def test_predictions_with_nan_scores_are_an_error(self):
        module, batch = make(), collate_queries(ROWS[:3])
        with torch.no_grad():
            module.tables[1].weight[1, 0] = torch.nan
        for relation, tail in ((batch.relation, None), (torch.full((3,), -1), torch.tensor([1, 2, 3]))):
            batch.relation, batch.tail = relation, tail
            with pytest.raises(ValueError, match="nan scores: training has diverged"):
                module.predict_step(batch)


class TestAnswers:
    triples = tiny_triples()

    def test_scores_by_label_and_number(self):
        module = make()
        by_label = module.score([("person 0", "next", "person 1"), ("person 4", "opposite", "person 9")])
        torch.testing.assert_close(by_label, module.score([(0, 0, 1), (4, 2, 9)]))
        found = {answer.id: answer.score for answer in module.predict_tails("person 0", "next", k=PEOPLE)}
        assert found[1] == pytest.approx(by_label[0].item(), rel=1e-5)

    def test_heads_are_tails_of_the_reciprocal(self):
        module = make()
        heads = module.predict_heads("second", "person 5", k=4)
        batch = collate_queries([{"sample_id": 0, "head": 5, "relation": 1 + 3, "target": [], "known": []}])
        assert [answer.id for answer in heads] == module.predict_step(batch).item_ids[0, :4].tolist()
        assert [answer.label for answer in heads] == [f"person {answer.id}" for answer in heads]
        assert heads[0].score >= heads[1].score
        torch.testing.assert_close(torch.tensor([a.uncertainty for a in heads]), module.uncertainty()[[a.id for a in heads]])

    def test_known_triples_are_excluded(self):
        module = make()
        best = module.predict_tails(3, "next", k=2)
        again = module.predict_tails("person 3", 0, k=PEOPLE, exclude=[("person 3", "next", best[0].label), (4, "next", best[1].label)])
        assert again[0].id == best[1].id
        assert len(again) == PEOPLE - 1
        first = module.predict_heads("next", 3, k=1)[0]
        assert module.predict_heads("next", 3, k=1, exclude=[(first.label, 0, 3)])[0].id != first.id

    def test_relations(self):
        module = make()
        found = module.predict_relations("person 2", "person 8", k=9)
        assert sorted(answer.label for answer in found) == ["next", "opposite", "second"]
        torch.testing.assert_close(torch.tensor([answer.score for answer in found]), module.score([(2, a.id, 8) for a in found]))

    def test_uncertainty_is_the_mean_deviation(self, monkeypatch):
        module = make()
        expected = module.tables[0].weight[:, 6:].abs().mean(1)
        torch.testing.assert_close(module.uncertainty(), expected)
        monkeypatch.setattr(graph_answers, "ROWS", 5)
        torch.testing.assert_close(module.uncertainty(), expected)

    def test_points_have_no_uncertainty(self):
        module = make(TransE)
        assert module.predict_tails(0, 0, k=1)[0].uncertainty is None
        with pytest.raises(ValueError, match="entities of Translation are points without uncertainty"):
            module.uncertainty()

    @pytest.mark.parametrize(
        ("triple", "message"),
        [
            (("person 13", "next", 0), "the graph has no entity 'person 13'; did you mean 'person 3', 'person 1'"),
            ((0, "nxet", 0), r"the graph has no relation 'nxet'; did you mean 'next'\?"),
            ((0, 0, 12), "the graph has no entity 12; numbers run from 0 to 11"),
            ((0, 3, 1), "the graph has no relation 3; numbers run from 0 to 2"),
            (("?", 0, 1), r"the graph has no entity '\?'; numbers run from 0 to 11"),
        ],
    )
    def test_unknown_names(self, triple, message):
        with pytest.raises(ValueError, match=message):
            make().score([triple])

    @pytest.mark.parametrize("kind", ["nfe1", "nfe2", "affine_point"])
    def test_relation_patterns(self, kind):
        """A rotation of period two by construction, an inverse pair, and a composition."""
        graph = KnowledgeGraph(tuple(map(str, range(30))), ("mirror", "there", "back", "twice"))
        torch.manual_seed(0)
        module = NFE(kind, 8, graph=graph, init=Init("normal", 1.0))
        module.configure_model()
        with torch.no_grad():
            rows = module.tables[1].weight
            shift, scale = rows[:4, :8], rows[:4, 8:]
            scale[0] = -1
            scale[1] = scale[1].sign() * (0.5 + scale[1].abs())
            scale[2], shift[2] = 1 / scale[1], -shift[1] / scale[1]
            scale[3], shift[3] = scale[1] ** 2, scale[1] * shift[1] + shift[1]
        found = {(pattern.kind, pattern.relations): pattern.difference for pattern in module.relation_patterns(k=1)}
        assert list(found) == [("symmetric", ("mirror",)), ("inverse", ("there", "back")), ("composed", ("there", "there", "twice"))] or (
            ("composed", ("twice", "back", "there")) in found or ("composed", ("back", "twice", "there")) in found
        )
        assert max(found.values()) < 1e-8

    def test_patterns_of_the_others(self):
        assert {pattern.kind for pattern in make(DistMult).relation_patterns()} == {"symmetric", "inverse", "composed"}
        assert make(kind=NFE, graph=tiny_graph()).relation_patterns(k=1)[0].kind == "symmetric"
        sigma = NFE("sigma", 4, graph=tiny_graph())
        sigma.configure_model()
        assert len(sigma.relation_patterns(k=2)) == 6
        among = make().relation_patterns(among=["opposite", 0])
        assert {label for pattern in among for label in pattern.relations} == {"opposite", "next"}

    def test_export(self, tmp_path):
        module = make()
        for _ in range(2):  # the second takes the place of the first
            assert module.export(tmp_path / "embeddings") == tmp_path / "embeddings"
        tensors = load_file(tmp_path / "embeddings" / "embeddings.safetensors")
        assert {name: tuple(part.shape) for name, part in tensors.items()} == {
            "entity.mu": (12, 6),
            "entity.s": (12, 6),
            "relation.b": (6, 6),
            "relation.a": (6, 6),
        }
        assert torch.equal(torch.cat([tensors["entity.mu"], tensors["entity.s"]], 1), module.tables[0].weight)
        labels = json.loads((tmp_path / "embeddings" / "labels.json").read_text())
        assert labels == {"entities": list(tiny_graph().entities), "relations": list(tiny_graph().relations)}
        assert [path.name for path in tmp_path.iterdir()] == ["embeddings"]


class TestCheckpoints:
    def saved(self, tmp_path):
        module = make(
            gamma=2.0, gamma_trainable=True, loss=Softmax(0.1), regulariser=F2(), tuning=EmbeddingTuning(lr=0.05), ranking=LinkRanking((1, 2))
        )
        trainer = quiet_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
        trainer.fit(module, TinyGraphData())
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
        return module, tmp_path / "saved.ckpt"

    def test_a_checkpoint_alone_answers_queries(self, tmp_path):
        module, path = self.saved(tmp_path)
        loaded = NFE.load_from_checkpoint(path, weights_only=True)
        assert loaded.graph == module.graph
        assert isinstance(loaded.loss, Softmax)
        assert loaded.loss.smoothing == 0.1
        assert loaded.regulariser.weight == module.regulariser.weight
        assert tuple(loaded.ranking.ks) == (1, 2)
        assert loaded.predict_tails("person 1", "next") == module.eval().predict_tails("person 1", "next")

    def test_another_graph_is_refused(self, tmp_path):
        _, path = self.saved(tmp_path)
        other = KnowledgeGraph(tuple(reversed(tiny_graph().entities)), tiny_graph().relations)
        with pytest.raises(MisconfigurationException, match="in another order, first at position 0: 'person 0' in the checkpoint, 'person 11' here"):
            NFE.load_from_checkpoint(path, graph=other)

    def test_a_checkpoint_without_a_graph(self):
        with pytest.raises(MisconfigurationException, match="NFE needs `graph`, which the checkpoint does not contain"):
            NFE().on_load_checkpoint({})
