"""By how many looks a trainer chose the checkpoint that it kept."""

from transformers import Trainer


def kept(trainer: Trainer) -> dict[str, str]:
    """`{"kept": "best of 11 looks"}` where a trainer keeps its best checkpoint; empty where it keeps the last.

    The best of many looks at the same held-out data is best by luck too: what was measured there flatters it.
    """
    args = trainer.args
    if not args.load_best_model_at_end:
        return {}
    metric = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    looks = sum(metric in row and row["step"] > 0 for row in trainer.state.log_history)
    return {"kept": f"best of {looks} look{'s' * (looks != 1)}"}
