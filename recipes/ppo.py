"""PPO: the SFT policy improved against a reward, under a KL penalty to where it started.

    make sft rm ppo
    make ppo ARGS="run=mine model=qwen2.5-0.5b" PPO_ARGS="training.beta=0.1 training.kl_target=6"
    make ppo PPO_ARGS="reward=function 'reward.functions=[rewards.py:brevity]'"

Policy, reference, reward and value are adapters on one base, over one trunk (rlhf_recipes/roles.py). An iteration is
one rollout batch; `training.max_steps` counts optimizer steps.
"""

from omegaconf import DictConfig

from rlhf_recipes import data, guard, rewards, terminal
from rlhf_recipes.config import build, recipe
from rlhf_recipes.plan.shortage import told_when_full
from rlhf_recipes.runs import Stage


@told_when_full
def train(cfg: DictConfig, stage: Stage) -> dict[str, object]:
    """Train, measure and save; returns the figures of `metrics.json`."""
    reward = rewards.from_config(cfg.reward, stage.adapter("rm"))
    unseen = guard.from_config(cfg, stage.adapter("rm"))
    rows = data.load(cfg.data, "prompts", cfg.seed)
    asked = data.heldout_prompts(cfg, rows.test)
    taught = data.load(cfg.data, "sft", cfg.seed) if "ptx_coef" in cfg.training else None
    stage.check_rows(rows, taught)
    from rlhf_recipes import PPOConfig, PPOTrainer, evaluation, models
    from rlhf_recipes.guard.callback import watch
    from rlhf_recipes.roles import POLICY, REFERENCE

    layers = {"trunk": cfg.trunk, "frozen_top": cfg.frozen_top}
    ensemble = {"reward_ensemble": cfg.reward.ensemble, "reward_spread_coef": cfg.reward.spread_coef}
    set_here = stage.arguments | {"reward_weights": reward.weights}
    args = build(PPOConfig, cfg.training, **layers, **ensemble, **set_here, **models.precision(cfg))
    data.check_batch(len(rows.train), args.prompts_per_iteration)
    tokenizer = models.load_tokenizer(cfg.model, rows.train)
    policy = models.load_policy(cfg, stage.adapter("sft"))
    stage.check_base(models.fingerprint(policy))

    trainer = PPOTrainer(
        *(policy, reward.functions, args, rows.train, asked, tokenizer),
        reward_adapter=reward.adapters,
        ptx_dataset=taught.train if taught else None,
    )
    watched = watch(trainer, trainer.roles, tokenizer, cfg, unseen)
    terminal.progress(trainer, "ppo")
    stage.train(trainer)

    watched.save(stage.saving)
    best = {args.metric_for_best_model: trainer.state.best_metric}
    best |= evaluation.kept(trainer)
    figures = best | {"stopped": trainer.stop_reason or watched.stop_reason} | watched.figures
    figures |= {"self_test": trainer.self_test_at_start}
    reward.functions = trainer.reward_funcs[bool(reward.adapters) :]  # classifiers as they are loaded
    compared = {cfg.start: REFERENCE, "ppo": POLICY}
    changes = evaluation.changes(cfg, asked, trainer.roles, tokenizer, compared, reward)
    log = trainer.state.log_history
    stage.finish(figures | changes.figures, save=trainer.save_model, samples=changes.samples, log=log)
    terminal.summary(stage, "PPO adapter and critic", figures, changes)
    return figures | changes.figures


@recipe("ppo")
def main(cfg: DictConfig) -> None:
    """Open the stage, and train unless it is finished."""
    models = rewards.named_models(cfg.reward.model) + rewards.named_models(cfg.guard.model)
    before = ["sft"] * (cfg.start == "sft") + ["rm"] * ("run" in models)
    parts = ["prompts"] + ["sft"] * ("ptx_coef" in cfg.training)
    read = {part: data.describe(cfg.data, part) for part in parts}
    with Stage.open(cfg, "ppo", predecessors=before, others=rewards.folders(models), data_fingerprint=read) as stage:
        terminal.say(stage.message)
        if stage.state != "skip":
            train(cfg, stage)


if __name__ == "__main__":
    main()
