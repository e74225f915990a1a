"""Imported first by the resident: keeps out what a dependency would load merely because it is installed.

structlog's development renderer imports rich when it finds it: 4 MiB for colours that a resident never shows.
"""

from __future__ import annotations

import sys

sys.modules.setdefault("rich", None)  # type: ignore[arg-type]  # None makes `import rich` raise ImportError
