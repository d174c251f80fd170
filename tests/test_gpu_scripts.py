"""`benchmarks.gpu` rehearsed on the CPU: every line of the scripts for a lent GPU runs here."""

import json
import shutil
import subprocess
import sys

import pytest

from benchmarks.gpu import __main__ as everything
from benchmarks.gpu import smoke, sweep
from benchmarks.gpu.families import CHECKS, FIGURES
from tests import ROOT
from tests.conftest import needs_native


def run(script, *arguments, out):
    command = [sys.executable, "-m", f"benchmarks.gpu.{script}", "--rehearse", "--out", str(out)]
    return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)


@needs_native
def test_smoke_checks_and_measures_every_family(tmp_path):
    result = run("smoke", "--backends", "native", "--seconds", "300", out=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    found = [json.loads(line) for line in (tmp_path / "smoke.jsonl").read_text().splitlines()]
    for part, families in (("checks", CHECKS), ("figures", FIGURES)):
        assert {x["done"] for x in found if x.get("part") == [part, "native"]} == set(families)
    checks = [x for x in found if "check" in x]
    assert len(checks) > 20
    assert all(x["right"] for x in checks)
    assert {x["op"] for x in found if "copies" in x} == {
        *("ppo_loss_", "ppo_loss", "token_logprobs_and_entropy", "kl_divergence", "gae"),
        *("sample_tokens", "token_statistics"),
    }


@needs_native
def test_a_family_that_hangs_is_left(tmp_path, monkeypatch, capsys):
    """A watchdog shorter than PyTorch needs to import its own parts takes them all."""
    monkeypatch.setattr(smoke, "WATCHDOG", {True: 0.001})
    arguments = ["smoke", "--rehearse", "--backends", "native", "--families", "kl"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(tmp_path)])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert smoke.main() == 1
    found = [json.loads(line) for line in (tmp_path / "smoke.jsonl").read_text().splitlines()]
    failed = [x["failed"] for x in found if "failed" in x]
    assert failed == ["kl", "kl"]
    assert capsys.readouterr().out.count("WRONG") == 2


def test_what_is_wrong_is_told_and_counted(capsys):
    wrong = {"check": "kl 1x2", "right": False, "errors": {"kl": "1e-1 > 1e-5"}}
    assert smoke.report([wrong, {"check": "gae", "right": True}, {"done": "kl"}]) == 1
    out = capsys.readouterr().out
    assert "WRONG {'check': 'kl 1x2'" in out
    assert "1 of 2 checks right" in out


@pytest.mark.parametrize(
    "command",
    [
        ["profile", "--op", "kl_divergence", "--tokens", "3", "--vocabulary", "64"],
        ["tests", "--backend", "triton"],
    ],
    ids=" ".join,
)
def test_the_other_scripts_run(tmp_path, command):
    result = run(*command, out=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_without_a_folder_for_the_results_nothing_starts(monkeypatch, capsys):
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(sys, "argv", ["smoke", "--rehearse"])
    with pytest.raises(SystemExit, match="2"):
        smoke.main()
    assert "--out must name a folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", sweep.VARIANTS)
def test_variants_of_the_sweep_fit_the_sources(tmp_path, name):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    sweep.varied(tmp_path / "csrc", name)


@pytest.mark.parametrize("nvcc", (False, True))
@pytest.mark.parametrize("extension", (False, True))
def test_a_carried_extension_is_not_built_again(tmp_path, monkeypatch, nvcc, extension):
    """Without nvcc it would be replaced by one without CUDA."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "ppo_kernels").mkdir()
    if nvcc:
        (tmp_path / "bin" / "nvcc").touch(mode=0o755)
    if extension:
        (tmp_path / "ppo_kernels" / "_C.abi3.so").touch()
    ran = []
    monkeypatch.setattr(everything, "run", lambda *command, **_: ran.append(command[0]) or 0)
    monkeypatch.setattr(everything, "why_not_native", lambda device: "not asked")
    monkeypatch.setattr(everything, "ROOT", tmp_path)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    everything.measure(tmp_path / "results.json", [], dry_run=False)
    assert ("setup.py" in ran) == (nvcc or not extension)
