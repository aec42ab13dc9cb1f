"""What each stage will take of a card, by part, and what to override where it does not fit; nothing is loaded.

    make plan ARGS="model=qwen2.5-0.5b data=ultrafeedback hardware=12gb" CARD=12
    make plan ARGS="model=llama3.1-8b data=hh" PPO_ARGS="training.max_completion_length=256" CARD=16
    python -m recipes.plan card=12 prompt=1024 model=qwen2.5-3b quantization=nf4 --ppo trunk=0.75

The real passes run on tensors without data (rlhf_recipes/plan/). `card` is in GB (where there is one: what is free on
it), `prompt` the tokens of the longest prompt (512); texts are as long as `training.max_length`. For GPUs these are
predictions, not yet measured.
"""

import sys

from rlhf_recipes import figures, machine, terminal
from rlhf_recipes.config import compose, plain_errors
from rlhf_recipes.config.options import TRAINING
from rlhf_recipes.plan.command import Asked, advice, assumptions, parse, row


def plan(asked: Asked) -> dict[str, int]:
    """Print the table, and the line that makes all fit; returns the peaks in bytes by stage."""
    configs = {stage: compose(stage, asked.overrides(stage)) for stage in TRAINING}
    from rlhf_recipes.plan.overrides import overrides_that_fit
    from rlhf_recipes.plan.stages import phases

    asked = asked.on(machine.card())
    limit, prompt = asked.limit, asked.prompt
    found = {stage: phases(stage, cfg, prompt_length=prompt) for stage, cfg in configs.items()}
    peaks = {stage: max(of_stage, key=lambda phase: phase.peak) for stage, of_stage in found.items()}
    terminal.say(figures.table([row(peak, limit) for peak in peaks.values()]))
    terminal.say(assumptions(asked))
    if limit is not None:
        tight = [stage for stage, peak in peaks.items() if peak.peak > limit]
        fit = {s: overrides_that_fit(found[s], asked.overrides(s), limit, prompt_length=prompt) for s in tight}
        terminal.say(advice(asked, fit))
    return {stage: peak.peak for stage, peak in peaks.items()}


def main() -> None:
    """Check the command line, and plan."""
    terminal.quiet()
    with plain_errors():
        plan(parse(sys.argv[1:], __doc__ or ""))


if __name__ == "__main__":
    main()
