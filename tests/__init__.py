import importlib.util
import os
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def build_folder(name):
    """build/NAME, or where the repository cannot be written to, one among the temporary files."""
    build = ROOT / "build"
    if not os.access(build if build.exists() else ROOT, os.W_OK):
        build = Path(tempfile.gettempdir(), f"ppo_kernels-{os.getuid()}")
    return build / name


def setup_py():
    """setup.py, for its flags."""
    spec = importlib.util.spec_from_file_location("ppo_kernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
