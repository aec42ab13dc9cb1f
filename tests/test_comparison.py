"""What `make eval` is made of: win rates and text measures against oracles, judges against a real server."""

import functools
import json
import math
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from judge_server import prefers, serving
from nltk.util import ngrams as nltk_ngrams
from scipy.stats import binomtest, bootstrap
from sklearn.linear_model import LogisticRegression
from transformers import AutoTokenizer

from rlhf_recipes import rewards, world
from rlhf_recipes.comparison import asking, findings, harness, judges, policies, reward_bench, texts, wins
from rlhf_recipes.comparison.answers import Answers, RunModels, _drawn_alone, _key, _rewards
from rlhf_recipes.config import compose
from rlhf_recipes.errors import UserError
from rlhf_recipes.evaluation import Sample

# ---- texts


def test_distinct_n_by_hand():
    """the cat the cat: 4 words, 2 different; 3 bigrams (the cat, cat the, the cat), 2 different."""
    assert texts.distinct(["the cat the cat"], 1) == 2 / 4
    assert texts.distinct(["The cat, the cat!"], 2) == 2 / 3
    assert texts.distinct(["a b", "a b", "b a"], 2) == 2 / 3
    assert texts.distinct(["", "one"], 2) == 0


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_n_agrees_with_nltk(n):
    made = [row["completion"] for row in world.demonstrations()["train"][:50]]
    grams = [gram for text in made for gram in nltk_ngrams(texts.words(text), n)]
    assert 0 < texts.distinct(made, n) < 1
    assert texts.distinct(made, n) == len(set(grams)) / len(grams)


def test_self_repetition_is_the_share_of_4_grams_that_were_there_before():
    """a b c d a b c d: abcd bcda cdab dabc abcd, one of five was there."""
    assert texts.self_repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert texts.self_repetition("a b c d e") == texts.self_repetition("a b c") == 0
    assert texts.self_repetition("no " * 8) == pytest.approx(4 / 5)


def test_refusals_are_told_by_their_phrases():
    declined = [
        "I can't help with that.",
        "I\u2019m sorry, but no.",
        "I will not help: it would be wrong.",
        "As an AI, ...",
    ]
    helped = ["You can open it so.", "I know the answer.", "Sorry seems to be the hardest word", ""]
    assert [texts.refuses(t) for t in declined] == [True] * 4
    assert [texts.refuses(t) for t in helped] == [False] * 4


# ---- win rates


def test_a_tie_is_half_a_win_and_a_failed_comparison_counts_neither_way():
    assert wins.win_rate([1, 0.5, 0, 0], 1).mean == pytest.approx(1.5 / 4)
    assert wins.win_rate([1, None, None, 0.5], 1).mean == pytest.approx(1.5 / 2)
    assert wins.win_rate([None, None], 1) is None


def test_samples_of_one_prompt_that_agree_count_once():
    verdicts = np.repeat(np.random.default_rng(0).integers(0, 2, 100), 4).tolist()
    assert wins.win_rate(verdicts, 4)[:3] == pytest.approx(wins.win_rate(verdicts[::4], 1)[:3])
    together, apart = wins.win_rate(verdicts, 4), wins.win_rate(verdicts, 1)
    assert together.high - together.low == pytest.approx(2 * (apart.high - apart.low), rel=0.05)


@pytest.mark.parametrize("won", [0, 1, 4, 8])
def test_the_interval_of_wins_and_losses_is_wilsons(won):
    theirs = binomtest(won, 8).proportion_ci(method="wilson")
    ours = wins.win_rate([1.0] * won + [0.0] * (8 - won), 1)
    assert ours == pytest.approx((won / 8, theirs.low, theirs.high, 8))


def test_with_many_prompts_the_interval_is_that_of_a_bootstrap():
    verdicts = np.random.default_rng(1).choice([0, 0.5, 1], 150, p=[0.3, 0.3, 0.4])
    theirs = bootstrap(
        (verdicts,), np.mean, n_resamples=5000, method="percentile", random_state=np.random.default_rng(2)
    ).confidence_interval
    ours = wins.win_rate(verdicts.tolist(), 1)
    assert (ours.low, ours.high) == (pytest.approx(theirs.low, abs=0.01), pytest.approx(theirs.high, abs=0.01))


def test_one_prompt_has_no_interval_however_many_samples_it_has():
    rate = wins.win_rate([1, 1, 0, 1], 4)
    assert (rate.mean, rate.prompts) == (0.75, 1) and math.isnan(rate.low) and math.isnan(rate.high)


@pytest.mark.parametrize("rate", [0.5, 0.9])
@pytest.mark.parametrize("prompts", [8, 16])
def test_intervals_cover_the_true_win_rate_in_95_of_100_comparisons_however_few_prompts(prompts, rate):
    """2000 simulated comparisons, two samples of each prompt, whose chance of a win differs by prompt."""
    rng = np.random.default_rng(3)
    chance = rng.beta(4 * rate, 4 * (1 - rate), size=(2000, prompts, 1))
    verdicts = (rng.random((2000, prompts, 2)) < chance).astype(float)
    found = [wins.win_rate(of.ravel().tolist(), 2) for of in verdicts]
    assert 0.93 <= sum(of.low <= rate <= of.high for of in found) / 2000 <= 0.97


def simulated(likes_length, gain=0.0, n=1000, seed=4):
    """Verdicts of a judge that sees by how much an answer is longer, and adds `gain` to the policy's."""
    rng = np.random.default_rng(seed)
    longer = rng.normal(8, 20, n).round()
    chance = 1 / (1 + np.exp(-(gain + likes_length * np.tanh(longer / np.sqrt((longer**2).mean())))))
    return (rng.random(n) < chance).astype(float), longer


def test_the_length_controlled_win_rate_is_that_of_a_public_logistic_regression():
    won, longer = simulated(1.5, gain=0.3)
    won[::7] = 0.5
    x = np.append(np.tanh(longer / np.sqrt((longer**2).mean())), 0)[:, None]
    won = np.append(won, 0.5)  # the tie at equal lengths that is added
    model = LogisticRegression(C=1 / wins.RIDGE, tol=1e-10, max_iter=1000)
    # a tie is half of a win and half of a loss
    model.fit(np.vstack([x, x]), np.repeat([1, 0], len(x)), sample_weight=np.concatenate([won, 1 - won]))
    theirs = 1 / (1 + math.exp(-model.intercept_[0]))
    ours = wins.length_controlled(won[:-1].tolist(), longer.tolist(), 1)
    assert ours.mean == pytest.approx(theirs, abs=1e-5)
    assert ours.low < ours.mean < ours.high


def test_a_judge_that_likes_length_alone_gives_half_at_equal_length():
    won, longer = simulated(2.0)
    assert wins.win_rate(won.tolist(), 1).low > 0.55
    rate = wins.length_controlled(won.tolist(), longer.tolist(), 1)
    assert rate.low < 0.5 < rate.high


def test_a_judge_that_does_not_see_length_gives_the_raw_rate():
    won, longer = simulated(0.0, gain=0.8)
    controlled, raw = wins.length_controlled(won.tolist(), longer.tolist(), 1), wins.win_rate(won.tolist(), 1)
    assert controlled.mean == pytest.approx(raw.mean, abs=0.02)


def test_where_one_side_is_nearly_always_longer_there_is_no_rate_at_equal_length():
    """A judge that sees length alone: the raw rate is no rate at equal length, and nothing else is known of it."""
    rng = np.random.default_rng(5)
    for extra in (100, 40, 20):  # with a deviation of 10, fewer than one answer in twenty is shorter
        longer = rng.normal(extra, 10, 768)
        won = rng.random(768) < 1 / (1 + np.exp(-0.05 * longer))
        assert wins.win_rate(won.tolist(), 4).low > 0.6
        assert wins.length_controlled(won.tolist(), longer.tolist(), 4) is None
        assert "of the answers are shorter than the baseline's" in wins.why_not_controlled(
            won.tolist(), longer.tolist()
        )
    longer = rng.normal(10, 10, 768)
    won = rng.random(768) < 1 / (1 + np.exp(-0.05 * longer))
    rate = wins.length_controlled(won.tolist(), longer.tolist(), 4)
    assert rate.low < 0.5 < rate.high and rate.high - rate.low < 0.15
    assert wins.why_not_controlled(won.tolist(), longer.tolist()) is None


def test_equal_lengths_have_nothing_to_control():
    assert wins.length_controlled([1, 0, 1], [0, 0, 0], 1) is None
    assert wins.why_not_controlled([1, 0, 1], [0, 0, 0]) == "all answers have the length of the baseline's"
    assert wins.why_not_controlled([None], [3]) == "nothing was decided"


def test_length_that_decides_everything_ends_in_finite_numbers():
    rate = wins.length_controlled([1, 1, 0, 0] * 10, [5, 3, -2, -4] * 10, 1)
    assert all(math.isfinite(value) for value in rate)
    rate = wins.length_controlled([1] * 20, list(range(-10, 10)), 1)
    assert rate.mean > 0.95 and 0.05 < rate.high - rate.low < 0.4


def test_rates_at_equal_length_cover_the_true_one_in_95_of_100_comparisons():
    covered = 0
    for seed in range(300):
        won, longer = simulated(1.5, gain=1.0, n=40, seed=seed)
        rate = wins.length_controlled(won.tolist(), longer.tolist(), 1)
        covered += rate.low <= 1 / (1 + math.exp(-1)) <= rate.high
    assert covered >= 0.93 * 300


# ---- a judge behind an endpoint, and a real server


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(asking, "FIRST_WAIT", 0.0)


def judge_at(server, folder, **options):
    port = server if isinstance(server, int) else server.server_port
    settings = {"concurrency": 4, "timeout": 5.0, "retries": 2, "key_variable": "JUDGE_KEY", "question": "Which?"}
    settings |= {"url": f"http://127.0.0.1:{port}/v1", "model": "qwen"}
    return asking.endpoint(SimpleNamespace(**settings | options), folder)


PROMPTS = ["p1", "p2", "p3", "p4"]
GOOD, BAD = ["good 1", "good 2", "good 3", "good 4"], ["bad 1", "bad 2", "bad 3", "bad 4"]


def test_the_better_answer_wins_on_either_side(tmp_path):
    with serving(prefers("good")) as server:
        judge = judge_at(server, tmp_path)
        assert judge.verdicts(PROMPTS, GOOD, BAD) == [1] * 4
        assert judge.verdicts(PROMPTS, BAD, GOOD) == [0] * 4
        assert judge.verdicts(PROMPTS[:2], ["good", "bad"], ["very good", "very bad"]) == [0.5, 0.5]


@pytest.mark.parametrize("always", ["A", "B", "T", "Answer A.", "**B**"])
def test_a_judge_that_always_says_the_same_gives_half(tmp_path, always):
    with serving(lambda *_: always) as server:
        verdicts = judge_at(server, tmp_path).verdicts(PROMPTS, GOOD, BAD)
    assert verdicts == [0.5] * 4
    assert wins.win_rate(verdicts, 1).mean == 0.5


def test_equal_answers_tie_without_a_question(tmp_path):
    with serving(prefers("good")) as server:
        assert judge_at(server, tmp_path).verdicts(PROMPTS, GOOD, [f" {good}\n" for good in GOOD]) == [0.5] * 4
        assert server.asked == []


def test_nonsense_and_server_errors_are_tried_again(tmp_path):
    good = prefers("good")

    def reply(text, number):
        return 500 if number == 1 else "I would rather not say" if number == 2 else good(text, number)

    with serving(reply) as server:
        assert judge_at(server, tmp_path).verdicts(PROMPTS, GOOD, BAD) == [1] * 4
        assert len(server.asked) == 8 + 2


@pytest.mark.parametrize("failure", [500, 429, "no idea, A or B", ""])
def test_a_question_that_never_gets_a_reply_is_counted_and_no_loss(tmp_path, failure):
    good = prefers("good")
    with serving(lambda text, n: failure if "p2" in text else good(text, n)) as server:
        verdicts = judge_at(server, tmp_path).verdicts(PROMPTS, GOOD, BAD)
    assert verdicts == [1, None, 1, 1]
    assert len([text for text in server.asked if "p2" in text]) == 2 * 3, "three tries of both questions"
    assert wins.win_rate(verdicts, 1).mean == 1


def test_a_judge_that_takes_too_long_is_a_failure(tmp_path):
    def reply(text, _):
        if "p1" in text:
            time.sleep(1.5)
        return prefers("good")(text, _)

    with serving(reply) as server:
        judge = judge_at(server, tmp_path, timeout=0.3, retries=0)
        assert judge.verdicts(PROMPTS, GOOD, BAD) == [None, 1, 1, 1]


def test_a_judge_that_is_gone_ends_the_comparison_and_the_next_one_asks_only_the_rest(tmp_path):
    many = [f"p{i}" for i in range(40)]
    good, bad = [f"good {i}" for i in range(40)], [f"bad {i}" for i in range(40)]
    gone = pytest.raises(UserError, match=r"gave no usable reply to 20 questions in a row. The \d+ replies")
    with serving(lambda text, n: prefers("good")(text, n) if n <= 30 else 503) as server, gone:
        judge_at(server, tmp_path, concurrency=1, retries=0).verdicts(many, good, bad)
    kept = len(next(tmp_path.glob("*.jsonl")).read_text().splitlines())
    assert kept == 30
    with serving(prefers("good")) as again:
        port_moved = judge_at(again, tmp_path)
        port_moved.about, port_moved.file = {**port_moved.about, "url": server_url(server)}, next(tmp_path.iterdir())
        assert port_moved.verdicts(many, good, bad) == [1] * 40
        assert len(again.asked) == 80 - 30


def server_url(server):
    return f"http://127.0.0.1:{server.server_port}/v1"


def test_a_line_that_a_killed_process_left_half_written_is_asked_again(tmp_path):
    with serving(prefers("good")) as server:
        judge = judge_at(server, tmp_path)
        judge.verdicts(PROMPTS, GOOD, BAD)
        judge.file.write_text(judge.file.read_text()[:-20])
        server.asked.clear()
        assert judge.verdicts(PROMPTS, GOOD, BAD) == [1] * 4
        assert len(server.asked) == 1


def test_another_question_is_another_judge(tmp_path):
    with serving(prefers("good")) as server:
        judge_at(server, tmp_path).verdicts(PROMPTS, GOOD, BAD)
        server.asked.clear()
        judge_at(server, tmp_path, question="Which? Be strict.").verdicts(PROMPTS, GOOD, BAD)
        assert len(server.asked) == 8


def test_the_key_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with serving(prefers("good")) as server:
        judge = judge_at(server, tmp_path)
        judge.verdicts(PROMPTS, GOOD, BAD)
        assert server.keys == ["Bearer secret"]
    assert not any("secret" in file.read_text() for file in tmp_path.iterdir())


def test_a_judge_that_cannot_be_reached_or_has_no_such_model_is_told_at_once(tmp_path):
    with serving(prefers("good")) as server:
        with pytest.raises(UserError, match="no such model; it has qwen"):
            judge_at(server, tmp_path, model="gpt")
        port = server.server_port
    with pytest.raises(UserError, match="no judge answers at"):
        judge_at(port, tmp_path)


@pytest.mark.parametrize(
    ("said", "reply"),
    [
        *(("A", "A"), ("b", "B"), (" T ", "T"), ("**A**", "A"), ('"B"', "B"), ("(A)", "A"), ("Option B", "B")),
        *(("Answer: B.", "B"), ("Final answer: A", "A"), ("**Verdict:** B", "B"), ("The better answer is A.", "A")),
        *((r"$\boxed{\text{A}}$", "A"), ("<answer>B</answer>", "B"), ("[[A]]", "A"), ("I'd go with B.", "B")),
        *(("A is better", "A"), ("B is better than A.", "B"), ("I prefer A over B", "A"), ("Response B wins.", "B")),
        ("<think>A is long. B?</think>\n\nB", "B"),
        ("Both are fine, but the first is shorter.\nAnswer A", "A"),
        ("A is better in style. B is more honest.\n\nFinal verdict: B", "B"),
    ],
)
def test_a_verdict_is_read_however_it_is_dressed(said, reply):
    assert asking.read_reply(said) == reply


@pytest.mark.parametrize(
    "said", ["T", "Tie", "tie.", "**Tie**", "It's a tie.", "Draw", "Verdict: tie", "T (tie)", "Neither is better."]
)
def test_a_tie_is_read_in_as_many_words_as_a_win(said):
    assert asking.read_reply(said) == "T"


@pytest.mark.parametrize(
    ("said", "reply"),
    [
        ("A\n\nBoth are fine, but A is shorter.", "A"),
        ("B. It is the honest one.", "B"),
        ("B is better because A rambles. It also ends.", "B"),
        ("A: it is shorter", "A"),
        ("A\n\nActually, B is the one.", None),
        ("A is better. However, B is better.", "B"),
        ("A: clear but wrong.\nB: right.", None),
        ("A - a good answer, but the second is better", None),
    ],
)
def test_a_letter_with_reasons_is_read_where_they_do_not_speak_for_the_other_answer(said, reply):
    assert asking.read_reply(said) == reply


@pytest.mark.parametrize(
    "said",
    [
        *("", "C", "AB", "A or B", "A and B", "A/B", "A, B", "Not A", "Is A better?", "I would rather not say"),
        *("A is worse than B", "A is not better", "The worse answer is A", "Worse: A", "A is the worse answer"),
        *("A better answer would be B", "I don't think A is better", "The winner is not A", "A: 7/10\nB: 8/10"),
        *("Ranking:\n1. A\n2. B", "- A\n- B", "[[A]] if the first is better, [[B]] if the second"),
    ],
)
def test_what_is_no_plain_verdict_is_not_read_as_one(said):
    assert asking.read_reply(said) is None


@pytest.mark.parametrize("tag", ["<think>", "<THINK>", "<thinking>"])
def test_reasoning_is_no_verdict_and_one_that_is_cut_off_has_none(tag):
    assert asking.read_reply(f"{tag}B\nA") is None
    assert asking.read_reply(f"{tag}B{tag.replace('<', '</')}\nA") == "A"
    assert asking.read_reply(f"the tag was in the prompt: B{tag.replace('<', '</')}\nA") == "A"


def test_a_judge_that_says_tie_loses_nothing(tmp_path):
    with serving(lambda text, n: "Tie" if "p2" in text else prefers("good")(text, n)) as server:
        assert judge_at(server, tmp_path).verdicts(PROMPTS, GOOD, BAD) == [1, 0.5, 1, 1]


def test_after_many_failures_a_reply_is_quoted(tmp_path):
    many = [str(i) for i in range(20)]
    told = pytest.raises(UserError, match="What came last: 'As a careful judge I abstain'")
    with serving(lambda *_: "As a careful judge I abstain") as server, told:
        judge_at(server, tmp_path, retries=0).verdicts(many, [f"good {i}" for i in many], many)


def test_the_secrets_of_an_address_stand_in_no_name_and_no_file(tmp_path):
    with serving(prefers("good")) as server:
        judge = judge_at(server, tmp_path, url=f"http://me:pw-1@127.0.0.1:{server.server_port}/v1?v=2&api_key=sk-2")
        judge.verdicts(PROMPTS, GOOD, BAD)
    assert judge.name == f"qwen at http://***@127.0.0.1:{server.server_port}/v1?v=2&api_key=***"
    written = "".join(file.name + file.read_text() for file in tmp_path.iterdir())
    assert len(written) > 100 and not any(secret in written + str(judge.about) for secret in ("pw-1", "sk-2", "me:"))


# ---- a judge in this process


def test_a_local_model_says_the_likelier_letter_of_each_unpadded_question(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cfg = compose("eval", ["judge=local", f"judge.model={world.BASE}", "evaluation.batch_size=2"])
    judge = asking.local(cfg, tmp_path)
    questions = [asking.Question(p, a, b) for p, a, b in zip(PROMPTS[:3], GOOD, ["bad", "b " * 30, ""], strict=False)]
    replies = {number: reply for number, reply, _ in judge._ask(questions)}
    tokenizer = AutoTokenizer.from_pretrained(world.BASE)
    model = AutoModelForCausalLM.from_pretrained(world.BASE)
    from rlhf_recipes.models import PLAIN_CHAT_TEMPLATE

    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    letters = [[tokenizer(t)["input_ids"][-1] for t in (letter, f" {letter}")] for letter in "AB"]
    for number, question in enumerate(questions):
        chat = [{"role": "user", "content": question.text(cfg.judge.question)}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            chances = model(ids).logits[0, -1].softmax(-1)
        first, second = (chances[sorted(set(of))].sum() for of in letters)
        assert replies[number] == ("A" if first > second else "B")


def another_model(tmp_path, **tokenizer):
    """A folder with the embedded base's weights and a tokenizer of its own."""
    from transformers import AutoTokenizer

    shutil.copytree(world.BASE, tmp_path / "other")
    own = AutoTokenizer.from_pretrained(world.BASE)
    for key, value in tokenizer.items():
        setattr(own, key, value)
    own.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def other_weights(folder):
    from safetensors.torch import load_file, save_file

    (file,) = folder.glob("*.safetensors")
    save_file({name: tensor.flip(0) for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def test_a_local_judge_with_other_weights_in_the_same_folder_is_asked_again(tmp_path):
    model = another_model(tmp_path)
    cfg = compose("eval", ["judge=local", f"judge.model={model}"])
    asked = []

    def judged():
        judge = asking.local(cfg, tmp_path / "replies")
        judge._ask = lambda questions: asked.extend(questions) or ((i, "A", "A") for i in range(len(questions)))
        judge.verdicts(PROMPTS, GOOD, BAD)
        return len(asked)

    assert [judged(), judged()] == [8, 8]
    other_weights(model)
    assert judged() == 16


# ---- answers


def test_a_model_of_its_own_is_asked_under_its_own_chat_template(tmp_path):
    chat = "Who is {{ messages[0].content }}"
    model = another_model(tmp_path, chat_template=chat, eos_token="<pad>")
    cfg = compose(
        "eval",
        [
            "model.chat_template='Where is {{ messages[0].content }}'",
            "evaluation.max_new_tokens=1",
            "evaluation.samples=1",
        ],
    )
    (made,) = _drawn_alone(cfg, str(model), [{"prompt": [{"role": "user", "content": "Kit?"}]}])
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert made.prompt_ids == tokenizer("Who is Kit?")["input_ids"] != tokenizer("Where is Kit?")["input_ids"]


def test_answers_of_another_base_in_the_same_folder_are_not_taken_for_its_own(tmp_path):
    base = another_model(tmp_path)
    cfg, asked = compose("eval", [f"model.name_or_path={base}"]), [{"prompt": "Who?"}]
    run = RunModels(cfg, policies.Compared([], "base"), asked)
    before = _key(cfg, run, asked)
    moved = compose("eval", [f"model.name_or_path={shutil.copytree(base, tmp_path / 'moved')}"])
    smaller = compose("eval", [f"model.name_or_path={base}", "evaluation.batch_size=1"])
    assert _key(moved, run, asked) == _key(smaller, run, asked) == before
    other_weights(base)
    assert _key(cfg, run, asked) != before


# ---- judges that score

NOTHING = policies.Compared([], "sft")


def answers(name, completions, rewards=None):
    made = [Sample(prompt, text, [1], [2] * len(text.split())) for prompt, text in completions]
    return Answers(name, made, {} if rewards is None else {"reward": rewards})


def test_scores_compare_sample_by_sample_and_a_missing_score_is_no_verdict():
    judge = judges.Scores("s", {"a": [1.0, 2.0, None, 3.0], "b": [0.0, 2.0, 1.0, 4.0]})
    assert judge.verdicts(answers("a", []), answers("b", [])) == [1, 0.5, None, 0]


def test_wins_are_told_with_ties_as_half_and_without_them():
    found = {name: answers(name, [("p", "one")] * 4) for name in ("sft", "ppo")}
    judge = judges.Scores("s", {"ppo": [1.0, 1.0, 0.0, 0.0], "sft": [0.0, 0.0, 1.0, 0.0]})
    (told,) = findings.win_rates(found, "sft", [judge], [None], 4)
    assert (told["win_rate"].mean, told["ties"], told["without_ties"].mean) == (2.5 / 4, 1 / 4, 2 / 3)


def test_lengths_are_counted_in_characters_since_tokenizers_differ():
    """The same texts in 1.4 times the tokens are no longer answers."""
    found = {name: answers(name, [("p", "w " * n) for n in (10, 50)]) for name in ("sft", "ppo")}
    for sample in found["ppo"].made:
        sample.completion_ids.extend(sample.completion_ids[: len(sample.completion_ids) * 2 // 5])
    (told,) = findings.win_rates(
        found, "sft", [judges.Scores("s", {"ppo": [1.0, 0.0], "sft": [0.0, 1.0]})], [None] * 2, 1
    )
    assert told["length_controlled"] is None
    assert told["not_controlled"] == "all answers have the length of the baseline's"


def test_few_prompts_are_marked_and_one_has_no_interval():
    found = {name: answers(name, [("p", "one")] * 3) for name in ("sft", "ppo")}
    judge = judges.Scores("s", {"ppo": [1.0, 1.0, 0.0], "sft": [0.0, 0.0, 0.0]})
    (told,) = findings.win_rates(found, "sft", [judge], ["a", "a", "b"], 1)
    assert findings._percent(told["win_rate"]) == "83% [38%, 98%] (3 prompts)"
    assert findings._percent(told["categories"]["b"]) == "50% (1 prompt)"
    assert findings._percent(wins.win_rate([1, 0] * 10, 1)) == "50% [30%, 70%]"


def scoring(tmp_path, body):
    file = tmp_path / "scores.py"
    file.write_text(f"def score(prompts, completions, completion_ids, **kwargs):\n    return {body}\n")
    return compose("eval", ["judge=function", f"judge.function={file}:score", "eval.prompts=hhh"])


def test_a_function_scores_the_answers(tmp_path):
    found = {"a": answers("a", [("p", "one two three"), ("p", "one")]), "b": answers("b", [("p", "one"), ("p", "one")])}
    (judge,) = judges.after_answers(
        scoring(tmp_path, "[len(c.split()) for c in completions]"), NOTHING, found, tmp_path
    )
    assert judge.verdicts(found["a"], found["b"]) == [1, 0.5]


@pytest.mark.parametrize("side", ["a", "b"])
def test_nan_is_no_verdict_whichever_side_it_is_on(side):
    scores = {"a": [1.0, 2.0], "b": [1.0, 0.0]}
    scores[side] = [math.nan, *scores[side][1:]]
    assert judges.Scores("s", scores).verdicts(answers("a", []), answers("b", [])) == [None, 1]


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_a_judge_that_scores_no_answer_of_a_policy_is_refused(nothing):
    with pytest.raises(UserError, match="s scores none of the 2 answers of b"):
        judges.Scores("s", {"a": [1.0, 2.0], "b": [nothing] * 2})


@pytest.mark.parametrize(("body", "told"), [("1 / 0", "ZeroDivisionError"), ("[1.0]", "returned 1 scores for 2")])
def test_a_function_that_fails_is_told(tmp_path, body, told):
    found = {"a": answers("a", [("p", "one two three"), ("p", "one")])}
    with pytest.raises(UserError, match=told):
        judges.after_answers(scoring(tmp_path, body), NOTHING, found, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["judge.url=http://localhost:1/v1"], "judge.url needs judge.model"),
        (["judge.function=a.py:f", "judge.reward_model=b"], "one at a time"),
        (["judge.model=b", "judge.function=a.py:f"], "one at a time"),
        (["judge.function=nothing.py:f"], "nothing.py cannot be read"),
    ],
)
def test_what_is_wrong_with_a_judge_is_told_before_anything_is_loaded(overrides, told):
    compared = policies.Compared([], "sft")
    with pytest.raises(UserError, match=told):
        judges.refuse_faults(compose("eval", overrides), compared)


# ---- which policies, which prompts


def run_with(tmp_path, *reward, run="r", **stages):
    """A run folder with finished stages, as far as their manifests go; PPO's rewards by overrides."""
    from rlhf_recipes.runs import Stage

    for name, before in stages.items():
        cfg = composed(name, tmp_path, run, *(reward if name == "ppo" else ()))
        read = {"sources": "preferences"} if name in ("rm", "dpo") else {}
        with Stage.open(cfg, name, predecessors=before, data_fingerprint=read, overrides=[]) as stage:
            stage.finish(
                {"accuracy": [0.7, 0.01], "calibration_error": 0.02, "pairs": 9},
                save=lambda folder, name=name: adapter(folder, name + run),
            )
    return lambda *overrides: policies.resolve(composed("eval", tmp_path, run, *overrides))


compose_once = functools.cache(lambda recipe, *overrides: compose(recipe, overrides))  # it takes a while


def composed(recipe, folder, run, *overrides):
    cfg = compose_once(recipe, *overrides).copy()
    cfg.runs_dir, cfg.run = str(folder), run
    return cfg


def adapter(folder, weights):
    (Path(folder) / "adapter_config.json").write_text("{}")
    (Path(folder) / "adapter_model.safetensors").write_text(weights)


def test_the_base_and_all_finished_stages_are_compared_by_default(tmp_path):
    resolve = run_with(tmp_path, sft=(), rm=("sft",), ppo=("sft", "rm"))
    compared = resolve()
    assert [policy.name for policy in compared.policies] == ["base", "sft", "ppo"]
    assert compared.baseline == "sft" and compared.best_of == [4]
    assert compared.sft.path == tmp_path / "r/sft" and compared.reward_model.path == tmp_path / "r/rm"


def test_without_sft_the_base_is_the_baseline(tmp_path):
    compared = run_with(tmp_path, ppo=())()
    assert (compared.baseline, compared.best_of) == ("base", [])


def test_other_models_are_named_by_folder_or_hub_id_and_the_baseline_comes_along(tmp_path):
    resolve = run_with(tmp_path, sft=(), ppo=("sft",))
    compared = resolve(f"eval.policies=[ppo,{world.BASE},HuggingFaceTB/SmolLM2-135M-Instruct]")
    assert [p.name for p in compared.policies] == ["sft", "ppo", str(world.BASE), "HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert [p.source is None for p in compared.policies] == [True, True, False, False]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["eval.policies=[pop]"], "pop is no policy. There are base, sft"),
        (["eval.policies=[dpo]"], "dpo is missing. Make it first: make dpo"),
        (["eval.baseline=dpo"], "eval.baseline=dpo is none of the policies: base, sft"),
        (["eval.policies=[{tmp_path}]"], "holds no model and no adapter"),
    ],
)
def test_what_cannot_be_compared_is_told(tmp_path, overrides, told):
    resolve = run_with(tmp_path, sft=())
    with pytest.raises(UserError, match=told):
        resolve(*(o.format(tmp_path=tmp_path) for o in overrides))


def test_nothing_to_compare_is_told(tmp_path):
    (tmp_path / "r").mkdir()
    with pytest.raises(UserError, match="Make one first: make sft"):
        run_with(tmp_path)()


def test_the_shipped_prompts_are_of_three_kinds_and_all_different():
    asked = policies.prompts(compose("eval", ["eval.prompts=hhh"]))
    assert {row["category"] for row in asked} == {"helpful", "honest", "harmless"}
    assert len({policies.text(row["prompt"]) for row in asked}) == len(asked) == 48


@pytest.mark.parametrize(
    ("line", "told"), [('{"promt": "x"}', "line 2: want"), ("nonsense", "line 2: want"), ("3", "line 2: want")]
)
def test_a_bad_line_of_a_prompts_file_is_named(tmp_path, line, told):
    file = tmp_path / "p.jsonl"
    file.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(UserError, match=told):
        policies.prompts(compose("eval", [f"eval.prompts={file}"]))


def test_the_bound_of_best_of_n_by_hand():
    """log 4 - 3/4."""
    assert policies.best_of_kl(4) == pytest.approx(1.3862943611 - 0.75)


# ---- what a policy was trained on is no evidence for it

WHOLE = {"sft": (), "rm": ("sft",), "dpo": ("sft",), "ppo": ("sft", "rm")}
NO_MODEL = {"sft": (), "ppo": ("sft",)}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Reward functions in the folder that the commands are typed in."""
    monkeypatch.chdir(tmp_path)
    body = "def {0}(completions, **kwargs):\n    return [{1} for c in completions]\n"
    text = [body.format("brevity", "-len(c)"), body.format("words", "len(c.split())")]
    text.append(
        "def right(completions, answer, **kwargs):\n    return [float(c == a) for c, a in zip(completions, answer)]\n"
    )
    Path("mine.py").write_text("".join(text))


def evidence(compared, *overrides, baseline="sft"):
    """Whether each judge is evidence for each policy, where all of them score what the run's rewards measure."""
    names = [*(policy.name for policy in compared.policies), *map(policies.best_of_name, compared.best_of)]
    found = {name: answers(name, [("p", "one")]) for name in names}
    for of in found.values():
        of.measured = {reward.measure: [1.0] for reward in compared.rewards}
    cfg = compose_once("eval", "eval.prompts=hhh", *overrides)
    asked = judges.after_answers(cfg, compared, found, Path("replies"))
    rows = findings.win_rates(found, baseline, asked, [None], 1, optimized=compared.optimized)
    return {(row["policy"], row["judge"]): row["evidence"] for row in rows}


def test_the_reward_model_that_ppo_optimised_is_no_evidence_for_it_and_for_what_it_picked(tmp_path):
    found = evidence(run_with(tmp_path, **WHOLE)())
    assert found == {
        ("base", judges.FROM_RUN): True,
        ("dpo", judges.FROM_RUN): False,  # it learned the same pairs
        ("ppo", judges.FROM_RUN): False,
        ("best-of-4", judges.FROM_RUN): False,
    }
    compared = run_with(tmp_path)()
    assert not any(evidence(compared, baseline="ppo").values()), "nor where it judges against PPO"


def test_gold_is_evidence_unless_it_was_the_reward(tmp_path):
    compared = run_with(tmp_path, "reward=function", f"reward.functions=[{judges.GOLD}]", **NO_MODEL)()
    row = world.demonstrations()["test"][0]
    found = {name: answers(name, [(row["prompt"], row["completion"])]) for name in ("sft", "base", "ppo")}
    (judge,) = judges.after_answers(compose("eval"), compared, found, tmp_path)
    told = findings.win_rates(found, "sft", [judge], [None], 1, optimized=compared.optimized)
    assert [(row["policy"], row["evidence"]) for row in told] == [("base", True), ("ppo", False)]


def test_a_function_that_ppo_optimised_is_no_evidence_and_a_reward_model_it_never_saw_is(tmp_path, mine):
    made = {**WHOLE, "ppo": ("sft",)}
    compared = run_with(tmp_path, "reward=function", "reward.functions=[mine.py:brevity]", **made)()
    found = evidence(compared)
    assert found["ppo", judges.FROM_RUN] and not found["ppo", "mine.py:brevity"]
    assert found["dpo", "mine.py:brevity"] and not found["best-of-4", "mine.py:brevity"]
    for same in ("mine.py:brevity", "mine:brevity", f"{tmp_path}/mine.py:brevity"):
        assert not evidence(compared, "judge=function", f"judge.function={same}")["ppo", same]
    assert evidence(compared, "judge=function", "judge.function=mine.py:words")["ppo", "mine.py:words"]


def test_another_runs_reward_model_that_ppo_optimised_is_no_evidence(tmp_path):
    run_with(tmp_path, run="other", sft=(), rm=("sft",))
    model = tmp_path / "other" / "rm"
    compared = run_with(tmp_path, f"reward.model={model}", **{**WHOLE, "ppo": ("sft",)})()
    found = evidence(compared)
    assert found["ppo", judges.FROM_RUN] and not found["ppo", str(model)]
    assert compared.optimized("ppo") == {rewards.mark(model)}


def test_a_policy_of_another_run_says_by_its_own_manifest_what_it_was_trained_on(tmp_path):
    run_with(tmp_path, run="other", **WHOLE)
    ppo = tmp_path / "other" / "ppo"
    compared = run_with(tmp_path, **WHOLE)(f"eval.policies=[{ppo}]")
    assert compared.optimized(str(ppo)) == {rewards.mark(tmp_path / "other" / "rm")}
    assert evidence(compared)[str(ppo), judges.FROM_RUN]


def test_no_evidence_at_all_is_told_with_what_to_ask_for():
    row = {"policy": "ppo", "judge": "f", "evidence": False, "win_rate": None, "length_controlled": None}
    row |= {"ties": 0.0, "without_ties": None, "failed": 0, "prompts": 50, "not_controlled": None}
    metrics = {"baseline": "sft", "prompts": {"samples": 1, "count": 50}, "best_of_n": [], "win_rates": [row]}
    metrics["policies"] = {"sft": {"length": (1.0, 0.1)}, "ppo": {"length": (1.0, 0.1)}}
    hint = "No judge here is evidence for ppo. Name one that no training has seen: judge=reward_model, judge=function"
    assert hint in findings.tell(metrics)
    assert hint not in findings.tell(metrics | {"win_rates": [row | {"evidence": True}]})


# ---- what PPO optimised is measured, and picks the best of n


def measured(compared, completions, **columns):
    made = [
        Sample("p", text, [1], [2], columns={k: v[i] for k, v in columns.items()}) for i, text in enumerate(completions)
    ]
    return _rewards(compose_once("eval"), SimpleNamespace(compared=compared, roles=None, tokenizer=None), made)


def test_the_function_that_ppo_optimised_is_the_reward(tmp_path, mine):
    compared = run_with(tmp_path, "reward=function", "reward.functions=[mine.py:brevity]", **NO_MODEL)()
    assert compared.best_of == [4]
    assert measured(compared, ["one two", "three"]) == ({"reward": [-7, -5]}, False)


def test_of_several_rewards_each_is_measured_by_its_name_beside_their_sum(tmp_path, mine):
    both = "reward.functions=[{path: mine.py:words, weight: 2}, mine.py:right]"
    compared = run_with(tmp_path, "reward=function", both, **NO_MODEL)()
    found, failed = measured(compared, ["one two", "three"], answer=["one", "three"])
    assert found == {"rewards/words": [2, 1], "rewards/right": [0, 1], "reward": [4, 3]} and not failed


def test_a_reward_that_cannot_be_measured_is_told_and_nothing_is_called_the_reward(tmp_path, mine, capsys):
    both = "reward.functions=[mine.py:words, mine.py:right]"
    resolve = run_with(tmp_path, "reward=function", both, **NO_MODEL)
    assert measured(resolve(), ["one two"]) == ({"rewards/words": [2]}, True)  # the prompts have no `answer`
    assert "mine.py:right is not measured: reward function `right` raised TypeError" in capsys.readouterr().out
    Path("mine.py").unlink()
    compared = resolve()
    told = capsys.readouterr().out
    assert compared.rewards == [] and "words is not measured: reward function 'mine.py:words'" in told
    assert compared.best_of == [] and "No best of n" in told and "has no reward to pick by" in told


def test_a_run_without_sft_says_that_it_has_no_best_of_n(tmp_path, capsys):
    assert run_with(tmp_path, ppo=())("eval.best_of=[2]").best_of == []
    assert "has no SFT stage to draw from" in capsys.readouterr().out


# ---- the reward model by category, and benchmarks


def test_pairs_in_the_form_of_reward_bench_are_read_and_a_bad_row_is_named(tmp_path):
    file = tmp_path / "bench.jsonl"
    good = {"prompt": "p", "chosen": "yes", "rejected": "no", "subset": "chat"}
    file.write_text("\n".join(json.dumps(row) for row in (good, good | {"subset": "safety"})))
    rows = reward_bench.pairs(compose("eval", [f"eval.reward_bench={file}"]))
    assert [row["subset"] for row in rows] == ["chat", "safety"]
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(json.dumps(row) for row in (good, good | {"rejected": "yes"})))
    with pytest.raises(UserError, match="row 2: `chosen` and `rejected` are the same"):
        reward_bench.pairs(compose("eval", [f"eval.reward_bench={bad}"]))
    with pytest.raises(UserError, match="cannot be read"):
        reward_bench.pairs(compose("eval", [f"eval.reward_bench={tmp_path}/none.jsonl"]))
    assert reward_bench.pairs(compose("eval")) == []


def test_a_benchmark_that_lm_eval_does_not_have_is_told():
    with pytest.raises(UserError, match="no task qqq"):
        harness.tasks(compose("eval", ["eval.benchmarks=[qqq]"]))
    assert harness.tasks(compose("eval")) is None
