"""Where the packages lie, and the kernels compiled ahead of time; everything else about the project is in pyproject.toml.

`kernels/`, `ds_configs/` and `configs/` stand at the top level, where people look for them, and are installed inside the
package, where code finds them: as `t2v_ds.kernels`, `t2v_ds.ds_configs` and `t2v_ds.configs`.

The readers are compiled here where there is a compiler, the kernels where torch can be imported as well (`pip install
--no-build-isolation .`), else at their first use. For CUDA, the environment variable T2V_BUILD_CUDA decides: "auto" (the default)
compiles if there is an nvcc and torch knows CUDA, "1" fails if that cannot be done, "0" does not try. No GPU is needed.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


def compile_kernels(into: Path) -> None:
    """Compile into the folder what can be; only a CUDA kernel that was asked for with T2V_BUILD_CUDA=1 must succeed."""
    wanted = os.environ.get("T2V_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"T2V_BUILD_CUDA is {wanted!r}; it can be auto, 0 or 1")
    spec = importlib.util.spec_from_file_location("kernels_build", HERE / "kernels" / "build.py")
    build = importlib.util.module_from_spec(spec)
    sys.modules["kernels_build"] = build
    spec.loader.exec_module(build)
    for name, target in build.TARGETS.items():
        if name == "CUDA" and wanted == "0":
            continue
        try:
            build.compile_library(name, into / build.library_name(target))
        except ImportError as error:
            reason = f"{error.name} cannot be imported; install it first and use pip install --no-build-isolation"
        except (OSError, RuntimeError) as error:
            reason = str(error)
        else:
            continue
        if name == "CUDA" and wanted == "1":
            sys.exit(f"T2V_BUILD_CUDA=1, but {reason}")
        print(f"{target.source} is not compiled now: {reason}")


class BuildWithKernels(build_py):
    """Also compiles the kernels, into what is built or, for an editable installation, beside their sources."""

    def run(self) -> None:
        super().run()
        compile_kernels(HERE / "kernels" if self.editable_mode else Path(self.build_lib) / "t2v_ds" / "kernels")


setup(
    cmdclass={"build_py": BuildWithKernels},
    packages=[
        "t2v_ds",
        *(f"t2v_ds.{name}" for name in find_packages("t2v_ds")),
        "t2v_ds.kernels",
        "t2v_ds.ds_configs",
        "t2v_ds.configs",
    ],
    package_dir={
        "t2v_ds": "t2v_ds",
        "t2v_ds.kernels": "kernels",
        "t2v_ds.ds_configs": "ds_configs",
        "t2v_ds.configs": "configs",
    },
    package_data={
        "t2v_ds": ["py.typed"],
        "t2v_ds.kernels": ["*.cpp", "*.h", "*.inc", "*.cu", "*.cuh"],
        "t2v_ds.ds_configs": ["*.json"],
        "t2v_ds.configs": ["*.yaml"],
    },
    include_package_data=False,
)
