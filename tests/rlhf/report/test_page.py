"""The report page: what it says is what the run's files hold, and a browser draws it by itself."""

import html
import json
import re
import shutil
import statistics
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib import image

from rlhf.cli import main
from rlhf.errors import UserError
from rlhf.ppo.train import train_ppo
from rlhf.report.page import numbers, write_report
from tests.rlhf.helpers.pages import answer, gold, make_stage, report, words, write_completions

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WIDTH, HEIGHT = 1280, 9000
PLANTED = "http://planted.invalid/x.png"
MEASURE = """<script>
for (const fold of document.querySelectorAll("details")) fold.open = true;
const boxes = [...document.querySelectorAll("figure")].map((figure) => {
  const {x, y, width, height} = figure.querySelector("svg").getBoundingClientRect();
  return [figure.querySelector("h4").textContent, x, y, width, height];
});
const out = document.createElement("pre");
out.id = "boxes";
out.hidden = true;
out.textContent = JSON.stringify([document.documentElement.scrollWidth, boxes]);
document.body.append(out);
</script>"""


@pytest.fixture(scope="module")
def demo(ppo_config, trained_sft, trained_reward, world, tmp_path_factory) -> Path:
    """The folder of a demo: three runs of the tests' world, with a gold score of weight 0."""
    path = tmp_path_factory.mktemp("demo") / "demo"
    shutil.copytree(trained_sft, path / "sft")
    shutil.copytree(trained_reward, path / "reward")
    config = ppo_config(
        output_dir=str(path / "ppo"),
        eval_dataset_name=str(world / "prompts.jsonl"),
        reward_weights=[1.0, 0.0],
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        total_episodes=64,
    )
    train_ppo(config, reward_funcs=[str(trained_reward), gold])
    results = {"gold_before": 0.01, "gold_after": 0.694, "kl": 5.1}
    summary = {"seed": 0, "seconds": 603.2, "ppo": results, "stage_seconds": {"sft": 132.1}}
    (path / "summary.json").write_text(json.dumps(summary))
    return path


@pytest.fixture(scope="module")
def page(demo) -> str:
    return report(demo)


def test_page_tells_what_the_files_of_a_demo_hold(demo, page):
    text = words(page)
    assert "Gold score 0.010 → 0.694 on fresh prompts" in text and "Time 603" in text
    assert text.count("finished after") == 3 and "finished after 8 steps" in text
    rows = [json.loads(line) for line in (demo / "ppo" / "completions.jsonl").open()]
    means = [statistics.fmean(row[side]["score"] for row in rows) for side in ("before", "after")]
    assert f"Score {' → '.join(numbers(means))} mean of {len(rows)} answers" in text
    last = json.loads((demo / "ppo" / "metrics.jsonl").read_text().splitlines()[-2])
    assert f"KL to the reference {numbers([last['objective/kl']])[0]}" in text
    assert "Gold score against KL" in text and "Score against KL" in text
    for row in rows:
        assert row["prompt"] in text and row["after"]["completion"].strip() in text
    for stage in ("sft", "reward", "ppo"):
        assert (demo / stage / f"{stage}.yaml").read_text() in html.unescape(page)
        metrics = {
            name for line in (demo / stage / "metrics.jsonl").open() for name in json.loads(line)
        }
        assert metrics
        section = page.split(f'<section id="{stage}">')[1].split("</section>")[0]
        drawn = {
            name
            for name in metrics
            if f"<code>{name}</code>" in section or f"<h4>{name}" in section
        }
        assert {name for name in metrics - drawn if not name.startswith("eval/")} == {"step"} | (
            {"episodes"} if stage == "ppo" else set()
        )


def test_same_files_same_bytes_and_one_stage_by_itself(demo, page):
    assert report(demo) == page
    text = words(report(demo / "reward"))
    assert "Reward model accuracy" in text and "of held-out pairs" in text and "PPO" not in text


def browse(page: Path, folder: Path) -> tuple[str, set[str]]:
    """Opens a page in the browser, which leaves shot.png in `folder`; returns the document as it
    stands then, and the addresses that the page, not the browser, asked for."""
    log = folder / "net.json"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", "--dump-dom"]
    command += [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={folder / 'shot.png'}"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, timeout=120, check=True)
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    asked = {
        event["url"]
        for event in events
        if event.get("network_isolation_key", "").startswith("file:")
        or event.get("initiator", "not an origin") != "not an origin"
    }
    return done.stdout.decode(), asked


@pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium")
def test_browser_draws_every_chart_and_the_page_fetches_nothing(page, tmp_path):
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]+)">', page)
    assert policy[1].startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    planted = page.replace("</footer>", f'</footer><img src="{PLANTED}">')
    # With the policy not even what is planted is fetched; without it nothing else is.
    guarded = tmp_path / "guarded.html"
    guarded.write_text(planted, encoding="utf-8")
    assert browse(guarded, tmp_path)[1] == set()
    bare = tmp_path / "bare.html"
    bare.write_text(planted.replace(policy[0], "").replace("</body>", MEASURE + "</body>"))
    document, asked = browse(bare, tmp_path)
    assert asked == {PLANTED}

    width, boxes = json.loads(html.unescape(re.search(r'id="boxes"[^>]*>([^<]+)<', document)[1]))
    assert width == WIDTH and len(boxes) == page.count("<figure>") > 40
    shot = image.imread(tmp_path / "shot.png")[..., :3]
    for title, *box in boxes:
        x, y, w, h = map(round, box)
        assert w > 250 and h > 140 and x >= 0 and x + w <= WIDTH and y + h <= HEIGHT, title
        part = shot[y : y + h, x : x + w]
        # Axes, grid and text are grey; only what is drawn of the run has a colour.
        assert (np.ptp(part, axis=-1) > 0.25).sum() > 20, f"{title}: nothing is drawn"


def test_run_that_was_cut_off_shows_what_there_is(tmp_path):
    records = [
        {
            "step": i,
            "objective/scores": i / 2,
            "objective/kl": i,
            "kl_coef": None,
            "episodes": 8 * i,
        }
        for i in range(1, 5)
    ]
    folder = make_stage(tmp_path / "run", "ppo", records, total_episodes=77)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "objective/sc')
    write_completions(
        folder, [("p", answer("a", 1.0), answer("b", None))], end='{"prompt": "q", "bef'
    )
    text = words(report(folder))
    assert "still going or cut off: step 4 of 10" in text
    assert "run/metrics.jsonl: 1 line is not whole and left out." in text
    assert "run/completions.jsonl: 1 line is not whole and left out." in text
    assert "Score in training 0.50 → 2.00" in text and "KL to the reference 4.00" in text
    assert "Without a finite value: kl_coef." in text and "after – 5 tokens" in text
    (folder / "completions.jsonl").unlink()
    (folder / "config.json").touch()  # of the model, when a finished run goes on again
    assert "still going or cut off: step 4 of 10" in words(report(folder))
    (folder / "ppo.yaml").write_text((folder / "ppo.yaml").read_text().replace("77", "32"))
    assert "finished after 4 steps" in words(report(folder))
    assert "Before and after" not in words(report(folder))


def test_lines_that_lack_something_are_left_out_or_show_a_dash(tmp_path):
    """None of it is a traceback, which would also end `rlhf ppo` after its last step."""
    folder = make_stage(tmp_path / "run", "ppo", [], dataset_name=None, max_steps="x")
    records = [{"step": step} for step in (None, "7", 0, 1e400, -1)]
    records += [{"step": 2, "objective/kl": 10**400, "loss/value": 1e308, "episodes": "8"}]
    records += [
        {"step": 4, "objective/kl": 10**30, "objective/scores": 1, "loss/value": -1e308},
        {"step": 5, "x": [1], "lr": "low"},
    ]
    records += [{"step": 3, "objective/kl": 1.0, "a\ud83d": 0.5, "episodes": 1}]
    lines = [json.dumps(row) for row in records] + ["null", "[" * 100_000]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    whole = answer("a", 1e17)
    sides = [None, [], {}, {"completion": None}]
    rows = [{"prompt": "lost", "before": side, "after": whole} for side in sides]
    rows += [{"prompt": "lost", "before": whole}, {"before": whole, "after": whole}]
    rows += [{"prompt": [{"role": "user", "content": "lost"}], "before": whole, "after": whole}]
    rows += [{"prompt": "kept", "before": {"completion": "bare"}, "after": whole}]
    odd = whole | {"score": "high", "tokens": None, "ended": None, "rewards": None}
    rows += [{"prompt": "odd", "before": odd, "after": whole | {"score": 1e308}}]
    named = {"$\\frac$": 1.25, "\ud83d": 1.75, "gold": 1.5, "x": "y", "z": 10**400}
    rows += [{"prompt": "named", **dict.fromkeys(("before", "after"), whole | {"rewards": named})}]
    (folder / "completions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = report(folder)
    text = words(page)
    assert "run/metrics.jsonl: 7 lines are not whole and left out." in text
    assert "run/completions.jsonl: 7 lines are not whole and left out." in text
    assert "cut off: step 5<" in page and "KL to the reference 1.00" in text and "m –" in text
    assert "Without a finite value: loss/value, lr, x." in text
    assert "the same 3 prompts" in text and "lost" not in text
    assert "before – bare" in text and "odd before – a after – 5 tokens" in text
    assert "gold 1.50 x – z –" in text and page.count("<svg") == 10
    settings = {"model_name_or_path": "m", "total_episodes": 20}
    (folder / "ppo.yaml").write_text(yaml.safe_dump(settings))
    assert "step 5 of 60" in words(report(folder))


@pytest.mark.parametrize(
    ("summary", "shown"),
    [
        ("[]", "summary.json is not whole"),
        ("null", "summary.json is not whole"),
        ('{"ppo": ', "summary.json is not whole"),
        ('{"ppo": {"gold_before": 1}}', "Gold score 1.00 → – on fresh"),
        ('{"ppo": {"gold_before": "a", "gold_after": 1e999}}', "Gold score – → – on fresh"),
        ('{"ppo": [1], "seconds": "long", "stage_seconds": {"ppo": "x"}}', "seconds starts from"),
        ('{"seconds": null, "stage_seconds": 5}', "state starts from"),
    ],
)
def test_summary_that_lacks_something(summary, shown, tmp_path):
    folder = make_stage(tmp_path / "run", "ppo", [{"step": 1, "objective/kl": 1.0}])
    (folder / "summary.json").write_text(summary)
    text = words(report(folder))
    assert shown in text and "Time" not in text


def test_scores_as_large_as_a_reward_may_give_are_drawn(tmp_path):
    folder = make_stage(tmp_path / "run", "ppo", [])
    largest = float(np.finfo(np.float32).max)
    for low, high in ((1e17, 1e17), (-largest, largest), (largest, largest)):
        rows = [
            ("p", answer("a", low), answer("b", high, 6)),
            ("q", answer("c", low), answer("d", high)),
        ]
        write_completions(folder, rows)
        assert report(folder).count("<svg") == 3


def test_the_first_place_of_a_stage_counts(tmp_path):
    folder = make_stage(tmp_path / "run", "ppo", [{"step": 3}])
    make_stage(folder / "ppo", "ppo", [{"step": 5}])
    page = report(folder)
    assert page.count('id="ppo"') == 1 and "step 3" in page and "step 5" not in page


@pytest.mark.parametrize(
    ("weights", "judge"),
    [([1.0, 0.0], "gold"), ([0.0, 1.0], "rm"), ([1, 0.5], None), (None, None), ([0.0], None)],
)
def test_a_reward_judges_only_if_it_weighs_nothing(weights, judge, tmp_path):
    record = {"step": 1, "rewards/rm": 1.0, "rewards/gold": 2.0, "objective/kl": 1.0}
    page = report(make_stage(tmp_path / "run", "ppo", [record], reward_weights=weights))
    assert ("over-optimisation" in page) == (judge == "gold")
    figures = re.findall(r"<h4>.*?</figcaption>", page, re.S)
    said = [figure for figure in figures if "judges, but does not train" in figure]
    assert [f"rewards/{judge}" in figure for figure in said] == [True] * (judge is not None)


def test_run_that_has_only_begun(tmp_path):
    folder = make_stage(tmp_path / "run", "sft", [], max_steps=30)
    page = report(folder)
    assert "step 0 of 30" in page and "No metrics have been logged yet." in page
    assert "<svg" not in page
    (folder / "metrics.jsonl").unlink()
    assert report(folder) == page
    make_stage(folder, "sft", [{"step": 10, "loss": 2.5}], max_steps=-1)
    page = report(folder)
    assert "cut off: step 10<" in page and page.count("<svg") == 1
    assert "<b>2.50</b>" in page and page.count("<use") > page.count("xtick")


def test_texts_are_shown_and_never_run(tmp_path):
    folder = make_stage(tmp_path / "<i>run", "ppo", [])
    evil = "</p><script>alert('x')</script>{{ 7 * 6 }}"
    exotic = "naïve 你好 🙂 \u202eabc\u2028 $x_1$"
    write_completions(
        folder,
        [(evil, answer(evil, 0.0), answer(exotic, 1.0)), ("", answer(" ", 1), answer("\ud83d", 1))],
    )
    page = report(folder)
    assert "<script" not in page and "<i>run" not in page
    assert html.unescape(page).count(evil) == 2 and exotic in page
    assert "(empty)" in page and page.count('<p class="text" dir="auto">?</p>') == 1


def test_command_prints_the_path_and_refuses_what_is_no_run(tmp_path, capsys):
    folder = make_stage(tmp_path / "run", "sft", [{"step": 1, "loss": 1.0}])
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    with pytest.raises(UserError, match="must hold a run"):
        write_report(tmp_path)
    for wrong in (tmp_path, tmp_path / "nowhere"):
        assert main(["report", str(wrong)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    (folder / "sft.yaml").write_text("a: [")
    assert main(["report", str(folder)]) == 2
    assert "sft.yaml" in capsys.readouterr().err
