"""How many weights each of several layers keeps, where only their sum is given.

    minimise  sum of the shares of energy that layers lose     subject to  weights kept <= share of all

Each layer loses a share of the energy of its own output, so loud layers count no more than others. Solved by a price
on weights (Lagrange): at each price every layer takes what is cheapest for it by itself; the price is bisected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnxcompress.passes._forms import Form, Ranks, Settings
from onnxcompress.statistics import Evidence

__all__ = ["Cut", "shared_out"]

_SHARES = tuple(n / 20 for n in range(1, 20))
"""Of a layer's weights that it may be left with, besides all of them."""
_BISECTIONS = 60


@dataclass(frozen=True, eq=False)
class Cut:
    """One form of one layer at one rank.

    Attributes:
        form: which.
        ranks: at which.
        energy: the rank is the smallest that keeps this share of the output's energy; ``ranks`` are the largest.
        share: of the weights of all layers together; the rank is what falls to this one.
        step: ranks are multiples of it.
    """

    form: Form
    ranks: Ranks
    energy: float | None = None
    share: float | None = None
    step: int = 1


def shared_out(cuts: Sequence[Cut], evidence: Evidence, settings: Settings) -> list[Ranks | None]:
    """Ranks for all layers, so that together they keep the share they were given; None for one that stays whole.

    Args:
        cuts: one of each layer, all with the same share.
        evidence: what was seen of their inputs.
        settings: how factors are worked out.
    """
    ladders = [_ladder(cut, evidence, settings) for cut in cuts]
    total = sum(cut.form.old_weights for cut in cuts)
    most = (cuts[0].share or 1.0) * total
    low, high = 0.0, float(total)
    found = [_cheapest(ladder, high, total) for ladder in ladders]
    for _ in range(_BISECTIONS):
        price = (low + high) / 2 if low else high / 1024
        chosen = [_cheapest(ladder, price, total) for ladder in ladders]
        if sum(weights for weights, _, _ in chosen) <= most:
            high, found = price, chosen
        else:
            low = price
    return [ranks for _, _, ranks in found]


def _ladder(cut: Cut, evidence: Evidence, settings: Settings) -> list[tuple[int, float, Ranks | None]]:
    """Weights, what is lost, and ranks; all weights first."""
    form = cut.form
    rungs = dict.fromkeys(ranks for share in _SHARES if (ranks := form.at_share(share, cut.step)) is not None)
    lost = form.losses(tuple(rungs), evidence, settings)
    return [(form.old_weights, 0.0, None), *((form.weights(r), lost[r], r) for r in rungs)]


def _cheapest(
    ladder: Sequence[tuple[int, float, Ranks | None]], price: float, total: int
) -> tuple[int, float, Ranks | None]:
    return min(ladder, key=lambda rung: (rung[1] + price * rung[0] / total, -rung[0]))
