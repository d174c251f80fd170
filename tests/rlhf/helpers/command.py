"""A command that must fail."""

from rlhf.cli import main


def fails(capsys, argv: list[str], *expected: str) -> None:
    capsys.readouterr()
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"rlhf {argv[0]}: error: ")
    for part in expected:
        assert part in error
