"""Pipelines from configuration: whole or not at all, and every error says where."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from seawall import CircuitBreaker, CircuitOpenError, Retry, RetryBudget, Timeout, policies_of
from seawall.configuration import TYPES, ConfigurationError, Pipelines

TOML = """
[policies.bank]
type = "breaker"
consecutive_failures = 2
on = ["ConnectionError", "BankError"]

[pipelines.pay]
policies = [
    { type = "rate_limiter", rate = 100 },
    "bank",
    { type = "timeout", after = 2.0 },
]

[pipelines.refund]
policies = ["bank"]
"""


class BankError(Exception):
    pass


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "seawall.toml"
    path.write_text(TOML)
    return path


def one(**settings):
    return {"pipelines": {"pay": {"policies": [{"type": "breaker", **settings}]}}}


def test_a_file_gives_pipelines_that_share_the_policies_they_name(file):
    pipelines = Pipelines.from_toml(file, names={"BankError": BankError})
    assert list(pipelines) == ["pay", "refund"]
    assert [type(policy).__name__ for policy in pipelines["pay"].policies] == [
        "RateLimiter",
        "CircuitBreaker",
        "Timeout",
    ]
    assert pipelines["pay"].policies[1] is pipelines["refund"].policies[0]

    @pipelines["pay"]
    async def pay():
        raise BankError

    @pipelines["refund"]
    def refund():
        return "refunded"

    for _ in range(2):
        with pytest.raises(BankError):
            asyncio.run(pay())
    with pytest.raises(CircuitOpenError):
        refund()


def test_settings_change_while_in_use_and_what_is_left_out_goes_back_to_its_default():
    pipelines = Pipelines(one(failure_rate=0.3, minimum_calls=7))
    call = pipelines["pay"](lambda: 1)
    (breaker,) = policies_of(call)
    pipelines.update(one(failure_rate=0.4))
    assert policies_of(call) == (breaker,)
    assert (breaker.failure_rate, breaker.minimum_calls) == (0.4, 20)
    pipelines.update(one())
    assert breaker.failure_rate == 0.5


def test_a_wrong_update_changes_nothing():
    before = {
        "pipelines": {
            "pay": {"policies": [{"type": "breaker", "failure_rate": 0.3}]},
            "z": {"policies": [{"type": "timeout", "after": 1.0}]},
        }
    }
    pipelines = Pipelines(before)
    after = {
        "pipelines": {
            "pay": {"policies": [{"type": "breaker", "failure_rate": 0.4}]},
            "z": {"policies": [{"type": "timeout", "after": -1.0}]},
        }
    }
    with pytest.raises(ConfigurationError, match=r"pipelines.z.policies\[0\].after: after must be more than 0"):
        pipelines.update(after)
    assert pipelines["pay"].policies[0].failure_rate == 0.3
    assert pipelines["z"].policies[0].after == 1.0


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ({"pipelines": {}}, r"pipelines.pay: is gone; only settings can change"),
        (
            {"pipelines": {"pay": {"policies": [{"type": "breaker"}, {"type": "breaker"}]}}},
            r"pipelines.pay.policies\[1\]: is new",
        ),
        (
            {"pipelines": {"pay": {"policies": [{"type": "timeout", "after": 1.0}]}}},
            r"pipelines.pay.policies\[0\]: is another policy now",
        ),
        (one(name="other"), r"is another policy now \(<CircuitBreaker 'other'>, not <CircuitBreaker 'pay'>\)"),
    ],
)
def test_only_settings_may_change(after, message):
    with pytest.raises(ConfigurationError, match=message):
        Pipelines(one()).update(after)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"a": ["x", "y"], "b": ["y"], "c": ["x"]}, r"pipelines.c: is new; only settings can change"),
        ({"a": ["x", "y"]}, r"pipelines.b: is gone; only settings can change"),
        ({"a": ["x"], "b": ["y"]}, r"pipelines.a.policies\[1\]: is gone"),
        ({"a": ["x", "y"], "b": ["y", "x"]}, r"pipelines.b.policies\[1\]: is new"),
        ({"a": ["y", "x"], "b": ["y"]}, r"pipelines.a.policies\[0\]: is policies.y now, not policies.x; only settings"),
    ],
)
def test_which_shared_policies_stand_where_may_not_change(rows, message):
    policies = {"x": {"type": "breaker"}, "y": {"type": "bulkhead", "max_concurrent": 2}}

    def using(rows):
        return {"policies": policies, "pipelines": {name: {"policies": row} for name, row in rows.items()}}

    pipelines = Pipelines(using({"a": ["x", "y"], "b": ["y"]}))
    with pytest.raises(ConfigurationError, match=message):
        pipelines.update(using(rows))
    pipelines.update(using({"b": ["y"], "a": ["x", "y"]}))


def test_a_change_that_one_policy_cannot_make_changes_none():
    def with_algorithm(algorithm, rate):
        limiter = {"type": "rate_limiter", "rate": rate, "algorithm": algorithm}
        return {"pipelines": {"pay": {"policies": [{"type": "slo", "target": 0.9 + rate / 1000}, limiter]}}}

    pipelines = Pipelines(with_algorithm("gcra", 10))
    with pytest.raises(ConfigurationError, match=r"pipelines.pay.policies\[1\]: .*can't change its algorithm"):
        pipelines.update(with_algorithm("fixed_window", 20))
    slo, limiter = pipelines["pay"].policies
    assert (slo.target, limiter.rate) == (0.91, 10.0)
    pipelines.update(with_algorithm("gcra", 20))
    assert (slo.target, limiter.rate) == (0.92, 20.0)


def test_listeners_are_not_changed_by_an_update():
    pipelines = Pipelines(one(listeners="$a"), names={"a": [print], "b": [repr]})
    with pytest.raises(ConfigurationError, match=r"policies\[0\].listeners: can't change"):
        pipelines.update(one(listeners="$b"))


@pytest.mark.parametrize(
    ("configuration", "path", "problem"),
    [
        ({"pipeline": {}}, "configuration.pipeline", "did you mean 'pipelines'"),
        ([], "configuration", "must be a table"),
        ({"pipelines": []}, "pipelines", "must be a table"),
        ({"pipelines": {"pay": []}}, "pipelines.pay", "must be a table"),
        ({"pipelines": {"pay": {"polices": []}}}, "pipelines.pay.polices", "did you mean 'policies'"),
        ({"pipelines": {"pay": {"policies": 3}}}, "pipelines.pay.policies", "must be a list of policies, got 3"),
        ({"pipelines": {"pay": {"policies": ["bnk"]}}}, "pipelines.pay.policies[0]", "there is no policies.bnk"),
        ({"policies": {"x": {"type": "braker"}}}, "policies.x.type", "did you mean 'breaker'"),
        ({"policies": {"x": {}}}, "policies.x.type", "must be one of"),
        ({"policies": {"x": {"type": "timeout"}}}, "policies.x.after", "is missing; timeout needs it"),
        ({1: {}}, "configuration", "must be a table"),
        ({"pipelines": {"pay": {"policies": [{"type": 10**5000}]}}}, "pipelines.pay.policies[0].type", "got a int"),
        ({"policies": {"x": {"type": "breaker", "listeners": "abc"}}}, "policies.x.listeners", "iterable of functions"),
        (one(failure_rat=0.5), "pipelines.pay.policies[0].failure_rat", "did you mean 'failure_rate'"),
        (one(failure_rate=50), "pipelines.pay.policies[0].failure_rate", "for 50 % write 0.5"),
        (one(failure_rate="$rat"), "pipelines.pay.policies[0].failure_rate", "the app gave no name 'rat'"),
        (one(on="OSEror"), "pipelines.pay.policies[0].on", "must name exceptions"),
        (one(on="print"), "pipelines.pay.policies[0].on", "must name exceptions"),
        (one(on="__import__('os')"), "pipelines.pay.policies[0].on", "must name exceptions"),
        (one(name=""), "pipelines.pay.policies[0]", "name must be 1 to 200"),
    ],
    ids=itertools.count(),
)
def test_an_error_names_the_path(configuration, path, problem):
    with pytest.raises(ConfigurationError) as caught:
        Pipelines(configuration, names={"rate": 0.5})
    assert caught.value.path == path
    assert problem in str(caught.value)


def test_a_name_of_the_apps_may_stand_for_any_setting():
    heard = []
    pipelines = Pipelines(one(listeners="$listeners", consecutive_failures=1), names={"listeners": [heard.append]})

    @pipelines["pay"]
    def fail():
        raise OSError

    with pytest.raises(OSError):
        fail()
    assert len(heard) == 1
    pipelines.update(one(listeners="$listeners", consecutive_failures=5))
    assert pipelines["pay"].policies[0].consecutive_failures == 5


def test_a_file_that_is_no_toml_says_so(tmp_path):
    path = tmp_path / "broken.toml"
    path.write_text("[pipelines")
    with pytest.raises(ConfigurationError, match=r"broken\.toml: is no TOML"):
        Pipelines.from_toml(path)
    with pytest.raises(FileNotFoundError):
        Pipelines.from_toml(tmp_path / "none.toml")


def test_a_file_changes_them_too(file):
    pipelines = Pipelines.from_toml(file, names={"BankError": BankError})
    file.write_text(TOML.replace("after = 2.0", "after = 3.0"))
    pipelines.update_from_toml(file)
    assert isinstance(pipelines["pay"].policies[2], Timeout)
    assert pipelines["pay"].policies[2].after == 3.0


EVERYTHING = [
    {"type": "slo", "target": 0.99},
    {"type": "fallback", "value": "nothing"},
    {"type": "deadline", "after": 5},
    {"type": "cache", "ttl": 60},
    {"type": "retry", "on": ["ConnectionError", "TimeoutError"], "attempts": 2, "budget": "$budget"},
    {"type": "hedge", "delay": 0.5, "on": "OSError"},
    {"type": "load_shedder", "failure_rate": 0.2},
    {"type": "rate_limiter", "rate": 100, "per": 1},
    {"type": "keyed_rate_limiter", "rate": 10, "key": "$tenant"},
    {"type": "keyed", "factory": "$breaker", "key": "$tenant"},
    {"type": "keyed_around", "factory": "$retry", "key": "$tenant"},
    {"type": "bulkhead", "max_concurrent": 8},
    {"type": "adaptive_bulkhead", "max_limit": 50, "drops": "TimeoutError"},
    {"type": "breaker", "failure_rate": 0.3},
    {"type": "timeout", "after": 2.0},
    {"type": "chaos", "rate": 0.5, "exception": "$boom"},
]


def test_every_policy_can_be_configured_and_changed():
    def with_all(policies):
        return {"pipelines": {"everything": {"policies": policies}}}

    names = {
        "budget": RetryBudget("shared"),
        "tenant": lambda tenant: tenant,
        "breaker": CircuitBreaker,
        "retry": lambda tenant: Retry(tenant, on=ConnectionError),
        "boom": ConnectionError,
    }
    assert {policy["type"] for policy in EVERYTHING} == set(TYPES) - {"brownout", "retry_budget"}  # see test_ladders
    pipelines = Pipelines(with_all(EVERYTHING), names)
    slower = [{**policy, "after": 3} if policy["type"] == "timeout" else policy for policy in EVERYTHING]
    pipelines.update(with_all(slower))

    @pipelines["everything"]
    async def greet(tenant):
        return f"hello {tenant}"

    assert asyncio.run(greet("a")) == "hello a"
    assert policies_of(greet)[-2].after == 3.0
