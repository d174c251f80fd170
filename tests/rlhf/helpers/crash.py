"""Runs of PPO that are ended and resumed:
`python -m tests.rlhf.helpers.crash --kills 20 --sigterms 20`.

A small run that uses all state there is goes through unbroken. Then, for each kill, it is started
again, killed with SIGKILL at a random moment (of a rollout, of an update, of a save, or anywhere)
and resumed; its weights and its metrics, times aside, must be those of the unbroken run, bit for
bit. With SIGTERM likewise, where a run that has begun must also say where to go on, with exit code
143. Exit code 1 if one is different.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

PHASES = ("rollout", "update", "save")
REWARD = """
import random

def noise(completions):
    # State of Python's own generator: a resumed run must continue it.
    return [random.random() for _ in completions]
"""
CONFIG = {
    "per_device_train_batch_size": 8,
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "total_episodes": 16 * 10,
    "learning_rate": 1e-3,
    "warmup_ratio": 0.2,
    "critic_warmup": 2,
    "response_length": 12,
    "sample_response_length": True,
    "reward_weights": [1.0, 0.3],
    "score_scaling": "running",
    "adaptive_kl": "sequence",
    "target_kl": 0.1,
    "kl_horizon": 200,
    "eval_steps": 3,
    "save_steps": 2,
    "save_total_limit": 2,
    "metric_for_best_model": "objective/scores",
    "report_to": "none",
}


class Phase:
    """What a run is doing, in a file that another process can read: phase and iteration."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> tuple[str, int]:
        try:
            name, iteration = self.path.read_text().split()
        except (OSError, ValueError):
            return "start", 0
        return name, int(iteration)

    def wrap(self, owner, method: str, name: str, trainer_of) -> None:
        """Makes `owner.method` note the phase while it runs."""
        original = getattr(owner, method)

        def noting(*args, **kwargs):
            self.path.write_text(f"{name} {trainer_of(args).iteration}")
            try:
                return original(*args, **kwargs)
            finally:
                self.path.write_text(f"between {trainer_of(args).iteration}")

        setattr(owner, method, noting)


def run_noting_phases(config: Path, phase: Phase) -> int:
    """`rlhf ppo --config FILE --resume_from_checkpoint auto` that notes its phase."""
    import torch

    from rlhf import cli
    from rlhf.ppo.trainer import PPOTrainer
    from rlhf.run.saving import Checkpoints

    torch.set_num_threads(1)
    phase.wrap(PPOTrainer, "sample", "rollout", lambda args: args[0])
    phase.wrap(PPOTrainer, "update", "update", lambda args: args[0])
    phase.wrap(Checkpoints, "save", "save", lambda args: args[0].trainer)
    return cli.main(["ppo", "--config", str(config), "--resume_from_checkpoint", "auto"])


class Runs:
    """Runs of one configuration, each in a folder of its own under `root`."""

    def __init__(self, root: Path):
        from transformers.utils.logging import disable_progress_bar, set_verbosity_error

        from tests.rlhf.helpers.world import make_tokenizer, make_world

        self.root = root
        (root / "world").mkdir()
        disable_progress_bar()
        set_verbosity_error()
        make_world(root / "world", make_tokenizer())
        (root / "reward.py").write_text(REWARD)

    def start(self, name: str) -> subprocess.Popen:
        world = self.root / "world"
        config = CONFIG | {
            "model_name_or_path": str(world / "llama"),
            "reward_funcs": [str(world / "llama-reward"), f"{self.root / 'reward.py'}:noise"],
            "dataset_name": str(world / "prompts.jsonl"),
            "eval_dataset_name": str(world / "prompts.jsonl"),
            "output_dir": str(self.root / name),
        }
        file = self.root / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config))
        # What an earlier run of this name did last is not what this one does.
        self.phase(name).path.unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.rlhf.helpers.crash", "--run", str(file)]
        with (self.root / f"{name}.log").open("a") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def finish(self, name: str) -> None:
        if self.start(name).wait() != 0:
            raise SystemExit(f"run {name} failed:\n{(self.root / f'{name}.log').read_text()}")

    def phase(self, name: str) -> Phase:
        return Phase(self.root / f"{name}.phase")

    def half_saved(self, name: str) -> list[str]:
        return [path.name for path in self.root.joinpath(name).glob(".saving-*")]

    def result(self, name: str) -> dict:
        """Weights as bytes and metrics, times aside."""
        folder = self.root / name
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        metrics = [
            {
                key: value
                for key, value in json.loads(line).items()
                if not key.startswith("time/") and key != "tokens_per_second"
            }
            for line in lines
        ]
        weights = [folder / "model.safetensors", folder / "critic" / "model.safetensors"]
        return {"metrics": metrics, "weights": [file.read_bytes() for file in weights]}


def kill(
    runs: Runs, name: str, target: str, rng: random.Random, seconds: float, number: int
) -> str | None:
    """Starts a run and sends it a signal: in phase `target` of a random iteration, or at a random
    moment of its `seconds`. Returns where that was; None if it ended before."""
    process = runs.start(name)
    phase = runs.phase(name)
    deadline = time.monotonic() + rng.uniform(0, seconds)
    iteration = rng.randrange(1, CONFIG["total_episodes"] // 16)
    delay = rng.uniform(0, 0.02)
    while process.poll() is None:
        if target == "anywhere":
            if time.monotonic() >= deadline:
                break
        else:
            now, at = phase.read()
            if now == target and at >= iteration:
                time.sleep(delay)
                break
        time.sleep(0.0005)
    ended = process.poll() is not None
    now, at = phase.read()
    process.send_signal(number)
    code = process.wait()
    if ended:
        return None
    if number == signal.SIGKILL:
        now, at = phase.read()
    else:
        log = (runs.root / f"{name}.log").read_text().splitlines()
        told = code == 143 and log[-1].startswith("rlhf ppo: ended by SIGTERM: ")
        if not told and now != "start":
            raise SystemExit(f"SIGTERM in {now} of iteration {at}: code {code}, {log[-1:]}")
    return f"{now} of iteration {at}" + "".join(f", leaving {x}" for x in runs.half_saved(name))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.rlhf.helpers.crash", description=__doc__)
    parser.add_argument("--kills", type=int, default=0, help="if no --sigterms: 20")
    parser.add_argument("--sigterms", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run is not None:
        return run_noting_phases(args.run, Phase(args.run.with_suffix(".phase")))
    if not args.kills + args.sigterms:
        args.kills = 20
    with tempfile.TemporaryDirectory() as folder:
        cycle = [*PHASES, "anywhere"]
        targets = [
            (number, cycle[i % 4])
            for number, times in ((signal.SIGKILL, args.kills), (signal.SIGTERM, args.sigterms))
            for i in range(times)
        ]
        different, half_saves = crash(Path(folder), targets, random.Random(args.seed))
    print(
        f"{args.kills} kills, {half_saves} in the middle of a save, {args.sigterms} SIGTERMs, "
        f"{different} runs differ"
    )
    return int(different > 0)


def crash(root: Path, targets: list[tuple[int, str]], rng: random.Random) -> tuple[int, int]:
    """Ends and resumes a run for each of `targets`, a signal and a phase or "anywhere"; returns how
    many of them were different at last from the unbroken run, and how many died in the middle of a
    save."""
    runs = Runs(root)
    start = time.monotonic()
    runs.finish("unbroken")
    seconds = time.monotonic() - start
    expected = runs.result("unbroken")
    print(f"unbroken: {len(expected['metrics'])} lines of metrics, {seconds:.1f} s", flush=True)
    different = half_saves = 0
    for count, (number, target) in enumerate(targets, 1):
        name = f"ended-{count}"
        for _ in range(20):  # A save is over in a moment, and a run may end before its kill.
            where = kill(runs, name, target, rng, seconds, number)
            if where is None:
                shutil.rmtree(root / name)
            elif target != "save" or number != signal.SIGKILL or runs.half_saved(name):
                break
        else:
            raise SystemExit(f"no kill out of 20 hit the {target} of {name}")
        half_saves += len(runs.half_saved(name)) > 0
        runs.finish(name)
        same = runs.result(name) == expected
        different += not same
        verdict = "bitwise the unbroken run" if same else "DIFFERS from the unbroken run"
        print(f"{signal.Signals(number).name} {count}: in {where}; resumed: {verdict}", flush=True)
    return different, half_saves


if __name__ == "__main__":
    sys.exit(main())
