"""Where each package lives. Everything else (name, dependencies, entry point) is in pyproject.toml.

The top-level directory kernels/ installs as `kunbr_fast.kernels`, because Hugging Face publishes a package
called `kernels`, which ours must not shadow. The mapping also decides how an editable install is made: with
an import finder that knows exactly `kunbr_fast` and `kunbr_fast.kernels`. Without it, or with
`editable_mode=compat`, the repository root would go onto sys.path, and `kernels` with it.

Python that is started in the checkout finds kunbr_fast/ there, not the installed one: kunbr_fast/kernels.py.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["kunbr_fast", "kunbr_fast.*"]), "kunbr_fast.kernels"],
    package_dir={"kunbr_fast.kernels": "kernels"},
)
