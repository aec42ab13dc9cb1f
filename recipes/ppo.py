"""PPO: the SFT policy improved against a reward, under a KL penalty to where it started.

    make sft rm ppo
    make ppo ARGS="run=mine model=qwen2.5-0.5b" PPO_ARGS="training.beta=0.1 training.kl_target=6"
    make ppo PPO_ARGS="reward=function 'reward.functions=[rewards.py:brevity]'"

Policy, reference, reward and value are adapters on one base, over one trunk (rlhf_recipes/roles.py). An iteration is
one rollout batch; `training.max_steps` counts optimizer steps.
"""

from omegaconf import DictConfig

from rlhf_recipes import data, rewards, terminal
from rlhf_recipes.config import build, recipe
from rlhf_recipes.runs import Stage


def train(cfg: DictConfig, stage: Stage) -> dict[str, object]:
    """Train, measure and save; returns the figures of `metrics.json`."""
    reward = rewards.from_config(cfg.reward, stage.adapter("rm"))
    rows = data.load(cfg.data, "prompts", cfg.seed)
    asked = data.heldout_prompts(cfg, rows.test)
    taught = data.load(cfg.data, "sft", cfg.seed).train if "ptx_coef" in cfg.training else None
    from rlhf_recipes import PPOConfig, PPOTrainer, evaluation, models
    from rlhf_recipes.roles import POLICY, REFERENCE

    layers = {"trunk": cfg.trunk, "frozen_top": cfg.frozen_top}
    set_here = stage.arguments | {"reward_weights": reward.weights}
    args = build(PPOConfig, cfg.training, **layers, **set_here, **models.precision(cfg))
    data.check_batch(len(rows.train), args.generation_batch_size)
    tokenizer = models.load_tokenizer(cfg.model, rows.train)
    policy = models.load_policy(cfg, stage.adapter("sft"))
    stage.check_base(models.fingerprint(policy))

    trainer = PPOTrainer(
        policy, reward.functions, args, rows.train, asked, tokenizer, reward_adapter=reward.adapter, ptx_dataset=taught
    )
    terminal.progress(trainer, "ppo")
    trainer.train(resume_from_checkpoint=stage.resume_from)

    figures = {"objective": trainer.state.best_metric, "stopped": trainer.stop_reason}
    changes = evaluation.changes(cfg, asked, trainer.roles, tokenizer, {cfg.start: REFERENCE, "ppo": POLICY})
    log = trainer.state.log_history
    stage.finish(figures | changes.figures, save=trainer.save_model, samples=changes.samples, log=log)
    terminal.summary(stage, "PPO adapter and critic", figures, changes)
    return figures | changes.figures


@recipe("ppo")
def main(cfg: DictConfig) -> None:
    """Open the stage, and train unless it is finished."""
    before = ["sft"] * (cfg.start == "sft") + ["rm"] * (cfg.reward.model == "run")
    parts = ["prompts"] + ["sft"] * ("ptx_coef" in cfg.training)
    read = {part: data.describe(cfg.data, part) for part in parts}
    with Stage.open(cfg, "ppo", predecessors=before, data_fingerprint=read) as stage:
        terminal.say(stage.message)
        if stage.state != "skip":
            train(cfg, stage)


if __name__ == "__main__":
    main()
