"""Add the recipes and scripts to the wheel, which pyproject.toml cannot express.

The recipes are installed inside the package. The scripts of the console commands are installed outside it: they set
environment variables before PyTorch is imported, and importing the package imports PyTorch.
"""
from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py


class BuildScripts(build_py):
    """Build command that takes two scripts, and nothing else, from the folder of smpconv_programs."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if package != 'smpconv_programs' or module[1] in ('train', 'validate')]


setup(
    packages=[*find_namespace_packages(include=['smpconv_models*']), 'smpconv_models.recipes', 'smpconv_programs'],
    package_dir={'smpconv_models.recipes': 'recipes', 'smpconv_programs': '.'},
    include_package_data=False,  # MANIFEST.in also names files of the checkout's folder
    cmdclass={'build_py': BuildScripts},
)
