"""Direct preference optimization: the SFT policy improved on preferences, with no reward model and no sampling.

    make sft dpo
    make dpo ARGS="run=mine model=qwen2.5-0.5b" DPO_ARGS="training.beta=0.2 training.loss_type=[ipo]"

The reference is a frozen copy of the SFT adapter on the same base; the lower layers (`trunk`) stay as SFT left them.
TRL's DPOTrainer, with every loss and option of its own; `training.precompute_ref_log_probs=true` computes the
reference once.
"""

from omegaconf import DictConfig

from rlhf_recipes import data, guard, rewards, terminal
from rlhf_recipes.config import build, recipe
from rlhf_recipes.plan.shortage import told_when_full
from rlhf_recipes.runs import Stage


@told_when_full
def train(cfg: DictConfig, stage: Stage) -> dict[str, object]:
    """Train, measure and save; returns the figures of `metrics.json`."""
    unseen = guard.from_config(cfg, stage.adapter("rm"))
    rows, asked = data.load(cfg.data, "preferences", cfg.seed), data.heldout_prompts(cfg)
    stage.check_rows(rows)
    from trl import DPOConfig

    from rlhf_recipes import evaluation, models
    from rlhf_recipes.backoff import back_off
    from rlhf_recipes.finite import StopAtNonFinite
    from rlhf_recipes.guard.callback import watch
    from rlhf_recipes.preferences import PairDPOTrainer
    from rlhf_recipes.roles import POLICY, REFERENCE

    args = build(DPOConfig, cfg.training, **stage.arguments, **models.precision(cfg))
    tokenizer = models.load_tokenizer(cfg.model, rows.train)
    parts = {f"{name} pairs": data.comparisons(part, tokenizer) for name, part in rows.parts.items()}
    (train, test, asked), said = data.fit(parts | {"held-out prompts": asked}, tokenizer, args.max_length)
    terminal.say(said)
    policy = models.load_policy(cfg, stage.adapter("sft"))
    stage.check_base(models.fingerprint(policy))

    trainer = PairDPOTrainer(policy, args, train_dataset=train, eval_dataset=test, processing_class=tokenizer)
    roles = models.thaw(policy, cfg.trunk, cfg.frozen_top)
    back_off(trainer, pairs=True)
    StopAtNonFinite(trainer)
    watched = watch(trainer, roles, tokenizer, cfg, unseen)
    terminal.progress(trainer, "dpo")
    stage.train(trainer)

    watched.save(stage.saving)
    evaluated = trainer.evaluate()
    figures = watched.figures | {"stopped": watched.stop_reason} if unseen else {}
    figures |= {name: evaluated[f"eval_rewards/{name}"] for name in ("accuracies", "margins")}
    figures |= evaluation.kept(trainer)
    changes = evaluation.changes(cfg, asked, roles, tokenizer, {cfg.start: REFERENCE, "dpo": POLICY})
    log = trainer.state.log_history
    stage.finish(figures | changes.figures, save=trainer.save_model, samples=changes.samples, log=log)
    terminal.summary(stage, "DPO adapter", figures, changes)
    return figures | changes.figures


@recipe("dpo")
def main(cfg: DictConfig) -> None:
    """Open the stage, and train unless it is finished."""
    before = ["sft"] * (cfg.start == "sft") + ["rm"] * ("run" in rewards.named_models(cfg.guard.model))
    others, read = rewards.folders(cfg.guard.model), data.describe(cfg.data, "preferences")
    with Stage.open(cfg, "dpo", predecessors=before, others=others, data_fingerprint=read) as stage:
        terminal.say(stage.message)
        if stage.state != "skip":
            train(cfg, stage)


if __name__ == "__main__":
    main()
