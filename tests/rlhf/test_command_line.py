"""The command line as a process: how soon it helps, how it ends, and what it prints of others."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rlhf.cli import main, parse_config, quiet_writer_threads
from rlhf.config.fields import expand
from rlhf.errors import UserError, quote
from rlhf.run import terminal

REQUIRED = ["--model_name_or_path=m", "--dataset_name=d", "--output_dir=o", "--reward_funcs=r"]


def start(*argv: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
    )


def fails(capsys, argv: list[str]) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


# Help


@pytest.mark.parametrize("argv", [["--help"], ["ppo", "--help"], ["config", "ppo"], []])
def test_help_does_not_wait_for_torch(argv):
    """0.5 s of a CPU; only what must be there anyway is imported."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = start(*argv, PYTHONPROFILEIMPORTTIME="1")
    out, imports = process.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == 0 and len(out) > 500
    for package in (b"torch", b"transformers", b"datasets", b"numpy", b"huggingface_hub"):
        assert not any(line.split()[-1] == package for line in imports.splitlines() if line)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 0.5


def test_rlhf_alone_prints_help(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: rlhf") and "rlhf COMMAND --help" in out


def test_version(capsys):
    from ppo_kernels import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rlhf {__version__}\n"


def test_env_tells_versions_devices_and_backends(capsys):
    import torch
    import transformers

    assert main(["env"]) == 0
    out = capsys.readouterr().out
    for part in (torch.__version__, transformers.__version__, "native", "GPU", "CPUs"):
        assert part in out


def test_an_option_may_be_a_switch_a_list_or_none():
    config = parse_config("ppo", [*REQUIRED, "--bf16", "--stop-token", "a", "b", "--seed", "7"])
    assert (config.bf16, config.stop_token, config.seed, config.target_kl) == (
        *(True, ["a", "b"], 7, None),
    )
    assert not parse_config("ppo", [*REQUIRED, "--no-whiten-advantages"]).whiten_advantages
    with pytest.raises(UserError, match="must be true or false, got 'maybe'"):
        parse_config("ppo", [*REQUIRED, "--bf16=maybe"])


# Ctrl-C before there is anything to save


@pytest.mark.parametrize(
    "module", ["rlhf.config.fields", "numpy", "torch", "torch.nn", "transformers"]
)
def test_an_interrupt_in_the_first_seconds_is_one_line(module, tmp_path):
    """As soon as the module has been imported, and while the next one is."""
    argv = ["demo", f"--output_dir={tmp_path / 'demo'}", "--task=counting"]
    process = start(*argv, PYTHONPROFILEIMPORTTIME="1")
    for line in process.stderr:
        if line.split()[-1] == module.encode():
            process.send_signal(signal.SIGINT)
            break
    _, error = process.communicate()
    lines = [line for line in error.splitlines() if not line.startswith(b"import time:")]
    assert (process.returncode, lines) == (130, [b"rlhf demo: interrupted"])


def test_an_interrupt_that_the_parent_ignores_stays_ignored():
    command = f"trap '' INT; {sys.executable} -c 'PROGRAM'"
    program = (
        "import os, signal; from rlhf.run import signals; signals.interrupt_at_once([]); "
        "signals.catch(); os.kill(os.getpid(), signal.SIGINT); print(signals.received())"
    )
    shell = ["sh", "-c", command.replace("PROGRAM", program)]
    done = subprocess.run(shell, capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


# What others wrote


def test_an_error_escapes_what_would_speak_to_the_terminal(capsys, tmp_path):
    evil = "\x1b]0;owned\x07\x1b[31m\u202ered\x9b"
    (tmp_path / "a.yaml").write_text(json.dumps({f"k{evil}": 1}))
    for argv in (
        ["ppo", *REQUIRED, f"--config={tmp_path / 'a.yaml'}"],
        ["ppo", f"--{evil}"],
        ["ppo", *REQUIRED, evil],
        ["ppo", *REQUIRED, f"--optim={evil}"],
        ["sft", f"--model_name_or_path={evil}", f"--dataset_name={evil}.jsonl", "--output_dir=o"],
    ):
        error = fails(capsys, argv)
        assert error.isascii() and error.rstrip("\n").isprintable() and r"\x1b" in error
    with pytest.raises(SystemExit):
        main(["report", "a", evil])
    error = capsys.readouterr().err
    assert "\x1b" not in error and r"\x1b" in error


def test_say_escapes_what_would_speak_to_the_terminal(capsys):
    terminal.say("a\tb\nc\x1b[2J\x08\r\u2066é 中 \udc80")
    assert capsys.readouterr().out == "a\tb\nc\\x1b[2J\\x08\\r\\u2066é 中 \\udc80\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["ppo", "--" + "x" * 9_999],
        ["ppo", *REQUIRED, "x y " * 9_999],
        ["ppo", *REQUIRED, "--optim=" + "x" * 9_999],
        ["ppo", *REQUIRED, "--bf16=" + "x" * 9_999],
        ["ppo", *REQUIRED, "--seed=" + "9" * 9_999],
        ["ppo", *REQUIRED, "--config=" + "x/" * 9_999],
        ["ppo", *REQUIRED, "--learning_rate=" + "x" * 9_999],
    ],
)
def test_long_values_are_cut_in_messages(argv, capsys):
    error = fails(capsys, argv)
    assert 20 < len(error) < 1600 and "..." in error


def test_an_integer_of_thousands_of_digits_can_be_quoted():
    assert quote(10**5000).startswith("<int: ValueError")
    assert quote("a") == "'a'" and len(quote("a" * 99)) == 60


def test_ascii_terminals_get_escapes(tmp_path):
    file = tmp_path / "é\udce9.yaml"
    file.write_text("learning_rate: ñ")
    for argv in (["config", "ppo"], ["--help"], ["ppo", *REQUIRED, f"--config={file}"]):
        process = start(*argv, PYTHONIOENCODING="ascii", LC_ALL="C")
        out, error = process.communicate()
        assert b"Traceback" not in error and (out + error).isascii()
    assert b"\\xe9" in error and process.returncode == 2


# Paths


def test_home_and_variables_are_expanded_in_all_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUN", "one")
    values = {
        "model_name_or_path": "~/model",
        "critic_model_path": "$HOME/critic",
        "reward_funcs": ["~/r.py:f", "$HOME/reward"],
        "dataset_name": "${HOME}/data.jsonl",
        "eval_dataset_name": "~/eval.jsonl",
        "output_dir": "~/runs/$RUN",
        "resume_from_checkpoint": "~/c",
    }
    (tmp_path / "ppo.yaml").write_text(json.dumps(values))
    config = parse_config("ppo", ["--config=~/ppo.yaml"])
    for name, value in values.items():
        expected = json.dumps(value).replace("~", str(tmp_path))
        assert getattr(config, name) == json.loads(os.path.expandvars(expected))
        assert str(tmp_path) in expected or "HOME" in expected
    argv = ["--policies", "~/a", "$HOME/b", "--dataset_name=~/d", "--reward_funcs=m:f"]
    config = parse_config("evaluate", [*argv, "--output_file=~/o.json"])
    assert config.policies == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert config.output_file == str(tmp_path / "o.json") and config.reward_funcs == ["m:f"]


def test_a_path_of_a_missing_variable_or_with_nul_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"output_dir '\$NO_SUCH/x' holds \$NO_SUCH"):
        expand("output_dir", "$NO_SUCH/x")
    Path("$NO_SUCH").mkdir()
    assert expand("output_dir", "$NO_SUCH") == "$NO_SUCH"
    (tmp_path / "a.yaml").write_text('output_dir: "a\\0b"')
    with pytest.raises(UserError, match=r"output_dir must not hold the character NUL, got 'a\\x00"):
        parse_config("ppo", [*REQUIRED[:2], REQUIRED[3], f"--config={tmp_path / 'a.yaml'}"])


# YAML


def test_aliases_are_refused(capsys, tmp_path):
    bomb = "a: &a [x, x]\n" + "".join(
        f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n"
        for old, new in zip("abcdefghi", "bcdefghij", strict=True)
    )
    (tmp_path / "bomb.yaml").write_text(bomb)
    error = fails(capsys, ["ppo", *REQUIRED, f"--config={tmp_path / 'bomb.yaml'}"])
    assert "not valid YAML" in error and "the alias *a is refused" in error and "line 2" in error


# Threads


def test_an_error_of_a_user_s_thread_is_shown(monkeypatch):
    """Those of TensorBoard's are not, which the main thread tells."""
    told = []
    monkeypatch.setattr(threading, "excepthook", told.append)

    def fail():
        raise OSError("no socket")

    with quiet_writer_threads():
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    assert [args.exc_type for args in told] == [OSError]
