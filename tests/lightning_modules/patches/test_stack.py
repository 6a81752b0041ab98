import io
from itertools import permutations

import pytest
import torch
from tiny_patch import DOWN, QUERY, UP, gpt2, llama, random_patch, with_lora

from malleable.lightning_modules.patches.delta import Delta
from malleable.lightning_modules.patches.patch import Patch
from malleable.lightning_modules.patches.stack import PatchStack
from malleable.lightning_modules.patches.tensors import canonical_tensors


def copies(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def equal(one, two):
    return one.keys() == two.keys() and all(one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one)


class Target:
    """Tensors with their stack, changed in place."""

    def __init__(self, tensors):
        self.tensors, self.stack = tensors, PatchStack()

    def apply(self, patch, **options):
        self._take(self.stack.apply(patch, self.tensors, **options))

    def revert(self, *ids, **options):
        self._take(self.stack.revert(ids, self.tensors, **options))

    def _take(self, change):
        change.write_into(self.tensors)
        self.stack = change.stack


@pytest.fixture
def target():
    return Target(copies(canonical_tensors(llama())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_revert_in_any_order_restores_the_weights_exactly(dtype):
    target = Target(copies(canonical_tensors(llama(dtype=dtype))))
    before = copies(target.tensors)
    patches = [random_patch(before, names, seed, rank) for seed, (names, rank) in enumerate([((DOWN, UP), 2), ((DOWN,), None), ((DOWN, QUERY), 1)])]
    for order in permutations(patches):
        for patch in patches:
            target.apply(patch, allow_conflicts=True)
        assert not equal(target.tensors, before)
        for patch in order:
            target.revert(patch.id)
        assert equal(target.tensors, before)
        assert (target.stack.patches, target.stack.originals, target.stack.hashes) == ((), {}, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_revert_of_a_middle_patch_equals_never_applying_it(dtype):
    target, other = (Target(copies(canonical_tensors(llama(dtype=dtype)))) for _ in range(2))
    # Three remain: of two, the order of the sum never shows.
    first, middle, *last = (random_patch(target.tensors, (DOWN, UP), seed) for seed in range(4))
    for patch in (first, middle, *last):
        target.apply(patch, allow_conflicts=True)
    target.revert(middle.id)
    for patch in (*reversed(last), first):
        other.apply(patch, allow_conflicts=True)
    assert equal(target.tensors, other.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sum_is_rounded_once(dtype):
    target = Target(copies(canonical_tensors(llama(dtype=dtype))))
    original = target.tensors[DOWN].clone()
    patches = [random_patch(target.tensors, seed=seed) for seed in range(3)]
    for patch in patches:
        target.apply(patch, allow_conflicts=True)
    exact = original.double() + sum(patch.deltas[DOWN].dense().double() for patch in patches)
    torch.testing.assert_close(target.tensors[DOWN], exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_low_rank_and_dense_deltas_give_equal_weights(target):
    factored = random_patch(target.tensors)
    dense = Patch(kind="alpha_edit", deltas={DOWN: Delta(factored.deltas[DOWN].dense())}, base=factored.base)
    changes = [target.stack.apply(patch, target.tensors).tensors for patch in (factored, dense)]
    assert equal(*changes)


def test_only_patched_tensors_change(target):
    before = copies(target.tensors)
    change = target.stack.apply(random_patch(target.tensors), target.tensors)
    assert set(change.tensors) == set(change.stack.originals) == {DOWN}
    assert equal(target.tensors, before)  # until it is written


def test_model_in_memory_preserves_ties_dtypes_and_gradients():
    model = llama(tied=True).requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    tensors = canonical_tensors(model)
    before, parameter = copies(tensors), model.model.embed_tokens.weight
    target = Target(tensors)
    target.apply(random_patch(tensors, ["model.embed_tokens.weight"]))
    assert model.lm_head.weight is model.model.embed_tokens.weight is parameter
    assert parameter.requires_grad
    assert not torch.equal(model.lm_head.weight, before["model.embed_tokens.weight"])
    target.revert(target.stack.ids[0])
    assert equal(copies(tensors), before)


def test_weights_of_base_and_adapter():
    model = with_lora(llama())
    name = QUERY.replace(".weight", ".lora_A.weight")
    target = Target(canonical_tensors(model))
    before = copies(target.tensors)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    target.apply(random_patch(before, [QUERY, name], rank=1))
    assert not torch.equal(layer.base_layer.weight, before[QUERY])
    assert not torch.equal(layer.lora_A["default"].weight, before[name])
    target.revert(target.stack.ids[0])
    assert equal(copies(target.tensors), before)


def test_delta_has_the_layout_of_transposed_weights():
    model = gpt2()
    target = Target(canonical_tensors(model))
    name = "transformer.h.0.mlp.c_fc.weight"
    before, inputs = target.tensors[name].detach().clone(), torch.randn(1, 16)
    plain = model.transformer.h[0].mlp.c_fc(inputs)
    patch = random_patch(target.tensors, [name])
    assert patch.deltas[name].shape == (16, 64)  # inputs by outputs
    target.apply(patch)
    torch.testing.assert_close(model.transformer.h[0].mlp.c_fc(inputs) - plain, inputs @ patch.deltas[name].dense(), rtol=1e-4, atol=1e-5)
    target.revert(patch.id)
    assert torch.equal(target.tensors[name], before)


def test_patch_without_weights(target):
    target.apply(Patch(kind="erasure", deltas={}, base={}, requests=[{"concept": "Snoopy"}]))
    assert len(target.stack.patches) == 1
    assert target.stack.originals == {}


def test_base_of_a_new_patch_is_the_unpatched_model(target):
    plain = target.stack.base(target.tensors)
    target.apply(random_patch(target.tensors))
    assert target.stack.base(target.tensors) == plain
    above = random_patch(target.tensors, base=plain, seed=1, requires=target.stack.ids)
    target.apply(above)
    assert target.stack.ids[1] == above.id


def refused(target, message, call):
    before, ids = copies(target.tensors), target.stack.ids
    with pytest.raises(ValueError, match=message):
        call()
    assert equal(target.tensors, before)
    assert target.stack.ids == ids


def test_other_base_raises_and_changes_nothing(target):
    patch = random_patch(canonical_tensors(llama(seed=1)))
    message = rf"{patch.id} was made for other weights; .* differ: 16 \(the target contains 21 of the 21 tensors of its base\).*force does not help"
    refused(target, message, lambda: target.apply(patch))
    refused(target, message, lambda: target.apply(patch, force=True))


def test_differences_in_other_tensors_need_force(target):
    patch = random_patch(target.tensors)
    target.tensors[UP] += 1
    refused(target, rf"tensors that differ: 1 .* such as {UP}, but none that it changes; use force", lambda: target.apply(patch))
    target.apply(patch, force=True)


@pytest.mark.parametrize("made_on_adapter", [True, False])
def test_adapter_on_one_side_only_needs_force(made_on_adapter):
    bare, wrapped = (canonical_tensors(model) for model in (llama(), with_lora(llama())))
    made_on, target = (wrapped, Target(bare)) if made_on_adapter else (bare, Target(wrapped))
    patch = random_patch(made_on)
    refused(target, "tensors that differ: 4 .*lora_A.* use force", lambda: target.apply(patch))
    target.apply(patch, force=True)


def test_missing_tensors_are_not_compared():
    tensors = canonical_tensors(with_lora(llama()))
    name = QUERY.replace(".weight", ".lora_A.weight")
    trained = {key: tensor for key, tensor in tensors.items() if ".lora_" in key}
    patch = random_patch(tensors, [name], rank=1)
    assert PatchStack().apply(patch, trained).unchecked == len(tensors) - len(trained)
    refused(Target(trained), "if it contains trained weights only, give the folder", lambda: PatchStack().apply(random_patch(tensors), trained))


def test_other_names_of_the_same_model(target):
    short = {name.removeprefix("model."): tensor for name, tensor in target.tensors.items()}
    refused(Target(short), "its tensors have other names", lambda: PatchStack().apply(random_patch(target.tensors), short))


def test_other_shape_raises(target):
    patch = random_patch(target.tensors)
    target.tensors[DOWN] = target.tensors[DOWN].T.clone()
    refused(target, rf"has shape \(24, 16\), but \(16, 24\) in patch {patch.id}", lambda: target.apply(patch, force=True))


def test_quantised_weights_raise(target):
    patch = random_patch(target.tensors)
    target.tensors[DOWN] = target.tensors[DOWN].to(torch.int8)
    refused(target, r"has dtype torch\.int8, and quantised weights cannot be patched", lambda: target.apply(patch, force=True))


def test_overflow_of_the_dtype_raises():
    target = Target(copies(canonical_tensors(llama(dtype=torch.float16))))
    deltas = {DOWN: Delta(torch.full((16, 24), 1e6))}
    patch = Patch(kind="alpha_edit", deltas=deltas, base=target.stack.base(target.tensors))
    refused(target, r"is not finite after patching: values exceed the range of torch\.float16", lambda: target.apply(patch))


def test_tied_tensor_stored_twice_raises(target):
    tied = canonical_tensors(llama(tied=True))
    patch = random_patch(tied, ["model.embed_tokens.weight"])
    target.tensors = {**copies(tied), "lm_head.weight": tied["model.embed_tokens.weight"].detach().clone()}
    refused(target, r"lm_head\.weight in the target equals .* stored twice", lambda: target.apply(patch))
    target.apply(random_patch(tied))  # one that does not touch it may pass


def test_applying_a_patch_twice_raises(target):
    patch = random_patch(target.tensors)
    target.apply(patch)
    refused(target, f"{patch.id} is applied already", lambda: target.apply(patch, force=True, allow_conflicts=True))


def test_required_patches(target):
    below = random_patch(target.tensors)
    above = random_patch(target.tensors, (DOWN,), 1, requires=[below.id])
    refused(target, f"{above.id} requires {below.id}, which are not applied; apply", lambda: target.apply(above))
    target.apply(below)
    target.apply(above)  # and is no conflict
    refused(target, rf"require the patches to revert: {above.id} \(requires {below.id}\); revert those, too", lambda: target.revert(below.id))
    target.revert(below.id, force=True)
    refused(target, "which are not applied", lambda: Target(copies(canonical_tensors(llama()))).apply(above))


def test_conflicts_must_be_allowed(target):
    one, two = (random_patch(target.tensors, seed=seed) for seed in range(2))
    target.apply(one)
    refused(target, f"(?s)conflict with {one.id}.*{DOWN}: cosine .*allow conflicts", lambda: target.apply(two, force=True))
    (conflict,) = target.stack.apply(two, target.tensors, allow_conflicts=True).conflicts
    assert (conflict.other, conflict.overlaps[0].tensor) == (one, DOWN)


def test_revert_after_training_needs_force(target):
    before, patch = copies(target.tensors), random_patch(target.tensors)
    target.apply(patch)
    target.tensors[DOWN][0, 0] += 1
    refused(target, f"{DOWN} changed after the patches {patch.id} were applied.*reverting would discard this change", lambda: target.revert(patch.id))
    refused(target, "changed after the patches", lambda: target.apply(random_patch(before, (UP,), 1), force=True))
    target.revert(patch.id, force=True)
    assert equal(target.tensors, before)


def test_unique_prefixes_of_ids(target):
    patches = [random_patch(target.tensors, seed=seed, rank=1) for seed in range(17)]
    stack = PatchStack(tuple(patches))
    assert stack.find(patches[3].id[:11]) is patches[3]
    with pytest.raises(ValueError, match="more than one patch with id ''"):
        stack.find("")
    with pytest.raises(ValueError, match=f"no patch with id 'x'; the target has {patches[0].id}, "):
        stack.find("x")


def test_plain_data_round_trip(target):
    for patch in (random_patch(target.tensors, (DOWN, UP)), random_patch(target.tensors, (DOWN,), 1, rank=None)):
        target.apply(patch, allow_conflicts=True)
    file = io.BytesIO()
    torch.save(target.stack.as_plain(), file)
    file.seek(0)
    read = PatchStack.from_plain(torch.load(file, weights_only=True), "here")
    assert read.ids == target.stack.ids
    assert equal(read.originals, target.stack.originals)
    assert read.hashes == target.stack.hashes
    change = read.revert(read.ids, target.tensors)
    assert equal(change.tensors, target.stack.originals)
    assert PatchStack.from_plain(None, "here").ids == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda section: section.pop("originals"), "patches in here are damaged: field 'originals' is missing"),
        (lambda section: section["originals"].pop(DOWN), f"stored originals do not have the same tensors: {DOWN}"),
        (lambda section: section["digests"].pop(DOWN), f"stored originals do not have the same tensors: {DOWN}"),
        (lambda section: section["originals"][DOWN].add_(1), f"the stored originals of {DOWN} differ from the base of the patches"),
        (lambda section: section["patches"][0].update(manifest="{"), r"here, patch 0/patch\.json: it is not JSON"),
    ],
)
def test_damaged_section_raises(target, change, message):
    target.apply(random_patch(target.tensors))
    section = target.stack.as_plain()
    change(section)
    with pytest.raises(ValueError, match=message):
        PatchStack.from_plain(section, "here")
