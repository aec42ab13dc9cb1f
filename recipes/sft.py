"""Supervised fine-tuning: a LoRA adapter that answers as the demonstrations do. Every later stage starts from it.

    make sft
    make sft ARGS="run=mine model=qwen2.5-0.5b data=ultrafeedback hardware=12gb lora.r=32"

All layers are trained, by TRL's SFTTrainer with every option of its own: packing, NEFTune, the loss on all tokens ...
"""

from omegaconf import DictConfig

from rlhf_recipes import data, terminal
from rlhf_recipes.config import build, recipe
from rlhf_recipes.plan.shortage import told_when_full
from rlhf_recipes.runs import Stage


@told_when_full
def train(cfg: DictConfig, stage: Stage) -> dict[str, object]:
    """Train, measure and save; returns the figures of `metrics.json`."""
    rows, asked = data.load(cfg.data, "sft", cfg.seed), data.heldout_prompts(cfg)
    stage.check_rows(rows)
    from trl import SFTConfig, SFTTrainer

    from rlhf_recipes import evaluation, models
    from rlhf_recipes.backoff import back_off
    from rlhf_recipes.finite import StopAtNonFinite
    from rlhf_recipes.roles import POLICY

    args = build(SFTConfig, cfg.training, **stage.arguments, **models.precision(cfg))
    tokenizer = models.load_tokenizer(cfg.model, rows.train)
    everything = args.completion_only_loss is False
    parts = {f"{name} rows": data.demonstrations(part, tokenizer, everything) for name, part in rows.parts.items()}
    texts = "text" in rows.train.column_names
    (train, test, asked), said = data.fit(parts | {"held-out prompts": asked}, tokenizer, args.max_length, texts)
    terminal.say(said)
    policy = models.new_adapter(models.load_base(cfg), cfg)
    stage.check_base(models.fingerprint(policy))

    trainer = SFTTrainer(policy, args, train_dataset=train, eval_dataset=test, processing_class=tokenizer)
    roles = models.thaw(policy, trunk=0)
    back_off(trainer)
    StopAtNonFinite(trainer)
    terminal.progress(trainer, "sft")
    stage.train(trainer)

    figures = {"loss": trainer.evaluate()["eval_loss"]} | evaluation.kept(trainer)
    changes = evaluation.changes(cfg, asked, roles, tokenizer, {"base": None, "sft": POLICY})
    log = trainer.state.log_history
    stage.finish(figures | changes.figures, save=trainer.save_model, samples=changes.samples, log=log)
    terminal.summary(stage, "SFT adapter", figures, changes)
    return figures | changes.figures


@recipe("sft")
def main(cfg: DictConfig) -> None:
    """Open the stage, and train unless it is finished."""
    with Stage.open(cfg, "sft", data_fingerprint=data.describe(cfg.data, "sft")) as stage:
        terminal.say(stage.message)
        if stage.state != "skip":
            train(cfg, stage)


if __name__ == "__main__":
    main()
