"""Knowledge-graph embeddings written out as the papers state them: one triple, one query, one entity at a time, no product, no grouping."""

import math

import torch
from torch.nn.functional import softplus

C = {"normal": math.sqrt(2 / math.pi), "uniform": math.sqrt(3) / 2}


def distance(kind, h, r, t, base="normal", swap=False, consistent=False):
    """Minus the score, of rows whose leading dimensions broadcast: ``(..., parts x D)``."""
    if kind == "Translation":
        return (h + r - t).square().sum(-1)
    if kind == "Diagonal":
        return -(h * r * t).sum(-1)
    if kind in ("ComplexDiagonal", "Rotation"):
        head, tail = (torch.complex(*row.chunk(2, -1)) for row in (h, t))
        if kind == "ComplexDiagonal":
            return -(head * torch.complex(*r.chunk(2, -1)) * tail.conj()).sum(-1).real
        return (head * torch.complex(r.cos(), r.sin()) - tail).abs().square().sum(-1)
    if kind == "Sigma":
        return ((r * h).abs() - t.abs()).square().sum(-1)
    b, a = r.chunk(2, -1)
    if kind == "AffinePoint":
        return (a * h + b - t).square().sum(-1)
    if kind == "NFE2":
        (mu_h, neg_h, pos_h), (mu, neg, pos) = h.chunk(3, -1), t.chunk(3, -1)
        neg_1, pos_1 = (a * neg_h).abs(), (a * pos_h).abs()
        if swap:
            neg_1, pos_1 = torch.where(a < 0, pos_1, neg_1), torch.where(a < 0, neg_1, pos_1)
        dm, da, db = a * mu_h + b - mu, neg_1 - neg.abs(), pos_1 - pos.abs()
        return (dm**2 + da**2 / 2 + db**2 / 2 + C[base] * dm * (db - da)).sum(-1)
    (mu_h, s_h), (mu, s) = h.chunk(2, -1), t.chunk(2, -1)
    m = a * mu_h + b
    if kind == "NFE1":
        return (m - mu).square().sum(-1) + ((a * s_h).abs() - s.abs()).square().sum(-1)
    first = (a.abs() if consistent else softplus(a)) * softplus(s_h)
    second = softplus(s)
    return ((second / first).log() + (first**2 + (m - mu) ** 2) / (2 * second**2) - 0.5).sum(-1)


def squares(left, right):
    """Squared distances of all pairs of rows, by one product."""
    return left.square().sum(-1)[:, None] + right.square().sum(-1) - 2 * left @ right.T


def products(kind, h, r, entities):
    """Minus the distances of queries ``(B, ...)`` to all entities ``(E, ...)``, one product for each term of the formula as it stands."""
    b, a = r.chunk(2, -1)
    if kind == "NFE2":
        (mu_h, neg_h, pos_h), (mu, neg, pos) = h.chunk(3, -1), entities.chunk(3, -1)
        m, neg_1, pos_1, neg_2, pos_2 = a * mu_h + b, (a * neg_h).abs(), (a * pos_h).abs(), neg.abs(), pos.abs()
        gap_1, gap_2 = pos_1 - neg_1, pos_2 - neg_2
        cross = (m * gap_1).sum(-1)[:, None] - m @ gap_2.T - gap_1 @ mu.T + (mu * gap_2).sum(-1)
        return -(squares(m, mu) + squares(neg_1, neg_2) / 2 + squares(pos_1, pos_2) / 2 + C["normal"] * cross)
    (mu_h, s_h), (mu, s) = h.chunk(2, -1), entities.chunk(2, -1)
    m = a * mu_h + b
    if kind == "NFE1":
        return -(squares(m, mu) + squares((a * s_h).abs(), s.abs()))
    first, second = softplus(a) * softplus(s_h), softplus(s)
    precision = 1 / second.square()
    logs = second.log().sum(-1) - first.log().sum(-1)[:, None]
    means = m.square() @ precision.T - 2 * m @ (mu * precision).T + (mu.square() * precision).sum(-1)
    return -(logs + (first.square() @ precision.T + means - m.shape[-1]) / 2)


def masked_loss(scores, target):
    """:func:`loss` with the signs as one dense mask."""
    signs = torch.ones_like(scores).scatter_(1, target[:, None], -1)
    return softplus(signs * scores).sum() / len(scores)


def loss(scores, target):
    """The official loss of ungrouped queries: every entity a candidate, the own tail positive, sum over entities, mean over rows."""
    signs = torch.ones_like(scores)
    for row, tail in enumerate(target.tolist()):
        signs[row, tail] = -1
    return softplus(signs * scores).sum() / len(scores)


def official_rank(scores, target, known):
    """The official filtered rank of one query: known answers, the target among them, go to -1e8."""
    own = scores[target].item()
    rest = scores.clone()
    rest[torch.tensor(sorted({*known, target}))] = -1e8
    return sum(score >= own for score in rest.tolist()) + 1


def rank(scores, target, known, ties):
    """The filtered rank of one query by counting."""
    own, greater, equal = scores[target].item(), 0, 0
    for entity, score in enumerate(scores.tolist()):
        if entity != target and entity not in known:
            greater += score > own
            equal += score == own
    return 1 + greater + {"optimistic": 0, "realistic": 0.5, "pessimistic": 1}[ties] * equal
