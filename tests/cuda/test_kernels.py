"""The CUDA kernels' own source, run on the CPU by csrc/simt under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import pytest
import simt_build

CASES = sorted(path.stem for path in simt_build.CASES.glob("case_*.py"))


@pytest.mark.parametrize("case", CASES)
def test_kernels_on_the_executor(case):
    """Runs cases/<case>.py in a process of its own; what it printed is shown where it fails."""
    done = simt_build.run(
        [
            "-m", "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider", "-p", "no:benchmark",
            "-o", "python_files=case_*.py", "-o", "python_functions=case_*", f"--confcutdir={simt_build.CASES}", str(simt_build.CASES / f"{case}.py"),
        ]
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[:8000]
