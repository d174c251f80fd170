"""Errors that the user can mend."""


class UserError(ValueError):
    """Wrong input from the user: one line that names the cause and the remedy.

    The command line prints it without a traceback and exits with code 2. `on_all_ranks` tells that
    every process raises it, so that the main one alone is to print it.
    """

    def __init__(self, message: str, *, on_all_ranks: bool = False):
        super().__init__(message)
        self.on_all_ranks = on_all_ranks


def one_line(error: BaseException) -> str:
    """Somebody else's error, to be quoted in a UserError."""
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}"


def quote(value: object, length: int = 60) -> str:
    """The value as Python writes it, cut to a length that can be read."""
    try:
        text = repr(value)
    except Exception as error:  # an integer of thousands of digits, or whatever a class raises
        text = f"<{type(value).__name__}: {one_line(error)}>"
    return text if len(text) <= length else text[: length - 3] + "..."


# What the extra `rlhf` of pyproject.toml brings, by the names that it is imported by.
EXTRA = (
    *("transformers", "datasets", "tokenizers", "safetensors", "tensorboard"),
    *("rich", "matplotlib", "yaml", "jinja2", "numpy"),
)


def of_the_extra(error: ModuleNotFoundError) -> ModuleNotFoundError:
    """The error, or if a package of the extra is missing one that says how to install it."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRA:
        return error
    return ModuleNotFoundError(
        f'the trainer needs {package}: pip install "ppo-kernels[rlhf]"', name=package
    )
