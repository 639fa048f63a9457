"""The reference page is what the code says, and the code says no more than the page."""

from __future__ import annotations

from seawall.core.events import Event
from seawall.telemetry import gen_ai, happenings
from seawall.telemetry import spans as span_module
from tests.telemetry import reference


def test_the_committed_page_is_up_to_date():
    if reference.PAGE.read_text(encoding="utf-8") != reference.page():
        raise AssertionError(f"{reference.PAGE.name} is out of date; run: python tests/telemetry/reference.py")


def test_levels_are_given_to_events_that_there_are():
    names = {kind.__name__ for kind in reference.subclasses(Event)}
    assert happenings._OFTEN | happenings._GRAVE <= names
    assert not happenings._OFTEN & happenings._GRAVE


def test_every_attribute_that_a_span_may_have_is_on_the_page():
    sources = [(span_module, span_module.ATTRIBUTES), (gen_ai, gen_ai.ATTRIBUTES)]
    for module, described in sources:
        text = reference.Path(module.__file__).read_text(encoding="utf-8")
        used = {part for part in text.split('"') if part.startswith(("seawall.", "gen_ai.")) and part.count(".") < 4}
        unknown = used - described.keys() - set(gen_ai.METRICS) - {gen_ai.SCOPE, "gen_ai.token.type"}
        assert not unknown
