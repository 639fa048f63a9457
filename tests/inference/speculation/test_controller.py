"""The controller drafts where that pays and not where it does not, whatever happens to acceptance, cost and load."""

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seawall.inference.generate.speculation import Controller, Costs, Pace, Plan, Proposal
from tests.inference.speculation.simulation import PACE, best, simulate

SEEDS = range(8)


def speedups(*arguments, **settings):
    return [simulate(*arguments, seed=seed, **settings) for seed in SEEDS]


@pytest.mark.parametrize("cost", [0.0, 0.1, 0.25, 0.4])
@pytest.mark.parametrize("acceptance", [0.0, 0.1, 0.3, 0.5, 0.7, 0.85, 0.92, 0.97, 1.0])
def test_it_comes_within_a_tenth_of_the_best_fixed_length_and_never_below_plain(acceptance, cost):
    found = speedups(lambda _: acceptance, cost=cost)
    assert statistics.mean(found) >= 0.9 * best(acceptance, cost)
    assert min(found) >= 0.97


@pytest.mark.parametrize("cost", [0.0, 0.4])
def test_a_drafter_that_collapses_half_way_costs_little_of_what_it_won(cost):
    found = speedups(lambda done: 0.95 if done < 200 else 0.02, cost=cost)
    second_half_plain = 2 / (1 / best(0.95, cost) + 1)  # the harmonic mean of both halves
    assert statistics.mean(found) >= 0.9 * second_half_plain
    assert min(found) >= 0.97


@pytest.mark.parametrize("cost", [0.0, 0.4])
def test_a_drafter_that_becomes_good_is_found_out_even_though_it_was_switched_off(cost):
    found = speedups(lambda done: 0.02 if done < 200 else 0.95, cost=cost, tokens=1000)
    assert statistics.mean(found) >= (1.8 if cost == 0 else 1.2)


def test_acceptance_that_flips_every_fifty_tokens_never_makes_it_slower_than_plain():
    assert min(speedups(lambda done: 0.95 if done // 50 % 2 else 0.02, cost=0.4, tokens=600)) >= 0.97


@pytest.mark.parametrize(
    "load",
    [lambda d: 4 if d < 200 else 1, lambda d: 1 if d < 200 else 4, lambda d: 1 + 2 * (d // 30 % 2)],
    ids=["it leaves", "it comes", "it comes and goes"],
)
def test_a_busy_neighbour_changes_how_long_things_take_and_not_what_pays(load):
    good = speedups(lambda _: 0.92, cost=0.4, load=load, noise=0.2, tokens=600)
    assert statistics.mean(good) >= 0.9 * best(0.92, 0.4)
    useless = speedups(lambda _: 0.05, cost=0.4, load=load, noise=0.2, tokens=600)
    assert min(useless) >= 0.95  # measured 0.96 to 0.99: the change of load itself is part of it


@pytest.mark.parametrize("cost", [0.0, 0.35])
def test_an_answer_of_fifty_tokens_loses_at_most_a_thirtieth_to_a_drafter_that_is_always_wrong(cost):
    assert min(speedups(lambda _: 0.0, cost=cost, tokens=50)) >= 0.966


def test_an_answer_of_twenty_tokens_loses_less_to_a_free_drafter_that_is_always_wrong():
    assert min(speedups(lambda _: 0.0, tokens=20)) >= 0.975


def test_a_drafter_that_is_right_only_while_nobody_asks_loses_a_hundredth_of_an_answer_however_long():
    fooled, spent, written = controller(chances=((0.7,),)), 0.0, 0
    for _ in range(4000):
        plan = fooled.plan([[Proposal(1)] * 16], 16)
        fooled.score(0, 0, hit=plan.drafter is None)
        seconds = PACE.plain if plan.drafter is None else PACE.pair + PACE.more * (plan.most - 1)
        fooled.learn(plan, plan.most, 1, 0.0, seconds)
        spent, written = spent + seconds, written + 1
    assert 1.005 < spent / written <= 1.011  # it was fooled, all along


@pytest.mark.parametrize("cost", [0.0, 0.4])
def test_passes_that_are_interrupted_now_and_then_do_not_count_against_speculation(cost):
    rng = random.Random(1)
    disturbed = speedups(lambda _: 0.9, cost=cost, load=lambda _: rng.choice([1, 1, 1, 1, 1, 1, 4]), tokens=600)
    assert statistics.mean(disturbed) >= 0.8 * best(0.9, cost)


@pytest.mark.parametrize("cost", [0.1, 0.35, 0.8])
def test_a_drafter_that_is_paid_and_has_nothing_to_say_costs_a_hundredth_of_a_long_answer(cost):
    one, spent = controller(drafts=[cost]), 0.0
    for _ in range(1000):
        plan = one.plan([None], 16)
        drafting = 0.0 if plan.drafter is None else cost
        one.learn(plan, 0, 1, drafting, PACE.plain)
        spent += drafting + PACE.plain
    assert 1000 * PACE.plain / spent > 0.975


def test_a_drafter_that_cannot_pay_at_any_acceptance_is_never_tried():
    assert min(speedups(lambda _: 0.0, cost=1.2, noise=0.0)) == pytest.approx(1.0)


def test_a_drafter_with_nothing_to_offer_costs_nothing():
    assert min(speedups(lambda _: 0.9, offered=0, noise=0.0)) == pytest.approx(1.0)


def controller(*, chances=((0.9,),), drafts=(0.0,), **settings):
    return Controller(chances, Costs(PACE, drafts), **({"most": 16} | settings))


def successful(controller):
    """The same, which has won what it may stake."""
    for _ in range(2):
        controller.learn(Plan(0, 4), 4, 5, 4 * controller.costs.draft(0), controller.costs.verify(5))
    return controller


def test_a_longer_draft_is_asked_for_where_more_is_accepted():
    lengths = []
    for chance in (0.4, 0.6, 0.8, 0.9):
        plan = successful(controller(chances=((chance,),))).plan([[Proposal(1)] * 16], 16)
        lengths.append(plan.most)
    assert lengths == sorted(lengths)
    assert len(set(lengths)) == 4


def test_no_more_is_staked_than_may_be_lost():
    sure = controller(chances=((0.99,),))
    offer = [[Proposal(1)] * 16]
    lengths = []
    for _ in range(4):
        plan = sure.plan(offer, 16)
        lengths.append(plan.most)
        sure.learn(plan, plan.most, plan.most + 1, 0.0, sure.costs.verify(plan.most + 1))
    assert lengths == sorted(lengths)
    assert lengths[0] < 16 == lengths[-1]  # what was won is staked next
    refused = controller(chances=((0.99,),))
    plan = refused.plan(offer, 16)
    refused.learn(plan, plan.most, 1, 0.0, refused.costs.verify(plan.most + 1))
    assert refused.plan(offer, 16).most <= 1


def test_plain_passes_may_be_told_one_by_one_or_together():
    alone, together = controller(), controller()
    for _ in range(8):
        alone.learn(Plan(None), 0, 1, 0.0, 1.2)
    together.learn(Plan(None), 0, 8, 0.0, 9.6, passes=8)
    assert together.costs.plain() == pytest.approx(alone.costs.plain(), rel=0.02)
    assert together.plan([[Proposal(1)] * 16], 16) == alone.plan([[Proposal(1)] * 16], 16)


def test_a_drafter_is_asked_for_one_token_where_nothing_after_it_can_make_up_for_it():
    def asked(chance, **settings):
        return len(controller(chances=((chance,),), **settings).useful(0, iter([Proposal(1)] * 16)))

    assert asked(0.9) > 1
    assert asked(0.01) == 1
    assert asked(0.01, length=4) == 16  # its user has decided
    assert controller().useful(0, iter([])) == []


@given(
    chances=st.lists(st.floats(0, 0.97), min_size=4, max_size=4),
    strengths=st.lists(st.integers(0, 3), max_size=16),
    won=st.integers(0, 6),
)
def test_what_a_drafter_is_not_asked_for_would_be_in_no_plan(chances, strengths, won):
    one = controller(chances=(chances,))
    for _ in range(won):
        one.learn(Plan(0, 4), 4, 5, 0.0, one.costs.verify(5))
    offer = [Proposal(token, strength) for token, strength in enumerate(strengths)]
    useful = one.useful(0, iter(offer))
    assert useful == offer[: len(useful)]
    assert one.plan([useful], 16) == one.plan([offer], 16)


def test_of_several_drafters_the_one_that_gains_most_drafts():
    pair = controller(chances=((0.9,), (0.9,)), drafts=(0.0, 0.3))
    assert pair.plan([[Proposal(1)] * 16, None], 16).drafter == 0
    assert pair.plan([[], None], 16).drafter == 1


def test_no_more_is_drafted_than_there_is_room_for():
    assert controller().plan([[Proposal(1)] * 16], 3).most == 3
    assert controller().plan([[Proposal(1)] * 16], 0) == Plan(None)


def test_a_fixed_length_is_always_drafted_with_the_first_drafter_that_has_something():
    fixed = controller(chances=((0.01,), (0.01,)), drafts=(0.0, 5.0), length=4)
    assert fixed.plan([[Proposal(1)], None], 16) == Plan(0, 4)
    assert fixed.plan([[], None], 16) == Plan(1, 4)
    assert fixed.plan([[], None], 2) == Plan(1, 2)
    assert fixed.another(Plan(1, 4), 0.0, 3)
    assert not fixed.another(Plan(1, 4), 1.0, 4)


def test_unlikely_tokens_end_a_draft_that_costs():
    costly = successful(controller(drafts=(0.4,)))
    plan = costly.plan([None], 16)
    assert costly.another(plan, 0.95, 1)
    assert not costly.another(plan, 0.2, 1)


def test_experiments_take_a_hundredth_of_the_time():
    hopeless = controller(chances=((0.05,),), drafts=(0.3,))
    for _ in range(40):
        hopeless.score(0, 0, hit=False)
    spent = tried = 0.0
    for _ in range(2000):
        plan = hopeless.plan([None], 16)
        drafted = 2 if plan.experiment else 0
        assert plan.drafter is None or plan.experiment
        seconds = (0.6, 1.15) if drafted else (0.0, 1.0)
        hopeless.learn(plan, drafted, 1, *seconds)
        spent += sum(seconds)
        tried += 0.75 if drafted else 0.0
    assert 0 < tried <= 0.011 * spent


def test_costs_follow_the_load_and_keep_their_shape():
    costs = Costs(PACE, [0.4])
    for _ in range(50):
        costs.saw_plain(3.0)
    assert costs.plain() == pytest.approx(3.0, rel=0.05)
    assert costs.verify(9) / costs.plain() == pytest.approx(1.45, rel=0.25)
    assert costs.draft(0) / costs.plain() == pytest.approx(0.4, rel=0.25)


def test_one_pass_that_was_interrupted_moves_little():
    costs = Costs(PACE, [])
    costs.saw_plain(1.0)
    costs.saw_plain(100.0)
    assert costs.plain() < 1.6


def test_the_slope_of_verification_is_learned_where_it_was_measured_wrong():
    costs = Costs(Pace(1.0, 1.0, 0.0), [])
    for _ in range(60):
        for tokens in (3, 5, 9, 17):
            costs.saw_verify(tokens, 1.0 + 0.3 * (tokens - 2))
            costs.saw_plain(1.0)
    assert costs.verify(17) / costs.verify(3) == pytest.approx(5.5 / 1.3, rel=0.1)
