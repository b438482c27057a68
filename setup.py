"""Packaging. Dependencies live in requirements.txt; a line's `extra == "name"` marker puts it in that extra."""

import re
from collections import defaultdict
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

required, extras = [], defaultdict(list)
for line in (ROOT / "requirements.txt").read_text().splitlines():
    requirement, _, marker = line.split("#")[0].partition(";")
    name = re.search(r'extra == "([\w-]+)"', marker)
    if requirement.strip():
        (extras[name[1]] if name else required).append(requirement.strip())

setup(
    name="rpt_jax",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "rpt_jax/__init__.py").read_text())[1],
    description="Reinforcement pre-training (arXiv:2506.08007) in JAX",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["rpt_jax", "rpt_jax.*", "experiments", "experiments.*"]),
    package_data={"rpt_jax": ["py.typed"], "rpt_jax.analysis.reports": ["browser.js"]},
    install_requires=required,
    extras_require=extras,
    project_urls={"Paper": "https://arxiv.org/abs/2506.08007"},
    keywords=["reinforcement learning", "language models", "pre-training", "GRPO", "JAX"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
