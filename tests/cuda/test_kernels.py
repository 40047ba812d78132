"""The CUDA kernels' own source, run on the CPU by csrc/simt under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import pytest
import simt_build

CASES = sorted(path.stem for path in simt_build.CASES.glob("case_*.py"))


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Where each case writes the addresses of the kernels it launched."""
    return tmp_path_factory.mktemp("launched")


@pytest.mark.parametrize("case", CASES)
def test_kernels_on_the_executor(case, launched):
    """Runs cases/<case>.py in a process of its own; what it printed is shown where it fails."""
    done = simt_build.run(
        [
            "-m", "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider", "-p", "no:benchmark",
            "-o", "python_files=case_*.py", "-o", "python_functions=case_*", f"--confcutdir={simt_build.CASES}", str(simt_build.CASES / f"{case}.py"),
        ],
        MMKD_SIMT_LAUNCHED=str(launched / case),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[:8000]


def test_every_kernel_was_launched(launched):
    """Every instantiation of every kernel, by the cases above."""
    ran = [path.read_text().split() for path in launched.iterdir()]
    if len(ran) < len(CASES):
        pytest.skip("not all cases were run")
    kernels = simt_build.kernels()
    assert len(kernels) >= 80
    addresses = {int(line, 16) for lines in ran for line in lines}
    assert not sorted(name for address, name in kernels.items() if address not in addresses)
