# SPDX-License-Identifier: Apache-2.0
"""Write docs/reference/configuration.md from the table of keys."""

from pathlib import Path

from qmpbackup.fleet.config.pages import reference

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "configuration.md"

PAGE.write_text(reference(), "utf-8")
