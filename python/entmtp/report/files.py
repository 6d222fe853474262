"""Reports as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..common.atomic import atomic_path


def write_json(report: dict[str, Any], path: str | Path | None) -> None:
    """The figures as JSON, if a file was named."""
    if path:
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
