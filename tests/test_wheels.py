"""The wheels of `make wheel`, where torch is installed and nothing else, not even a compiler."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch

from tests import ROOT, setup_py

pytestmark = pytest.mark.slow

HOW_TO_INSTALL = 'pip install "ppo-kernels[rlhf]"'


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, **options)


class Environment:
    """A fresh one with this torch, in which a wheel takes the place of the one before."""

    def __init__(self, folder):
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)

    def python(self, *arguments):
        path = f"{self.folder}/bin"
        return run(f"{path}/python", "-I", *arguments, cwd=self.folder, env={"PATH": path})

    def install(self, wheel):
        """Without an index: whatever it needed besides torch would be missing."""
        self.python("-m", "pip", "uninstall", "-y", "ppo-kernels")
        result = self.python("-m", "pip", "install", "--no-index", str(wheel))
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    environment = Environment(tmp_path_factory.mktemp("environment"))
    release = torch.__version__.partition("+")[0]
    result = run(f"{environment.folder}/bin/pip", "install", "-q", f"torch=={release}")
    if result.returncode != 0:
        pytest.skip(f"pip cannot install torch here: {result.stderr.splitlines()[-1]}")
    return environment


@pytest.fixture(scope="module")
def wheels(environment, tmp_path_factory):
    """That with C++ code and that for any machine. The objects of `make install` serve again."""
    reason = "there is no make" if shutil.which("make") is None else setup_py().why_not()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("wheels")
    options = [f"VENV={sys.prefix}", f"WHEELS={folder}", "FORCE_CUDA=0"]
    result = run("make", "-o", "install", "wheel", *options, cwd=ROOT, env=os.environ)
    assert result.returncode == 0, result.stdout + result.stderr
    return sorted(folder.iterdir())


def names(wheel):
    with zipfile.ZipFile(wheel) as file:
        return {x for x in file.namelist() if ".dist-info/" not in x}


def test_tags_and_contents(wheels):
    native, pure = wheels
    assert "-cp310-abi3-manylinux_2_28_" in native.name
    assert pure.name.endswith("-py3-none-any.whl")
    assert names(native) - names(pure) == {"ppo_kernels/_C.abi3.so"}
    files = [*ROOT.glob("ppo_kernels/**/*.py"), *ROOT.glob("rlhf/**/*.py")]
    sources = {str(x.relative_to(ROOT)) for x in files}
    assert {x for x in names(pure) if x.endswith(".py")} == sources


@pytest.mark.parametrize("backend", ("native", "reference"))
def test_an_op_of_each_family_runs(wheels, environment, backend):
    environment.install(wheels[backend == "reference"])
    result = environment.python(str(ROOT / "tests" / "installed.py"), backend)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "9 families\n"
    report = environment.python("-m", "ppo_kernels").stdout
    assert f"auto        cpu: {backend}" in report


def test_the_trainer_says_how_to_install_what_it_needs(wheels, environment):
    environment.install(wheels[1])
    command = run(f"{environment.folder}/bin/rlhf", "sft")
    assert (command.returncode, command.stdout) == (2, "")
    assert command.stderr.count("\n") == 1 and HOW_TO_INSTALL in command.stderr
    module = environment.python("-c", "from rlhf import train_sft")
    assert HOW_TO_INSTALL in module.stderr.splitlines()[-1]
