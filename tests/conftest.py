"""What several test modules share. tests/ itself is importable: `from synthetic_dicom import write_series`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before anything imports torch, and for every process a test starts: workers that each take all cores wait
# for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Bitwise is what the tests ask of a CPU. Those that want a GPU say so, and `on_gpu` gives it back to them.
os.environ.setdefault("GPUS_OF_THIS_MACHINE", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""

sys.path.insert(0, str(Path(__file__).parent))

from your_own import my_nets  # noqa: F401  a fixture
