"""Losses, and training steps, equal to those of TRL 1.16."""

from types import SimpleNamespace

import pytest
import torch

from malleable.lightning_modules.losses.adaptive_margin import SimPO
from malleable.lightning_modules.losses.answer_losses import KTO, SPPO, APODown, APOZero, BCOPair, NCAPair
from malleable.lightning_modules.losses.preference import CPO, IPO, ORPO, Discopop, ExoPair, Hinge, Robust, Sigmoid

pytestmark = pytest.mark.slow  # TRL takes several seconds to import
trl = pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[test]'")

B, T = 6, 9
BETA = 0.3
PAIRS = {
    "sigmoid": (Sigmoid(BETA), {}),
    "sigmoid_norm": (Sigmoid(BETA, length_norm=True), {}),
    "hinge": (Hinge(BETA), {}),
    "ipo": (IPO(BETA, length_norm=True), {}),
    "robust": (Robust(BETA, smoothing=0.2), {"label_smoothing": 0.2}),
    "exo_pair": (ExoPair(BETA, smoothing=0.05), {"label_smoothing": 0.05}),
    "nca_pair": (NCAPair(BETA), {}),
    "bco_pair": (BCOPair(BETA, shift="none"), {}),
    "sppo_hard": (SPPO(BETA), {}),
    "apo_zero": (APOZero(BETA), {}),
    "apo_down": (APODown(BETA), {}),
    "discopop": (Discopop(BETA, tau=0.05), {}),
}


def random_rows():
    """Log-probabilities of tokens of chosen and rejected answers ``(2 B, T)``, their lengths, and sums under a reference."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, T + 1, (2, B), generator=generator)
    mask = torch.arange(T) < lengths.flatten()[:, None]
    tokens = -2 * torch.rand(2 * B, T, generator=generator) * mask
    reference = tokens.sum(1) + torch.randn(2 * B, generator=generator)
    return tokens, mask, lengths.T, reference


def fake_accelerator():
    def gather(values):
        return values

    return SimpleNamespace(gather=gather, gather_for_metrics=gather, device=torch.device("cpu"))


def fake_model(tokens, training=True):
    outputs = {"log_probs": tokens, "entropy": tokens, "mean_logits": tokens, "is_top1": tokens > 0}

    class Model:
        def __call__(self, **_):
            return SimpleNamespace(**outputs)

    model = Model()
    model.training = training
    return model


def their_loss(name, tokens, mask, reference, **options):
    """The loss of ``DPOTrainer`` on log-probabilities instead of a model."""
    from collections import defaultdict

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=fake_accelerator(),
        args=SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        beta=BETA,
        label_smoothing=0.0,
        loss_types=[name],
        loss_weights=[1.0],
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    vars(trainer).update(options)
    inputs = {
        "input_ids": torch.ones(2 * B, T + 1, dtype=torch.long),
        "attention_mask": torch.ones(2 * B, T + 1, dtype=torch.long),
        "completion_mask": torch.cat([torch.zeros(2 * B, 1, dtype=torch.long), mask.long()], 1),
        "ref_chosen_logps": reference[:B],
        "ref_rejected_logps": reference[B:],
    }
    return trl.DPOTrainer._compute_loss(trainer, fake_model(tokens), inputs, False), trainer._metrics["train"]


@pytest.mark.parametrize("name", PAIRS)
def test_losses_of_pairs_and_their_gradients(name):
    loss, options = PAIRS[name]
    tokens, mask, lengths, reference = random_rows()
    ours, theirs = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    expected, _ = their_loss(name, theirs, mask, reference, **options)
    found = loss(ours.sum(1).reshape(2, B).T, reference.reshape(2, B).T, lengths).losses.mean()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad * mask, theirs.grad * mask, atol=1e-6, rtol=1e-6)


def test_rewards():
    tokens, mask, lengths, reference = random_rows()
    _, metrics = their_loss("sigmoid", tokens, mask, reference)
    rewards = Sigmoid(BETA)(tokens.sum(1).reshape(2, B).T, reference.reshape(2, B).T, lengths).rewards
    assert rewards[:, 0].mean().item() == pytest.approx(metrics["rewards/chosen"][0], abs=1e-6)
    assert rewards[:, 1].mean().item() == pytest.approx(metrics["rewards/rejected"][0], abs=1e-6)
    assert (rewards[:, 0] > rewards[:, 1]).float().mean().item() == pytest.approx(metrics["rewards/accuracies"][0])


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (SimPO(BETA, gamma_beta_ratio=0.5 / BETA), {"loss_type": "simpo", "simpo_gamma": 0.5}),
        (SimPO(BETA, gamma_beta_ratio=0.5 / BETA, smoothing=0.1), {"loss_type": "simpo", "simpo_gamma": 0.5, "label_smoothing": 0.1}),
        (CPO(BETA, nll_weight=0.0), {"loss_type": "sigmoid"}),
        (CPO(BETA, nll_weight=0.0, smoothing=0.2), {"loss_type": "sigmoid", "label_smoothing": 0.2}),
    ],
)
def test_losses_without_reference(loss, options):
    from trl.experimental.cpo import CPOTrainer

    tokens, _, lengths, _ = random_rows()
    policy = tokens.sum(1).reshape(2, B).T
    logps = policy / lengths if isinstance(loss, SimPO) else policy
    trainer = SimpleNamespace(**{"alpha": 0.0, "beta": BETA, "label_smoothing": 0.0, "accelerator": fake_accelerator(), **options})
    expected, chosen, rejected = CPOTrainer.cpo_loss(trainer, logps[:, 0], logps[:, 1])
    output = loss(policy, None, lengths)
    torch.testing.assert_close(output.losses, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(output.rewards, torch.stack([chosen, rejected], 1))


def test_odds_ratio():
    from trl.experimental.orpo import ORPOTrainer

    tokens, _, lengths, _ = random_rows()
    policy = tokens.sum(1).reshape(2, B).T
    means = policy / lengths
    trainer = SimpleNamespace(beta=BETA, accelerator=fake_accelerator())
    theirs, *_ = ORPOTrainer.odds_ratio_loss(trainer, means[:, 0], means[:, 1])
    torch.testing.assert_close(ORPO(BETA)(policy, None, lengths).losses, -theirs - means[:, 0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shift", [-1.0, 2.0])
def test_unpaired_rows(shift):
    """A negative estimate of the divergence counts as 0."""
    from collections import defaultdict

    tokens, mask, lengths, reference = random_rows()
    tokens, others = tokens[:B], tokens[B:]
    desirable = torch.tensor([True, False, True, True, False, False])
    reference_others = others.sum(1) - shift
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=fake_accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=BETA,
        desirable_weight=1.5,
        undesirable_weight=0.7,
        _compute_kl_logps=lambda *_: others.sum(1),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.ones(B, T + 1, dtype=torch.long),
        "attention_mask": torch.ones(B, T + 1, dtype=torch.long),
        "completion_mask": torch.cat([torch.zeros(B, 1, dtype=torch.long), mask[:B].long()], 1),
        "label": desirable,
        "ref_logps": reference[:B],
        "ref_KL_logps": reference_others,
    }
    expected = trl.KTOTrainer._compute_loss(trainer, fake_model(tokens), inputs, False)
    loss = KTO(BETA, 1.5, 0.7, kl_update="micro_batch")
    policy = torch.stack([tokens.sum(1), others.sum(1)], 1)
    found = loss(policy, torch.stack([reference[:B], reference_others], 1), desirable=desirable).losses.mean()
    assert loss.divergence().item() == pytest.approx(max(0.0, shift), abs=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert lengths.shape == (B, 2)


EOS, PAD, VOCAB = 0, 1, 40


def training_rows(count):
    """Random prompts of three to six tokens, and answers of two to five."""
    generator = torch.Generator().manual_seed(1)

    def words(low, high):
        length = int(torch.randint(low, high + 1, (1,), generator=generator))
        return torch.randint(2, VOCAB, (length,), generator=generator).tolist()

    return [{"sample_id": row, "prompt": words(3, 6), "answers": [[*words(1, 4), EOS], [*words(1, 4), EOS]]} for row in range(count)]


def save_tiny_model(folder):
    """A random Llama, and a tokenizer whose tokens are written as numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}
    config = LlamaConfig(**sizes, vocab_size=VOCAB, bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD, initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {"</s>": EOS, "<pad>": PAD} | {str(token): token for token in range(2, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)


def text(tokens):
    return " ".join("</s>" if token == EOS else str(token) for token in tokens)


@pytest.mark.parametrize(("name", "loss"), [("sigmoid", Sigmoid(0.1)), ("ipo", IPO(0.1, length_norm=True)), ("apo_zero", APOZero(0.1))])
@pytest.mark.filterwarnings("ignore")
def test_twenty_training_steps(tmp_path, name, loss):
    """Equal losses in each step, and equal weights at the end, with the same batches."""
    from datasets import Dataset
    from lightning.pytorch import Callback
    from tiny_data import quiet_trainer
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from malleable import DPO, LanguageModelConfig, PhasedLoader, PreferenceBatch, ReferenceCache, Tuning, Vocabulary, collate

    save_tiny_model(tmp_path / "model")
    rows = training_rows(80)
    options = trl.DPOConfig(
        str(tmp_path / "trl"),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        beta=0.1,
        loss_type=[name],
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )

    class InOrder(trl.DPOTrainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

    texts = [{"prompt": text(row["prompt"]), "chosen": " " + text(row["answers"][0]), "rejected": " " + text(row["answers"][1])} for row in rows]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    trainer = InOrder(model, args=options, train_dataset=Dataset.from_list(texts), processing_class=tokenizer)
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    losses = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

    loader = PhasedLoader(rows, 4, collate_fn=lambda part: collate(part, PreferenceBatch, pad_token_id=PAD), shuffle=False)
    tuning = Tuning(lr=3e-3, warmup_steps=0, decay="constant")
    module = DPO(LanguageModelConfig(name=str(tmp_path / "model")), vocabulary=Vocabulary(VOCAB, EOS, PAD), loss=loss, tuning=tuning)
    callbacks = [ReferenceCache(loader=loader, reuse=False), Watch()]
    ours = quiet_trainer(tmp_path, max_epochs=1, gradient_clip_val=1.0, callbacks=callbacks, enable_checkpointing=False)
    ours.fit(module, loader)
    assert len(losses) == len(theirs) == 20
    # TRL rounds logged losses to four significant digits.
    assert losses == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(module.model.state_dict()[key], value, atol=1e-5, rtol=0)
