import weakref
from collections.abc import Mapping

import torch
from tiny_patch import llama

from malleable.lightning_modules.patches import fingerprint as module
from malleable.lightning_modules.patches.fingerprint import compare, digest, fingerprint
from malleable.lightning_modules.patches.names import canonical_tensors


def test_equal_values_have_equal_digests_in_every_narrow_format():
    for dtype in (torch.bfloat16, torch.float16):
        narrow = torch.randn(4, 3).to(dtype)
        assert digest(narrow) == digest(narrow.float())
    assert digest(torch.randn(4, 3).bfloat16()) != digest(torch.randn(4, 3))


def test_shape_values_and_integers_count():
    values = torch.arange(6.0)
    digests = [digest(tensor) for tensor in (values, values.view(2, 3), values.view(3, 2), values + 1, values.long(), values.double())]
    assert len(set(digests)) == len(digests)
    assert all(len(value) == 16 for value in digests)


def test_layout_does_not_count():
    values = torch.randn(3, 4)
    assert digest(values.T) == digest(values.T.contiguous())


def test_it_does_not_depend_on_the_size_of_a_block(monkeypatch):
    values = torch.randn(10, 7)
    whole = digest(values)
    monkeypatch.setattr(module, "_BLOCK", 16)
    assert digest(values) == whole


def test_one_tensor_is_read_at_a_time():
    class Lazy(Mapping):
        alive = most = 0

        @classmethod
        def freed(cls):
            cls.alive -= 1

        def __getitem__(self, name):
            values = torch.randn(4)
            Lazy.alive += 1
            Lazy.most = max(Lazy.most, Lazy.alive)
            weakref.finalize(values, Lazy.freed)
            return values

        def __iter__(self):
            return iter("abcd")

        def __len__(self):
            return 4

    assert len(fingerprint(Lazy())) == 4
    assert Lazy.most == 1


def test_a_comparison_names_every_difference():
    base = {"same": "1", "other": "2", "gone": "3", "tied": "4"}
    found = compare(base, {"same": "1", "other": "9", "new": "5", "copy": "4", "tied": "4"})
    assert found.checked == 3
    assert (found.differing, found.missing, found.unknown, found.copies) == (("other",), ("gone",), ("new",), {"copy": "tied"})


def test_a_model_and_its_copy_in_half_precision():
    half = llama(dtype=torch.bfloat16)
    assert fingerprint(canonical_tensors(half)) == fingerprint(canonical_tensors(half.float()))
    assert fingerprint(canonical_tensors(half)) != fingerprint(canonical_tensors(llama()))
