"""Run folders: `runs/<run>/<stage>/` holds what a stage made, and opening a stage decides what is left to do.

A stage that is finished and unchanged is skipped, an unfinished one resumes from its newest complete checkpoint, and
one that was configured differently, or whose data or predecessor changed, is refused with the list of what differs.
Nothing here imports torch: a skip takes a moment.

    with Stage.open(cfg, "rm", predecessors=("sft",), data_fingerprint=describe(cfg.data, "preferences")) as stage:
        if stage.state != "skip":
            args = build(RewardConfig, cfg.training, output_dir=str(stage.checkpoints_dir))
            ...                                         # stage.adapter("sft") is the SFT adapter's folder
            stage.train(trainer)
            stage.finish(metrics, save=trainer.save_model)
"""

from rlhf_recipes.runs.commands import make_command
from rlhf_recipes.runs.manifest import Made
from rlhf_recipes.runs.stage import Stage, finished, reading, run_folder

__all__ = ["Made", "Stage", "finished", "make_command", "reading", "run_folder"]
