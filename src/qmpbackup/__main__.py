# SPDX-License-Identifier: Apache-2.0
"""`python -m qmpbackup` is `qmpbackup`."""

from qmpbackup.cli.main import qmpbackup

qmpbackup()
