"""AlphaEdit and EditEvaluation: evaluation before and after the edit, and after each batch."""

import copy
import json
import math

import pytest
import torch
from launch import launch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import MixedPrecision
from post_fit_run import FactModule, edit, evaluation, trainer_of
from small_facts import KNOWN, NEW, OTHERS, PARAPHRASE, SETTINGS, TEXTS

from malleable import EditEvaluation, RunReport
from malleable.callbacks.editing import edit_evaluation
from malleable.callbacks.editing.edit_report import UsedDirections, edit_sections, spectrum_section, survival_section
from malleable.callbacks.report.plots import save_figure
from malleable.lightning_modules.editing.evaluation import evaluate_edits
from malleable.lightning_modules.editing.known import KnownFacts
from malleable.lightning_modules.editing.settings import EditSettings

TRUE = {fact.subject: fact.target for fact in KNOWN}


def make_request(fact, number, neighbors=2):
    others = OTHERS[number * neighbors : (number + 1) * neighbors]
    return {
        "prompt": fact.prompt,
        "subject": fact.subject,
        "target": fact.target,
        "true": TRUE[fact.subject],
        "paraphrases": [PARAPHRASE.replace("{}", fact.subject)],
        "neighbors": [{"prompt": other.prompt.replace("{}", other.subject), "answer": other.target} for other in others],
    }


REQUESTS = [make_request(fact, number) for number, fact in enumerate(NEW)]
BATCHES = {"settings": EditSettings(**{**SETTINGS, "batch_size": 2}), "requests": REQUESTS}
LITTLE = {"survival": False, "answers": 0, "texts": 0}


@pytest.fixture(scope="module")
def learnt():
    module = FactModule()
    module.learn()
    return module


@pytest.fixture(scope="module")
def run(learnt, tmp_path_factory):
    """Fit, edit in batches, and test, with a report."""
    folder = tmp_path_factory.mktemp("run")
    callback, measured = edit(**BATCHES), evaluation()
    trainer = trainer_of(folder, measured, callback)
    trainer.callbacks.append(RunReport(str(folder / "report")))
    module = copy.deepcopy(learnt)
    trainer.fit(module)
    (figures,) = trainer.test(module, verbose=False)
    return folder, trainer, callback, figures, measured


def test_evaluation_before_and_after_the_edit(run):
    _, trainer, _, figures, measured = run
    assert figures["test_efficacy"] == figures["test_efficacy_exact"] == 100
    assert figures["test_specificity"] == 100
    assert figures["test_generalization"] >= 50
    assert figures["test_new"] == 1
    assert measured.before.figures["efficacy"] == 0
    assert measured.before.figures["specificity_exact"] == 100
    assert figures["test_perplexity_ratio"] == pytest.approx(measured.after.figures["perplexity"] / measured.before.figures["perplexity"])
    # The tested weights are the edited ones, to the bit, after the originals had been put in their place.
    stored = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]
    own = trainer.lightning_module.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in stored.items())


def test_report_sections(run):
    folder = run[0]
    page = (folder / "report/report.md").read_text()
    assert "| before the edit |" in page
    for fact, request in zip(NEW, REQUESTS, strict=True):
        line = next(line for line in page.splitlines() if line.startswith(f"| the capital of {fact.subject} |"))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1] == f"{request['true']} → {fact.target}"
        assert cells[2].startswith(request["true"])
        assert cells[3].startswith(fact.target)
        assert cells[4] == "0 % → 100 %"
    assert "After the last of 3 batches" in page
    assert "relative_energy 0.001" in page
    for name in ("survival_of_edits.png", "second_moments_of_keys.png"):
        assert (folder / "report" / name).stat().st_size > 10_000
    metrics = json.loads((folder / "report/metrics.json").read_text())
    assert metrics["test_efficacy"] == 100
    assert metrics["before_efficacy"] == 0


def test_patch_contains_the_results_of_each_request(run):
    (patch,) = run[2].stack.patches
    assert patch.figures["before"] == pytest.approx(run[4].before.figures)
    assert patch.figures["after"] == pytest.approx(run[4].after.figures), "those of the test"
    assert patch.figures["after"]["drift"] == pytest.approx(run[3]["test_drift"])
    for request in patch.requests:
        before, after = request["outcome"]["before"], request["outcome"]["after"]
        assert before["efficacy"] == 0
        assert after["efficacy_exact"] == 1
        assert before["answer"].startswith(request["true"])
        assert after["answer"].startswith(request["target"])
        assert all(not isinstance(value, float) or math.isfinite(value) for value in after.values())


def test_id_of_the_patch_does_not_depend_on_the_evaluation(run, learnt, tmp_path):
    callback = edit(**BATCHES)
    trainer_of(tmp_path, callback, evaluation(**LITTLE)).fit(copy.deepcopy(learnt))
    assert callback.applied == run[2].applied


def test_edit_without_evaluation(run, learnt, tmp_path):
    callback = edit(**BATCHES)
    trainer = trainer_of(tmp_path, callback)
    trainer.fit(copy.deepcopy(learnt))
    (figures,) = trainer.test(verbose=False)
    (patch,) = callback.stack.patches
    assert callback.applied == run[2].applied
    assert patch.figures.keys() == {"after"}
    assert patch.figures["after"].keys() == {"drift"}
    assert figures.keys() == {"test_new", "test_others"}


def test_order_of_the_callbacks(run, learnt, tmp_path):
    measured = evaluation()
    trainer, module = trainer_of(tmp_path, edit(**BATCHES), measured), copy.deepcopy(learnt)
    trainer.fit(module)
    (figures,) = trainer.test(module, verbose=False)
    assert figures == run[3]
    assert measured.before.figures == run[4].before.figures
    one, other = (callback.stack.patches[0] for callback in (measured, run[4]))
    assert (one.figures, one.requests) == (other.figures, other.requests)
    assert [section.title for section in measured.report_sections()] == ["Facts before and after", "Survival of edits"]


def test_references_are_used_in_the_test_but_not_stored(learnt, tmp_path):
    told = {"generation_prompts": ["the capital of"], "references": ["the capital of Peru park park"]}
    callback, measured = edit(requests=[{**request, **told} for request in REQUESTS]), evaluation(writing=12)
    trainer = trainer_of(tmp_path, callback, measured)
    module = copy.deepcopy(learnt)
    trainer.fit(module)
    (patch,) = callback.stack.patches
    assert not any("references" in request for request in patch.requests)
    after = dict(measured.after.figures)
    assert after.keys() >= {"fluency", "consistency"}
    (figures,) = trainer.test(module, verbose=False)
    assert figures["test_consistency"] == pytest.approx(after["consistency"], rel=1e-4)
    assert figures["test_fluency"] == pytest.approx(after["fluency"], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": {"layers": [0, 9]}}, r"layers \[9\] do not exist"),
        ({"settings": {"projection": "model.layers.{}.mlp.none"}}, "projection='model.layers.{}.mlp.none' names no module"),
        ({"requests": [{"prompt": "{} is", "subject": "Peru", "target": "\u200b"}]}, "the answer"),
    ],
)
def test_invalid_edit_raises_before_training(learnt, tmp_path, options, message):
    module, steps = copy.deepcopy(learnt), []
    module.on_train_start = lambda: steps.append(1)
    if "requests" in options:
        module.tokenizer = TokenizerWithoutInvisibleCharacters(module.tokenizer)
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, edit(**options)).fit(module)
    assert not steps


class TokenizerWithoutInvisibleCharacters:
    """Has no tokens for what cannot be seen."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, text, **options):
        return self.tokenizer(text.replace("\u200b", "").rstrip() if isinstance(text, str) else text, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": {"method": "AlphaEdit"}}, "method must be one of alpha_edit, memit, ridge, fine_tune, got 'AlphaEdit'"),
        ({"settings": {"threshold": {"mode": "relative"}}}, r"threshold\.mode must be one of absolute, .*got 'relative'"),
        ({"settings": {"fact_token": "subject-last"}}, "fact_token must be one of subject_last, .*got 'subject-last'"),
    ],
)
def test_invalid_settings_raise(options, message):
    with pytest.raises(ValueError, match=message):
        edit(**options)
    with pytest.raises(ValueError, match=r"protocol\.max_rows must be >= 1, got 0"):
        EditEvaluation({"max_rows": 0})


def test_tokenizer_created_in_setup(learnt, tmp_path):
    module = copy.deepcopy(learnt)
    tokenizer = module.tokenizer
    del module.tokenizer
    module.setup = lambda stage: setattr(module, "tokenizer", tokenizer)
    callback = edit(**BATCHES)
    trainer_of(tmp_path, callback, evaluation(**LITTLE)).fit(module)
    assert callback.applied


@pytest.mark.parametrize("alone", [True, False])
def test_test_of_a_checkpoint_evaluates_the_requests_of_its_patches(run, tmp_path, alone):
    _, trainer, _, figures, _ = run
    callback, measured, module = edit(requests=None), evaluation(), FactModule()
    tested = trainer_of(tmp_path, *([measured] if alone else [callback, measured]))
    (again,) = tested.test(module, ckpt_path=trainer.checkpoint_callback.best_model_path, weights_only=True, verbose=False)
    assert again == figures
    assert [section.title for section in measured.report_sections()] == ["Facts before and after", "Survival of edits"]
    assert [section.title for section in callback.report_sections()] == ([] if alone else ["Second moments of keys"])
    assert measured.before.figures["efficacy"] == 0


def test_test_after_fit_does_not_evaluate_the_originals_again(learnt, tmp_path, monkeypatch):
    measured = evaluation(survival=False, texts=0)
    trainer, module = trainer_of(tmp_path, edit(**BATCHES), measured), copy.deepcopy(learnt)
    trainer.fit(module)
    before, calls = measured.before, []
    monkeypatch.setattr(edit_evaluation, "evaluate_edits", lambda *arguments: calls.append(1) or evaluate_edits(*arguments))
    trainer.test(module, verbose=False)
    assert len(calls) == 1
    assert measured.before is before


@pytest.mark.parametrize("given", [True, False])
def test_unedited_model_is_evaluated_once(learnt, tmp_path, given):
    measured = EditEvaluation(requests=REQUESTS, texts=TEXTS) if given else evaluation()
    callbacks = [measured] if given else [measured, edit(**BATCHES)]
    (figures,) = trainer_of(tmp_path, *callbacks).test(copy.deepcopy(learnt), verbose=False)
    assert figures["test_efficacy"] == 0
    assert figures["test_specificity"] == 100
    assert not measured.before.figures
    assert measured.report_columns() == []
    assert "test_perplexity_ratio" not in figures


def test_only_known_facts_are_edited(learnt, tmp_path):
    unknown = [{**make_request(fact, 0), "true": "Zürich"} for fact in OTHERS[-2:]]
    strange = {"prompt": "the capital of Lima", "answer": "Zürich"}
    lonely = {**REQUESTS[1], "neighbors": [strange]}
    mixed = {**REQUESTS[0], "neighbors": [*REQUESTS[0]["neighbors"], strange]}
    callback = edit(requests=[*unknown, mixed, lonely, *REQUESTS[2:5]], known=KnownFacts(min_neighbors=1, limit=3))
    measured = evaluation(survival=False)
    trainer = trainer_of(tmp_path, measured, callback)
    trainer.fit(copy.deepcopy(learnt))
    (patch,) = callback.stack.patches
    assert [request["subject"] for request in patch.requests] == [REQUESTS[number]["subject"] for number in (0, 2, 3)]
    assert strange not in patch.requests[0]["neighbors"]
    assert len(measured.after.requests) == 3
    assert not any("survival" in section.title.lower() for section in measured.report_sections())


def test_no_known_fact_raises(learnt, tmp_path):
    callback = edit(requests=[{**make_request(OTHERS[0], 0), "true": "Zürich"}], known={})
    with pytest.raises(ValueError, match=r"gives the true answer of none of the 1 requests.* there is no known fact to edit"):
        trainer_of(tmp_path, callback).fit(copy.deepcopy(learnt))
    with pytest.raises(ValueError, match=r"known\.limit must be >= 1"):
        KnownFacts(limit=0)


def test_texts_from_a_file(learnt, tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    given, read = (edit(texts=texts) for texts in (TEXTS, str(tmp_path / "texts.json")))
    for callback in (given, read):
        trainer_of(tmp_path / "run", callback, max_steps=0).fit(copy.deepcopy(learnt))
    assert given.applied == read.applied
    for callback in (edit(texts="none.txt"), EditEvaluation(texts="none.txt")):
        with pytest.raises(FileNotFoundError, match=r"the file none\.txt does not exist; give a file of texts"):
            trainer_of(tmp_path, callback).fit(copy.deepcopy(learnt))
    with pytest.raises(MisconfigurationException, match=r"AlphaEdit needs texts=\.\.\. \(a file or a list\)"):
        trainer_of(tmp_path, edit(texts=None)).fit(copy.deepcopy(learnt))


def test_long_reports_show_the_facts_with_the_lowest_efficacy():
    from malleable.datamodules.editing.requests import EditRequest
    from malleable.lightning_modules.editing.evaluation import EvaluationResult
    from malleable.lightning_modules.metrics.editing import RequestFigures

    requests = [EditRequest(str(number), "{} is", f"fact {number}", "new", "old") for number in range(100)]
    results = [RequestFigures(float(number != 90), *[math.nan] * 8) for number in range(100)]
    before = EvaluationResult([RequestFigures(*[0.0] * 9)] * 100, ["old"] * 100)
    (section,) = edit_sections(requests, before, EvaluationResult(results, ["new"] * 100))
    header, rows = section.table
    assert len(rows) == 60
    assert rows[-1][0] == "fact 90 is"
    assert rows[-1][-3:] == ["0 % → 0 %", "0 % → –", "0 % → –"]
    assert "60 of 100 facts with the lowest efficacy" in section.text
    assert len(header) == len(rows[0])
    assert edit_sections(requests, EvaluationResult(), EvaluationResult(results)) == []


def test_figures_of_survival_and_of_methods_without_a_null_space(tmp_path):
    matrix = [[100.0, math.nan], [50.0, 100.0]]
    (section,) = survival_section({"edits": [5, 10], "matrix": matrix, "curve": [100.0, 75.0]})
    assert "After the last of 2 batches, 75.0 % of all edited facts are effective" in section.text
    assert survival_section({}) == survival_section({"edits": [5], "matrix": [[100.0]], "curve": [100.0]}) == []
    values = torch.linspace(1e-4, 1, 64)
    (spectrum,) = spectrum_section({0: UsedDirections(values, None), 1: UsedDirections(values, 64)}, "all")
    assert spectrum.table[1][0][1] is None
    for number, one in enumerate((section, spectrum)):
        save_figure(tmp_path / f"{number}.png", one.figure, one.figure_size)
        assert (tmp_path / f"{number}.png").stat().st_size > 5_000


SHORT = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "1"]
SHORT += ["--data.shuffles", "1", "--data.source.init_args.limit", "4", "--data.source.init_args.relations", '["continent"]']
SHORT += ["--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1"]
SHORT += ["--trainer.callbacks.EditEvaluation.protocol", '{"writing": 8, "texts": 8, "generated_tokens": 4}']
SHORT += ["--trainer.callbacks.settings.layers", "[0]", "--trainer.callbacks.settings.targets.steps", "3"]
RUN_ALL = "import json, sys; from malleable.cli import run; [run(words) for words in json.loads(sys.argv[1])]"


@pytest.mark.slow
@pytest.mark.ddp
def test_tiny_recipe_on_two_ranks_with_a_trained_and_a_frozen_model(tmp_path):
    recipe = ["fit", "--config", "alpha_edit/tiny.yaml", "--config", "base/ddp.yaml", *SHORT]
    small = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "max_length": 256}
    runs = [tmp_path / f"runs/alpha_edit/tiny/version_{number}" for number in (0, 1)]
    exported = str(runs[0] / "model")
    trained = ["--model.language_model", json.dumps({"scratch": small})]
    frozen = ["--model.language_model", json.dumps({"name": exported}), "--data.tokenizer", exported, "--model.frozen", "true"]
    commands = [[*recipe, *trained], [*recipe, *frozen, "--trainer.max_steps", "0", "--trainer.limit_train_batches", "0"]]
    launch(["-c", RUN_ALL, json.dumps(commands)], ranks=2, cwd=tmp_path, timeout_s=240)
    for folder in runs:
        assert len(list((folder / "patches").glob("*/patch.json"))) == 1
        figures = json.loads((folder / "report/metrics.json").read_text())
        assert {"test_efficacy", "test_efficacy_generated", "test_perplexity_ratio", "test_fluency"} <= figures.keys()


@pytest.mark.parametrize("precision", [pytest.param("16-mixed", marks=pytest.mark.slow), "bf16-mixed", "bf16-true"])
def test_edit_does_not_depend_on_the_precision_of_the_fit(run, learnt, tmp_path, precision):
    """Edits are found and measured outside autocast; weights in half precision get the sum of a layer's updates, rounded once."""
    callback = edit(**BATCHES)
    # Lightning takes bf16-mixed on a CPU where 16-mixed is its name.
    plugins = {"plugins": [MixedPrecision("16-mixed", "cpu")]} if precision == "16-mixed" else {"precision": precision}
    trainer = trainer_of(tmp_path, callback, evaluation(), **plugins)
    module = copy.deepcopy(learnt)
    trainer.fit(module)
    (figures,) = trainer.test(module, verbose=False)
    expected = run[3]
    for name in ("test_efficacy", "test_efficacy_exact", "test_specificity", "test_new"):
        assert figures[name] == expected[name], name
    assert figures["test_perplexity_ratio"] == pytest.approx(expected["test_perplexity_ratio"], abs=0.01)
    (patch,) = callback.stack.patches
    weights = dict(module.model.named_parameters())
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16 if precision == "bf16-true" else torch.float32}
    for name, delta in patch.deltas.items():
        assert delta.dense().dtype == torch.float32
        whole = callback.stack.originals[name].float() + delta.dense()
        assert torch.equal(weights[name].float(), whole.to(weights[name].dtype).float()), "rounded once"
    assert torch.get_default_dtype() == torch.float32
