"""Around the reward model: what it reads, how well it agrees with its raters, and the scale of its scores."""

import copy
import json
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaForSequenceClassification

from rlhf_recipes import evaluation
from rlhf_recipes.config import compose
from rlhf_recipes.reward_model import agreement, measure_scale, pair_scores, tokenize
from rlhf_recipes.roles import HEAD_FILE, POLICY, REWARD, Roles

# ---- agreement with the raters


def scores_of(*margins):
    return torch.tensor(margins), torch.zeros(len(margins))


def test_accuracy_counts_ties_as_half_and_comes_with_its_interval():
    accuracy = agreement(*scores_of(2.0, 3.0, 0.0, -1.0))["accuracy"]
    assert accuracy == evaluation.rate([1, 1, 0.5, 0]).around_mean()
    assert accuracy.mean == 0.625


def test_the_margin_is_the_mean_difference_and_pairs_are_counted():
    figures = agreement(torch.tensor([1.0, 5.0]), torch.tensor([0.5, 6.0]))
    assert figures["margin"] == pytest.approx((0.5 - 1.0) / 2)
    assert figures["pairs"] == 2


def test_the_calibration_error_is_how_far_the_model_is_too_sure_in_each_bin():
    margins = [math.log(3.1), math.log(3.2), -math.log(3.3), -math.log(9.5), 0.0]
    # bins of width 1/20 from 1/2 on. Sure .7561, .7619, .7674 (one bin): right 2 of 3. Sure .9048 (another): wrong.
    # Sure .5 on a tie, which counts as half right: no error.
    sure = [m / (1 + m) for m in (3.1, 3.2, 3.3)]
    wanted = 3 / 5 * abs(2 / 3 - sum(sure) / 3) + 1 / 5 * 9.5 / 10.5
    assert agreement(*scores_of(*margins))["calibration_error"] == pytest.approx(wanted, rel=1e-5)


def test_too_little_sure_is_as_wrong_as_too_sure():
    assert agreement(*scores_of(*[math.log(4)] * 10))["calibration_error"] == pytest.approx(0.2)  # sure .8, right 1
    half = [math.log(4)] * 5 + [-math.log(4)] * 5
    assert agreement(*scores_of(*half))["calibration_error"] == pytest.approx(0.3)  # sure .8, right .5


def test_a_model_that_is_sure_and_right_is_calibrated():
    figures = agreement(*scores_of(50.0, 60.0, 70.0))
    assert figures["accuracy"].mean == 1 and figures["calibration_error"] == pytest.approx(0)


# ---- what it reads


def test_a_chat_pair_is_rendered_as_a_rollout_without_the_templates_newline_after_eos(chatml):
    question = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "sky?"}]
    pairs = Dataset.from_list(
        [
            {
                "prompt": question,
                "chosen": [{"role": "assistant", "content": "blue"}],
                "rejected": [{"role": "assistant", "content": "It is green."}],
            }
        ]
    )
    row = tokenize(pairs, chatml)[0]
    opening = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nsky?<|im_end|>\n<|im_start|>assistant\n"
    assert chatml.pad_token_id == chatml.eos_token_id
    assert chatml.decode(row["chosen_ids"]) == opening + "blue<|im_end|>"
    assert chatml.decode(row["rejected_ids"]) == opening + "It is green.<|im_end|>"
    assert row["chosen_ids"] == chatml(opening + "blue<|im_end|>")["input_ids"]
    assert row["chosen_ids"][-2:] == [chatml("e")["input_ids"][0], chatml.eos_token_id]  # one EOS, at the end


def test_a_plain_pair_is_prompt_answer_and_one_eos(tokenizer):
    row = tokenize(Dataset.from_list([{"prompt": "w1 w2", "chosen": " w3", "rejected": " w4 w5"}]), tokenizer)[0]
    # <pad> <eos> <unk> are 0 to 2, w0 is 3
    assert (row["chosen_ids"], row["rejected_ids"]) == ([4, 5, 6, 1], [4, 5, 7, 8, 1])


def test_the_prompts_part_is_what_a_rollout_starts_from(chatml, tokenizer):
    from rlhf_recipes.data.formats import render_prompt

    chat = {"prompt": [{"role": "user", "content": "sky?"}]}
    plain = {"prompt": "w1 w2"}
    for row, answers, tok in (
        (chat, ([{"role": "assistant", "content": "blue"}], [{"role": "assistant", "content": "green"}]), chatml),
        (plain, (" w3", " w4"), tokenizer),
    ):
        pair = row | dict(zip(("chosen", "rejected"), answers, strict=True))
        prompt_ids = render_prompt(row, tok)
        for ids in tokenize(Dataset.from_list([pair]), tok).select_columns(["chosen_ids", "rejected_ids"])[0].values():
            assert ids[: len(prompt_ids)] == prompt_ids and ids[-1] == tok.eos_token_id
            assert tok.eos_token_id not in ids[len(prompt_ids) : -1]


def test_margins_stay_with_their_pairs(tokenizer):
    rows = [{"prompt": "w1", "chosen": " w3", "rejected": " w4", "margin": 0.5}]
    assert tokenize(Dataset.from_list(rows), tokenizer)[0]["margin"] == 0.5


# ---- scores


@pytest.fixture
def classifier(tiny_llama):
    base = tiny_llama()
    base.config.num_labels = 1
    torch.manual_seed(3)
    model = LlamaForSequenceClassification(base.config)
    model.model.load_state_dict(base.model.state_dict())
    config = LoraConfig(
        r=4, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"], init_lora_weights=False
    )
    return get_peft_model(model, config)


@pytest.fixture
def pairs(tokenizer):
    rows = [
        {"prompt": f"w{i} w{i + 1}", "chosen": " w3" * (i % 4 + 1), "rejected": " w7 w8" * (i % 3 + 1)}
        for i in range(10)
    ]
    return tokenize(Dataset.from_list(rows), tokenizer)


def test_pair_scores_are_the_models_own_of_each_row_without_padding(classifier, pairs, tokenizer):
    found = pair_scores(classifier, pairs, tokenizer, batch_size=4)
    for key, scores in zip(("chosen_ids", "rejected_ids"), found, strict=True):
        alone = [classifier(input_ids=torch.tensor([ids])).logits.item() for ids in pairs[key]]
        assert len(set(alone)) > 3
        assert scores.tolist() == pytest.approx(alone, rel=1e-3, abs=1e-5)


def test_an_answer_that_stands_in_several_pairs_is_scored_once(classifier, tokenizer):
    best, middle, worst = [3, 4, 1], [5, 1], [6, 7, 8, 1]
    ranked = [(best, middle), (best, worst), (middle, worst)]
    pairs = Dataset.from_list([{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in ranked])
    rows = []
    classifier.register_forward_hook(lambda m, args, kwargs, out: rows.append(len(out.logits)), with_kwargs=True)
    chosen, rejected = pair_scores(classifier, pairs, tokenizer, batch_size=2)
    assert sum(rows) == 3
    assert chosen[0] == chosen[1] and rejected[1] == rejected[2] and rejected[0] == chosen[2]


def test_the_score_is_read_before_the_eos_where_the_pad_is_the_eos(classifier, pairs, tokenizer):
    """As in SmolLM2: training, these figures and PPO must read the same place."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    classifier.config.pad_token_id = tokenizer.pad_token_id  # as RewardTrainer sets it
    chosen, _ = pair_scores(classifier, pairs, tokenizer, batch_size=4)
    with torch.no_grad():
        bare = classifier.get_base_model()
        alone = [
            bare.score(bare.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -2]).item()
            for ids in pairs["chosen_ids"]
        ]
    assert chosen.tolist() == pytest.approx(alone, rel=1e-3, abs=1e-5)


def test_the_score_depends_on_whether_an_answer_ends_where_the_pad_is_another_token(classifier, tokenizer):
    """Which every tokenizer of a recipe sees to that can: with the EOS as pad both scores are the same."""
    classifier.config.pad_token_id = tokenizer.pad_token_id
    ids = Dataset.from_list([{"chosen_ids": [5, 6, 7, tokenizer.eos_token_id], "rejected_ids": [5, 6, 7]}])
    ended, cut = pair_scores(classifier, ids, tokenizer, batch_size=4)
    assert (ended - cut).abs().item() > 1e-3


def test_accuracy_and_margin_are_those_that_trl_finds(classifier, pairs, tokenizer, tmp_path):
    from trl import RewardConfig, RewardTrainer

    args = RewardConfig(
        str(tmp_path), per_device_eval_batch_size=5, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True
    )
    trainer = RewardTrainer(classifier, args, train_dataset=pairs, eval_dataset=pairs, processing_class=tokenizer)
    assert trainer.train_dataset["chosen_ids"] == pairs["chosen_ids"]
    evaluated = trainer.evaluate()
    figures = agreement(*pair_scores(classifier, pairs, tokenizer, batch_size=3))
    assert figures["accuracy"].mean == pytest.approx(evaluated["eval_accuracy"])
    assert figures["margin"] == pytest.approx(evaluated["eval_margin"], rel=1e-4)


# ---- scale


@pytest.fixture
def saved(tiny_policy, tmp_path):
    """Folder of a reward model whose scores are far from mean 0 and spread 1."""
    roles = Roles(tiny_policy(), trunk=0.5)
    roles.add_copy(REWARD, POLICY)
    torch.manual_seed(5)
    roles.add_head(REWARD, torch.randn(1, 32) * 3)
    for parameter in roles.layer_parameters(REWARD, roles.layers[2:]).values():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    roles.save_scalar(REWARD, tmp_path / "rm")
    (tmp_path / "rm" / HEAD_FILE).unlink()  # as RewardTrainer saves it
    return tmp_path / "rm"


@pytest.fixture
def asked(prompts):
    """64 prompts, each of them in two pairs."""
    return Dataset.from_dict({"prompt": [*prompts["prompt"]] * 2})


def test_rewards_on_the_samples_that_the_scale_was_measured_on_have_mean_0_and_spread_1(
    saved, tiny_policy, tokenizer, asked
):
    cfg = compose("rm", ["evaluation.max_new_tokens=8", "evaluation.batch_size=16"])
    scale = measure_scale(cfg, tiny_policy(), tokenizer, asked, saved)
    assert json.loads((saved / HEAD_FILE).read_text()) == scale
    assert scale["std"] > 2 and abs(scale["mean"]) > 0.1

    roles = Roles(tiny_policy(), trunk=0)
    roles.add_copy(REWARD, POLICY)
    roles.load(REWARD, saved)
    once = list(dict.fromkeys(asked.shuffle(seed=cfg.seed)["prompt"]))
    made = evaluation.sample(
        roles.model, tokenizer, [{"prompt": p} for p in once], samples=1, max_new_tokens=8, batch_size=16, seed=cfg.seed
    )
    assert len(made) == 64
    scores = torch.tensor(evaluation.rewards(roles, tokenizer, made, 16))
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std().item() == pytest.approx(1, rel=1e-4)


def test_conversations_are_sampled_as_conversations(saved, tiny_policy, tokenizer):
    chats = Dataset.from_list([{"prompt": [{"role": "user", "content": f"w{i}"}]} for i in range(20)])
    tokenizer.chat_template = "{% for m in messages %}w1 {{ m.content }} {% endfor %}"
    try:
        cfg = compose("rm", ["evaluation.max_new_tokens=4"])
        assert measure_scale(cfg, tiny_policy(), tokenizer, chats, saved)["std"] > 0.1
    finally:
        tokenizer.chat_template = None


def test_a_reward_model_that_scores_all_alike_still_has_a_scale_to_divide_by(tiny_policy, tokenizer, asked, tmp_path):
    roles = Roles(tiny_policy(), trunk=0)
    roles.add_copy(REWARD, POLICY)
    roles.add_head(REWARD)  # zeros
    roles.save_scalar(REWARD, tmp_path)
    (tmp_path / HEAD_FILE).unlink()
    scale = measure_scale(compose("rm", ["evaluation.max_new_tokens=2"]), tiny_policy(), tokenizer, asked, tmp_path)
    assert scale["mean"] == 0 and 0 < scale["std"] < 1e-3


def scored(n=400):
    """Scores of pairs whose better answer wins the more often, the wider the margin."""
    draw = torch.Generator().manual_seed(3)
    margin = torch.randn(n, generator=draw)
    wins = torch.rand(n, generator=draw) < torch.sigmoid(2 * margin.abs())
    chosen = torch.where(wins, margin.abs(), -margin.abs())
    return chosen, torch.zeros(n)


def test_the_reliability_and_its_error_are_those_of_scikit_learn():
    from sklearn.calibration import calibration_curve

    chosen, rejected = scored()
    figures = agreement(chosen, rejected)
    sure = torch.sigmoid(chosen.abs()).double()
    right = (chosen > 0).numpy()
    # its bins are those of [0, 1]; ours are of [0.5, 1], since a model is never less sure than a coin
    true, confidence = calibration_curve(right, (2 * sure - 1).numpy(), n_bins=10)
    assert [b["accuracy"] for b in figures["reliability"]] == pytest.approx(true.tolist())
    assert [b["confidence"] for b in figures["reliability"]] == pytest.approx(((confidence + 1) / 2).tolist(), abs=1e-5)
    weights = [b["pairs"] / len(chosen) for b in figures["reliability"]]
    error = sum(w * abs(t - (c + 1) / 2) for w, t, c in zip(weights, true, confidence, strict=True))
    assert sum(weights) == pytest.approx(1) and figures["calibration_error"] == pytest.approx(error, abs=1e-5)


def test_the_accuracy_where_the_better_answer_is_shorter_by_hand():
    """Chosen is shorter in the first three pairs, of which one is ordered right and one is a tie: 1.5 of 3."""
    chosen, rejected = torch.tensor([1.0, 0.0, 2.0, 5.0]), torch.tensor([2.0, 0.0, 1.0, 0.0])
    figures = agreement(chosen, rejected, longer=torch.tensor([-1, -4, -2, 3]))
    assert figures["when_shorter"][0] == pytest.approx(0.5)
    assert figures["accuracy"][0] == pytest.approx(2.5 / 4)
    assert "when_shorter" not in agreement(chosen, rejected, longer=torch.tensor([0, 1, 2, 3]))
