"""The kernels' ops are there before the cases look for them: under the interpreter, or (MMKD_TRITON_CASES=gpu) on a GPU,
the tensors taken there and back."""

import os

from mmkd import backends
from mmkd.ops import _registry

if os.environ.get("TRITON_INTERPRET") == "1":
    _registry.namespace("triton")
elif os.environ["MMKD_TRITON_CASES"] == "gpu":
    from tests import through_gpu

    _ops = through_gpu.define("mmkd_triton_gpu", _registry.namespace("triton"))
    for _register in _registry._registrations:
        _register("mmkd_triton_gpu", _ops)
    _before = _registry.namespace
    _registry.namespace = lambda which: _ops if which == "triton" else _before(which)
    backends._triton_missing = lambda op, device: None
