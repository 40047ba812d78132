"""The Triton kernels' rows of docs/gpu.md."""

import json
import sys


def rows(jobs: int = 2) -> list[dict]:
    """One row per kernel, configuration and architecture: op, kernel, config, arch, registers, shared_bytes,
    spill_bytes, stack_bytes, global_load_width (`mmkd.kernels.aot.rows`)."""
    from mmkd.kernels import aot

    return aot.rows(jobs)


if __name__ == "__main__":
    json.dump(rows(), sys.stdout, indent=1)
