"""Who gets the next free row: rules told in plain numbers, and laws over whatever may come."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seawall.engine import DeadlineUnmeetableError, QueueFullError, QueueTimeoutError
from seawall.engine.admission import Admission, Ticket
from seawall.engine.pace import Pace

LOW, NORMAL, HIGH, CRITICAL = 1, 2, 3, 4


def ticket(tenant="", *, priority=NORMAL, deadline=math.inf, prompt=10, answer=10):
    return Ticket(prompt, answer, priority, tenant, deadline)


def admission(rows=1, **settings):
    return Admission("model", rows=rows, **{"aging": math.inf, **settings})


def offered(queue, *tickets, now=0.0):
    for one in tickets:
        queue.offer([one], now)
    return tickets


def served(queue, now=0.0):
    """The order in which all that waits gets a row, one at a time."""
    order = []
    while (one := queue.next(now)) is not None:
        queue.admit(one, now)
        order.append(one)
        one.written = one.answer
        queue.finish(one, whole=False)
    return order


def paced(*, per_prompt_token=0.01, step=0.1, rows=1, answer=None):
    pace = Pace()
    pace.stepped(per_prompt_token * 100, read=100, written=0, rows=0)
    pace.stepped(step, read=0, written=rows, rows=rows)
    pace.answer = answer
    return pace


def test_equals_are_served_in_the_order_they_came():
    queue = admission()
    tickets = [ticket() for _ in range(5)]
    for at, one in enumerate(tickets):
        queue.offer([one], float(at))
    assert served(queue, 5.0) == tickets


def test_the_earliest_deadline_goes_first_and_none_or_a_late_one_counts_as_a_minute():
    queue = admission()
    late, none, later, soon = ticket(deadline=100.0), ticket(), ticket(deadline=59.0), ticket(deadline=10.0)
    offered(queue, late, none, later, soon)
    assert served(queue) == [soon, later, late, none]


def test_a_higher_priority_goes_before_an_earlier_deadline():
    queue = admission()
    soon, important = ticket(deadline=1.0), ticket(priority=HIGH)
    offered(queue, soon, important)
    assert served(queue) == [important, soon]


def test_waiting_is_worth_a_level_of_priority_after_each_aging():
    queue = admission(aging=5.0)
    low, normal = ticket(priority=LOW), ticket()
    queue.offer([low], 0.0)
    queue.offer([normal], 4.0)
    assert queue.next(4.9) is normal
    assert queue.next(5.0) is low


def test_a_tenant_that_floods_the_queue_does_not_hold_up_another():
    queue = admission()
    flood = offered(queue, *[ticket("flood") for _ in range(10)])
    calm = offered(queue, ticket("calm"))
    order = served(queue)
    assert order[:2] in ([flood[0], calm[0]], [calm[0], flood[0]])


def test_tenants_share_by_tokens_and_not_by_calls():
    queue = admission()
    offered(queue, *[ticket("long", prompt=90) for _ in range(8)])
    offered(queue, *[ticket("short", prompt=15, answer=10) for _ in range(32)])
    counts = Counter(one.tenant for one in served(queue)[:20])
    assert counts == {"long": 4, "short": 16}


def test_what_a_tenant_did_not_use_is_given_back():
    queue = admission()
    one, other = ticket("short", answer=1000), ticket("exact", answer=100)
    offered(queue, one, other)
    for each, written in ((one, 5), (other, 100)):
        queue.admit(each, 0.0)
        each.written = written
        queue.finish(each, whole=True)
    offered(queue, ticket("exact"), ticket("short"))
    assert served(queue)[0].tenant == "short"


def test_who_was_away_comes_back_without_credit():
    queue = admission()
    for _ in range(50):
        offered(queue, ticket("busy"))
        served(queue)
    offered(queue, *[ticket("new") for _ in range(10)], *[ticket("busy") for _ in range(10)])
    assert {one.tenant for one in served(queue)[:4]} == {"new", "busy"}


def test_who_was_away_while_others_were_served_has_no_credit_before_anything_ends_either():
    queue = admission(rows=20)
    queue.admit(*offered(queue, ticket("away")), 0.0)
    [one] = queue.running
    one.written = one.answer
    queue.finish(one, whole=True)
    offered(queue, *[ticket("busy") for _ in range(8)])
    for _ in range(4):
        queue.admit(queue.next(0.0), 0.0)
    offered(queue, *[ticket("away") for _ in range(3)], now=1.0)
    order = []
    for _ in range(4):
        order.append(queue.next(1.0))
        queue.admit(order[-1], 1.0)
    assert [one.tenant for one in order] == ["away", "busy", "away", "busy"]


def test_a_low_priority_of_one_tenant_is_not_starved_by_another_tenant():
    queue = admission(aging=5.0)
    low = ticket("batch", priority=LOW)
    queue.offer([low], 0.0)
    now = 0.0
    while low not in queue.running:
        queue.offer([ticket("chat", priority=CRITICAL)], now)
        one = queue.next(now)
        queue.admit(one, now)
        if one is not low:
            queue.finish(one, whole=False)
        now += 1.0
        assert now < 25.0


def test_a_flood_of_low_priority_rises_once_for_each_aging_and_not_as_a_whole():
    queue = admission(aging=5.0, max_queued=100)
    for _ in range(10):
        queue.offer([ticket("batch", priority=LOW)], 0.0)
        queue.offer([ticket("chat", prompt=500)], 0.0)
    order = []
    for now in (1.0, 2.0, 5.0, 6.0, 7.0, 10.0, 11.0):
        one = queue.next(now)
        queue.admit(one, now)
        one.written = one.answer
        queue.finish(one, whole=True)
        order.append(one.tenant)
    assert order == ["chat", "chat", "batch", "chat", "chat", "batch", "chat"]


def test_the_queue_is_bounded_by_answers():
    queue = admission(rows=2, max_queued=3)
    offered(queue, *[ticket() for _ in range(5)])  # two of them for the free rows
    with pytest.raises(QueueFullError, match="'model' has a full queue"):
        queue.offer([ticket()], 0.0)
    assert queue.waiting == 5


def test_the_queue_is_bounded_by_tokens_but_one_answer_may_always_wait():
    queue = admission(max_queued_tokens=100)
    queue.admit(*offered(queue, ticket()), 0.0)
    offered(queue, ticket(prompt=500))
    with pytest.raises(QueueFullError):
        queue.offer([ticket()], 0.0)
    assert (queue.waiting, queue.waiting_tokens) == (1, 510)


def test_samples_of_one_call_are_queued_all_or_none():
    queue = admission(max_queued=3)
    offered(queue, ticket(), ticket())
    with pytest.raises(QueueFullError):
        queue.offer([ticket(), ticket(), ticket()], 0.0)
    assert queue.waiting == 2
    queue.offer([ticket(), ticket()], 0.0)
    assert queue.waiting == 4


def test_one_that_matters_more_takes_the_place_of_the_last_that_matters_less():
    queue = admission(max_queued=2)
    _, older, newer = [offered(queue, ticket(priority=LOW), now=at)[0] for at in (0.0, 1.0, 2.0)]
    assert queue.offer([ticket()], 3.0) == [newer]
    assert queue.offer([ticket()], 3.0) == [older]
    assert queue.waiting == 3


def test_a_tenant_that_holds_most_of_a_full_queue_gives_way_to_one_that_holds_less():
    queue = admission(max_queued=3)
    flood = [offered(queue, ticket("flood"), now=float(at))[0] for at in range(4)]
    assert queue.offer([ticket("calm")], 5.0) == [flood[-1]]
    assert queue.offer([ticket("calm")], 5.0) == [flood[-2]]
    with pytest.raises(QueueFullError):  # two each now
        queue.offer([ticket("calm")], 5.0)


def test_a_deadline_that_is_over_is_refused():
    with pytest.raises(DeadlineUnmeetableError):
        admission().offer([ticket(deadline=5.0)], 5.0)


def test_without_a_measured_pace_no_deadline_is_refused_early():
    queue = admission()
    queue.offer([ticket(deadline=0.001, prompt=10_000)], 0.0)
    assert queue.waiting == 1


def test_a_deadline_that_can_not_be_met_even_alone_is_refused_for_good():
    queue = admission(pace=paced())  # 10 * 0.01 + 10 * 0.1 = 1.1 s
    queue.offer([ticket(deadline=1.2)], 0.0)
    with pytest.raises(DeadlineUnmeetableError) as caught:
        queue.offer([ticket(deadline=1.0)], 0.0)
    assert caught.value.retry_after is None


def test_a_deadline_that_the_queue_is_too_long_for_says_when_it_will_not_be():
    queue = admission(pace=paced())
    queue.admit(*offered(queue, ticket()), 0.0)
    offered(queue, ticket(priority=HIGH))
    with pytest.raises(DeadlineUnmeetableError) as caught:  # 1.1 s to run out, 1.1 s before it, 1.1 s itself
        queue.offer([ticket(deadline=3.0)], 0.0)
    assert caught.value.retry_after == pytest.approx(0.3)
    queue.offer([ticket(deadline=3.4)], 0.0)


def test_who_would_wait_longer_than_anybody_may_is_refused_at_once():
    queue = admission(max_wait=2.0, pace=paced())
    queue.admit(*offered(queue, ticket()), 0.0)
    offered(queue, ticket())
    with pytest.raises(QueueFullError) as caught:  # 1.1 s to run out, and 1.1 s of the one before it
        queue.offer([ticket()], 0.0)
    assert caught.value.retry_after == pytest.approx(0.2)
    queue.offer([ticket(priority=HIGH)], 0.0)


def test_the_backlog_of_another_tenant_is_not_held_against_a_call():
    queue = admission(max_queued=100)
    queue.admit(*offered(queue, ticket("flood")), 0.0)
    offered(queue, *[ticket("flood", deadline=3.9) for _ in range(50)])
    queue.pace = paced()
    queue.offer([ticket("calm", deadline=4.0)], 0.0)
    with pytest.raises(DeadlineUnmeetableError):
        queue.offer([ticket("flood", deadline=4.0)], 0.0)


def test_answers_are_expected_to_be_as_long_as_answers_are():
    queue = admission(pace=paced(answer=10))
    queue.offer([ticket(answer=10_000, deadline=1.2)], 0.0)
    with pytest.raises(DeadlineUnmeetableError):
        admission(pace=paced(answer=100)).offer([ticket(answer=10_000, deadline=1.2)], 0.0)


def test_who_waited_too_long_leaves_with_an_error():
    queue = admission(max_wait=30.0)
    one, other = ticket(), ticket()
    queue.offer([one], 0.0)
    queue.offer([other], 1.0)
    assert list(queue.overdue(29.9)) == []
    [(left, error)] = queue.overdue(30.0)
    assert left is one
    assert isinstance(error, QueueTimeoutError)
    assert queue.waiting == 1


def test_who_could_not_be_answered_in_time_any_more_leaves():
    queue = admission(pace=paced())
    queue.admit(*offered(queue, ticket()), 0.0)
    queue.offer([ticket(deadline=4.0)], 0.0)
    assert list(queue.overdue(2.8)) == []
    [(_, error)] = queue.overdue(2.95)
    assert isinstance(error, DeadlineUnmeetableError)


def test_a_refusal_says_when_a_row_is_probably_free():
    queue = admission(max_queued=0, pace=paced())
    queue.admit(*offered(queue, ticket()), 0.0)
    with pytest.raises(QueueFullError) as caught:
        queue.offer([ticket()], 0.0)
    assert caught.value.retry_after == pytest.approx(1.1)


def test_one_that_lost_its_row_has_its_old_place_again():
    queue = admission(rows=2)
    first, second, third = [offered(queue, ticket(), now=float(at))[0] for at in range(3)]
    queue.admit(first, 3.0)
    queue.admit(second, 3.0)
    queue.put_back(second)
    assert queue.next(3.0) is second
    assert queue.waiting == 2
    queue.admit(second, 3.0)
    queue.finish(first, whole=True)
    assert queue.next(3.0) is third


def test_a_large_answer_keeps_its_turn_until_it_fits():
    queue = admission(rows=2)
    large, small = offered(queue, ticket(prompt=10_000), ticket())
    assert [queue.next(0.0), queue.next(9.0)] == [large, large]
    queue.withdraw(large)
    assert queue.next(9.0) is small


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"rows": 0}, "rows must be"),
        ({"max_queued": -1}, "max_queued must be"),
        ({"max_queued_tokens": 0}, "max_queued_tokens must be"),
        ({"max_wait": 0}, "max_wait must be"),
        ({"aging": -1.0}, "aging must be"),
    ],
)
def test_wrong_settings_are_named(settings, wrong):
    with pytest.raises(ValueError, match=wrong):
        Admission("model", **{"rows": 1, **settings})


# Laws

tenants = st.sampled_from(["a", "b", "c"])
tickets = st.builds(
    lambda tenant, priority, prompt, answer, patience: (tenant, priority, prompt, answer, patience),
    tenants,
    st.integers(0, 4),
    st.integers(1, 60),
    st.integers(1, 60),
    st.sampled_from([math.inf, 5.0, 50.0]),
)
acts = st.lists(
    st.one_of(
        st.tuples(st.just("offer"), st.lists(tickets, min_size=1, max_size=3)),
        st.tuples(st.just("admit"), st.none()),
        st.tuples(st.just("finish"), st.integers(0, 10)),
        st.tuples(st.just("withdraw"), st.integers(0, 10)),
        st.tuples(st.just("put back"), st.integers(0, 10)),
        st.tuples(st.just("wait"), st.floats(0, 5)),
    ),
    min_size=20,
    max_size=60,
)


@given(acts, st.integers(1, 3), st.integers(0, 4), st.integers(50, 500))
@settings(max_examples=300, deadline=None)
def test_whatever_comes_the_bounds_hold_and_everyone_is_in_one_place(story, rows, most, tokens):
    queue = Admission("model", rows=rows, max_queued=most, max_queued_tokens=tokens, max_wait=30.0)
    now, alive = 0.0, set()
    for act, detail in story:
        if act == "offer":
            new = [
                Ticket(prompt, answer, priority, detail[0][0], now + patience)
                for _, priority, prompt, answer, patience in detail
            ]
            before = queue.waiting
            try:
                gone = queue.offer(new, now)
            except (QueueFullError, DeadlineUnmeetableError):
                assert queue.waiting == before
            else:
                alive.update(new)
                alive.difference_update(gone)
                free = max(0, rows - len(queue.running))
                assert queue.waiting <= most + free
                assert queue.waiting_tokens <= tokens or queue.waiting <= max(1, free)
        elif act == "admit":
            if (one := queue.next(now)) is not None:
                queue.admit(one, now)
        elif act in ("finish", "put back") and queue.running:
            one = list(queue.running)[detail % len(queue.running)]
            if act == "finish":
                one.written = one.answer // 2
                queue.finish(one, whole=True)
                alive.remove(one)
            else:
                queue.put_back(one)
        elif act == "withdraw" and alive:
            one = sorted(alive, key=lambda one: (one.arrived, one.prompt))[detail % len(alive)]
            queue.withdraw(one)
            queue.finish(one, whole=False)
            alive.remove(one)
        elif act == "wait":
            now += detail
            alive.difference_update(one for one, _ in queue.overdue(now))
        assert len(queue.running) <= rows
        assert len(alive) == queue.waiting + len(queue.running)
    while (one := queue.next(now)) is not None or queue.running:
        if one is None:
            one = next(iter(queue.running))
            queue.finish(one, whole=True)
            alive.remove(one)
        else:
            queue.admit(one, now)
    assert not alive
    assert (queue.waiting, queue.waiting_tokens) == (0, 0)


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 100)), min_size=60, max_size=120),
    st.integers(1, 3),
)
@settings(max_examples=50, deadline=None)
def test_tenants_that_always_wait_never_differ_by_more_than_one_answer_each(sizes, rows):
    queue = admission(rows, max_queued=1000, max_queued_tokens=10**9)
    sizes = {tenant: [size for one, size in sizes if one == tenant] for tenant in "ab"}
    for tenant in sizes:
        for size in sizes[tenant]:
            queue.offer([ticket(tenant, prompt=size, answer=1)], 0.0)
    had = Counter()
    while all(any(one.tenant == tenant for one in queue._waiting()) for tenant in "ab"):
        if (one := queue.next(0.0)) is None:
            one = next(iter(queue.running))
            one.written = 1
            queue.finish(one, whole=False)
        else:
            queue.admit(one, 0.0)
            had[one.tenant] += one.tokens
            assert abs(had["a"] - had["b"]) <= 2 * 101


@given(
    st.lists(st.tuples(tenants, st.integers(0, 4), st.integers(1, 50)), min_size=1, max_size=200),
    st.integers(0, 4),
    st.floats(0.5, 10.0),
)
@settings(max_examples=150, deadline=None)
def test_nobody_starves_however_much_comes_after(others, priority, aging):
    queue = admission(aging=aging, max_queued=10_000, max_queued_tokens=10**9)
    queue.offer([ticket("c", prompt=50) for _ in range(3)], 0.0)
    mine = ticket("a", priority=priority, prompt=50)
    queue.offer([mine], 0.0)
    now, turns = 0.0, 0
    while mine not in queue.running:
        tenant, level, prompt = others[turns % len(others)]
        for _ in range(2):  # twice as much comes as is served
            queue.offer([ticket(tenant, priority=level, prompt=prompt, deadline=now + 100.0)], now)
        one = queue.next(now)
        queue.admit(one, now)
        if one is not mine:
            queue.finish(one, whole=False)
        now, turns = now + 1.0, turns + 1
        assert turns < 5 * aging * 3 + 120 + 40
