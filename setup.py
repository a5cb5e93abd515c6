"""Only what pyproject.toml cannot say: a wheel that was built without a C compiler has nothing that ties it to a platform."""

from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        if any(Path(output).exists() for output in self.get_finalized_command("build_ext").get_outputs()):
            return super().get_tag()
        return "py3", "none", "any"


setup(cmdclass={"bdist_wheel": Wheel})
