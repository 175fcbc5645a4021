# SPDX-License-Identifier: Apache-2.0
"""What of a configuration is due, by what is known of it."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from qmpbackup.fleet.history import History
from qmpbackup.fleet.records import Holding, Work
from qmpbackup.fleet.run.agenda import Agenda
from qmpbackup.fleet.settings import DAY, Configuration, TargetSettings, VerifyPolicy, VmSettings

NOW = datetime(2026, 11, 25, 5, 0, tzinfo=UTC)


def test_proofs_are_not_made_again_and_again_where_nothing_can_be_noted(tmp_path: Path) -> None:
    """Each run would read all data, as none knows of the one before."""
    target = TargetSettings("main", f"{tmp_path}/{{vm}}", verify=VerifyPolicy(every=30 * DAY))
    vm = VmSettings("a", "/x", targets=("main",), schedule=())
    configuration = Configuration(vms=(vm,), targets=(target,))
    newest = NOW - timedelta(hours=1)
    holdings = {("a", "main"): Holding("a", "main", NOW, newest, "p", points=1)}
    (tmp_path / "file").touch()
    for state, expected in ((tmp_path / "state", [Work.VERIFY]), (tmp_path / "file", [])):
        with History.opened(state) as history:
            agenda = Agenda(configuration, history, holdings)
            assert [each.work for each in agenda.plan(NOW)] == expected
