"""What setup.py compiles the CUDA sources for, and what it says where it cannot."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tests import ROOT, setup_py

KNOWN = "sm_75\nsm_80\nsm_86\nsm_90\nsm_100\n"
NVCC = f"""#!{sys.executable}
import sys
if "--version" in sys.argv:
    print("Cuda compilation tools, release 13.0, V13.0.88")
elif "--list-gpu-code" in sys.argv:
    print({KNOWN!r})
else:
    print("#$ LIBRARIES=-L/cuda/lib")
"""


@pytest.fixture
def toolkit(monkeypatch, tmp_path):
    """toolkit(text): a folder whose nvcc is that script, and torch is for its CUDA."""
    for name in ("TORCH_CUDA_ARCH_LIST", "FORCE_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(tmp_path))

    def write(text):
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir()
        nvcc.write_text(text)
        nvcc.chmod(0o755)

    return write


@pytest.fixture
def built(monkeypatch, capsys):
    """built(): archs that add_cuda compiles for, None if it leaves CUDA out, and what it says."""
    monkeypatch.chdir(ROOT)

    def run():
        native = SimpleNamespace(
            extra_compile_args={"cxx": []}, extra_link_args=[], sources=["module.cpp"]
        )
        setup_py().add_cuda(native)
        said = capsys.readouterr().err
        if native.sources == ["module.cpp"]:
            return None, said
        flags = native.extra_compile_args["nvcc"]
        return [x.rpartition("=")[2] for x in flags if x.startswith("-gencode")], said

    return run


def test_default_archs(toolkit, built):
    toolkit(NVCC)
    assert built() == (["sm_80", "sm_90a", "sm_100a", "compute_100"], "")


def test_default_archs_of_an_older_nvcc(toolkit, built):
    toolkit(NVCC.replace("sm_100", "sm_89"))
    assert built() == (["sm_80", "sm_90a", "compute_90"], "")


def test_archs_that_are_too_old_are_left_out(toolkit, built, monkeypatch):
    toolkit(NVCC)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0 7.5;8.0;9.0a")
    archs, said = built()
    assert archs == ["sm_80", "sm_90a"]
    assert said == "ppo_kernels: not compiled for sm_70, sm_75, older than sm_80\n"


@pytest.mark.parametrize(
    ("archs", "reason"),
    [
        ("7.5", "has no GPU from sm_80 on"),
        ("native", "names no GPU"),
        ("8.0;47.11", "names no GPU: Unknown CUDA arch (47.11)"),
        ("12.0", "does not know sm_120"),
    ],
)
def test_archs_that_cannot_be_compiled(toolkit, built, monkeypatch, archs, reason):
    toolkit(NVCC)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", archs)
    code, said = built()
    assert code is None
    assert "installed without the CUDA C++ kernels" in said and reason in said
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match="FORCE_CUDA=1 asks for the CUDA sources, but"):
        built()


@pytest.mark.parametrize(
    ("nvcc", "reason"),
    [
        (None, "there is no nvcc"),
        ("#!/nowhere/python\n", "nvcc does not run"),
        (f"#!{sys.executable}\nraise SystemExit(1)\n", "nvcc does not run"),
        (f"#!{sys.executable}\n", "nvcc is not understood"),
        (NVCC.replace("13.0", "12.9"), "is of CUDA 12, torch of 13.0"),
        (NVCC.replace(KNOWN.replace("\n", "\\n"), "sm_75"), "nvcc knows none of sm_80"),
    ],
)
def test_an_nvcc_that_does_not_serve(toolkit, built, nvcc, reason):
    if nvcc is not None:
        toolkit(nvcc)
    archs, said = built()
    assert archs is None
    assert reason in said


def test_force_cuda_is_0_or_1(toolkit, built, monkeypatch):
    toolkit(NVCC)
    monkeypatch.setenv("FORCE_CUDA", "0")
    assert built() == (None, "")
    monkeypatch.setenv("FORCE_CUDA", "yes")
    with pytest.raises(SystemExit, match="FORCE_CUDA must be 0 or 1, got 'yes'"):
        built()
    monkeypatch.setenv("FORCE_CUDA", "1")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert built()[0] is not None


def test_force_cuda_without_a_compiler():
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=os.environ | {"FORCE_CUDA": "1", "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "FORCE_CUDA=1 asks for the CUDA sources, but there is no C++ compiler" in result.stderr


@pytest.mark.parametrize("how", ("inplace", "editable_mode", "wheel"))
def test_the_build_removes_extensions_of_older_versions(tmp_path, monkeypatch, how):
    """Python takes `_C.cpython-311-x86_64-linux-gnu.so` before `_C.abi3.so`. A wheel's build leaves
    the tree alone, whose extension it does not replace."""
    monkeypatch.chdir(tmp_path)
    tree, built = tmp_path / "ppo_kernels", tmp_path / "build" / "lib" / "ppo_kernels"
    old, new = "_C.cpython-311-x86_64-linux-gnu.so", "_C.abi3.so"
    for folder in (tree, built):
        folder.mkdir(parents=True)
        (folder / old).touch()

    class Build:
        build_lib = "build/lib"
        inplace = how == "inplace"
        editable_mode = how == "editable_mode"

        def run(self):
            for folder in (built,) if how == "wheel" else (built, tree):
                (folder / new).touch()

    setup_py().without_other_builds(Build)().run()
    assert [x.name for x in built.iterdir()] == [new]
    assert [x.name for x in tree.iterdir()] == [old if how == "wheel" else new]
