"""Notifications by configuration, through notifiers of Airflow's kind."""

import json

import pytest
from airflow.sdk import BaseNotifier
from notices import Notice


class Noting(BaseNotifier):
    """Remembers what it was called with."""

    template_fields = ("message",)
    heard: list[str] = []  # noqa: RUF012

    def __init__(self, message: str) -> None:
        super().__init__()
        self.message = message

    def notify(self, context):
        self.heard.append(self.message)


@pytest.fixture(autouse=True)
def silence():
    Noting.heard.clear()


def configure(monkeypatch, *entries):
    monkeypatch.setenv("AIRFLOW_VAR_CRANE_NOTIFIERS", json.dumps(entries))


def entry(message, **more):
    return {"class": f"{__name__}.Noting", "arguments": {"message": message}, **more}


def test_nobody_is_told_where_nobody_is_configured(monkeypatch):
    monkeypatch.delenv("AIRFLOW_VAR_CRANE_NOTIFIERS", raising=False)
    Notice("failure")({})
    assert Noting.heard == []


def test_each_occasion_reaches_those_who_asked_for_it(monkeypatch):
    configure(
        monkeypatch,
        entry("any"),
        entry("{{ run }} failed", on=["failure"]),
        entry("decided", on=["decision"]),
    )
    Notice("failure")({"run": "r1"})
    assert Noting.heard == ["any", "r1 failed"]
    Notice("decision")({})
    assert Noting.heard == ["any", "r1 failed", "any", "decided"]


def test_one_template_serves_every_occasion(monkeypatch):
    configure(monkeypatch, entry("{{ run }} {{ missed }}{{ exception }}"))
    Notice("failure")({"run": "r1", "exception": "bad row"})
    Notice("missed")({"run": "r2", "missed": "a day"})
    Notice("decision")({"run": "r3"})
    assert Noting.heard == ["r1 bad row", "r2 a day", "r3 "]


def test_a_notifier_that_does_not_exist_is_an_error(monkeypatch):
    configure(monkeypatch, {"class": "nowhere.Nobody"})
    with pytest.raises(ModuleNotFoundError):
        Notice("failure")({})
