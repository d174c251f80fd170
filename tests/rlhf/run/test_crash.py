"""Runs that are killed and resumed; `python -m tests.rlhf.helpers.crash` does it many times."""

import random
import signal

from tests.rlhf.helpers.crash import crash


def test_killed_runs_resume_bitwise(tmp_path):
    targets = [(signal.SIGKILL, "save"), (signal.SIGKILL, "rollout"), (signal.SIGTERM, "anywhere")]
    different, half_saves = crash(tmp_path, targets, random.Random(1))
    assert different == 0 and half_saves >= 1
