"""Reward model: a LoRA adapter with a scalar head that scores answers as raters rank them (TRL's RewardTrainer).

    make sft rm
    make rm ARGS="run=mine model=qwen2.5-0.5b" RM_ARGS="training.learning_rate=5e-5"

It starts from the SFT adapter, whose lower layers (`trunk`) stay as they are, so that PPO can share them.
"""

from omegaconf import DictConfig

from rlhf_recipes import data, terminal
from rlhf_recipes.config import build, recipe
from rlhf_recipes.plan.shortage import told_when_full
from rlhf_recipes.runs import Stage


@told_when_full
def train(cfg: DictConfig, stage: Stage) -> dict[str, object]:
    """Train, measure and save; returns the figures of `metrics.json`."""
    rows = data.load(cfg.data, "preferences", cfg.seed)
    stage.check_rows(rows)
    from trl import RewardConfig

    from rlhf_recipes import evaluation, models, reward_model
    from rlhf_recipes.backoff import back_off
    from rlhf_recipes.finite import StopAtNonFinite
    from rlhf_recipes.preferences import PairRewardTrainer

    args = build(RewardConfig, cfg.training, **stage.arguments, **models.precision(cfg))
    tokenizer = models.load_tokenizer(cfg.model, rows.train)
    parts = {f"{name} pairs": reward_model.tokenize(part, tokenizer) for name, part in rows.parts.items()}
    (pairs, heldout), said = data.fit(parts, tokenizer, args.max_length)
    terminal.say(said)
    model = models.load_reward_model(cfg, stage.adapter("sft"))
    stage.check_base(models.fingerprint(model))

    trainer = PairRewardTrainer(model, args, train_dataset=pairs, eval_dataset=heldout, processing_class=tokenizer)
    models.thaw(model, cfg.trunk, cfg.frozen_top)
    back_off(trainer, pairs=True)
    StopAtNonFinite(trainer)
    terminal.progress(trainer, "rm")
    stage.train(trainer)

    chosen, rejected = reward_model.pair_scores(model, heldout, tokenizer, args.per_device_eval_batch_size)
    figures = reward_model.agreement(chosen, rejected, heldout["prompt"], reward_model.longer(heldout))
    figures |= evaluation.kept(trainer)
    trainer.save_model(stage.saving)
    trainer.accelerator.wait_for_everyone()
    log = trainer.state.log_history
    del trainer, model  # two bases in memory would be one too many
    policy = models.load_policy(cfg, stage.adapter("sft"))
    figures["scale"] = reward_model.measure_scale(cfg, policy, tokenizer, pairs, stage.saving)
    stage.finish(figures, log=log)
    terminal.summary(stage, "reward model", figures)
    return figures


@recipe("rm")
def main(cfg: DictConfig) -> None:
    """Open the stage, and train unless it is finished."""
    before = ["sft"] if cfg.start == "sft" else []
    with Stage.open(cfg, "rm", predecessors=before, data_fingerprint=data.describe(cfg.data, "preferences")) as stage:
        terminal.say(stage.message)
        if stage.state != "skip":
            train(cfg, stage)


if __name__ == "__main__":
    main()
