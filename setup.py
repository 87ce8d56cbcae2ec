"""Where the packages lie; everything else about the project is in pyproject.toml.

`kernels/`, `ds_configs/` and `configs/` stand at the top level, where people look for them, and are installed inside the
package, where code finds them: as `t2v_ds.kernels`, `t2v_ds.ds_configs` and `t2v_ds.configs`.
"""

from setuptools import find_packages, setup

setup(
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
        "t2v_ds.kernels": ["*.cpp", "*.h"],
        "t2v_ds.ds_configs": ["*.json"],
        "t2v_ds.configs": ["*.yaml"],
    },
    include_package_data=False,
)
