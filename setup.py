"""All of the packaging is in pyproject.toml, but for what needs a line of code: links of README.md
to files of the repository lead nowhere on a package index, so they become plain names there."""

import re
from pathlib import Path

from setuptools import setup

readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
setup(
    long_description=re.sub(r"\[([^\]]+)\]\((?!https?://|#)[^)]+\)", r"\1", readme),
    long_description_content_type="text/markdown",
)
