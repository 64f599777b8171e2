"""The packaging is in pyproject.toml, but for two things that need a line of code."""

import re
from pathlib import Path

from setuptools import find_packages, setup

# The folder convert/ is the package vit_convert: installed as `convert` it would collide with
# everybody's convert.py. (A clone has a link of that name, so that it also works uninstalled.)
packages = find_packages(include=["vit_common*", "vit_flax*", "vit_torch*", "vit_cli*"])
packages += [f"vit_{name}" for name in find_packages(include=["convert", "convert.*"])]

# Links to files of the repository lead nowhere on a package index: there they become plain names.
readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")

setup(
    packages=packages,
    package_dir={"vit_convert": "convert"},
    long_description=re.sub(r"\[([^\]]+)\]\((?!https?://|#)[^)]+\)", r"\1", readme),
    long_description_content_type="text/markdown",
)
