import importlib.util
import os
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def build_folder(name):
    """build/NAME, or where the repository cannot be written to, one among the temporary files."""
    build = ROOT / "build"
    if not os.access(build if build.exists() else ROOT, os.W_OK):
        build = Path(tempfile.gettempdir(), f"ppo_kernels-{os.getuid()}")
    return build / name


def cache_folder(name):
    """The folder of this name that all checkouts of a user share, without what nobody has used for
    a week but locks; where there can be none, one of this checkout's."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "ppo_kernels-tests" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = build_folder(name)
        folder.mkdir(parents=True, exist_ok=True)
    week_ago = time.time() - 7 * 24 * 3600
    for path in folder.rglob("*"):
        try:
            if path.is_file() and path.name != "lock" and path.stat().st_atime < week_ago:
                path.unlink()
        except FileNotFoundError:  # another run did
            pass
    return folder


def setup_py():
    """setup.py, for its flags."""
    spec = importlib.util.spec_from_file_location("ppo_kernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
