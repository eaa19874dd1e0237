"""One choice a layer, so that the sum of one number is least while the sum of another stays within a limit: the multiple-choice knapsack."""

from __future__ import annotations

from collections.abc import Sequence

import numpy

Table = Sequence[Sequence[float]]
"""[layers][choices]; layers may have different numbers of choices."""


def exact(goal: Table, price: Table, limit: float) -> list[int] | None:
    """The choices with the least sum of `goal` whose `price` sums to at most `limit`, or None when there are none (a MILP, solved to the end)."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    if sum(map(min, price)) > limit:
        return None
    layer_of = numpy.repeat(numpy.arange(len(goal)), [len(row) for row in goal])
    goals, prices = (numpy.array([x for row in table for x in row], dtype=float) for table in (goal, price))
    one_each = (layer_of == numpy.arange(len(goal))[:, None]).astype(float)
    unit, bound = prices.max() or 1.0, limit
    while True:  # the solver is content with a limit kept to 1e-6: if it is over, ask again for less
        constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(prices / unit, -numpy.inf, bound / unit)]
        found = milp(goals / (abs(goals).max() or 1.0), constraints=constraints, integrality=1, bounds=Bounds(0, 1), options={"mip_rel_gap": 0})
        if found.x is None:
            return greedy(goal, price, limit)
        chosen = [int(found.x[layer_of == i].argmax()) for i in range(len(goal))]
        if total(price, chosen) <= limit:
            return chosen
        bound -= 2e-6 * unit


def greedy(goal: Table, price: Table, limit: float) -> list[int] | None:
    """From each layer's best choice, again and again the step that costs the least `goal` for the `price` it saves, until the limit holds; or None."""
    if sum(map(min, price)) > limit:
        return None
    chosen = [min(range(len(row)), key=lambda c, row=row, i=i: (row[c], price[i][c])) for i, row in enumerate(goal)]
    while total(price, chosen) > limit:
        steps = [
            ((goal[i][c] - goal[i][now]) / (price[i][now] - price[i][c]), i, c)
            for i, now in enumerate(chosen)
            for c in range(len(goal[i]))
            if price[i][c] < price[i][now]
        ]
        _, i, c = min(steps)
        chosen[i] = c
    return chosen


def total(table: Table, chosen: Sequence[int]) -> float:
    """The sum over layers of what the choices have in a table."""
    return sum(row[c] for row, c in zip(table, chosen, strict=True))
