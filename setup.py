"""Which folders the package has; everything else of it is in pyproject.toml.

Three of them stay where a reader of the repository looks for them, and are installed within the
package.
"""

from setuptools import find_namespace_packages, setup

ELSEWHERE = {
    "rcmae.ds_configs": "ds_configs",
    "rcmae.slurm": "slurm",
    "rcmae.results": "tools/results",
}

setup(
    packages=[*find_namespace_packages(include=["rcmae*"]), *ELSEWHERE],
    package_dir={"rcmae": "rcmae", **ELSEWHERE},
    # An editable install is a path in a .pth, not an import hook: Python asks hooks last, and a
    # script beside the checkout would take its folder for a namespace package called rcmae.
    options={"editable_wheel": {"mode": "compat"}},
)
