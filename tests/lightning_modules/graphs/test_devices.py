"""What knowledge-graph embeddings ask of an accelerator: no waiting in steps, the same start and the same ranks on every device."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from synchronisations import Synchronisations
from tiny_data import quiet_trainer
from tiny_graph import TinyGraphData, collate_queries, grouped_rows, query_rows, tiny_graph, tiny_triples

from malleable.datamodules.batch import KnowledgeGraph, QueryBatch
from malleable.lightning_modules.graphs.nfe import NFE
from malleable.lightning_modules.graphs.point_embeddings import ComplEx, DistMult, RotatE, TransE
from malleable.lightning_modules.graphs.settings import EmbeddingTuning, Init
from malleable.lightning_modules.losses.embedding import DURA, N3, BCESum, KvsAll, NegativeSampling, Softmax
from malleable.lightning_modules.metrics.link_prediction import QueryEntities, filtered_ranks

ROWS = query_rows(tiny_triples())
MODELS = {
    **{kind: lambda kind=kind, **settings: NFE(kind, **settings) for kind in ("nfe1", "nfe2", "nfe3", "affine_point", "sigma")},
    **{kind.__name__: kind for kind in (TransE, DistMult, ComplEx, RotatE)},
}
LOSSES = {
    "BCESum": BCESum(0.1),
    "BCESum in chunks": BCESum(chunk=5),
    "Softmax": Softmax(),
    "Softmax in chunks": Softmax(0.1, chunk=5),
    "KvsAll": KvsAll(),
    "NegativeSampling": NegativeSampling(4),
    "NegativeSampling shared": NegativeSampling(4, 1.0, shared=True),
}
EVERY_MODEL = pytest.mark.parametrize("model", MODELS)
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES)


def make(model, seed=0, **settings):
    torch.manual_seed(seed)
    module = MODELS[model](**{"dimension": 6, "graph": tiny_graph(), "init": Init(scale=0.8), **settings})
    module.configure_model()
    return module


class TestWaiting:
    """On meta tensors, where code takes the paths of an accelerator."""

    @EVERY_MODEL
    @EVERY_LOSS
    def test_a_training_step_does_not_synchronise(self, model, loss):
        regulariser = DURA() if model == "nfe3" else N3()
        module = make(model, loss=LOSSES[loss], regulariser=regulariser, dropout=0.1).to("meta")
        batch = collate_queries(grouped_rows(ROWS), filtered=False).to("meta")
        for step in (None, torch.tensor(3.0, device="meta")):
            batch.num_step_tokens = batch.num_step_rows = step
            with Synchronisations() as waits:
                module.compute_loss(batch).loss.backward()
            assert not waits.found, waits

    @EVERY_MODEL
    def test_an_evaluation_step_does_not_synchronise(self, model):
        module = make(model).to("meta")
        metrics = {name: metric.to("meta") for name, metric in module.configure_metrics().items()}
        batch = collate_queries(ROWS).to("meta")
        batch.one_each = True
        with Synchronisations() as waits, torch.no_grad():
            module.compute_loss(batch)
            module.evaluate(batch, metrics)
        assert not waits.found, waits


class TestStart:
    @EVERY_MODEL
    def test_a_seed_gives_the_same_model_on_every_device_and_in_every_precision(self, model):
        expected = make(model).state_dict()
        for device in ("cpu", "meta"):  # as Lightning's context for an accelerator
            for dtype in (torch.bfloat16, torch.float16, torch.float64):
                module = MODELS[model](dimension=6, graph=tiny_graph(), init=Init(scale=0.8))
                torch.manual_seed(0)
                torch.set_default_dtype(dtype)
                try:
                    with torch.device(device):
                        module.configure_model()
                finally:
                    torch.set_default_dtype(torch.float32)
                for name, value in module.state_dict().items():
                    assert torch.equal(value, expected[name].to(dtype)), name


class TestOptimizer:
    @pytest.mark.parametrize("clip", [None, 0.5])
    def test_mixed_precision_and_clipping_go_together(self, clip, tmp_path):
        """Lightning clips no gradients of optimizers that undo the scale of gradients themselves, as fused ones may."""
        module = NFE(dimension=6, tuning=EmbeddingTuning(lr=0.1))
        trainer = quiet_trainer(tmp_path, max_epochs=1, precision="bf16-mixed", gradient_clip_val=clip, enable_checkpointing=False)
        trainer.fit(module, TinyGraphData(batch_size=24))
        assert trainer.optimizers[0].defaults["fused"]

    def test_half_precision_tables(self, tmp_path):
        settings = {"max_epochs": 1, "limit_val_batches": 0, "enable_checkpointing": False}
        with pytest.warns(
            UserWarning, match=r"tables of NFE are trained in bfloat16: updates below 1/256 of an entry are lost; use precision 32-true"
        ):
            quiet_trainer(tmp_path, precision="bf16-true", **settings).fit(NFE(dimension=6), TinyGraphData())
        with pytest.raises(
            MisconfigurationException, match="tables of NFE cannot be trained in float16: Adam's epsilon underflows; use precision 32"
        ):
            quiet_trainer(tmp_path, precision="16-true", **settings).fit(NFE(dimension=6), TinyGraphData())

    def test_fused_or_not_the_weights_are_the_same(self):
        modules = [make("nfe2"), make("nfe2")]
        optimizers = [module.default_optimizer(module.parameter_groups()) for module in modules]
        assert optimizers[0].defaults["fused"]
        for group in optimizers[1].param_groups:
            group["fused"] = False
        for _ in range(20):
            for module, optimizer in zip(modules, optimizers, strict=True):
                optimizer.zero_grad()
                module.compute_loss(collate_queries(ROWS)).loss.backward()
                optimizer.step()
        for own, other in zip(modules[0].tables, modules[1].tables, strict=True):
            torch.testing.assert_close(own.weight, other.weight, rtol=0, atol=1e-6)


class TestTies:
    """Entities with equal rows have equal scores, wherever they stand and however many queries are scored together."""

    @EVERY_MODEL
    @pytest.mark.parametrize("entities", [135, 2006])
    def test_duplicates_tie_in_batches_of_any_size(self, model, entities):
        graph = KnowledgeGraph(tuple(map(str, range(entities))), ("r", "s"))
        module = make(model, graph=graph, dimension=16)
        half = entities // 2
        twin = torch.randperm(half)
        with torch.no_grad():
            module.tables[0].weight[half : 2 * half] = module.tables[0].weight[twin]
        figures = set()
        for size in (1, 2, 7, 64):
            metrics = module.configure_metrics()
            for start in range(0, 64, size):
                number = torch.arange(start, min(start + size, 64))
                batch = QueryBatch(number, number % half, number % 4, number, number - start, number[:0], number[:0], one_each=True)
                ((_, scores),) = module._scores(batch, ranking=True)
                assert torch.equal(scores[:, half : 2 * half], scores[:, twin])
                # The pessimistic rank counts the twin, the optimistic one does not.
                best, worst = (
                    filtered_ranks(scores, QueryEntities(twin[number], None), QueryEntities(number[:0], number[:0]), ties)
                    for ties in ("optimistic", "pessimistic")
                )
                assert (worst - best >= 1).all()
                module.evaluate(batch, metrics)
            figures.add(metrics["ranking"].compute()["mrr"].item())
        assert len(figures) == 1


def figures_of(module, batch):
    """Loss, ranks and predictions of a batch."""
    metrics = module.configure_metrics()
    torch.manual_seed(1)
    loss = module.compute_loss(batch).loss.detach()
    module.evaluate(batch, metrics)
    named = module.predict_tails(1, 0, k=3), module.predict_heads(1, 2, k=3), module.predict_relations(0, 1)
    return [loss, module.score([(0, 0, 1), (3, 2, 5)]), *module.predict_step(batch), *metrics["ranking"].compute().values()], named


class TestPrecision:
    """Losses, scores and ranks of half precision are those of single precision, bit for bit, from equal weights."""

    @EVERY_MODEL
    @EVERY_LOSS
    def test_equal_under_every_precision(self, model, loss):
        settings = {"gamma": 2.0, "gamma_trainable": True} if model not in ("DistMult", "ComplEx") else {}
        module = make(model, loss=LOSSES[loss], regulariser=DURA(), **settings)
        with torch.no_grad():
            for table in module.tables:
                table.weight.copy_(table.weight.bfloat16().half())
        batch = collate_queries(ROWS)
        expected, names = figures_of(module, batch)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                found, again = figures_of(module, batch)
            assert all(own.dtype == other.dtype and torch.equal(own, other) for own, other in zip(found, expected, strict=True)), dtype
            assert again == names
        for dtype in (torch.bfloat16, torch.float16):
            found, again = figures_of(module.to(dtype), batch)
            assert all(own.dtype == other.dtype and torch.equal(own, other) for own, other in zip(found, expected, strict=True)), dtype
            assert again == names

    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
    def test_a_trainer_reports_the_figures_of_single_precision(self, precision, tmp_path):
        module = make("nfe2", loss=Softmax())
        with torch.no_grad():
            for table in module.tables:
                table.weight.copy_(table.weight.bfloat16())
        figures = []
        for setting in ("32-true", precision):
            trainer = quiet_trainer(tmp_path, precision=setting)
            figures.append(trainer.validate(module, TinyGraphData(), verbose=False)[0] | trainer.test(module, TinyGraphData(), verbose=False)[0])
        assert figures[0] == figures[1]
        assert "val_loss" in figures[0]
