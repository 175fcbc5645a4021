# SPDX-License-Identifier: Apache-2.0
"""What is logged, as one JSON object a line, for programs that collect logs."""

import json
import logging
from datetime import UTC, datetime

from qmpbackup.cli.log_fields import fields_of


class JsonLines(logging.Formatter):
    """`{"time": …, "level": …, "message": …}`, `"traceback"` where there is one, and what the message is
    about (`log_fields`)."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever is in the message."""
        said = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said)
