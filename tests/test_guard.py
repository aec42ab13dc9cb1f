"""The guard: a score that training does not see, when it has turned, what then happens, and who may not be guard."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from scipy.stats import ttest_rel

from rlhf_recipes import PPOConfig, PPOTrainer, guard, world
from rlhf_recipes.config import compose
from rlhf_recipes.errors import UserError
from rlhf_recipes.evaluation import Sample
from rlhf_recipes.guard.callback import Guard, watch
from rlhf_recipes.guard.scorer import Scorer
from rlhf_recipes.guard.turning import History, Point, critical
from rlhf_recipes.rewards import Rewards
from rlhf_recipes.roles import GUARD, POLICY, REWARD, VALUE, Roles

# ---- the decision, on figures alone


def evaluations(means, noise=0.3, prompts=200, rewards=None, objectives=None, seed=0, tolerance=0.0, effects=0.0):
    """The turns of a history of these mean scores, where each policy differs by prompt (`effects`: deviation)."""
    draw = np.random.default_rng(seed)
    history = History(len(means), tolerance)
    hard = draw.normal(size=prompts)  # some prompts score low, always
    turns = []
    for i, mean in enumerate(means):
        scores = mean + hard + draw.normal(scale=effects, size=prompts) + draw.normal(scale=noise, size=prompts)
        reward = float(i) if rewards is None else rewards[i]
        objective = None if objectives is None else objectives[i]
        point = Point(i, 0.1 * i, reward, float(scores.mean()), objective)
        turns.append(history.add(point, scores.tolist()))
    return turns, history


def test_a_fall_is_told_with_the_best_evaluation_and_how_far_it_is():
    turns, history = evaluations([0, 0.5, 1, 0.4])
    assert turns[:3] == [None] * 3
    turn = turns[3]
    assert (turn.best.step, turn.now.step, turn.stops) == (2, 3, True)
    assert turn.fall == pytest.approx(history.points[2].score - history.points[3].score)
    assert 0.4 < turn.surely < turn.fall


def test_the_bound_is_that_of_the_paired_differences_over_prompts():
    before, now = np.random.default_rng(1).normal([[1.0], [0.0]], 0.5, size=(2, 50))
    history = History(2)
    history.add(Point(0, 0, 0, before.mean()), before.tolist())
    turn = history.add(Point(1, 0, 1, now.mean()), now.tolist())
    assert turn.fall == pytest.approx((before - now).mean())
    assert turn.surely == pytest.approx(ttest_rel(before, now).confidence_interval(0.9).low)  # one-sided: 95%


def test_what_is_hard_for_both_does_not_hide_a_fall():
    # the prompts differ by 1, the fall is 0.15: in means alone it would be within the noise
    assert evaluations([1, 0.85], noise=0.2)[0][1] is not None


def test_a_fall_within_the_tolerance_is_none():
    assert evaluations([1, 0.85], noise=0.1, tolerance=0.2)[0][1] is None
    assert evaluations([1, 0.85], noise=0.1, tolerance=0.1)[0][1] is not None


@pytest.mark.parametrize("prompts", [8, 50])
@pytest.mark.parametrize("effects", [0.0, 0.3])
def test_a_plateau_fires_in_no_more_than_one_training_of_twenty_however_policies_differ_by_prompt(prompts, effects):
    fired = [any(evaluations([0] * 20, 0.1, prompts, effects=effects, seed=seed)[0]) for seed in range(400)]
    assert sum(fired) <= 0.05 * 400


def test_a_rise_and_a_plateau_after_it_fire_in_no_more_than_one_of_twenty():
    rising = [min(1.0, 0.1 * i) for i in range(30)]
    assert sum(any(evaluations(rising, prompts=50, seed=seed)[0]) for seed in range(100)) <= 5


def test_a_fall_of_a_tenth_is_seen_in_nine_trainings_of_ten():
    turned = [0, 0.1, 0.2, 0.2, 0.2, 0.15, 0.1, 0.1, 0.1, 0.1]
    seen = [any(evaluations(turned, 0.15, 192, effects=0.16, seed=seed)[0]) for seed in range(100)]
    assert sum(seen) >= 90


def test_more_looks_and_fewer_prompts_ask_for_more():
    """All pairs share one error of 5%: 1 for two looks, 3 for three, 105 for fifteen."""
    assert [round(critical(n, 10**6), 2) for n in (1, 2, 3, 15)] == [1.64, 1.64, 2.13, 3.30]
    assert critical(2, 31) == pytest.approx(1.6973, abs=5e-5)  # of a table of Student's t, 30 degrees of freedom
    assert critical(2, 8) == pytest.approx(1.8946, abs=5e-5)  # 7


def test_where_the_training_reward_falls_too_it_is_no_over_optimization():
    assert evaluations([1, 0.0], rewards=[1.0, 0.9])[0] == [None, None]
    assert evaluations([1, 0.0], rewards=[1.0, 1.0])[0][1] is not None
    assert evaluations([1, 0.0], rewards=[None, None])[0][1] is not None  # no such figure: the score alone decides


def test_where_the_reward_does_not_pay_for_its_kl_the_turn_is_told_and_does_not_stop():
    for objective, stops in ((0.8, False), (0.9, True), (None, True)):
        assert evaluations([1, 0.0], objectives=[0.9, objective])[0][1].stops is stops


def test_a_score_that_collapses_while_the_objective_falls_is_not_passed_over():
    """Gold falls by .3 a look while the reward rises by .03 and the KL by half a nat, at beta .1."""
    looks = range(6)
    found = evaluations(
        [-0.3 * i for i in looks], rewards=[0.03 * i for i in looks], objectives=[-0.02 * i for i in looks]
    )
    assert [turn is not None for turn in found[0]] == [False, *[True] * 5]
    assert not any(turn.stops for turn in found[0] if turn)


def test_a_prompt_without_a_score_is_left_out_of_the_pairs():
    before, now = [1.0, None, 1.0, *[1.1] * 7], [0.0, 5.0, None, *[0.0, 0.1] * 3, 0.0]
    history = History(2)
    history.add(Point(0, 0, 0, 1.0), before)
    turn = history.add(Point(1, 0, 1, 0.0), now)
    assert turn.fall == pytest.approx((1.0 + 7 * 1.1 - 3 * 0.1) / 8)


def test_fewer_than_8_prompts_prove_nothing():
    for prompts, fires in ((1, False), (7, False), (8, True)):
        assert (evaluations([10, 0.0], prompts=prompts)[0][1] is not None) is fires


def test_a_history_survives_json():
    _, history = evaluations([0, 1, 0.5])
    assert History.from_state(json.loads(json.dumps(history.state()))) == history


# ---- who may be guard


def config(recipe, *overrides):
    return compose(recipe, list(overrides))


def reward_model(folder, seed, accuracy=0.7):
    """A folder with what a reward model's recipe leaves, as far as it is read before a model is loaded."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_text(f"weights of seed {seed}")
    (folder / "metrics.json").write_text(json.dumps({"accuracy": [accuracy, 0.02], "pairs": 2000}))
    return folder


def refused(cfg, run_model=None):
    with pytest.raises(UserError) as error:
        guard.from_config(cfg, run_model)
    return str(error.value)


@pytest.mark.parametrize("recipe", ["dpo", "ppo"])
def test_there_is_no_guard_unless_asked_for(recipe):
    assert guard.from_config(config(recipe), None) is None


@pytest.mark.parametrize("recipe", ["dpo", "ppo"])
def test_a_guard_keeps_the_checkpoint_that_its_scorer_thinks_best_of(recipe):
    training = config(recipe, "guard=gold").training
    assert (training.metric_for_best_model, training.load_best_model_at_end) == ("guard", True)
    assert training.eval_steps == training.save_steps


def test_gold_scores_as_the_world_does():
    scorer = guard.from_config(config("ppo", "guard=gold"), None)
    prompt = world.prompts(0)["test"][0]["prompt"]
    made = [Sample(prompt, text, [], [1]) for text in ("I do not know.", "No")]
    assert scorer.scores(None, None, made, 8) == [world.gold(prompt, s.completion).score for s in made]


def test_gold_is_refused_for_other_data():
    own = [f"data.{part}.path=x.jsonl" for part in ("sft", "preferences", "prompts")]
    assert "knows the embedded world alone" in refused(config("ppo", "guard=gold", "data=files", *own))


def test_a_guard_without_prompts_is_refused():
    cfg = config("dpo", "guard=function", "guard.functions=[math:sqrt]", "data=files", "data.preferences.path=x.jsonl")
    assert "set data.prompts.path=" in refused(cfg)


def test_the_reward_model_that_ppo_optimizes_is_refused_as_its_guard(tmp_path):
    model, copy = reward_model(tmp_path / "rm", 0), reward_model(tmp_path / "copy", 0)
    for named in ("run", str(model), str(copy)):
        cfg = config("ppo", "guard=reward_model", f"guard.model={named}")
        message = refused(cfg, model)
        assert (
            f"is {model} of reward.model, which PPO optimizes: its score rises whatever the answers become" in message
        )
        assert "python -m recipes.rm -m run=<run> seed=8,9" in message


def test_a_member_of_the_optimized_ensemble_is_refused_and_another_seed_is_not(tmp_path):
    members = [reward_model(tmp_path / f"seed={seed}", seed) for seed in (0, 1, 2)]
    guarded = "guard=reward_model", f"guard.model={tmp_path}/seed=*"
    assert "seed=1 of reward.model" in refused(config("ppo", *guarded, f"reward.model='{members[1]}'"))
    other = reward_model(tmp_path / "other" / "rm", 3)
    found = guard.from_config(config("ppo", *guarded, f"reward.model={other}"), None)
    assert found.sources.adapters == members


def test_the_same_function_and_the_same_address_are_refused(tmp_path, monkeypatch):
    (tmp_path / "r.py").write_text("def f(completions, **kwargs):\n    return [0.0] * len(completions)\n")
    monkeypatch.chdir(tmp_path)
    sources = "{s}.functions=[r.py:f]", "{s}.url=http://localhost:1"
    both = [text.format(s=section) for section in ("reward", "guard") for text in sources]
    cfg = config("ppo", "reward=function", "guard=function", *both)
    message = refused(cfg)
    assert "guard.functions: r.py:f is r.py:f of reward.functions, which PPO optimizes" in message
    assert "guard.url: http://localhost:1 is http://localhost:1 of reward.url, which PPO optimizes" in message


def test_a_classifier_of_its_own_is_refused_with_the_way_round():
    assert "use guard=url" in refused(config("ppo", "guard=reward_model", "guard.model=org/rm"))


def test_a_guard_at_chance_is_refused(tmp_path):
    model = reward_model(tmp_path / "rm", 0, accuracy=0.5)
    message = refused(config("dpo", "guard=reward_model", f"guard.model={model}"))
    assert "not surely above 0.5" in message and "guard.min_accuracy=0" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["guard=gold", "training.eval_strategy=no"], "it looks at every evaluation, and there are none"),
        (["guard=gold", "guard.prompts=7"], "guard.prompts=7: at least 8"),
        (["guard=gold", "guard.samples=0"], "guard.samples=0: at least 1"),
        (["guard=reward_model"], "guard.model: no value"),
        (["guard=url"], "guard.url: no value"),
    ],
)
def test_a_guard_that_cannot_work_is_refused_in_a_second(overrides, message):
    with pytest.raises(UserError, match=message):
        config("ppo", *overrides)


# ---- at work


def much_w3(completions, **kwargs):
    return [float(completion.split().count("w3")) for completion in completions]


def little_w3(completions, **kwargs):
    """The truth: up to one is fine, each more is worse."""
    return [-max(0.0, count - 1) for count in much_w3(completions)]


@pytest.fixture
def train(tmp_path, tiny_policy, tokenizer, prompts):
    """A function that trains on a reward which the unseen score is against, under a guard, and gives both."""

    def make(
        name="out",
        functions=(little_w3,),
        adapters=(),
        stop=False,
        resume=None,
        guarded=True,
        still=0.0,
        asked=64,
        **args,
    ):
        defaults = {
            "output_dir": str(tmp_path / name), "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2,
            "steps_per_generation": 2, "kl_budget": None,
            "max_completion_length": 8, "max_steps": 16, "learning_rate": 2e-2, "value_learning_rate": 1e-2,
            "lr_scheduler_type": "constant", "beta": 0.0, "bf16": False,
            "use_cpu": True, "report_to": "none", "logging_steps": 1, "gradient_checkpointing": False,
            "disable_tqdm": True, "eval_strategy": "steps", "eval_on_start": True, "eval_steps": 2, "save_steps": 2,
            "save_total_limit": 1, "load_best_model_at_end": True, "greater_is_better": True,
            "metric_for_best_model": "guard" if guarded else "reward",
        }  # fmt: skip
        section = {"prompts": 64, "samples": 4, "stop": stop, "tolerance": 0.0, "root_kl_step": still}
        section |= {"ensemble": "mean", "spread_coef": 1.0}
        answers = {"max_new_tokens": 8, "batch_size": 64}
        cfg = OmegaConf.create({"seed": 0, "guard": section, "evaluation": answers})
        trainer = PPOTrainer(
            tiny_policy(), much_w3, PPOConfig(**defaults | args), prompts, prompts.select(range(8)), tokenizer
        )
        count = len(functions) + bool(adapters)
        sources = Rewards(list(adapters), list(functions), [1.0] * count, [*map(str, range(count))])
        watched = watch(
            trainer, trainer.roles, tokenizer, cfg, Scorer("few w3", sources, cfg.guard) if guarded else None
        )
        watched.prompts = prompts.select(range(asked))
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / resume))
        return trainer, watched

    return make


def weights(trainer):
    held = {f"{a}/{n}": p.detach().clone() for a in (POLICY, VALUE) for n, p in trainer.roles.parameters(a).items()}
    return held | {"head": trainer.roles.heads[VALUE].weight.detach().clone()}


def equal(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def steps(trainer):
    return [entry["step"] for entry in trainer.state.log_history if "eval_guard" in entry]


def test_over_optimization_is_told_once_with_its_figures_and_the_best_checkpoint_is_kept(train, caplog):
    trainer, watched = train()
    points = {point.step: point for point in watched.history.points}
    assert [*points] == steps(trainer) == [*range(0, 18, 2)]
    best = max(points.values(), key=lambda point: point.score)
    assert points[16].reward > points[0].reward and points[16].score < best.score  # it was hacked
    told = [record.message for record in caplog.records if "over-optimization" in record.message]
    assert told == [watched.warning]
    now = int(watched.warning.split("at step ")[1].split(":")[0])
    for figure in (best.score, points[now].score, best.reward, points[now].reward, points[now].kl):
        assert f"{figure:.3g}" in watched.warning
    assert "guard.stop=true stops here" in watched.warning and "training.beta=0.1" in watched.warning
    assert trainer.state.global_step == 16 and watched.stop_reason is None
    later = [point for point in points.values() if point.step]
    kept = max(later, key=lambda point: point.score)
    assert trainer.state.best_metric == kept.score
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{kept.step}")


def test_stop_ends_training_at_the_turn_with_the_best_checkpoint(train, tmp_path):
    trainer, watched = train(stop=True)
    turned = trainer.state.global_step
    assert turned < 16 and watched.history.points[-1].step == turned
    assert watched.stop_reason == watched.warning and "Stopped." in watched.warning
    from rlhf_recipes.roles import read_adapter

    saved = read_adapter(tmp_path / "out" / trainer.state.best_model_checkpoint.rsplit("/")[-1])
    assert equal(saved, trainer.roles.parameters(POLICY))


@pytest.mark.parametrize("stop", [False, True])
def test_a_turn_that_does_not_pay_for_its_kl_is_told_and_a_later_one_that_does_may_stop(stop, caplog):
    """The score falls at step 1, where the objective falls too, and stays low at step 2, where the objective rises."""
    cfg = OmegaConf.create({"tolerance": 0.0, "root_kl_step": 0.0, "stop": stop})
    watched = Guard(SimpleNamespace(log=lambda figures: None), None, None, None, Scorer("truth", Rewards(), cfg))
    watched.training, watched.history.looks = True, 3
    looks = [(1.0, 0.5), (0.0, 0.4), (0.0, 0.6)]
    stopped = []
    for step, (score, objective) in enumerate(looks):
        point = Point(step, 2.0 * step, 1.0, score, objective), (score + 0.01 * np.arange(9)).tolist()
        watched._measured = lambda *args, found=point: found
        state = SimpleNamespace(global_step=step, is_world_process_zero=True, eval_steps=1)
        control = SimpleNamespace(should_training_stop=False)
        args = SimpleNamespace(load_best_model_at_end=True, beta=0.1)
        watched.on_evaluate(args, state, control, {"eval_kl": 2.0 * step})
        stopped.append(control.should_training_stop)
        if step == 1:
            assert watched.figures == {"over_optimized": watched.warning} and watched.stop_reason is None
            assert "over-optimization at step 1" in watched.warning and "training goes on" in watched.warning
    assert stopped == [False, False, stop]
    assert "at step 2" in watched.warning and watched.stop_reason == (watched.warning if stop else None)
    assert sum("over-optimization" in record.message for record in caplog.records) == 2


def test_answers_without_a_score_are_left_out_and_training_goes_on(train, caplog):
    def partly(completions, **kwargs):
        return [[math.nan, None, math.inf, 1.0][i % 4] for i in range(len(completions))]

    _, watched = train(functions=(partly,), max_steps=2)
    assert [point.score for point in watched.history.points] == [1.0, 1.0]
    assert "128 scores are NaN or infinite, and left out" in caplog.text


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_a_guard_that_scores_nothing_stops_instead_of_being_the_best_with_0(train, nothing):
    with pytest.raises(UserError, match="none of the 256 completions at step 0 has a score"):
        train(functions=(lambda completions, **kwargs: [nothing] * len(completions),))


def test_a_guard_function_that_gives_too_few_scores_is_refused(train):
    with pytest.raises(UserError, match="1 scores for 256 completions"):
        train(functions=(lambda completions, **kwargs: [1.0],))


def test_a_guard_with_fewer_than_8_held_out_prompts_is_refused_before_training(train):
    with pytest.raises(UserError, match="7 held-out prompts are too few to tell a fall from noise; at least 8"):
        train(asked=7)


def test_training_under_a_guard_is_the_same_as_without(train):
    settings = {"max_steps": 4, "load_best_model_at_end": False}
    with_guard, _ = train("with", **settings)
    without, _ = train("without", guarded=False, **settings)
    assert equal(weights(with_guard), weights(without))


def test_a_resumed_guard_decides_as_one_that_was_not_broken_off(train):
    settings = {"save_total_limit": None}
    unbroken, watched = train("a", **settings)
    resumed, again = train("b", resume="a/checkpoint-4", **settings)
    assert again.history == watched.history
    assert again.warning == watched.warning and watched.warning is not None
    assert equal(weights(unbroken), weights(resumed))
    assert resumed.state.best_metric == unbroken.state.best_metric


def test_a_policy_that_has_hardly_moved_is_looked_at_in_every_second_evaluation(train):
    trainer, watched = train("a", still=1e9, max_steps=8)
    looks = {point.step: point for point in watched.history.points}
    assert [*looks] == steps(trainer) == [0, 4, 8]
    every = {point.step: point for point in train("b", max_steps=8)[1].history.points}
    assert all(every[step] == look for step, look in looks.items())
    assert looks[0].score > looks[8].score  # so that the best is not the last
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")  # as good as the start, for all that is known


def test_a_guard_that_stopped_stays_stopped_in_a_resume(train):
    stopped, watched = train("a", stop=True, save_total_limit=None)
    last = f"a/checkpoint-{stopped.state.global_step}"
    resumed, again = train("b", resume=last, stop=True, save_total_limit=None)
    assert again.stop_reason == watched.stop_reason
    assert resumed.state.global_step <= stopped.state.global_step + 1
    assert equal(weights(stopped), weights(resumed))


def test_reward_adapters_guard_as_roles_of_the_base_and_training_is_the_same(train, tiny_policy, tmp_path):
    folders = []
    for seed in (5, 6):
        roles = Roles(tiny_policy(), trunk=0.5)
        roles.add_copy(REWARD, POLICY)
        torch.manual_seed(seed)
        roles.add_head(REWARD, torch.randn(1, 32))
        roles.save_scalar(REWARD, tmp_path / f"rm{seed}")
        folders.append(tmp_path / f"rm{seed}")
    settings = {"max_steps": 4, "load_best_model_at_end": False}
    trainer, watched = train("adapters", functions=(), adapters=folders, **settings)
    assert trainer.roles.members(GUARD) == ["guard", "guard_1"]
    assert trainer.roles.trunk_layers == 2
    assert len({point.score for point in watched.history.points}) > 1
    without, _ = train("without", guarded=False, **settings)
    assert equal(weights(trainer), weights(without))


def test_every_evaluation_is_written_down(train, tmp_path):
    _, watched = train(max_steps=4)
    watched.save(tmp_path)
    written = json.loads((tmp_path / "guard.json").read_text())
    assert written["scorer"] == "few w3"
    assert [point["step"] for point in written["points"]] == [0, 2, 4]
    assert all(point.keys() == {"step", "kl", "reward", "score", "objective"} for point in written["points"])
    assert all(point["objective"] == point["reward"] for point in written["points"])  # beta is 0 here
