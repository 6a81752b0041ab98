import torch

from malleable.lightning_modules.functional.recommendation.row_hash import hash_rows

ROWS = torch.randint(0, 50, (6, 4), generator=torch.Generator().manual_seed(0))
IDS = torch.arange(6)


def digest(rows=ROWS, ids=IDS, **fields):
    return hash_rows(ids, [rows[:, :1], fields.get("history", rows[:, 1:]), fields.get("candidates")]).tolist()


def test_order_batches_and_padding_do_not_matter():
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert digest(ROWS[order]) == digest()
    parts = [hash_rows(IDS[part], [ROWS[part, :1], ROWS[part, 1:], None]) for part in (slice(0, 2), slice(2, 6))]
    assert (parts[0] + parts[1]).tolist() == digest()
    for padding in ((2, 0), (0, 2)):
        assert digest(history=torch.nn.functional.pad(ROWS[:, 1:], padding, value=-1)) == digest()


def test_padding_rows_are_not_counted():
    more = torch.cat([ROWS, ROWS[:2]])
    assert digest(more, torch.cat([IDS, torch.tensor([-1, -2])])) == digest()
    assert digest()[0] == 6


def test_every_change_changes_the_hash():
    changed = ROWS.clone()
    changed[2, 3] += 1
    swapped = ROWS[:, [0, 2, 1, 3]]
    found = [
        digest(),
        digest(changed),
        digest(swapped),
        digest(ROWS[:5], IDS[:5]),
        digest(candidates=ROWS),
        digest(torch.cat([ROWS, ROWS[:1]]), torch.arange(7)),
    ]
    assert len(set(map(tuple, found))) == len(found)
