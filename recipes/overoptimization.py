"""Over-optimization, drawn: PPO at several `beta`, its training reward and its gold score against the KL it has spent.

    make overoptimization
    make overoptimization ARGS="run=mine seed=1" BETAS=0,0.1,0.5
    make overoptimization ARGS="run=mine" PPO_ARGS="training.max_steps=168 reward.ensemble=worst"

As in Gao et al. (arXiv 2210.10760), on the embedded world, whose truth is known. Stages sft and rm are made where they
are missing; each `beta` is a job of a sweep, runs/<run>/ppo/training.beta=<beta>, skipped if it is finished and resumed
if it was broken off. With guard=reward_model in PPO_ARGS, and data of your own, that scorer stands for gold.
"""

import subprocess
import sys
from pathlib import Path

from rlhf_recipes import terminal
from rlhf_recipes.config import by_stage, compose, plain_errors
from rlhf_recipes.errors import UserError
from rlhf_recipes.guard import curves

BETAS = "0,0.05,0.1,0.25,0.5"
STAGES = ("sft", "rm", "ppo")


def overoptimization(betas: list[str], overrides: dict[str, list[str]]) -> list[curves.CurvePoint]:
    """Make what is missing, and write points, table and picture; `overrides` are those of each stage."""
    configs = {stage: compose(stage, overrides[stage]) for stage in STAGES}  # a typo is told before anything is made
    cfg = configs["ppo"]
    for stage in STAGES:
        sweep = ["-m", f"training.beta={','.join(betas)}"] if stage == "ppo" else []
        done = subprocess.run([sys.executable, "-m", f"recipes.{stage}", *sweep, *overrides[stage]])
        if done.returncode:
            sys.exit(done.returncode)  # it has said why
    run = Path(cfg.runs_dir) / cfg.run
    points = [point for beta in betas for point in curves.read(run / "ppo" / f"training.beta={beta}", beta, cfg.seed)]
    folder = curves.write(points, run / "overoptimization")
    terminal.say("\n" + curves.table(points) + f"\n\n{folder / curves.POINTS}\n{folder / curves.PICTURE}")
    return points


def parse(arguments: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """`beta=0,0.1 <overrides of all stages> --sft <its own> --rm ... --ppo ...`: the betas, and each stage's overrides.

    Raises:
        UserError: fewer than two betas, or one that is no number of 0 or more.
    """
    given, common, own = by_stage("overoptimization", __doc__ or "", arguments, keys=["beta"], stages=STAGES)
    text = given.get("beta", BETAS)
    betas = text.strip("[]").replace(" ", "").split(",")
    if len({*betas}) < 2 or not all(beta.replace(".", "", 1).isdigit() for beta in betas):
        raise UserError(f"beta={text}: want two numbers of 0 or more, or more of them, such as beta={BETAS}")
    overrides = {stage: [*common, *own[stage]] for stage in STAGES}
    named = [o.partition("=")[0] for o in overrides["ppo"]]
    overrides["ppo"] += [] if "experiment" in named else ["experiment=ppo_overoptimization"]
    overrides["ppo"] += [] if "guard" in named else ["guard=gold"]
    return list(dict.fromkeys(betas)), overrides


def main() -> None:
    """Check the command line, and draw."""
    terminal.quiet()
    with plain_errors():
        overoptimization(*parse(sys.argv[1:]))


if __name__ == "__main__":
    main()
