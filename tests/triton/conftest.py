"""Triton reads TRITON_INTERPRET when it is imported, so the cases run in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = Path(__file__).parent / "cases"
collect_ignore = [] if "MMKD_TRITON_CASES" in os.environ else ["cases"]


@pytest.fixture(scope="session")
def run_python():
    """Runs python with `arguments` in the repository and `environment` on top of this one's."""
    pytest.importorskip("triton", reason="Triton is not installed")

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)

    return run


@pytest.fixture(scope="session")
def run_case(run_python):
    """Runs cases/case_<name>.py under pytest; its output is shown where it fails."""

    def run(name: str, **environment: str) -> None:
        done = run_python(
            "-m", "pytest", "-q", "-x", "--capture=sys", "-p", "no:cacheprovider", "-p", "no:benchmark",
            "-o", "python_files=case_*.py", "-o", "python_functions=case_*", str(CASES / f"case_{name}.py"),
            MMKD_TRITON_CASES="1", **environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]

    return run
