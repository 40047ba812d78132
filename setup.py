"""Drives CMake (the one truth of the build) and copies what it built into the package.

The extension is compiled against the torch of the environment it is installed into, also under build isolation:
the interpreter that runs this file may be an isolated one, so torch is looked for in the environment around it too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
PROBE = (
    "import json, torch, torch.utils.cpp_extension as e;"
    "print(json.dumps({'version': torch.__version__, 'include': e.include_paths(), 'lib': e.library_paths()}))"
)


def find_torch() -> dict:
    """Paths of the torch this interpreter's environment holds; exits with one line that says what to type."""
    said = ""
    for python in dict.fromkeys([sys.executable, os.path.join(sys.prefix, "bin", "python")]):
        # -I: neither PYTHONPATH (where pip's build isolation sits) nor the working folder may shadow torch.
        done = subprocess.run([python, "-I", "-c", PROBE], capture_output=True, text=True)
        if done.returncode == 0:
            return json.loads(done.stdout.strip().splitlines()[-1])
        said = (done.stderr.strip().splitlines() or ["no output"])[-1]
    sys.exit(
        f"mmkd: no usable torch in {sys.prefix} ({said}). Install it first: "
        "pip install -c constraints.txt torch   and then: pip install -e ."
    )


class CMakeBuild(build_ext):
    """One CMake build of every target; setuptools only asks for files by name."""

    def run(self) -> None:
        torch = find_torch()
        out = ROOT / "mmkd" if self.inplace or self.editable_mode else Path(self.build_lib).resolve() / "mmkd"
        out = Path(os.environ.get("MMKD_OUT") or out).resolve()
        build = ROOT / "build" / f"cmake-{os.environ.get('MMKD_BUILD', 'release')}"
        build.mkdir(parents=True, exist_ok=True)
        import pybind11

        args = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DMMKD_OUT={out}",
            f"-DMMKD_TORCH_INCLUDE={';'.join(torch['include'])}",
            f"-DMMKD_TORCH_LIB={';'.join(torch['lib'])}",
            f"-DMMKD_TORCH_VERSION={torch['version']}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMMKD_CUDA={os.environ.get('MMKD_CUDA', 'auto')}",
            f"-DMMKD_CUDA_ARCHS={os.environ.get('MMKD_CUDA_ARCHS', '80;86;89;90')}",
            f"-DMMKD_SANITIZE={os.environ.get('MMKD_SANITIZE', 'off')}",
        ]  # fmt: skip
        subprocess.run(args, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        subprocess.run(["cmake", "--install", str(build)], check=True)

    def get_outputs(self) -> list[str]:
        return []


setup(
    packages=[
        "mmkd", "mmkd.cli", "mmkd.data", "mmkd.evaluation", "mmkd.models", "mmkd.models.baselines", "mmkd.ops",
        "mmkd.reference", "mmkd.serving", "mmkd.training", "mmkd.kernels",
    ],
    package_dir={"mmkd": "mmkd", "mmkd.kernels": "kernels"},
    package_data={"mmkd": ["lib/*.so", "lib/*.json", "*.so"]},
    include_package_data=False,
    ext_modules=[Extension("mmkd._host", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)  # fmt: skip
