"""The cases run in processes of their own, under sanitizers (see test_kernels.py)."""

import os
import sys
from pathlib import Path

collect_ignore = [] if "MMKD_SIMT_LIBRARY" in os.environ else ["cases"]
sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("tools", "bench")]
