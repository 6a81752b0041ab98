"""Metrics of edits, on fixed logits and on a decoder trained on facts."""

import math

import pytest
import torch
from small_editing import decoder, tokenizer
from small_facts import ANSWERS, KNOWN, NEW, PARAPHRASE, learnt_decoder, share

from malleable.datamodules.editing.requests import EditRequest, Probe
from malleable.lightning_modules.editing.answers import (
    evaluate_answers,
    evaluate_generated_answers,
    evaluate_generated_texts,
    evaluate_requests,
    generate_answers,
    generate_texts,
    perplexity,
    stop_tokens,
)
from malleable.lightning_modules.editing.prompts import PromptEncoder
from malleable.lightning_modules.metrics.editing import EditingMetrics, RequestFigures


class FixedModel(torch.nn.Module):
    """Model with fixed log-probabilities of the first token of answers; other tokens are improbable.

    Args:
        logps_by_text: Log-probability of the first token of an answer, by text and answer.
    """

    def __init__(self, encoder, logps_by_text):
        super().__init__()
        self.encoder, self.head = encoder, torch.nn.Identity()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.logps_by_text = {}
        for (text, answer), logp in logps_by_text.items():
            self.logps_by_text.setdefault(tuple(encoder.encode_text(text).ids), {})[encoder.encode_answer(answer)[0]] = logp

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask, use_cache):
        logits = torch.full((*input_ids.shape, 800), -50.0)
        for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            for end in range(1, sum(mask) + 1):
                for token, logp in self.logps_by_text.get(tuple(ids[:end]), {}).items():
                    logits[row, end - 1, token] = logp
                # The remaining probability belongs to a token that is not an answer.
                logits[row, end - 1, 3] = math.log(max(1e-9, 1 - float(logits[row, end - 1].exp().sum())))
        return type("Output", (), {"logits": self.head(logits)})


PROBES = (Probe("the capital of Lima", "park"), Probe("Lima", "park"))
REQUEST = EditRequest(
    "1",
    "the capital of {}",
    "Peru",
    "house",
    "park",
    ("so Peru", "I know Peru", "Peru"),
    (Probe("the capital of Lima", "park"), Probe("Lima", "park")),
)


def summary(figures):
    metric = EditingMetrics()
    metric.update(figures)
    return {name: float(value) for name, value in metric.compute().items()}


def test_figures_equal_hand_computed_values():
    encoder = PromptEncoder(tokenizer("bos"))
    logps_by_text = {
        ("the capital of Peru", "house"): math.log(0.6),
        ("the capital of Peru", "park"): math.log(0.3),
        ("so Peru", "house"): math.log(0.2),  # likelier than the old answer, but not the likeliest
        ("so Peru", "park"): math.log(0.1),
        ("I know Peru", "house"): math.log(0.7),
        ("I know Peru", "park"): math.log(0.1),
        ("Peru", "house"): math.log(0.1),
        ("Peru", "park"): math.log(0.8),
        ("the capital of Lima", "park"): math.log(0.9),
        ("the capital of Lima", "house"): math.log(0.05),
        ("Lima", "park"): math.log(0.1),
        ("Lima", "house"): math.log(0.2),
    }
    (figures,) = evaluate_requests(FixedModel(encoder, logps_by_text), encoder, [REQUEST])
    assert figures[:9] == pytest.approx((1, 2 / 3, 1 / 2, 1, 1 / 3, 1 / 2, 1, 1 / 3, 1 / 2))
    means = summary([figures, RequestFigures(0, math.nan, 1, 0, math.nan, 1, 0, math.nan, 1)])
    assert means["efficacy"] == 50
    assert means["generalization"] == pytest.approx(200 / 3), "the request without paraphrases is not counted"
    assert means["specificity"] == 75
    assert means["score"] == pytest.approx(3 / (1 / 50 + 3 / 200 + 1 / 75))


def test_neighbour_with_the_target_as_answer_has_no_specificity():
    model, encoder = decoder(), PromptEncoder(tokenizer("bos"))
    request = EditRequest("1", "the capital of {}", "Peru", "house", "park", neighbors=(Probe("the capital of Lima", "house"),))
    (figures,) = evaluate_requests(model, encoder, [request])
    assert math.isnan(figures.specificity)
    assert figures.specificity_exact == 0


def test_scores_of_answers_with_several_tokens():
    model, encoder = decoder(), PromptEncoder(tokenizer("bos"))
    questions = [("The capital of Peru is", "Zürich"), ("I saw", "Anna and Tom"), ("I", "dog")]
    found = evaluate_answers(model, encoder, questions, max_rows=2)
    for number, (text, answer) in enumerate(questions):
        ids, tokens = encoder.encode_text(text).ids, encoder.encode_answer(answer)
        logps = model(torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        own = logps[torch.arange(len(tokens)), torch.tensor(tokens)]
        assert float(found.nll[number]) == pytest.approx(-float(own.mean()), rel=1e-4)
        assert float(found.accuracy[number]) == pytest.approx(float((logps.argmax(-1) == torch.tensor(tokens)).float().mean()))


def test_trained_facts_are_exact():
    model, encoder = learnt_decoder(), PromptEncoder(tokenizer("bos"))
    known = [EditRequest(str(number), fact.prompt, fact.subject, fact.target) for number, fact in enumerate(KNOWN)]
    assert summary(evaluate_requests(model, encoder, known)) == {"efficacy": 100, "efficacy_exact": 100, "efficacy_accuracy": 100}
    new = [EditRequest(str(number), fact.prompt, fact.subject, fact.target) for number, fact in enumerate(NEW)]
    assert summary(evaluate_requests(model, encoder, new))["efficacy"] == 100 * share(model, NEW) == 0


@pytest.mark.parametrize("max_logits", [1, 40 * 480, 1 << 26])
def test_perplexity_equals_mean_over_single_texts(max_logits):
    model, encoder = decoder(), PromptEncoder(tokenizer("bos"))
    texts = ["Anna lives in Lima", "I saw the big dog in the park", "", "The capital of Peru is Lima. Lima lies on the coast, and Peru"]
    losses, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([encoder.tokenizer(text)["input_ids"][:12]])
        if ids.shape[1] > 1:
            losses += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert perplexity(model, encoder, texts, 12, max_logits) == pytest.approx(math.exp(losses / count), rel=1e-5)
    with pytest.raises(ValueError, match="two tokens"):
        perplexity(model, encoder, [""])


def test_generated_texts_depend_on_position_and_seed_only():
    model, cut = decoder(), tokenizer("bos")
    prompts = ["Anna lives in", "I", "The capital of Peru is"]
    texts = generate_texts(model, cut, prompts, length=12)
    assert all(text.startswith(prompt) for text, prompt in zip(texts, prompts, strict=True))
    assert texts == generate_texts(model, cut, prompts, length=12, max_rows=2)
    assert texts != generate_texts(model, cut, prompts, length=12, seed=1)
    # With top_k=1 the seed has no effect.
    assert generate_texts(model, cut, prompts, length=12, top_k=1) == generate_texts(model, cut, prompts, length=12, top_k=1, seed=1)


def test_generated_answers_are_greedy():
    model, encoder = learnt_decoder(), PromptEncoder(tokenizer("bos"))
    prompts = [fact.prompt.format(fact.subject) for fact in KNOWN]
    assert generate_answers(model, encoder, prompts, [len(encoder.encode_answer(fact.target)) for fact in KNOWN], max_rows=7) == [
        fact.target for fact in KNOWN
    ]


def test_generated_answers_are_compared_with_targets():
    model, encoder = learnt_decoder(), PromptEncoder(tokenizer("bos"))
    fact, other = KNOWN[:2]
    known = EditRequest(
        "1",
        fact.prompt,
        fact.subject,
        fact.target,
        paraphrases=(PARAPHRASE.format(fact.subject),),
        neighbors=(Probe(other.prompt.format(other.subject), other.target),),
    )
    wrong = EditRequest("2", other.prompt, other.subject, next(answer for answer in ANSWERS if answer != other.target))
    shares, answers = evaluate_generated_answers(model, encoder, [known, wrong], tokens=1, all_prompts=True)
    assert shares[0] == (1, 1, 1)
    assert shares[1][0] == 0
    assert all(math.isnan(share) for share in shares[1][1:])
    assert answers == [fact.target, other.target]
    shares, longer = evaluate_generated_answers(model, encoder, [known, wrong], tokens=6)
    assert [share[0] for share in shares] == [1, 0]
    assert all(math.isnan(share) for share in shares[0][1:])
    assert all(text.startswith(start) for text, start in zip(longer, answers, strict=True))


def test_generated_answers_end_at_line_breaks_and_eos():
    cut = tokenizer("bos")
    stops = stop_tokens(cut)
    assert cut.eos_token_id in stops
    assert cut("\n", add_special_tokens=False)["input_ids"][0] in stops
    model, encoder = learnt_decoder(), PromptEncoder(cut)
    prompt = KNOWN[0].prompt.format(KNOWN[0].subject)
    first = encoder.encode_answer(KNOWN[0].target)[0]
    assert generate_answers(model, encoder, [prompt], [5], stops=[first]) == [""]


def test_generated_texts_are_evaluated_if_requests_have_prompts():
    model, cut = decoder(), tokenizer("bos")
    asked = EditRequest("1", "the capital of {}", "Peru", "house")
    assert evaluate_generated_texts(model, cut, [asked]) == {}
    begun = EditRequest("2", "the capital of {}", "Peru", "house", generation_prompts=("Peru is",))
    assert evaluate_generated_texts(model, cut, [asked, begun], length=20).keys() == {"fluency"}
    texts = generate_texts(model, cut, ["Peru is"], length=20)
    referred = EditRequest("3", "the capital of {}", "Peru", "house", generation_prompts=("Peru is",), references=tuple(texts))
    figures = evaluate_generated_texts(model, cut, [asked, referred], length=20)
    assert figures["consistency"] == pytest.approx(100)
    assert 0 < figures["fluency"] < 1000
