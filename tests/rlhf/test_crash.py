"""Runs that are killed and resumed; `python -m tests.rlhf.crash` does it many times more."""

import random

from tests.rlhf.crash import crash


def test_killed_runs_resume_bitwise(tmp_path):
    different, half_saves = crash(tmp_path, ["save", "rollout"], random.Random(1))
    assert different == 0 and half_saves >= 1
