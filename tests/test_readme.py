"""README's examples, executed as written."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def examples(heading):
    """The blocks of Python under a heading of the README."""
    section = re.split(r"^## ", README.read_text(), flags=re.MULTILINE)
    (section,) = (x for x in section if x.startswith(heading))
    return re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)


def execute(source, folder, monkeypatch):
    """Run in an empty folder; gives the names that the example defines."""
    monkeypatch.chdir(folder)
    names = {"__name__": "__main__"}
    exec(compile(source, str(README), "exec"), names)
    return names


def test_own_loop(tmp_path, monkeypatch, capsys):
    source, _ = examples("Drop one op into your own loop")
    names = execute(source, tmp_path, monkeypatch)
    gradient = names["head"].weight.grad
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    assert names["loss"].approx_kl.abs() < 1e-6
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_hidden_states(tmp_path, monkeypatch):
    _, source = examples("Drop one op into your own loop")
    names = execute(source, tmp_path, monkeypatch)
    assert names["loss"].approx_kl.abs() < 1e-6
    for leaf in (names["hidden"], names["head"].weight):
        assert leaf.grad.isfinite().all() and leaf.grad.abs().max() > 0
