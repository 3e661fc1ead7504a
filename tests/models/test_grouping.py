"""Which rows step together: fair, bounded, and no larger than it pays."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from fakes import row
from gathering import Together
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.engine.grouping import GroupLimits, Pace, choose
from deployments.engine.row import Whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from deployments.engine.row import Row

_SECONDS_PER_PX = 0.01


def make(steps: int, cost_px: int, key: str = "a", arrived_s: float = 0.0) -> Row:
    one = row(key=key, steps=steps, cost_px=cost_px)
    one.progress.steps = one.progress.steps_left = steps
    one.progress.cost_px, one.progress.arrived_s = cost_px, arrived_s
    return one


def work_s(one: Row) -> float:
    return one.progress.work_px * _SECONDS_PER_PX


class Shop:
    """Steps rows on a clock of its own, at a constant cost of each network pixel."""

    def __init__(self, limits: GroupLimits) -> None:
        self.now_s = 0.0
        self.turns = 0
        self.rows: list[Row] = []
        self.waited_s: dict[Row, float] = {}
        self._limits = limits
        self._pace = Together()
        self._pace.record([make(1, 1)], _SECONDS_PER_PX)

    def turn(self) -> list[Row]:
        group = choose(
            self.rows, lambda one: one.input.request.key, self._limits, self._pace, self.now_s
        ).rows
        seconds = sum(one.progress.cost_px for one in group) * _SECONDS_PER_PX
        self._pace.record(group, seconds)
        self.now_s += seconds
        self.turns += 1
        for one in group:
            one.progress.steps_left -= 1
            if not one.progress.steps_left:
                self.rows.remove(one)
                self.waited_s[one] = self.now_s - one.progress.arrived_s
        return group


def bound_s(kinds: Iterable[tuple[int, int]], present: int, batch: int) -> float:
    """How long a row may take at most while at most `present` rows are there at any time.

    With W the longest and w the shortest work of a row alone, and k the most steps:

    1) A row of age t has urgency at most W^2 / (1 + (t / 2W)^2), one of age up to A at least
       (w / k) w / (1 + (A / 2w)^2). (The lowest urgency number goes first.)
    2) So from the age T = 2W sqrt(k (W / w)^2 (1 + (A / 2w)^2)) on, nothing younger than A goes
       before it.
    3) During A seconds from then on, what came later is younger than A. Only the rows that were
       there at its age T go before it: at most `present` rows of k turns, of which each lasts at
       most `batch` times the longest step. Take just that for A: then the row is done at T + A.
    """
    works = [steps * cost_px * _SECONDS_PER_PX for steps, cost_px in kinds]
    longest, shortest = max(works), min(works)
    most_steps = max(steps for steps, _ in kinds)
    step_s = max(cost_px for _, cost_px in kinds) * _SECONDS_PER_PX
    age = present * most_steps * batch * step_s
    ratio = most_steps * (longest / shortest) ** 2 * (1 + (age / 2 / shortest) ** 2)
    return 2 * longest * math.sqrt(ratio) + age


# --- fairness ---


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("factor", [2, 5, 10])
def test_a_large_row_is_done_in_bounded_time_under_an_endless_stream_of_small_ones(
    factor: int, batch: int
) -> None:
    kinds = {"large": (4 * factor, factor), "small": (4, 1)}
    shop = Shop(GroupLimits(batch))
    large = make(*kinds["large"], key="large")
    shop.rows = [large, *(make(*kinds["small"], key="small") for _ in range(4))]
    while large.progress.steps_left:
        shop.turn()
        while len(shop.rows) < 5:
            shop.rows.append(make(*kinds["small"], key="small", arrived_s=shop.now_s))
        assert shop.now_s < bound_s(kinds.values(), 5, batch)
    waited, alone = shop.waited_s[large], work_s(large)
    small = work_s(shop.rows[0])
    print(
        f"{alone / small:.0f} times the work, {batch} a pass: {shop.turns} turns,"
        f" {waited / alone:.1f} times as long as alone"
    )
    # Fresh rows are overtaken from the age of 2 W^2 / w on; what has begun is finished before.
    assert waited <= 2 * alone**2 / small * 2 + 2 * alone


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    kinds=st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 4), st.sampled_from("ab")),
        min_size=1,
        max_size=4,
    ),
    present=st.integers(1, 5),
    batch=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_no_row_waits_longer_than_the_bound(
    kinds: list[tuple[int, int, str]], present: int, batch: int, seed: int
) -> None:
    """Whatever mix keeps coming: each row that ends makes room for another."""
    rng = random.Random(seed)
    shop = Shop(GroupLimits(batch))
    limit_s = bound_s([kind[:2] for kind in kinds], present, batch)
    for _ in range(400):
        while len(shop.rows) < present:
            shop.rows.append(make(*rng.choice(kinds), arrived_s=shop.now_s))
        shop.turn()
        assert all(shop.now_s - one.progress.arrived_s <= limit_s for one in shop.rows)
    assert max(shop.waited_s.values()) <= limit_s


class Album:
    """Pictures of one request, in tiles, of which the shop has some of each picture at a time."""

    def __init__(self, shop: Shop, tiles: int, pictures: int = 1, at_a_time: int = 4) -> None:
        self.whole = Whole(shop.now_s, tiles * pictures, tiles * pictures)
        self.inside: list[Row] = []
        self._at_a_time = at_a_time * pictures
        self._shop = shop

    def refill(self, deadline_s: float = math.inf) -> None:
        self.inside = [one for one in self.inside if one.progress.steps_left]
        while self.whole.waiting and len(self.inside) < self._at_a_time:
            tile = make(4, 1, arrived_s=self._shop.now_s)
            tile.input = replace(tile.input, whole=self.whole, deadline_s=deadline_s)
            self.whole.waiting -= 1
            self.inside.append(tile)
            self._shop.rows.append(tile)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("pictures", [1, 8])
def test_pictures_in_tiles_hold_up_no_small_request_and_are_done_all_the_same(
    pictures: int, batch: int
) -> None:
    shop = Shop(GroupLimits(batch))
    album, smalls = Album(shop, 60, pictures), list["Row"]()
    alone_s = pictures * 60 * work_s(make(4, 1))
    album.refill()
    while album.inside:
        if shop.turns % 8 == 0:  # half of what a shop that takes one a turn can do
            smalls.append(make(4, 1, arrived_s=shop.now_s))
            shop.rows.append(smalls[-1])
        shop.turn()
        album.refill()
    assert shop.now_s <= 3 * alone_s
    waited = [shop.waited_s[one] / work_s(one) for one in smalls if one in shop.waited_s]
    print(f"{batch} a pass: small ones took {max(waited):.1f} times as long as alone")
    assert len(waited) >= 8
    assert max(waited) <= 2 * batch


@pytest.mark.parametrize("batch", [1, 4])
def test_the_results_of_a_request_give_way_to_a_single_one_that_comes_later(batch: int) -> None:
    shop = Shop(GroupLimits(batch))
    whole = Whole(0.0, 8, 0)
    eight = [make(20, 1) for _ in range(8)]
    for one in eight:
        one.input = replace(one.input, whole=whole)
    shop.rows = list(eight)
    for _ in range(5):
        shop.turn()
    later = make(20, 1, arrived_s=shop.now_s)
    shop.rows.append(later)
    groups = [shop.turn() for _ in range(20)]
    assert all(later in group for group in groups)
    assert {len(group) for group in groups} == {batch}  # and nobody's place is left empty


def test_the_tiles_of_a_picture_that_are_still_to_come_count_before_its_deadline() -> None:
    shop = Shop(GroupLimits(1))
    album = Album(shop, 60)
    small = make(4, 1, arrived_s=0.0)
    small.input = replace(small.input, deadline_s=100.0)
    shop.rows = [small]
    album.refill(deadline_s=1.2 * 60 * work_s(small))
    assert shop.turn() != [small]


def test_the_least_work_goes_first_among_those_that_came_together() -> None:
    shop = Shop(GroupLimits(1))
    rows = [
        make(steps, cost_px, str(i)) for i, (steps, cost_px) in enumerate([(9, 3), (2, 1), (3, 2)])
    ]
    shop.rows = list(rows)
    order = [shop.turn()[0] for _ in range(14)]
    assert order == [rows[1]] * 2 + [rows[2]] * 3 + [rows[0]] * 9


def test_of_two_alike_the_one_that_came_first_goes_first() -> None:
    shop = Shop(GroupLimits(1))
    early, late = make(3, 1, "a", 0.0), make(3, 1, "b", 0.005)
    shop.now_s = 0.01
    shop.rows = [late, early]
    assert [shop.turn()[0] for _ in range(6)] == [early] * 3 + [late] * 3


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    data=st.data(),
    rows=st.lists(
        st.tuples(
            st.integers(1, 40), st.integers(1, 10**6), st.sampled_from("abc"), st.integers(0, 9)
        ),
        min_size=1,
        max_size=12,
        unique_by=lambda made: made[3],
    ),
    most=st.integers(1, 8),
    budget_px=st.none() | st.integers(1, 3 * 10**6),
    exact=st.booleans(),
)
def test_a_group_is_of_one_key_within_the_limits_and_in_order_of_urgency(
    data: st.DataObject,
    rows: list[tuple[int, int, str, int]],
    most: int,
    budget_px: int | None,
    exact: bool,
) -> None:
    """And depends on the rows alone, not on their order."""
    made = [make(*values) for values in rows]
    for one in made:
        one.progress.steps_left = data.draw(st.integers(1, one.progress.steps))
    limits = GroupLimits(most, budget_px, exact)

    def group(some: list[Row]) -> list[Row]:
        return choose(some, lambda one: one.input.request.key, limits, Together(), 50.0).rows

    chosen = group(made)
    assert len({one.input.request.key for one in chosen}) == 1
    assert len(set(chosen)) == len(chosen) <= (1 if exact else most)
    cost_px = sum(one.progress.cost_px for one in chosen)
    assert len(chosen) == 1 or budget_px is None or cost_px <= budget_px
    assert group(data.draw(st.permutations(made))) == chosen
    if not exact and len(chosen) < most and budget_px is None:
        assert len(chosen) == sum(
            one.input.request.key == chosen[0].input.request.key for one in made
        )
    # Who is left out and would have fitted is less urgent than the first.
    alone = [one for one in made if one not in chosen]
    assert all(group([chosen[0], one])[0] is chosen[0] for one in alone)


def test_a_row_too_large_for_the_company_is_passed_over_not_waited_for() -> None:
    shop = Shop(GroupLimits(4, budget_px=10))
    rows = [make(1, 4, arrived_s=0.0), make(2, 8, arrived_s=0.0), make(3, 5, arrived_s=0.0)]
    shop.rows = list(rows)
    assert shop.turn() == [rows[0], rows[2]]


# --- what pays ---


def learn(pace: Pace, rows: list[Row], model: Callable[[int], float], turns: int) -> list[int]:
    """The group sizes of so many turns, of steps that last `model(size)`."""
    sizes = []
    for _ in range(turns):
        size = pace.best_size(rows)
        pace.record(rows[:size], model(size) * rows[0].progress.cost_px)
        sizes.append(size)
    return sizes


@pytest.mark.parametrize("most", [2, 4, 8])
def test_full_groups_where_a_pass_costs_the_same_at_every_size(most: int) -> None:
    sizes = learn(Pace(), [make(9, 100) for _ in range(most)], lambda _: 1.0, 3 * most + 200)
    assert Counter(sizes[: 3 * most]) == dict.fromkeys(range(1, most + 1), 3)
    assert set(sizes[3 * most :]) == {most}


@pytest.mark.parametrize("most", [2, 4, 8])
def test_rows_alone_where_a_pass_costs_as_much_as_its_rows(most: int) -> None:
    sizes = learn(Pace(), [make(9, 100) for _ in range(most)], float, 3 * most + 640)
    settled = Counter(sizes[3 * most :])
    assert set(settled) == {1, most}
    assert settled[most] <= 11, "a size that did not pay is tried again, but rarely"


def test_a_gain_within_the_noise_is_none() -> None:
    sizes = learn(Pace(), [make(9, 100) for _ in range(2)], lambda n: n * 0.97 ** (n - 1), 60)
    assert set(sizes[6:]) == {1}


def test_a_size_that_is_worse_is_avoided() -> None:
    """As where a kernel for the next size up is slow, or memory begins to be short."""
    times = {1: 1.0, 2: 1.2, 3: 1.5, 4: 9.0}
    sizes = learn(Pace(), [make(9, 100) for _ in range(4)], times.__getitem__, 12 + 320)
    settled = Counter(sizes[12:])
    assert set(settled) == {3, 4}
    assert settled[4] <= 6


def test_what_pays_is_learned_again_when_it_changes() -> None:
    pace, rows = Pace(), [make(9, 100) for _ in range(4)]
    assert learn(pace, rows, float, 100)[-1] == 1
    sizes = learn(pace, rows, lambda _: 1.0, 64 * 6)
    assert sizes[-1] == 4


def test_one_slow_step_teaches_nothing() -> None:
    pace, rows = Pace(), [make(9, 100) for _ in range(2)]
    learn(pace, rows, lambda _: 1.0, 20)
    pace.record(rows, 100 * 100.0)
    assert set(learn(pace, rows, lambda _: 1.0, 30)) == {2}


def test_sizes_of_pictures_are_told_apart() -> None:
    """Small ones gain from company where large ones do not."""
    pace = Pace()
    small, large = ([make(9, cost_px) for _ in range(4)] for cost_px in (64**2, 1024**2))
    for _ in range(40):
        learn(pace, small, lambda _: 1.0, 1)
        learn(pace, large, float, 1)
    assert pace.best_size(small) == 4
    assert pace.best_size(large) == 1
    assert pace.best_size(small[:3]) == 3


def test_the_pace_takes_bounded_memory() -> None:
    pace, rng = Pace(), random.Random(0)
    for _ in range(5000):
        rows = [make(9, rng.randint(1, 2**24)) for _ in range(rng.randint(1, 8))]
        pace.record(rows[: pace.best_size(rows)], rng.random())
    assert len(pace._costs) <= 25 * 8
    assert max(len(samples) for samples in pace._costs.values()) <= 5


def test_the_seconds_of_a_pixel_follow_what_is_seen() -> None:
    pace = Pace()
    assert pace.seconds(1000) > 0
    for _ in range(100):
        pace.record([make(1, 100), make(1, 300)], 8.0)
    assert pace.seconds(1000) == pytest.approx(20.0)
    for _ in range(100):
        pace.record([make(1, 100)], 1.0)
    assert pace.seconds(1000) == pytest.approx(10.0, rel=0.01)


def test_a_group_that_would_gain_nothing_from_more_rows_says_so() -> None:
    class Alone(Together):
        def best_size(self, rows: Iterable[Row]) -> int:
            return 1

    made = [make(1, 1), make(1, 1)]
    group = choose(made, lambda one: one.input.request.key, GroupLimits(), Alone(), 0.0)
    assert (len(group.rows), group.closed) == (1, "pace")
