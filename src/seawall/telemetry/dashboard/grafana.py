"""The dashboard as Grafana reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from seawall.telemetry.dashboard.panels import ROWS, Kind, Panel
from seawall.telemetry.ledger import PIPELINE_DURATION
from seawall.telemetry.names import prometheus_name

SCHEMA = 41  # of Grafana 11.6; later ones read it, and bring it up to date
HEIGHT = 8
WIDTH = 24  # of the page
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def grafana_dashboard(*, title: str = "seawall", uid: str = "seawall") -> dict[str, Any]:
    """The dashboard as JSON data, to import into Grafana or to put into its provisioning folder.

    Its variables are the data source, of type Prometheus, and the jobs to show. It fits every service: what that does
    not have shows no data.

    Args:
        title: as Grafana shows it.
        uid: by which Grafana knows it again, so that importing a newer one replaces it; up to 40 characters.

    Examples:
        >>> dashboard = grafana_dashboard(title="shop")
        >>> [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"]
        ['Objectives', 'Guarded calls', 'Policies', 'Answers of models']
    """
    if not 1 <= len(uid) <= 40 or not uid.replace("-", "").replace("_", "").isalnum() or not uid.isascii():
        raise ValueError(f"uid must be 1 to 40 letters, digits, - or _, got {uid!r}")
    return {
        "title": title,
        "uid": uid,
        "description": "Objectives, guarded calls, policies and answers of models, as seawall exports them.",
        "tags": ["seawall"],
        "schemaVersion": SCHEMA,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": list(_panels()),
    }


def _variables() -> list[dict[str, Any]]:
    jobs = f"label_values({prometheus_name(PIPELINE_DURATION)}_count, job)"
    return [
        {"type": "datasource", "name": "datasource", "label": "Data source", "query": "prometheus"},
        {
            "type": "query",
            "name": "job",
            "label": "Job",
            "datasource": _DATASOURCE,
            "query": {"query": jobs, "refId": "job"},
            "refresh": 2,  # when the time range changes
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": ["All"], "value": ["$__all"]},
        },
    ]


def _panels() -> Iterator[dict[str, Any]]:
    number = y = 0
    for title, panels in ROWS.items():
        number += 1
        yield {"type": "row", "id": number, "title": title, "collapsed": False, "panels": [],
               "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1}}  # fmt: skip
        y += 1
        x = 0
        for panel in panels:
            if x + panel.width > WIDTH:
                x, y = 0, y + HEIGHT
            number += 1
            yield _panel(panel, number, x, y)
            x += panel.width
        y += HEIGHT


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "mappings": [], "custom": _CUSTOM[panel.kind]}
    if panel.kind == "timeseries":
        defaults["min"] = 0
    if panel.most is not None:
        defaults["max"] = panel.most
    if panel.steps:
        first, *later = panel.steps
        defaults["thresholds"] = {
            "mode": "absolute",
            "steps": [{"value": None, "color": first[1]}, *({"value": at, "color": colour} for at, colour in later)],
        }
        defaults["color"] = {"mode": "thresholds" if panel.kind == "stat" else "palette-classic"}
        if panel.kind == "timeseries":
            defaults["custom"] = {**_CUSTOM[panel.kind], "thresholdsStyle": {"mode": "dashed"}}
    if panel.states:
        states = {str(value): {"text": text, "color": colour} for value, (text, colour) in panel.states.items()}
        defaults["mappings"] = [{"type": "value", "options": states}]
    return {
        "type": panel.kind,
        "id": number,
        "title": panel.title,
        "description": panel.text,
        "datasource": _DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": HEIGHT},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": _DATASOURCE, "expr": expr, "legendFormat": legend,
             "range": True}
            for index, (legend, expr) in enumerate(panel.queries.items())
        ],
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _OPTIONS[panel.kind],
    }  # fmt: skip


_CUSTOM: Mapping[Kind, Mapping[str, Any]] = {
    "timeseries": {"lineWidth": 1, "fillOpacity": 10, "showPoints": "never"},
    "stat": {},
    "state-timeline": {"lineWidth": 0, "fillOpacity": 80},
}
_OPTIONS: Mapping[Kind, Mapping[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {"reduceOptions": {"calcs": ["lastNotNull"], "values": False, "fields": ""}, "colorMode": "value",
             "graphMode": "area", "justifyMode": "auto", "textMode": "auto", "orientation": "auto"},
    "state-timeline": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "single", "sort": "none"},
        "mergeValues": True,
        "showValue": "auto",
        "rowHeight": 0.9,
    },
}  # fmt: skip
