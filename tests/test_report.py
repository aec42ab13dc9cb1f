"""The report of a run: what it says of it, and in a real browser that it stands alone and can be read anywhere."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recipes import report as recipe
from rlhf_recipes.comparison.policies import FROM_RUN
from rlhf_recipes.errors import UserError
from rlhf_recipes.report import Run, html, markdown, plots, report
from rlhf_recipes.report.command import parse
from rlhf_recipes.report.content import Table
from rlhf_recipes.report.examples import samples
from rlhf_recipes.report.judged import evaluation, overoptimization, win_rates
from rlhf_recipes.report.page import TEMPLATE, _escaped, _fenced
from rlhf_recipes.report.palette import COLOURS, hue, step
from rlhf_recipes.report.sections import measures, results
from rlhf_recipes.runs import Stage, disk
from rlhf_recipes.runs.manifest import read_manifest

ROOT = Path(__file__).parents[1]
BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
HEADINGS = [
    *("Results", "Where it comes from", "Training", "Evaluation", "Over-optimization", "Sample completions"),
    *("Time and memory", "Make it again"),
]
EVIL = "<script>document.title = 'taken'</script><img src=https://example.org/x.png> & <b>`bold`</b> | a_b_c"
LENGTH = "12.0 ± 0.4"
FAR = ["0.00 ± 0.30", LENGTH]
LIMIT = 3 * 2**20  # bytes of a page
BEFORE = {"sft": (), "rm": ("sft",), "dpo": ("sft",), "ppo": ("sft", "rm")}


def measured(gold, kl, **more):
    return {"gold": (gold, 0.02), "KL to SFT": (kl, 0.3), "length": (12.0, 0.4), "helpful": (gold, 0.04)} | more


METRICS = {
    "sft": {"loss": 0.26, "base": measured(0.01, 24.0), "sft": measured(0.69, 0.0), "change": measured(0.68, -24.0)},
    "rm": {"accuracy": (0.66, 0.02), "margin": 0.45, "scale": {"mean": 0.1, "std": 0.5}},
    "dpo": {"accuracies": 0.64, "sft": measured(0.69, 0.0), "dpo": measured(0.85, 6.1), "change": measured(0.16, 6.1)},
    "ppo": {
        "objective": 0.9,
        "kept": "best of 11 looks",
        "stopped": None,
        "sft": measured(0.69, 0.0, reward=(-0.1, 0.06)),
        "ppo": measured(0.9, 8.4, reward=(0.9, 0.04)),
        "change": measured(0.21, 8.4, reward=(1.0, 0.05)),
    },
}
SAMPLES = {
    "sft": [{"prompt": "Who is Kit?", "base": "Kit Kit", "sft": "A cook."}],
    "dpo": [{"prompt": "Who is Kit?", "sft": "A cook.", "dpo": "Kit is a cook."}],
    "ppo": [{"prompt": "Who is Kit?", "sft": "A cook.", "ppo": EVIL}],
}
EVALUATION = {
    "schema": 1,
    "baseline": "sft",
    "prompts": {"source": "data.prompts", "count": 100, "samples": 4},
    "policies": {"sft": measured(0.7, 0.0), "ppo": measured(0.91, 8.5, reward=(0.95, 0.03))},
    "win_rates": [
        {"policy": "ppo", "judge": "gold", "evidence": True, "win_rate": [0.68, 0.62, 0.74], "ties": 0.1}
        | {
            "without_ties": [0.7, 0.64, 0.77],
            "length_controlled": [0.66, 0.6, 0.72],
            "baseline": "sft",
            "prompts": 100,
            "failed": 0,
        },
        {"policy": "ppo", "judge": "reward", "evidence": False, "win_rate": [0.86, 0.82, 0.9], "baseline": "sft"},
    ],
    "reward_model": {
        "accuracy": [0.66, 0.02],
        "calibration_error": 0.031,
        "reliability": [{"confidence": c, "accuracy": c - 0.02, "pairs": 300} for c in (0.55, 0.75, 0.95)],
        "length_bias": {"accuracy": [0.61, 0.03], "pairs": 812},
        "categories": {"honest": {"accuracy": [0.68, 0.03], "pairs": 740}},
    },
    "best_of_n": [
        {"n": 1, "kl_bound": 0.0, "reward": [-0.1, 0.06], "gold": None},
        {"n": 4, "kl_bound": 0.636, "reward": [0.6, 0.06], "gold": [0.8, 0.02]},
    ],
    "benchmarks": {"sft": {"arc": {"acc,none": 0.5, "acc_stderr,none": 0.01}}, "ppo": {"arc": {"acc,none": 0.49}}},
}
POINTS = [
    {"beta": beta, "seed": seed, "step": at, "kl": at * (2 - 5 * beta), "reward": at / 10, "gold": 0.7 - at / 100}
    for beta in (0.0, 0.1)
    for seed in (0, 1)
    for at in range(0, 40, 10)
]


def history(steps, **names):
    """A log history as transformers writes it: training figures at each step, held-out ones at each tenth."""
    rows = [{"step": at, "loss": 1 / at, "learning_rate": 1e-4, **names} for at in range(1, steps + 1)]
    return rows + [{"step": at, "eval_loss": 1.1 / at, "eval_reward": 0.1} for at in range(10, steps + 1, 10)]


def config(folder, **more):
    model = {"name_or_path": "embedded", "revision": None}
    return {"run": "mine", "runs_dir": str(folder), "overwrite": False, "seed": 0, "model": model} | more


def make(folder, name, *, metrics=None, log=(), answers=None, finished=True, overrides=("run=mine",), **more):
    """A stage, through the class that the recipes use; `log` is its trainer's, so far as it came."""
    data = {"heldout": 0.1, "sources": [{"path": "world"}]}
    cfg = config(folder, **more)
    with Stage.open(cfg, name, predecessors=BEFORE[name], data_fingerprint=data, overrides=overrides) as stage:
        stage.check_base("b1")
        if log and not finished:
            checkpoint = stage.checkpoints_dir / f"checkpoint-{log[-1]['step']}"
            checkpoint.mkdir(parents=True)
            state = {"global_step": log[-1]["step"], "log_history": log}
            (checkpoint / "trainer_state.json").write_text(json.dumps(state))
        if finished:
            (stage.saving / "adapter_model.safetensors").write_text(name + str(more))
            stage.finish(
                METRICS[name] if metrics is None else metrics,
                samples=SAMPLES.get(name, []) if answers is None else answers,
                log=log,
            )
    return stage.path


def evaluated(run, found=EVALUATION, **more):
    """Write an evaluation of the policies that the run has now."""
    now = {path.parent.name: read_manifest(path.parent)["fingerprint"] for path in run.glob("*/manifest.json")}
    measured = {name: now.get(name, f"other {name}") for name in found["policies"]}
    made_from = {"policies": measured, "sft": now.get("sft"), "reward_model": now.get("rm")}
    made_from["by_reward_model"] = ["reward", "reward spread"]
    add(run, "eval/metrics.json", found | {"made_from": made_from} | more)


def add(run, name, value):
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.fixture
def run(tmp_path):
    """A run with nothing but its SFT stage."""
    return make(tmp_path / "runs", "sft", log=history(40)).parent


def whole(folder):
    """A run with all that a report can show."""
    for name in BEFORE:
        more = {"reward": 0.3, "kl": 2.0, "value_loss": 0.2, "explained_variance": 0.4} if name == "ppo" else {}
        path = make(folder, name, log=history(60, **more))
    for beta in (0.1, 0.2):  # a sweep is opened under Hydra; here its jobs are moved to where it has them
        shutil.copytree(path, path.parent / "swept")
        shutil.move(path.parent / "swept", path / f"training.beta={beta}")
    run = path.parent
    evaluated(run)
    answers = [("ppo", EVIL, 9.0), ("sft", "A cook.", -1.0)]
    answers = {policy: {"text": text, "reward": reward, "gold": None} for policy, text, reward in answers}
    rest = [{"prompt": f"{i}?", "completions": {"ppo": {"text": f"answer {i}", "reward": i / 9}}} for i in range(20)]
    add(run, "eval/samples.json", [{"prompt": EVIL, "completions": answers}, *rest])
    add(run, "overoptimization/metrics.json", {"points": POINTS})
    return run


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    run = whole(tmp_path_factory.mktemp("full"))
    recipe.write(run)
    return run


@pytest.fixture(scope="module")
def text(full):
    return (full / "report.md").read_text()


def titles(said):
    return [section.title for section in said.sections]


# ---- what it says


def test_a_whole_run_has_every_section_and_no_fault(full):
    said = report(Run.read(full))
    assert titles(said) == HEADINGS and said.faults == []
    assert dict(said.facts)["base"] == "embedded" and dict(said.facts)["device"].startswith("CPU")


def test_sections_with_nothing_to_show_are_left_out(run):
    said = report(Run.read(run))
    text = markdown(said)
    assert titles(said) == [heading for heading in HEADINGS if heading != "Over-optimization"]
    assert "Win rates" not in text and "Best of n" not in text and "| sft | 0.69 ± 0.02 |" in text
    assert "sft: gold score **0.69** (base 0.01, +0.68 ± 0.02)" in text


def tables(run):
    """Of the results: the rows of each table by policy, and its note."""
    found = [block for block in results(Run.read(run)) if isinstance(block, Table)]
    return [({row.cells[0]: row.cells[1:] for row in table.rows}, table.note) for table in found]


def test_each_set_of_prompts_has_a_table_of_its_own(full, text):
    (first, of_evaluation), (second, of_stages) = tables(full)
    assert first == {"sft": ["0.70 ± 0.02", "-", *FAR], "ppo": ["0.91 ± 0.02", "0.95 ± 0.03", "8.50 ± 0.30", LENGTH]}
    assert {"base", "sft", "dpo", "ppo"} <= second.keys()
    assert second["sft"][:2] == ["0.69 ± 0.02", "-0.10 ± 0.06"] and second["dpo"][:2] == ["0.85 ± 0.02", "-"]
    assert "Evaluated on 100 prompts (data.prompts), 4 completions each" in of_evaluation
    assert "at the end of sft, dpo, ppo, ppo/training.beta=0.1, ppo/training.beta=0.2, on 1 held-out" in of_stages
    assert "ppo: gold score **0.91** (sft 0.70)" in text


def test_both_sides_of_a_tile_are_of_one_measurement(run):
    """The evaluation has SFT alone, on other prompts: PPO stands beside the SFT of its own stage."""
    for name in ("rm", "ppo"):
        make(run.parent, name)
    there = {"sft": measured(0.2, 0.0, reward=(-2.0, 0.1))}
    evaluated(run, EVALUATION | {"policies": there, "win_rates": [], "best_of_n": []})
    text = markdown(report(Run.read(run)))
    assert "ppo: reward **0.90** (sft -0.10, +1.00 ± 0.05)" in text and "ppo: gold score **0.90** (sft 0.69" in text
    assert [list(rows) for rows, _ in tables(run)] == [["sft"], ["base", "sft", "ppo"]]


def test_stages_that_were_measured_on_other_prompts_are_not_in_one_table(run):
    make(run.parent, "dpo", answers=[{"prompt": "Another?", "sft": "a", "dpo": "b"}])
    assert [list(rows) for rows, _ in tables(run)] == [["base", "sft"], ["sft", "dpo"]]


def test_what_a_stage_says_of_an_sft_that_was_made_again_stands_apart(run):
    make(run.parent, "dpo")
    changed = METRICS["sft"] | {"sft": measured(0.1, 0.0)}
    make(run.parent, "sft", overwrite=True, seed=1, metrics=changed)
    (first, _), (second, note) = tables(run)
    assert first["sft"][0] == "0.10 ± 0.02" and second["sft"][0] == "0.69 ± 0.02"
    assert "sft was made again since" in note
    assert "dpo: gold score **0.85** (sft of then 0.69" in markdown(report(Run.read(run)))


# ---- figures of the present policies


@pytest.fixture
def judged(tmp_path):
    """A run with an evaluation of its policies as they are."""
    for name in BEFORE:
        run = make(tmp_path, name).parent
    duel = {"policy": "dpo", "judge": "gold", "win_rate": [0.6, 0.5, 0.7], "baseline": "sft"}
    wins = [*EVALUATION["win_rates"], duel, EVALUATION["win_rates"][0] | {"judge": FROM_RUN}]
    policies = EVALUATION["policies"] | {"dpo": measured(0.86, 6.0, reward=(0.5, 0.1)), "best-of-4": measured(0.8, 0.6)}
    evaluated(run, EVALUATION | {"win_rates": wins, "policies": policies})
    said = {name: {"text": f"I am {name}", "reward": 1.0, "gold": 1.0} for name in policies}
    add(run, "eval/samples.json", [{"prompt": "Who?", "completions": said}])
    return run


def test_an_evaluation_of_the_present_policies_is_shown_whole(judged):
    assert report(Run.read(judged)).faults == []
    assert [*tables(judged)[0][0]] == ["sft", "dpo", "ppo", "best-of-4"]


def test_a_policy_that_was_made_again_since_its_evaluation_is_left_out_and_said_so(judged):
    make(judged.parent, "ppo", overwrite=True, seed=1, metrics=METRICS["ppo"] | {"ppo": measured(0.3, 20.0)})
    read = Run.read(judged)
    assert [*read.evaluation["policies"]] == ["sft", "dpo", "best-of-4"]
    assert {row["policy"] for row in read.evaluation["win_rates"]} == {"dpo"}
    assert read.samples[0]["completions"].keys() == {"sft", "dpo", "best-of-4"}
    assert "ppo" not in read.evaluation["benchmarks"]
    text = markdown(report(read))
    assert "is of another ppo (figures, wins and samples) than there is now: left out" in text and "make eval" in text
    assert "0.91" not in text and "ppo: gold score **0.30**" in text


def test_with_another_sft_its_policies_the_kl_to_it_and_the_best_of_it_are_left_out(judged):
    make(judged.parent, "sft", overwrite=True, seed=1)
    read = Run.read(judged)
    assert {*read.evaluation["policies"]} == {"dpo", "ppo"} and not read.evaluation["win_rates"]
    assert all("KL to SFT" not in of for of in read.evaluation["policies"].values())
    assert not read.evaluation["best_of_n"] and read.evaluation["reward_model"]


def test_with_another_reward_model_its_scores_are_left_out(judged):
    make(judged.parent, "rm", overwrite=True, seed=1)
    read = Run.read(judged)
    assert {*read.evaluation["policies"]} == {"sft", "dpo", "ppo"}
    assert all("reward" not in of and "gold" in of for of in read.evaluation["policies"].values())
    assert FROM_RUN not in {row["judge"] for row in read.evaluation["win_rates"]} and read.evaluation["win_rates"]
    assert not read.evaluation["reward_model"]
    assert read.samples[0]["completions"]["ppo"] == {"text": "I am ppo", "gold": 1.0}


def test_a_policy_that_is_being_made_again_has_no_figures_of_before(judged):
    make(judged.parent, "ppo", overwrite=True, finished=False, log=history(20))
    assert "ppo" not in Run.read(judged).evaluation["policies"]


def test_an_evaluation_that_does_not_say_of_which_policies_it_is_is_not_shown(judged):
    add(judged, "eval/metrics.json", EVALUATION)
    said = report(Run.read(judged))
    assert "does not say of which policies it is" in said.faults[0] and "0.91" not in markdown(said)


def test_a_figure_that_is_no_number_is_seen(run):
    """Not a dash, as for what was not measured; a file may hold it as null."""
    make(
        run.parent,
        "dpo",
        metrics=METRICS["dpo"] | {"dpo": measured(None, 6.1)},
        log=[*history(40), {"step": 41, "loss": None}],
    )
    text = markdown(report(Run.read(run)))
    assert "| dpo | NaN | " in text and "metrics.json: dpo.gold, dpo.helpful: NaN or infinite" in text
    assert "no number at 1 steps" in html(report(Run.read(run)))
    metrics = json.loads((run / "dpo/metrics.json").read_text())
    (run / "dpo/metrics.json").write_text(json.dumps(metrics | {"accuracies": float("nan")}))
    assert "accuracies, dpo.gold" in markdown(report(Run.read(run)))


def test_the_stages_own_samples_show_the_best_and_the_worst_by_their_scores(run):
    scored = [
        {"prompt": f"{i}?", "sft": f"a{i}", "ppo": f"b{i}", "scores": {"sft": {"reward": 0.0}, "ppo": {"reward": i}}}
        for i in range(12)
    ]
    make(run.parent, "rm")
    make(run.parent, "ppo", answers=scored)
    [_, shown] = samples(Run.read(run))
    assert shown.comparisons[0].label == "highest reward of ppo" and shown.comparisons[0].prompt == "11?"
    assert [(a.policy, a.scores) for a in shown.comparisons[0].answers] == [("sft", "reward 0"), ("ppo", "reward 11")]
    assert shown.comparisons[2].label == "lowest reward of ppo" and shown.comparisons[2].prompt == "0?"


def test_a_policy_that_was_chosen_among_looks_says_so(text):
    results = text.partition("## Results")[2].partition("\n## ")[0]
    assert "ppo is the best of 11 looks at held-out data, which flatters it there a little" in results
    assert "objective 0.9, kept best of 11 looks" in text


def test_a_judge_that_ppo_was_trained_to_please_is_no_evidence(full, text):
    assert (
        "| ppo | sft | gold | 68.0 (62.0 to 74.0) | 66.0 (60.0 to 72.0) | 10.0 | 70.0 (64.0 to 77.0) | 100 | 0 |"
        in text
    )
    assert "| ppo | sft | reward (no evidence) | 86.0 (82.0 to 90.0) | - |" in text
    assert '<tr class="muted"><td class="word"><span class="chip"' in (full / "report.html").read_text()


def test_win_rates_of_few_prompts_are_marked_and_those_without_an_equal_length_say_why():
    duel = {"policy": "ppo", "judge": "gold", "win_rate": [0.75, 0.5, 0.9, 16], "without_ties": [1.0, None, None, 1]}
    blocks = win_rates([duel | {"length_controlled": None, "not_controlled": "only 1.0% are shorter"}], "sft")
    (table,) = [block for block in blocks if isinstance(block, Table)]
    assert table.rows[0].cells[3:7] == ["75.0 (50.0 to 90.0) (16 prompts)", "-", "-", "100.0 (1 prompt)"]
    assert "No length-controlled rate where only 1.0% are shorter." in table.note


def test_a_standard_error_of_a_benchmark_becomes_its_interval(text):
    assert "| arc | acc,none | 0.50 ± 0.02 | 0.490 |" in text


def test_samples_are_the_best_the_worst_and_some_at_random_and_say_so(full, text):
    labels = re.findall(r"### Prompt \((.*?)\)", text)
    assert labels == ["highest reward of ppo"] * 2 + ["lowest reward of ppo"] * 2 + ["random"] * 6
    assert text.index("answer 19") < text.index("answer 0")
    first, again = samples(Run.read(full)), samples(Run.read(full))
    assert first == again


def test_without_an_evaluation_the_stages_own_samples_are_put_side_by_side(run):
    for name in ("rm", "ppo"):
        make(run.parent, name)
    [_, shown] = samples(Run.read(run))
    assert [[answer.policy for answer in one.answers] for one in shown.comparisons] == [["base", "sft", "ppo"]]


def test_an_unfinished_stage_is_shown_as_such_with_its_curves_so_far(run):
    make(run.parent, "rm", log=history(40), finished=False)
    said = report(Run.read(run))
    assert said.faults == ["rm is unfinished: what is shown of it goes up to its newest checkpoint."]
    page = html(said)
    assert '<span class="state open">unfinished</span>' in page and "var(--rm)" in page


def test_a_stage_made_from_what_is_no_longer_there_is_marked(run):
    make(run.parent, "dpo")
    make(run.parent, "sft", overwrite=True, seed=1)
    assert "**made from another sft than there is now**" in markdown(report(Run.read(run)))


def test_a_stage_that_lost_a_file_is_marked(run):
    (run / "sft" / "adapter_model.safetensors").unlink()
    assert report(Run.read(run)).faults == ["sft: adapter_model.safetensors is missing"]


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("sft/metrics.json", "{", "is damaged"),
        ("sft/samples.json", "[]", "holds a list, and a dict was expected"),
        ("rm/manifest.json", "{}", "is damaged"),
        ("sft/log.jsonl", "{}\n\x00", "is damaged"),
        ("eval/metrics.json", "nonsense", "is damaged"),
        ("eval/samples.json", "{}", "holds a dict, and a list was expected"),
        ("overoptimization/metrics.json", "", "is damaged"),
        ("eval/metrics.json", '{"made_from": {}, "win_rates": [7]}', "Evaluation is left out: eval/metrics.json"),
        ("eval/samples.json", '[{"completions": 7}]', "Sample completions is left out: eval/samples.json"),
        ("overoptimization/metrics.json", '{"points": [7]}', "Over-optimization is left out: overoptimization/"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_and_the_rest_is_shown(run, file, text, told):
    add(run, file, text)
    said = report(Run.read(run))
    assert len(said.faults) == 1 and told in said.faults[0] and file.rpartition("/")[2] in said.faults[0]
    assert "Make it again" in titles(said) and html(said)


def without_one(value):
    """A mapping, or the first of a list of mappings, with each of its keys left out in turn; and empty."""
    first = value[0] if isinstance(value, list) else value
    for left_out in first:
        rest = {key: of for key, of in first.items() if key != left_out}
        yield [rest] if isinstance(value, list) else rest
    yield type(value)()


def test_every_key_of_what_was_measured_is_optional(run):
    for key, value in EVALUATION.items():
        for rest in without_one(value) if isinstance(value, dict | list) else [None]:
            add(run, "eval/metrics.json", {"made_from": {}, key: rest})
            read = Run.read(run)
            results(read), evaluation(read), measures(read)  # none of them raises
            assert not read.faults
    for rest in without_one(POINTS):
        add(run, "overoptimization/metrics.json", {"points": rest})
        read = Run.read(run)
        overoptimization(read)
        assert not read.faults


def test_the_page_and_the_markdown_have_the_same_tables(full, text):
    rows = re.findall(r"<tr.*?</tr>", (full / "report.html").read_text(), re.S)
    lines = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    cells = [[re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]
    assert len(rows) > 30
    assert [[cell.replace("\\", "").strip() for cell in line[1:-1].split("|")] for line in lines] == cells


def test_model_text_cannot_break_out_of_its_place_in_the_markdown():
    fenced = "a ``` b\n````\nc"
    assert _fenced(fenced) == f"`````text\n{fenced}\n`````"
    assert _escaped("a | b_c\n# d") == r"a \| b\_c \# d"


def test_long_logs_and_many_samples_make_no_large_page(tmp_path):
    many = [{"prompt": f"{i} " + "x" * 9000, "base": "y" * 9000, "sft": EVIL * 50} for i in range(500)]
    names = ("entropy", "reward", "kl", "value_loss", "explained_variance", "grad_norm", "eos_share")
    log = [{"step": at, "loss": at % 7, **dict.fromkeys(names, at % 5)} for at in range(1, 20_000)]
    run = make(tmp_path, "sft", log=log, answers=many).parent
    assert len(html(report(Run.read(run)))) < LIMIT / 3


# ---- colours and lines


def contrast(one, other):
    """Source: WCAG 2.2, contrast ratio of two colours given as #rrggbb."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_are_told_apart_from_the_page_and_text_is_read_in_light_and_in_dark():
    pages = re.findall(r"--page: (#\w+); --card: (#\w+); --ink: (#\w+); --soft: (#\w+)", TEMPLATE.read_text())
    assert len(pages) == 2
    for mode, (page, card, ink, soft) in enumerate(pages):
        assert all(contrast(text, back) >= 4.5 for text in (ink, soft) for back in (page, card))
        assert {name: c for name, pair in COLOURS.items() if (c := contrast(pair[mode], page)) < 3} == {}
    assert len({light for light, _ in COLOURS.values()}) == len(COLOURS)


def test_a_stage_has_one_colour_and_so_has_a_job_of_its_sweep():
    assert hue("ppo") == hue("ppo/training.beta=0.1") == "ppo" and hue("gpt-4") == "other"
    assert [step(i, 2) for i in (0, 1)] == ["step1", "step5"] and len({step(i, 5) for i in range(5)}) == 5


def test_a_plot_takes_its_colours_and_font_from_the_page_and_is_drawn_the_same_each_time():
    line = plots.Line("train", "ppo", [(0, 1, None), (1, 2, 0.1)])
    svg = plots.lines("a", [line], x="step", y="reward")
    assert "var(--ppo)" in svg and "currentColor" in svg and "DejaVu" not in svg and not re.search(": ?#", svg)
    assert svg == plots.lines("a", [line], x="step", y="reward") and svg.startswith("<svg")
    ids = [set(re.findall(r' id="(.*?)"', plots.lines(name, [line], x="", y=""))) for name in "ab"]
    assert ids[0] and not ids[0] & ids[1]  # two plots on one page


def test_a_long_line_is_thinned_to_what_can_be_seen_and_keeps_its_ends():
    kept = plots._kept(5001)
    assert len(kept) <= plots.POINTS + 2 and (kept[0], kept[-1]) == (0, 5000)
    assert plots.smooth([(0.0, 1.0, None), (1.0, 4.0, None), (2.0, 1.0, None)]) == [
        *((0.0, 2.5, None), (1.0, 2.0, None), (2.0, 2.5, None))
    ]


# ---- the command


def test_overrides_of_the_recipes_are_checked_and_ignored():
    assert parse(["run=mine", "runs_dir=there", "lora.r=32", "data=ultrafeedback", "model=qwen2.5-0.5b"], "") == Path(
        "there/mine"
    )
    assert parse(["training.kl_target=6", "reward=function", "reward.functions=[a.py:b]"], "") == Path("runs/default")
    with pytest.raises(UserError, match=r"did you mean training\.learning_rate"):
        parse(["training.lerning_rate=1"], "")
    with pytest.raises(UserError, match=r"did you mean run\?"):
        parse(["runn=mine"], "")


def test_a_run_that_is_not_there_is_told_with_those_that_are(run):
    with pytest.raises(UserError, match=r"There is no run nine in .*; there are mine\."):
        recipe.write(run.parent / "nine")
    with pytest.raises(UserError, match="there is none; make one: make sft rm ppo"):
        recipe.write(run.parent / "none" / "nine")


def test_a_run_with_no_finished_stage_is_told_so(tmp_path):
    make(tmp_path, "sft", finished=False, log=history(20))
    with pytest.raises(UserError, match=r"no finished stage yet \(sft is unfinished\)"):
        recipe.write(tmp_path / "mine")
    assert not (tmp_path / "mine" / "report.html").exists()


def test_the_command_imports_no_torch_and_a_broken_write_keeps_the_old_report(run, monkeypatch):
    code = "import sys, recipes.report\nrecipes.report.main()\nprint('torch' in sys.modules)"
    arguments = ["run=mine", f"runs_dir={run.parent}", "lora.r=32"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{run}/report.html", f"{run}/report.md", "False"]
    before = (run / "report.html").read_text()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "sync", full_disk)
    with pytest.raises(UserError, match="The disk is full"):
        recipe.write(run)
    assert (run / "report.html").read_text() == before and {f.name for f in run.iterdir() if f.is_file()} == {
        *("report.html", "report.md")
    }


def test_a_report_leaves_the_stages_as_they_are(run):
    before = read_manifest(run / "sft")
    recipe.write(run)
    assert read_manifest(run / "sft") == before
    make(run.parent, "rm")  # the next stage finds its predecessor whole


def test_help_tells_what_to_type():
    done = subprocess.run(
        [sys.executable, "-m", "recipes.report", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert 'make report ARGS="run=mine"' in done.stdout and "report.html" in done.stdout


# ---- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium without a network, which keeps what it logged and what it asked for."""
    if not (BROWSER and DRIVER):
        missing = "needs chromium and chromedriver: apt-get install chromium chromium-driver"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"):
        options.add_argument(f"--{flag}")
    for flag in ("disable-background-networking", "disable-component-update", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=ChromeService(DRIVER))
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd(
        "Network.emulateNetworkConditions",
        {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0},
    )
    driver.get("about:blank")  # off the browser's own start page,
    driver.get_log("performance")  # whose requests are nobody's business here
    yield driver
    driver.quit()


def show(browser, page, *, width=1280, scheme="light"):
    """Open a page by file:// on a screen of some width, in a colour scheme."""
    for log in ("browser", "performance"):
        browser.get_log(log)  # what came before is of no interest
    phone = width < 600
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": phone}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())


def requests(browser):
    """The addresses that the page shown last asked for."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


def test_the_page_stands_alone(browser, full):
    page = full / "report.html"
    show(browser, page)
    asked = [url for url in requests(browser) if not url.startswith("data:")]
    assert asked == [page.as_uri()]
    assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
    assert browser.get_log("browser") == []
    assert page.stat().st_size < LIMIT


def test_the_page_has_its_headings_and_a_plot_where_one_belongs(browser, full):
    show(browser, full / "report.html")
    read = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent.trim())"
    assert browser.execute_script(read, "h1") == ["mine"] and browser.execute_script(read, "h2") == HEADINGS
    count = "return document.querySelectorAll('#' + arguments[0] + ' figure svg').length"
    plotted = {title: browser.execute_script(count, re.sub(r"\W+", "-", title.lower())) for title in HEADINGS}
    assert plotted["Results"] == 3 and plotted["Over-optimization"] == 2 and plotted["Training"] >= 12
    assert plotted["Evaluation"] == 5  # win rates, best of n twice, reliability, categories


def test_what_a_model_wrote_is_text_and_nothing_else(browser, full):
    show(browser, full / "report.html")
    assert browser.title == "mine: report"
    assert browser.execute_script("return document.querySelectorAll('script, img, b').length") == 0
    assert EVIL in browser.execute_script("return document.querySelector('main').textContent")


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_is_wider_than_the_screen(browser, full, width):
    show(browser, full / "report.html", width=width)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    wide = """return [...document.querySelectorAll('main *')].filter(e => !e.closest('svg, .scroll, pre')
      && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
    assert browser.execute_script(wide) == []


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_the_page_and_its_plots_follow_the_colour_scheme(browser, full, scheme, dark):
    show(browser, full / "report.html", scheme=scheme)
    style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"

    def brightness(selector, name):
        return sum(map(int, re.findall(r"\d+", browser.execute_script(style, selector, name))[:3])) / 3

    page, text = brightness("body", "backgroundColor"), brightness("main p", "color")
    assert (page < 60 and text > 160) if dark else (page > 220 and text < 120)
    assert abs(brightness("figure svg text", "fill") - page) > 150


def test_texts_in_a_plot_do_not_overlap(browser, full):
    for width in (390, 1280):
        show(browser, full / "report.html", width=width)
        overlapping = """return [...document.querySelectorAll('figure svg')].flatMap(svg => {
          const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
          return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) =>
            Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1 &&
            Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 4).map(([b, q]) => a + ' / ' + b)); })"""
        assert browser.execute_script(overlapping) == []


@pytest.mark.slow
def test_the_report_of_a_real_run(browser, tmp_path):
    smoke = ["experiment=smoke", f"runs_dir={tmp_path}", "run=real", "evaluation.prompts=8", "evaluation.samples=1"]
    for command in ("sft", "report"):
        done = [sys.executable, "-m", f"recipes.{command}", *smoke]
        subprocess.run(done, check=True, cwd=ROOT, capture_output=True)
    show(browser, tmp_path / "real" / "report.html", width=390)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.get_log("browser") == []
    read = "return [...document.querySelectorAll('h2')].map(e => e.textContent)"
    assert {"Results", "Where it comes from", "Sample completions"} <= {*browser.execute_script(read)}
