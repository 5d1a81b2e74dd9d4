"""Parts of a wheel that lie beside the package in a checkout, which pyproject.toml cannot express.

The recipes are installed inside the package. The scripts of the console commands are installed outside it: they set
environment variables before PyTorch is imported, and importing the package imports PyTorch.
"""
from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=['smpconv_models*']), 'smpconv_models.recipes'],
    package_dir={'smpconv_models.recipes': 'recipes', 'smpconv_programs': '.'},
    py_modules=['smpconv_programs.train', 'smpconv_programs.validate'],
)
