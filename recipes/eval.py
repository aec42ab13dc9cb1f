"""Did it work? The policies of a run and others on the same prompts: measured, judged, and beside the best of n.

    make eval
    make eval EVAL_ARGS="judge=local judge.model=Qwen/Qwen2.5-7B-Instruct eval.prompts=hhh"
    make eval EVAL_ARGS="judge=endpoint judge.url=http://localhost:8000/v1 judge.model=qwen"

Win rates are against SFT, with 95% intervals over prompts. What a policy was trained on, by its manifest, is shown as a
judge of it, and marked as no evidence. What was answered and judged is kept in runs/<run>/eval/: with another judge,
only the judge is asked.
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rlhf_recipes import terminal
from rlhf_recipes.comparison import harness, judges, policies, reward_bench
from rlhf_recipes.config import recipe
from rlhf_recipes.runs import disk, reading


def compare(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Draw, measure and judge; returns the figures of `metrics.json`."""
    compared, asked = policies.resolve(cfg), policies.prompts(cfg)
    judges.refuse_faults(cfg, compared)
    pairs = reward_bench.pairs(cfg) if compared.reward_model else []
    tasks = harness.tasks(cfg)
    endpoint = judges.open_endpoint(cfg, folder / "replies")
    from rlhf_recipes.comparison import findings
    from rlhf_recipes.comparison.answers import RunModels, collect

    run = RunModels(cfg, compared, asked)
    answers = collect(cfg, compared, run, asked, folder / "answers")
    measured = findings.of_run(cfg, run, pairs, tasks)
    run.free()  # before a judge comes into memory

    deciding = [*judges.after_answers(cfg, compared, answers, folder / "replies"), *endpoint]
    metrics = findings.gather(cfg, compared, asked, answers, deciding) | measured
    disk.write_json(folder / "samples.json", findings.samples(cfg, answers))
    disk.write_json(folder / "metrics.json", metrics)
    terminal.say(findings.tell(metrics))
    terminal.say(f"\nAll figures: {folder / 'metrics.json'}; completions: {folder / 'samples.json'}")
    return metrics


@recipe("eval")
def main(cfg: DictConfig) -> None:
    """Compare, and let nobody else write there meanwhile."""
    with reading(cfg, "eval") as folder:
        compare(cfg, folder)


if __name__ == "__main__":
    main()
