"""README, the pages of docs/ and the examples: what they show runs, and what they name is there.

The blocks of Python on a page and the examples run as they stand, each in an empty folder and
alone. Those of other packages are skipped where the package is missing; `tests/peers` looks closer.
"""

import importlib.util
import inspect
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

import ppo_kernels
import rlhf.classic
from benchmarks.figures import GOALS, GPU_GOALS, read
from rlhf import PPOConfig
from rlhf.cli import COMMANDS, CONFIGURED, main, parse_config
from tests import ROOT
from tests.documents import blocks, execute, run_example

README = ROOT / "README.md"
ABOUT = [ROOT / name for name in ("CONTRIBUTING.md", "AGENTS.md", "CHANGELOG.md")]
PAGES = [README, *ABOUT, *sorted(ROOT.glob("docs/*.md"))]
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
PEERS = ("trl", "verl", "openrlhf", "torchrl")


def need_peers(source):
    """Skips the test where a package that the source imports, or patches, is missing."""
    for peer in PEERS:
        if re.search(rf"^(from|import) {peer}\b|patch\(\"{peer}", source, flags=re.MULTILINE):
            pytest.importorskip(peer, reason=f"{peer} is not installed")


def cases(language):
    """Each block of a language, by its page and number there."""
    return [
        pytest.param(page, source, id=f"{page.relative_to(ROOT)}-{n}")
        for page in PAGES
        for n, source in enumerate(blocks(page, language), 1)
    ]


@pytest.mark.parametrize(("page", "source"), cases("python"))
def test_python_on_a_page(page, source, tmp_path, monkeypatch):
    need_peers(source)
    execute(source, tmp_path, monkeypatch)


def assert_gradients(*leaves):
    for leaf in leaves:
        assert leaf.grad.isfinite().all() and leaf.grad.abs().max() > 0


def test_op_of_the_readme(tmp_path, monkeypatch, capsys):
    (source,) = blocks(README, "python")
    names = execute(source, tmp_path, monkeypatch)
    assert_gradients(names["logits"])
    assert len(capsys.readouterr().out.splitlines()) == 1


def check_own_loop(names):
    assert_gradients(names["head"].weight)
    assert names["loss"].approx_kl.abs() < 1e-6


def check_large_vocabulary(names):
    assert_gradients(names["hidden"], names["head"].weight)
    assert names["loss"].approx_kl.abs() < 1e-6


def check_rewards(names):
    texts = ["a " * 12, "a " * 6]
    assert names["brevity"](texts, label=[0, 1]) == [0, -0.5]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    assert names["brevity_of_chats"](chats) == [0, -0.5]
    assert names["keyword"](["a film", "a play", "b"], ["film", "film", None]) == [1, 0, None]
    assert names["repetition"]([[5, 5, 6], [7]]) == [[0, -0.1, 0], [0]]


# Of those with other packages in tests/peers.
CHECKS = {
    "own_loop.py": check_own_loop,
    "large_vocabulary.py": check_large_vocabulary,
    "rewards.py": check_rewards,
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example(example, tmp_path, monkeypatch):
    need_peers(example.read_text())
    names = run_example(example.name, tmp_path, monkeypatch)
    if example.name in CHECKS:
        CHECKS[example.name](names)


def commands(page):
    """The shell commands on a page, as lists of words."""
    text = "".join(blocks(page, "sh")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def check_options(command, options):
    """Checks that `rlhf` knows the command, each option and its value."""
    assert command in COMMANDS, command
    if command not in CONFIGURED or "--help" in options:
        return
    if "--config" in options and not Path(options[options.index("--config") + 1]).exists():
        del options[(at := options.index("--config")) : at + 2]
        for name in ("model_name_or_path", "dataset_name", "output_dir"):
            options += [f"--{name}", "the reader's"]
    parse_config(command, options)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_on_a_page_exist(page, monkeypatch):
    """`make` has each target, Python finds each module and file, `rlhf` knows its options."""
    monkeypatch.chdir(ROOT)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for program, *arguments in commands(page):
        if "-m" in arguments:
            program, *arguments = arguments[arguments.index("-m") + 1 :]
            assert importlib.util.find_spec(program), program
        if program == "make":
            assert {x for x in arguments if "=" not in x} <= set(targets), arguments
        elif program == "rlhf":
            check_options(*arguments[:1], arguments[1:])
        elif program.rpartition("/")[2] in ("python", "python3") and arguments[0] != "-c":
            assert (ROOT / arguments[0]).is_file(), arguments


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder in which `make demo` has run, with as little of everything as there can be."""
    from rlhf.demo.command import ReviewsSizes, run_demo

    folder = tmp_path_factory.mktemp("readme")
    sizes = ReviewsSizes(
        num_reviews=100,
        num_rankings=8,
        num_heldout_rankings=4,
        num_prompts=32,
        num_eval_prompts=8,
        vocab_size=400,
        hidden_size=32,
        num_layers=1,
        response_length=4,
        sft_steps=1,
        reward_steps=1,
        total_episodes=1,
    )
    (folder / "runs").mkdir()
    run_demo(folder / "runs" / "demo", 0, sizes)
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


# Options that cut a command of the README short.
SHORT = {
    "sft": ["--max_steps", "2"],
    "reward": ["--max_steps", "2"],
    "ppo": ["--total_episodes", "64", "--response_length", "8", "--report_to", "none"],
    "generate": ["--response_length", "8"],
    "evaluate": ["--response_length", "8", "--num_prompts", "8"],
    "report": [],
}


def test_trainer_commands_of_the_readme(demo, monkeypatch, capsys):
    monkeypatch.chdir(demo)
    run = []
    for program, *arguments in commands(README):
        if program == "rlhf":
            assert main(arguments + SHORT[arguments[0]]) == 0
            run.append(arguments[0])
    assert run == ["sft", "reward", "ppo", "generate", "evaluate"]
    assert Path("runs/ppo/config.json").is_file()
    assert "rewards/brevity" in Path("runs/ppo/metrics.jsonl").read_text()


def slugs(page):
    """The headings of a page as links name them on GitHub."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_of_a_page_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for path, heading in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not heading or heading in slugs(target), heading


def test_every_page_is_linked_from_the_readme():
    text = README.read_text(encoding="utf-8")
    for path in (*ROOT.glob("docs/*.md"), *EXAMPLES, *ABOUT):
        assert f"({path.relative_to(ROOT)})" in text, path


def test_measured_table_of_the_readme():
    """Its numbers are those of the results, its goals and marks those of the benchmarks."""
    text = README.read_text(encoding="utf-8").partition("## Measured")[2]
    run = read(ROOT / "benchmarks" / "results" / "epyc-zen4-2core.json")
    measured = {(f.label, f.shape, f.dtype): f for f in run.figures}
    rows = re.findall(r"^\| `(\w+)`[^|]* \| ([\d, ×]+) \|(.*) ≤ (\S+) copies \|", text, flags=re.M)
    assert len(rows) == 10
    for op, size, cells, goal in rows:
        shape = tuple(int(n.replace(",", "")) for n in size.split(" × "))
        for dtype, cell in zip(("float32", "bfloat16"), cells.split("|"), strict=False):
            if f := measured.get((op, shape, dtype)):
                mark = "✓" if f.reaches("copies") else "✗"
                assert cell.strip() == f"{f.values['copies']:.2f} {mark}", (op, size)
                assert float(goal) == f.goals["copies"]


def test_goals_on_the_page_are_those_of_the_benchmarks():
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)`[^|]*\| ≤ ([\d.]+)[^|]*\| ≤ ([\d.]+)", text, flags=re.M)
    goals = {op: (float(gpu), float(cpu)) for op, gpu, cpu in rows}
    for op in ("token_logprobs_and_entropy", "ppo_loss", "ppo_loss_", "kl_divergence"):
        gpu, cpu = (op, (8192, 32000), "bfloat16"), (op, (512, 32000), "bfloat16")
        assert goals.pop(op) == (GPU_GOALS[gpu]["copies"], GOALS[cpu]["copies"])
    gae = ("gae", (512, 2048), "float32")
    assert goals == {"gae": (GPU_GOALS[gae]["copies"], GOALS[gae]["copies"])}


def test_migration_tables_have_the_options_there_are():
    text = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    options = {field.name for field in fields(PPOConfig)}
    classic = {field.name for field in fields(rlhf.classic.PPOConfig)} - {"temperature"}
    tables = text.partition("In `rlhf ppo` they are:")[2]
    rows = [line.split(" | ") for line in tables.splitlines() if line.startswith("| `")]
    assert len(rows) > 50
    for row in rows:
        ours = set(re.findall(r"`(\w+)`", row[1]))
        assert ours <= options and (ours or "–" in row[1]), row
    theirs = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert classic <= theirs, classic - theirs


def test_the_version_to_cite_is_this_one():
    assert f"version: {ppo_kernels.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_readme_is_short_and_has_every_op():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    table = text.partition("| op | gives |")[2]
    for name in ppo_kernels.__all__:
        if not inspect.isclass(getattr(ppo_kernels, name)):
            assert f"`{name}`" in table, name
