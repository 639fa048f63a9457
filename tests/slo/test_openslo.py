"""Objectives as OpenSLO documents: what is written reads back, and what can't be judged by says where and why."""

from __future__ import annotations

import sys
import tomllib

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from seawall import SLO
from seawall.cli import main
from seawall.configuration import Pipelines
from seawall.slo.openslo import OpenSLOError, from_openslo, to_openslo
from seawall.slo.rules import EVENTS, Objective

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]) | st.just(" "), min_size=1, max_size=80)
OBJECTIVES = st.builds(
    Objective,
    NAMES,
    st.floats(0, 1, exclude_min=True, exclude_max=True),
    st.integers(1, 200_000).map(lambda minutes: minutes * 60.0),
    st.integers(1, 10_000),
    NAMES,
    st.none() | st.floats(1e-6, 1e6),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(OBJECTIVES, max_size=4, unique_by=lambda one: one.id))
def test_what_is_written_reads_back_the_same(objectives):
    assert objectives == from_openslo(to_openslo(objectives))


@settings(max_examples=20, deadline=None)
@given(st.lists(OBJECTIVES, min_size=1, max_size=4, unique_by=lambda one: one.id))
def test_what_is_written_keeps_to_the_specification(objectives):
    documents = list(yaml.safe_load_all(to_openslo(objectives, selector='job="shop"')))
    names = [document["metadata"]["name"] for document in documents]
    assert len(set(names)) == len(objectives)
    for name, document, objective in zip(names, documents, objectives, strict=True):
        assert (document["apiVersion"], document["kind"]) == ("openslo/v1", "SLO")
        for one in (name, document["spec"]["indicator"]["metadata"]["name"]):  # RFC 1123
            assert 1 <= len(one) <= 63
            assert one.strip("-") == one
            assert set(one) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
        assert all(isinstance(value, str) for value in document["metadata"]["annotations"].values())
        (entry,) = document["spec"]["objectives"]
        assert entry["target"] == objective.target
        query = document["spec"]["indicator"]["spec"]["ratioMetric"]["total"]["metricSource"]["spec"]["query"]
        assert query.startswith(f"sum({EVENTS}{{policy_name=")
        assert 'job="shop"' in query


# The examples of the specification, with what they say of targets, windows and latencies.
FOO = """
apiVersion: openslo/v1
kind: SLO
metadata:
  name: foo-slo
  displayName: Foo SLO
spec:
  service: foo
  indicator:
    metadata:
      name: foo-error
      displayName: Foo Error
    spec:
      ratioMetric:
        counter: true
        good:
          metricSource:
            metricSourceRef: datadog-datasource
            type: Datadog
            spec:
              query: sum:trace.http.request.hits.by_http_status{http.status_code:200}.as_count()
        total:
          metricSource:
            metricSourceRef: datadog-datasource
            type: Datadog
            spec:
              query: sum:trace.http.request.hits.by_http_status{*}.as_count()
  timeWindow: [{duration: 4w, isRolling: true}]
  budgetingMethod: Occurrences
  objectives:
    - displayName: Foo Total Errors
      target: 0.98
"""
SEARCH = """
apiVersion: openslo/v1
kind: SLO
metadata:
  name: search-slo
  displayName: Searching time
spec:
  description: Regardless of the number of parallel searches it never should be more than 500ms.
  service: web-shop
  indicatorRef: search-latency
  timeWindow:
    - duration: 2w # Two weeks is a good choice in most cases.
      isRolling: true
  budgetingMethod: Occurrences
  objectives:
    - displayName: Good experience
      op: lt
      value: 500
      targetPercent: 99.95
  alertPolicies: # nothing
---
apiVersion: openslo/v1
kind: SLI
metadata: {name: search-latency}
spec: {thresholdMetric: {metricSource: {type: Any, spec: {query: Any}}}}
"""


def test_documents_of_others_are_read():
    assert [Objective("foo-slo", 0.98, 28 * 86400.0, service="foo")] == from_openslo(FOO)
    (found,) = from_openslo(SEARCH, threshold_unit="ms")
    assert Objective("search-slo", 0.9995, 14 * 86400.0, service="web-shop", latency=0.5) == found
    assert from_openslo(SEARCH, threshold_unit="s")[0].latency == 500.0


def test_several_objectives_of_one_document_have_the_names_of_both():
    several = FOO + "    - {displayName: gold, targetPercent: 99.9}\n    - {target: 0.5}\n"
    found = {objective.name: objective.target for objective in from_openslo(several)}
    assert found == {"foo-slo-Foo Total Errors": 0.98, "foo-slo-gold": 0.999, "foo-slo-2": 0.5}


@pytest.mark.parametrize(
    ("old", "new", "path", "problem"),
    [
        ("openslo/v1", "openslo/v2alpha", "documents[0].apiVersion", "must be 'openslo/v1', got 'openslo/v2alpha'"),
        ("kind: SLO", "kind: SLOs", "documents[0].kind", "did you mean 'SLO'?"),
        ("name: foo-slo", "name: ''", "documents[0].metadata.name", "must be a name, got ''"),
        ("target: 0.98", "target: 98", "documents[0].spec.objectives[0].target", "for 98 % write 0.98"),
        ("target: 0.98", "target: high", "documents[0].spec.objectives[0].target", "must be a number, got 'high'"),
        ("target: 0.98", "targetPercent: 100", "documents[0].spec.objectives[0].targetPercent", "(0, 1), got 1.0"),
        ("target: 0.98", "targetPercent: .inf", "documents[0].spec.objectives[0].targetPercent", "(0, 1), got inf"),
        ("target: 0.98", "targt: 0.98", "documents[0].spec.objectives[0].targt", "did you mean 'target'?"),
        ("target: 0.98", "op: lte", "documents[0].spec.objectives[0]", "either target or targetPercent, got none"),
        ("target: 0.98", "{target: 1, a: }", "documents", "can't be read as YAML"),
        ("target: 0.98", "{target: 0.9, target: 0.8}", "documents", "can't be read as YAML"),
        ("target: 0.98", "indicatorRef: a", "documents[0].spec.objectives[0].indicatorRef", "make an SLO of each"),
        ("Occurrences", "Timeslices", "documents[0].spec.budgetingMethod", "an SLO counts calls, got 'Timeslices'"),
        ("4w, isRolling: true", "1M", "documents[0].spec.timeWindow[0].duration", "such as 30d, got '1M'"),
        ("4w, isRolling: true", "1Y, calendar: {}", "documents[0].spec.timeWindow[0]", "must roll"),
        ("[{duration: 4w, isRolling: true}]", "[]", "documents[0].spec.timeWindow", "exactly one entry, got 0"),
        ("ratioMetric", "ratio", "documents[0].spec.indicator.spec", "thresholdMetric or ratioMetric, got none"),
        ("  indicator:", "  indicatorRef: a\n  indicator:", "documents[0].spec", "got indicator and indicatorRef"),
        ("service: foo", "service: [foo]", "documents[0].spec.objectives[0]", "must be a string"),
        ("spec:", "spec: &a {a: *a}\nspecs:", "documents", "alias"),
    ],
)
def test_what_is_wrong_says_where(old, new, path, problem):
    with pytest.raises(OpenSLOError) as caught:
        from_openslo(FOO.replace(old, new, 1))
    assert (caught.value.path, problem in caught.value.problem) == (path, True), str(caught.value)


def test_a_threshold_without_a_unit_is_no_latency():
    with pytest.raises(OpenSLOError, match=r"objectives\[0\].value: has no unit"):
        from_openslo(SEARCH)
    with pytest.raises(OpenSLOError, match=r"objectives\[0\].op: must be lt or lte"):
        from_openslo(SEARCH.replace("op: lt", "op: gte"), threshold_unit="ms")
    with pytest.raises(ValueError, match="threshold_unit must be 's', 'ms' or None, got 'min'"):
        from_openslo(SEARCH, threshold_unit="min")
    annotated = SEARCH.replace("name: search-slo", "name: search-slo\n  annotations: {seawall/latency: '0.25'}")
    assert from_openslo(annotated)[0].latency == 0.25


@pytest.mark.parametrize(
    "hostile",
    [
        "[" * 100_000,
        "a: &a [" + "x," * 9 + "]\nb: [*a, *a]",
        "!!python/object/apply:os.system [ls]",
        "\x00",
        "9" * 5000,
    ],
)
def test_hostile_text_is_an_error_and_nothing_else(hostile):
    with pytest.raises(OpenSLOError):
        from_openslo(hostile)


def test_a_giant_is_not_even_parsed():
    with pytest.raises(OpenSLOError, match="1,000,000 characters at most"):
        from_openslo("#" * 1_000_001)


def test_a_window_that_openslo_can_not_say_is_refused():
    with pytest.raises(OpenSLOError, match=r"objectives\[0\]: window must be whole minutes in OpenSLO, got 90 s"):
        to_openslo([Objective("answers", 0.9, 90.0)])


def test_the_commands_export_and_import_what_a_configuration_holds(tmp_path, capsys):
    toml = tmp_path / "seawall.toml"
    toml.write_text('[pipelines."a b"]\npolicies = [{type = "slo", target = 0.99, latency = 0.5, window = 604800}]\n')
    assert main(["slo", "export", str(toml), "--service", "shop", "--selector", 'job="shop"']) == 0
    document = tmp_path / "slo.yaml"
    document.write_text(capsys.readouterr().out, encoding="utf-8")
    assert main(["slo", "import", str(document)]) == 0
    printed = capsys.readouterr().out
    tables = tomllib.loads(printed)
    assert {"a b": {"type": "slo", "target": 0.99, "latency": 0.5, "window": 604800.0, "minimum_calls": 10}} == tables[
        "policies"
    ]
    pipelines = Pipelines({**tables, "pipelines": {"ask": {"policies": ["a b"]}}})
    slo = pipelines["ask"].policies[0]
    assert isinstance(slo, SLO)
    assert (slo.name, slo.target, slo.latency) == ("a b", 0.99, 0.5)


def test_the_import_command_says_what_is_wrong(tmp_path, capsys):
    document = tmp_path / "slo.yaml"
    document.write_text(FOO.replace("0.98", "98"))
    assert main(["slo", "import", str(document)]) == 1
    assert "documents[0].spec.objectives[0].target" in capsys.readouterr().err
    document.write_text(FOO + "---" + FOO)
    assert main(["slo", "import", str(document)]) == 1
    assert "several objectives called 'foo-slo'" in capsys.readouterr().err
    document.write_text("")
    assert main(["slo", "import", str(document)]) == 1
    assert "no document of kind SLO" in capsys.readouterr().err


def test_without_the_package_the_error_names_the_extra(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "yaml", None)
    monkeypatch.delitem(sys.modules, "seawall.slo.safe_yaml")
    monkeypatch.delitem(sys.modules, "seawall.slo.openslo")
    monkeypatch.delattr(sys.modules["seawall.slo"], "safe_yaml")
    (tmp_path / "slo.yaml").write_text(FOO)
    assert main(["slo", "import", str(tmp_path / "slo.yaml")]) == 1
    assert "pip install 'seawall[openslo]'" in capsys.readouterr().err
