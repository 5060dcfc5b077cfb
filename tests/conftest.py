"""What several test modules share. tests/ itself is importable: `from synthetic_dicom import write_series`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
