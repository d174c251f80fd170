"""Names of models and data sets on the hub."""

import re
from functools import cache
from pathlib import Path

from rlhf.run.terminal import say

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def may_be_hub_id(name: str) -> bool:
    """Tells whether a name that is no local path is worth asking the hub for, which takes a minute
    where there is no network. `runs/sft` is not where a folder `runs` lies here: it is a typing
    error."""
    return HUB_ID.fullmatch(name) is not None and not ("/" in name and Path(name).parent.is_dir())


@cache
def say_asking(name: str) -> None:
    """Says, once for each name, that the hub is asked: it may take long, and a typing error may be
    the reason."""
    say(f"asking the hub for {name}, which is no local path")
