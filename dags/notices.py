"""Notifications of failures and decisions. The Airflow Variable `crane_notifiers` names the notifiers to call.

    [{"class": "airflow.providers.smtp.notifications.smtp.SmtpNotifier",
      "on": ["failure"],
      "arguments": {"to": "team@example.org", "subject": "{{ dag.dag_id }} {{ dag_run.run_id }} failed"}}]

Any notifier of Airflow will do. `on` lists the occasions; without it the notifier is called on all:

- `failure` of a run;
- `decision` of a promotion or rollback;
- `undelivered`: data of the run's window were missing at the deadline; `{{ exception }}` says which;
- `missed`: there was no run for the time `{{ missed }}` between the last interval and this one.

On other occasions `missed`, and `exception` where there is none, are empty.

`arguments` are those of the notifier. Airflow renders the arguments that the
notifier declares as templates with the context of the run.
"""

from __future__ import annotations

import json
from importlib import import_module

from airflow.sdk import BaseNotifier, Context
from local_job import setting


class Notice(BaseNotifier):
    """A callback that calls the configured notifiers, if there are any.

    Args:
        occasion: `failure`, `decision`, `undelivered` or `missed`.
    """

    def __init__(self, occasion: str) -> None:
        super().__init__()
        self.occasion = occasion

    def notify(self, context: Context) -> None:
        for entry in json.loads(setting("notifiers", "[]")):
            if self.occasion in entry.get("on", [self.occasion]):
                module, _, name = entry["class"].rpartition(".")
                notifier = getattr(import_module(module), name)(**entry.get("arguments", {}))
                # Airflow refuses a template that names what the context lacks.
                notifier({"missed": "", "exception": "", **context})
                self.log.info("notified occasion=%s class=%s", self.occasion, entry["class"])
