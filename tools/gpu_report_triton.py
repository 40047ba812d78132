"""The Triton kernels' rows of docs/gpu.md."""

import json
import sys


def rows(jobs: int = 2, full: bool = True) -> list[dict]:
    """One row per kernel, configuration and architecture: op, kernel, config, arch, registers, shared_bytes,
    spill_bytes, stack_bytes, global_load_width. Not `full`: the part that the tests compile (`mmkd.kernels.aot.rows`)."""
    from mmkd.kernels import aot

    return aot.rows(jobs, full)


if __name__ == "__main__":
    json.dump(rows(full="--part" not in sys.argv), sys.stdout, indent=1)
