"""Notifications by configuration: the Airflow Variable `crane_notifiers` names any of Airflow's notifiers.

    [{"class": "airflow.providers.smtp.notifications.smtp.SmtpNotifier",
      "on": ["failure"],
      "arguments": {"to": "team@example.org", "subject": "{{ dag.dag_id }} {{ dag_run.run_id }} failed"}}]

`on` lists the occasions, all of them when it is absent: `failure` of a run, `decision` of a promotion or rollback. The
arguments are the notifier's own; those that it declares as templates are rendered with the context of the run.
"""

from __future__ import annotations

import json
from importlib import import_module

from airflow.sdk import BaseNotifier, Context
from local_job import setting


class Notice(BaseNotifier):
    """Calls the configured notifiers; does nothing where none is configured.

    Args:
        occasion: `failure` or `decision`.
    """

    def __init__(self, occasion: str) -> None:
        super().__init__()
        self.occasion = occasion

    def notify(self, context: Context) -> None:
        for entry in json.loads(setting("notifiers", "[]")):
            if self.occasion in entry.get("on", [self.occasion]):
                module, _, name = entry["class"].rpartition(".")
                notifier = getattr(import_module(module), name)(**entry.get("arguments", {}))
                notifier(context)
                self.log.info("notified occasion=%s class=%s", self.occasion, entry["class"])
