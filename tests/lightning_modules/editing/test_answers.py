"""Measures of edits: by hand on made-up logits, and on a decoder that knows its facts."""

import math

import pytest
import torch
from small_editing import decoder, tokenizer
from small_facts import ANSWERS, KNOWN, NEW, PARAPHRASE, learnt_decoder, share

from malleable.datamodules.editing.requests import EditRequest, Probe
from malleable.lightning_modules.editing.answers import measure, measure_generated, measure_writing, perplexity, say, stop_tokens, take_answers, write
from malleable.lightning_modules.editing.prompts import Reader
from malleable.lightning_modules.metrics.editing import EditingMetrics, RequestFigures


class Oracle(torch.nn.Module):
    """Says after a text what it was told, with the log-probability it was told; all else is unlikely.

    Args:
        says: Log-probability of the first token of an answer, by text and answer.
    """

    def __init__(self, reader, says):
        super().__init__()
        self.reader, self.head = reader, torch.nn.Identity()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.says = {}
        for (text, answer), logp in says.items():
            self.says.setdefault(tuple(reader.question(text).ids), {})[reader.answer(answer)[0]] = logp

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask, use_cache):
        logits = torch.full((*input_ids.shape, 800), -50.0)
        for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            for end in range(1, sum(mask) + 1):
                for token, logp in self.says.get(tuple(ids[:end]), {}).items():
                    logits[row, end - 1, token] = logp
                # What is left falls to a token that is no answer.
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


def test_shares_by_hand():
    reader = Reader(tokenizer("bos"))
    says = {
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
    (figures,) = measure(Oracle(reader, says), reader, [REQUEST])
    assert figures[:9] == pytest.approx((1, 2 / 3, 1 / 2, 1, 1 / 3, 1 / 2, 1, 1 / 3, 1 / 2))
    means = summary([figures, RequestFigures(0, math.nan, 1, 0, math.nan, 1, 0, math.nan, 1)])
    assert means["efficacy"] == 50
    assert means["generalization"] == pytest.approx(200 / 3), "the record without paraphrases does not count"
    assert means["specificity"] == 75
    assert means["score"] == pytest.approx(3 / (1 / 50 + 3 / 200 + 1 / 75))


def test_a_neighbour_of_the_new_answer_has_none_to_lose():
    model, reader = decoder(), Reader(tokenizer("bos"))
    request = EditRequest("1", "the capital of {}", "Peru", "house", "park", neighbors=(Probe("the capital of Lima", "house"),))
    (figures,) = measure(model, reader, [request])
    assert math.isnan(figures.specificity)
    assert figures.specificity_exact == 0


def test_answers_of_several_tokens_are_scored_token_by_token():
    model, reader = decoder(), Reader(tokenizer("bos"))
    questions = [("The capital of Peru is", "Zürich"), ("I saw", "Anna and Tom"), ("I", "dog")]
    found = take_answers(model, reader, questions, max_rows=2)
    for number, (text, answer) in enumerate(questions):
        ids, tokens = reader.question(text).ids, reader.answer(answer)
        logps = model(torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        own = logps[torch.arange(len(tokens)), torch.tensor(tokens)]
        assert float(found.nll[number]) == pytest.approx(-float(own.mean()), rel=1e-4)
        assert float(found.accuracy[number]) == pytest.approx(float((logps.argmax(-1) == torch.tensor(tokens)).float().mean()))


def test_a_decoder_that_knows_a_fact_is_exact_about_it():
    model, reader = learnt_decoder(), Reader(tokenizer("bos"))
    known = [EditRequest(str(number), fact.prompt, fact.subject, fact.target) for number, fact in enumerate(KNOWN)]
    assert summary(measure(model, reader, known)) == {"efficacy": 100, "efficacy_exact": 100, "efficacy_accuracy": 100}
    new = [EditRequest(str(number), fact.prompt, fact.subject, fact.target) for number, fact in enumerate(NEW)]
    assert summary(measure(model, reader, new))["efficacy"] == 100 * share(model, NEW) == 0


@pytest.mark.parametrize("max_logits", [1, 40 * 480, 1 << 26])
def test_perplexity_in_passes_is_the_mean_over_tokens_one_by_one(max_logits):
    model, reader = decoder(), Reader(tokenizer("bos"))
    texts = ["Anna lives in Lima", "I saw the big dog in the park", "", "The capital of Peru is Lima. Lima lies on the coast, and Peru"]
    losses, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([reader.tokenizer(text)["input_ids"][:12]])
        if ids.shape[1] > 1:
            losses += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert perplexity(model, reader, texts, 12, max_logits) == pytest.approx(math.exp(losses / count), rel=1e-5)
    with pytest.raises(ValueError, match="two tokens"):
        perplexity(model, reader, [""])


def test_what_is_written_depends_on_its_place_and_seed_only():
    model, cut = decoder(), tokenizer("bos")
    prompts = ["Anna lives in", "I", "The capital of Peru is"]
    texts = write(model, cut, prompts, length=12)
    assert all(text.startswith(prompt) for text, prompt in zip(texts, prompts, strict=True))
    assert texts == write(model, cut, prompts, length=12, max_rows=2)
    assert texts != write(model, cut, prompts, length=12, seed=1)
    # Among one token there is nothing to draw.
    assert write(model, cut, prompts, length=12, top_k=1) == write(model, cut, prompts, length=12, top_k=1, seed=1)


def test_what_is_said_is_the_likeliest():
    model, reader = learnt_decoder(), Reader(tokenizer("bos"))
    prompts = [fact.prompt.format(fact.subject) for fact in KNOWN]
    assert say(model, reader, prompts, [len(reader.answer(fact.target)) for fact in KNOWN], max_rows=7) == [fact.target for fact in KNOWN]


def test_free_answers_are_compared_with_the_new_ones():
    model, reader = learnt_decoder(), Reader(tokenizer("bos"))
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
    shares, said = measure_generated(model, reader, [known, wrong], tokens=1, everything=True)
    assert shares[0] == (1, 1, 1)
    assert shares[1][0] == 0
    assert all(math.isnan(share) for share in shares[1][1:])
    assert said == [fact.target, other.target]
    shares, longer = measure_generated(model, reader, [known, wrong], tokens=6)
    assert [share[0] for share in shares] == [1, 0]
    assert all(math.isnan(share) for share in shares[0][1:])
    assert all(text.startswith(start) for text, start in zip(longer, said, strict=True))


def test_free_answers_end_at_line_breaks_and_the_end_token():
    cut = tokenizer("bos")
    stops = stop_tokens(cut)
    assert cut.eos_token_id in stops
    assert cut("\n", add_special_tokens=False)["input_ids"][0] in stops
    model, reader = learnt_decoder(), Reader(cut)
    prompt = KNOWN[0].prompt.format(KNOWN[0].subject)
    first = reader.answer(KNOWN[0].target)[0]
    assert say(model, reader, [prompt], [5], stops=[first]) == [""]


def test_writing_is_measured_where_requests_begin_texts():
    model, cut = decoder(), tokenizer("bos")
    asked = EditRequest("1", "the capital of {}", "Peru", "house")
    assert measure_writing(model, cut, [asked]) == {}
    begun = EditRequest("2", "the capital of {}", "Peru", "house", generation_prompts=("Peru is",))
    assert measure_writing(model, cut, [asked, begun], length=20).keys() == {"fluency"}
    texts = write(model, cut, ["Peru is"], length=20)
    referred = EditRequest("3", "the capital of {}", "Peru", "house", generation_prompts=("Peru is",), references=tuple(texts))
    figures = measure_writing(model, cut, [asked, referred], length=20)
    assert figures["consistency"] == pytest.approx(100)
    assert 0 < figures["fluency"] < 1000
