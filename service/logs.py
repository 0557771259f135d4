"""What is logged, and how: one JSON object a line, or text for people."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["json", "text"]
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def configure_logs(log_format: LogFormat, level: str) -> None:
    """Sends every record of the process to stderr in one format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter(_TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # One line a request is the service's own to write.
    logging.getLogger("uvicorn.access").disabled = True
    # httpx tells of each request that it sends at the level info.
    logging.getLogger("httpx").setLevel(logging.WARNING)


class JsonFormatter(logging.Formatter):
    """A record as JSON: `time` (UTC), `level`, `logger`, `message`, and the record's `fields`.

    `fields` is a dictionary given as `extra={"fields": {...}}`. A traceback is a field.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """A record as text, with its `fields` behind the message."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The first line."""
        fields: dict[str, Any] = getattr(record, "fields", {})
        told = " ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
        return super().formatMessage(record) + (f" {told}" if told else "")
