"""Brown-outs from configuration: who names whom, which steps there are, and what an update leaves alone."""

from __future__ import annotations

import pytest

from seawall import SLO, LoadShedder, Priority, RetryBudget, use_clock
from seawall.configuration import ConfigurationError, Pipelines
from seawall.engine import AnswerSettings
from seawall.slo.brownout import BrownOut, Run
from seawall.testing import VirtualClock

TOML = """
[policies.answers]
type = "slo"
target = 0.99
actions = ["dimmer"]

[policies.dimmer]
type = "brownout"
step_up = 15
hold = 300
ladder = [
    { step = "adjust", policy = "retries", ratio = 0.02 },
    { step = "shorter", max_tokens = 64 },
    { step = "shed", policy = "front", share = 0.25 },
    { step = "refuse", below = "high" },
]

[policies.retries]
type = "retry_budget"
ratio = 0.2

[policies.front]
type = "load_shedder"

[pipelines.ask]
policies = ["answers", "dimmer", "front", { type = "retry", on = "OSError", budget = "retries" }]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "seawall.toml"
    path.write_text(TOML)
    return path


def burn(clock, slo, seconds, fails):
    """Five calls a second."""
    for _ in range(seconds * 5):
        clock.advance(0.2)
        permit = slo.admit()
        if fails:
            permit.failure(OSError())
        else:
            permit.success()


def test_a_file_has_policies_that_name_each_other(file):
    pipelines = Pipelines.from_toml(file)
    slo, dimmer, front, retry = pipelines["ask"].policies
    assert isinstance(slo, SLO)
    assert slo.actions == (dimmer,)
    assert retry.budget is pipelines.policies["retries"]
    assert [repr(step) for step in dimmer.ladder] == [
        "Adjust(<RetryBudget 'retries'>, ratio=0.02)",
        "Shorter(64)",
        "Shed(0.25)",
        "Refuse(below=HIGH)",
    ]
    assert front.signals == (dimmer.ladder[2],)


def test_a_burn_takes_the_steps_of_the_file_and_a_recovery_gives_them_back(file):
    clock = VirtualClock()
    with use_clock(clock):
        pipelines = Pipelines.from_toml(file)
        slo, dimmer, front, _ = pipelines["ask"].policies
        budget, asked = pipelines.policies["retries"], AnswerSettings(max_tokens=256)
        burn(clock, slo, 3600, fails=False)
        assert (dimmer.level, budget.ratio, dimmer.adjust(asked)) == (0, 0.2, asked)
        burn(clock, slo, 900, fails=True)
        assert (dimmer.level, budget.ratio, dimmer.adjust(asked).max_tokens) == (4, 0.02, 64)
        assert front.signals[0].sample(clock()) == 0.25
        burn(clock, slo, 7200, fails=False)
        assert (dimmer.level, budget.ratio, dimmer.adjust(asked)) == (0, 0.2, asked)
        assert front.signals[0].sample(clock()) == 0.0


def burning(file):
    """A configuration whose ladder is up, and its clock."""
    clock = VirtualClock()
    with use_clock(clock):
        pipelines = Pipelines.from_toml(file)
        burn(clock, pipelines["ask"].policies[0], 900, fails=True)
    assert pipelines.policies["dimmer"].level == 4
    return pipelines, clock


def test_an_update_that_leaves_the_ladder_alone_leaves_it_up(file):
    pipelines, clock = burning(file)
    dimmer, budget = pipelines.policies["dimmer"], pipelines.policies["retries"]
    steps = dimmer.ladder
    file.write_text(TOML.replace("ratio = 0.2\n", "ratio = 0.3\n").replace("hold = 300", "hold = 60"))
    with use_clock(clock):
        pipelines.update_from_toml(file)
        assert (dimmer.level, dimmer.ladder, dimmer.hold) == (4, steps, 60.0)
        assert budget.ratio == 0.02  # the step holds
        assert pipelines["ask"].policies[2].signals == (steps[2],)
        burn(clock, pipelines["ask"].policies[0], 3600, fails=False)
    assert (dimmer.level, budget.ratio) == (0, 0.3)  # what the file says now


def test_an_update_with_another_ladder_begins_at_its_bottom_and_undoes_the_steps(file):
    pipelines, clock = burning(file)
    dimmer, front = pipelines.policies["dimmer"], pipelines.policies["front"]
    file.write_text(TOML.replace("share = 0.25", "share = 0.5"))
    with use_clock(clock):
        pipelines.update_from_toml(file)
    assert dimmer.level == 0
    assert pipelines.policies["retries"].ratio == 0.2
    assert front.signals == (dimmer.ladder[2],)
    assert front.signals[0].share == 0.5
    assert pipelines["ask"].policies[0].actions == (dimmer,)


def test_a_wrong_update_changes_nothing(file):
    pipelines, clock = burning(file)
    dimmer = pipelines.policies["dimmer"]
    steps = dimmer.ladder
    file.write_text(TOML.replace("share = 0.25", "share = 0.5").replace("ratio = 0.2", "ratio = -1"))
    with use_clock(clock), pytest.raises(ConfigurationError, match=r"policies\.retries\.ratio"):
        pipelines.update_from_toml(file)
    assert (dimmer.level, dimmer.ladder, pipelines.policies["retries"].ratio) == (4, steps, 0.02)
    assert pipelines.policies["front"].signals == (steps[2],)


def test_a_step_and_an_action_of_the_apps_have_names():
    ran = []
    step = Run(lambda: ran.append("on"))
    pipelines = Pipelines(
        {
            "policies": {
                "a": {"type": "slo", "target": 0.9, "actions": ["$page", "dimmer"]},
                "b": {"type": "slo", "target": 0.9, "actions": "$actions"},
                "dimmer": {"type": "brownout", "ladder": ["$step", {"step": "refuse"}]},
            }
        },
        names={"page": BrownOut("page", [Run(print)]), "step": step, "actions": []},
    )
    assert [action.name for action in pipelines.policies["a"].actions] == ["page", "dimmer"]
    assert pipelines.policies["dimmer"].ladder[0] is step
    assert pipelines.policies["dimmer"].ladder[1].refuses_below is Priority.CRITICAL
    assert isinstance(pipelines.policies["dimmer"], BrownOut)
    assert pipelines.policies["b"].actions == ()


BASE = {"b": {"type": "retry_budget"}, "f": {"type": "load_shedder"}, "s": {"type": "slo", "target": 0.9}}


@pytest.mark.parametrize(
    ("ladder", "path", "problem"),
    [
        (3, "", "must be a list of steps, got 3"),
        ([], "", "ladder must have a step or more"),
        ([3], "[0]", "must be a table, got 3"),
        ([{}], "[0].step", "must be one of adjust, refuse, shed, shorter, got None"),
        ([{"step": "shorten"}], "[0].step", "did you mean 'shorter'?"),
        (["$nothing"], "[0]", "the app gave no name 'nothing'"),
        (["$number"], "[0]", "$number must be a step such as Adjust(...), got 3"),
        ([{"step": "adjust"}], "[0].policy", "is missing; adjust needs it"),
        ([{"step": "adjust", "policy": "x"}], "[0].policy", "there is no policies.x"),
        ([{"step": "adjust", "policy": "b"}], "[0]", "got none"),
        ([{"step": "adjust", "policy": "b", "ratoi": 1}], "[0]", "ratoi"),
        ([{"step": "adjust", "policy": "b", "ratio": -1}], "[0].ratio", "ratio must be"),
        ([{"step": "adjust", "policy": "d", "hold": 1}], "", "refers to itself: d -> d"),
        ([{"step": "shed", "policy": "b", "share": 0.5}], "[0].policy", "must be of type load_shedder"),
        ([{"step": "shed", "policy": "f", "share": 50}], "[0].share", "for 50 % write 0.5"),
        ([{"step": "shed", "policy": "f"}], "[0].share", "share must be"),
        ([{"step": "shed", "policy": "f", "share": 0.5, "a": 1}], "[0].a", "shed has no such setting"),
        ([{"step": "refuse", "below": "hi"}], "[0].below", "must be one of sheddable, low, normal, high, critical"),
        ([{"step": "refuse", "belw": "high"}], "[0].belw", "did you mean 'below'?"),
        ([{"step": "shorter"}], "[0].max_tokens", "is missing; shorter needs it"),
        ([{"step": "shorter", "max_tokens": 0}], "[0].max_tokens", "must be 1 or more, got 0"),
    ],
)
def test_an_error_names_the_step(ladder, path, problem):
    with pytest.raises(ConfigurationError) as caught:
        Pipelines({"policies": {**BASE, "d": {"type": "brownout", "ladder": ladder}}}, names={"number": 3})
    wanted = "policies.d" if "itself" in problem else f"policies.d.ladder{path}"
    assert (caught.value.path, problem in caught.value.problem) == (wanted, True), str(caught.value)


@pytest.mark.parametrize(
    ("policies", "path", "problem"),
    [
        ({"a": {"type": "slo", "target": 0.9, "actions": ["b"]}}, "policies.a.actions[0]", "must be of type brownout"),
        ({"a": {"type": "slo", "target": 0.9, "actions": [3]}}, "policies.a.actions[0]", "there is no policies.3"),
        ({"a": {"type": "retry", "on": "OSError", "budget": "f"}}, "policies.a.budget", "must be of type retry_budget"),
        ({"a": {"type": "retry", "on": "OSError", "budget": "c"}}, "policies.a.budget", "there is no policies.c"),
    ],
)
def test_a_name_must_be_of_an_entry_of_the_right_type(policies, path, problem):
    with pytest.raises(ConfigurationError) as caught:
        Pipelines({"policies": {**BASE, **policies}})
    assert (caught.value.path, problem in caught.value.problem) == (path, True), str(caught.value)


def test_what_guards_nothing_can_not_stand_in_a_pipeline():
    with pytest.raises(ConfigurationError, match=r"pipelines\.p: .*is no policy"):
        Pipelines({"policies": BASE, "pipelines": {"p": {"policies": ["b"]}}})
    step = {"step": "refuse"}
    with pytest.raises(ConfigurationError, match=r"policies\[0\]\.ladder: belongs to an entry of `policies`"):
        Pipelines({"pipelines": {"p": {"policies": [{"type": "brownout", "ladder": [step]}]}}})


def test_a_shedder_keeps_the_signals_of_the_app():
    class Half:
        def sample(self, now):
            return 0.5

    half = Half()
    tables = {
        "f": {"type": "load_shedder", "signals": "$signals"},
        "d": {"type": "brownout", "ladder": [{"step": "shed", "policy": "f", "share": 0.5}]},
    }
    shedder = Pipelines({"policies": tables}, names={"signals": [half]}).policies["f"]
    assert isinstance(shedder, LoadShedder)
    assert shedder.signals[0] is half
    assert len(shedder.signals) == 2
    assert isinstance(Pipelines({"policies": BASE}).policies["b"], RetryBudget)
