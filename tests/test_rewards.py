"""Where PPO's reward comes from: functions by name, an endpoint that may fail, and refusals that say what to do."""

import http.server
import json
import socket
import sys
import threading

import pytest

from rlhf_recipes import rewards
from rlhf_recipes.config import compose
from rlhf_recipes.errors import UserError
from rlhf_recipes.rewards import endpoint, from_config, function

GOOD = """
import math

LIMIT = 3

def brevity(completions, **kwargs):
    return [-float(len(c)) for c in completions]

def praise(completions, **kwargs):
    return [float("good" in c) for c in completions]

def _hidden(completions, **kwargs):
    return [0.0] * len(completions)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder a person works in, with a module of reward functions."""
    (tmp_path / "my_rewards.py").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("my_rewards", None)


def ppo(*overrides):
    return compose("ppo", list(overrides)).reward


# ---- functions


@pytest.mark.parametrize("path", ["my_rewards.py:brevity", "my_rewards:brevity", "./my_rewards.py:brevity"])
def test_a_function_is_found_by_file_and_by_module_in_the_folder_one_works_in(folder, path):
    assert function(path)(completions=["ab", "c"]) == [-2.0, -1.0]


def test_a_function_is_found_by_an_absolute_path_and_in_an_installed_module(folder):
    assert function(f"{folder}/my_rewards.py:praise")(completions=["so good"]) == [1.0]
    assert function("math:sqrt")(4) == 2


@pytest.mark.parametrize("path", ["my_rewards.py:speed", "my_rewards:LIMIT"])
def test_a_missing_function_is_told_with_those_that_are_there_and_an_example(folder, path):
    with pytest.raises(UserError) as refused:
        function(path)
    message, name = str(refused.value), path.split(":")[1]
    assert f"has no function {name}; it has brevity, praise" in message
    assert "_hidden" not in message
    assert rewards.EXAMPLE in message


def test_the_example_is_a_reward_function(folder):
    (folder / "example.py").write_text(rewards.EXAMPLE)
    assert function("example.py:brevity")(prompts=["p"], completions=["x" * 50], completion_ids=[[1]]) == [-0.5]


def test_an_empty_file_has_no_functions(folder):
    (folder / "empty.py").touch()
    with pytest.raises(UserError, match="it has none"):
        function("empty.py:f")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent.py:f", r"absent.py cannot be read: FileNotFoundError"),
        ("absent_module:f", r"absent_module cannot be read: ModuleNotFoundError: No module named 'absent_module'"),
        ("broken.py:f", r"broken.py cannot be read: SyntaxError: .*line 2"),
        ("raising.py:f", r"raising.py cannot be read: ZeroDivisionError: division by zero"),
        ("brevity", r"want module:function or file.py:function, such as rewards.py:brevity"),
        ("my_rewards.py:", r"want module:function or file.py:function"),
        (":brevity", r"want module:function or file.py:function"),
        ("my_rewards.py", r"want module:function or file.py:function"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_path_and_why(folder, path, message):
    (folder / "broken.py").write_text("x = 1\ndef f(:\n")
    (folder / "raising.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match=message) as refused:
        function(path)
    assert f"reward function {path!r}" in str(refused.value)


# ---- the reward section of the config


def test_the_runs_own_reward_model_is_the_default(tmp_path):
    found = from_config(ppo(), measured(tmp_path, 0.63, 0.02))
    assert (found.adapters, found.functions, found.weights) == ([tmp_path], [], [1.0])


def test_functions_come_with_their_weights_and_without_one_count_as_one(folder):
    functions = "reward.functions=[{path: my_rewards.py:brevity, weight: 0.25}, my_rewards.py:praise]"
    found = from_config(ppo("reward=function", functions), None)
    assert found.adapters == []
    assert [f.__name__ for f in found.functions] == ["brevity", "praise"]
    assert found.weights == [0.25, 1.0]


def test_a_mix_is_model_functions_and_endpoint_in_this_order(folder):
    cfg = ppo("reward.functions=[my_rewards.py:brevity]", "reward.url=http://localhost:1", "reward.weights=[1,0.5,2]")
    found = from_config(cfg, measured(folder, 0.63, 0.02))
    assert found.adapters == [folder]
    assert [f.__name__ for f in found.functions] == ["brevity", "http_reward"]
    assert found.weights == [1.0, 0.5, 2.0]


def test_an_adapter_in_a_folder_is_the_reward_adapter_and_another_model_is_left_to_trl(folder):
    (folder / "adapter_config.json").write_text("{}")
    assert from_config(ppo(f"reward.model={folder}"), None).adapters == [folder]
    found = from_config(ppo("reward.model=org/reward-model"), None)
    assert (found.adapters, found.functions, found.weights) == ([], ["org/reward-model"], [1.0])


def test_weights_that_do_not_match_the_sources_are_refused_with_both_numbers(folder):
    with pytest.raises(UserError, match=r"reward\.weights has 3 numbers for 2 sources of reward"):
        from_config(
            ppo("reward.functions=[my_rewards.py:brevity]", "reward.weights=[1,2,3]"), measured(folder, 0.63, 0.02)
        )


def test_all_faults_are_told_in_one_message(folder):
    functions = "reward.functions=[absent.py:f, my_rewards.py:speed, my_rewards.py:brevity]"
    with pytest.raises(UserError) as refused:
        from_config(ppo("reward=function", functions, "reward.weights=[1]"), None)
    message = str(refused.value)
    assert "absent.py cannot be read" in message
    assert "has no function speed" in message
    assert "1 numbers for 3 sources" in message


@pytest.mark.parametrize(
    ("functions", "named"),
    [
        ("[{path: my_rewards.py:brevity, wieght: 2}]", "wieght"),
        ("[{weight: 2}]", "path"),
        ("[{path: my_rewards.py:brevity, weight: much}]", "much"),
    ],
)
def test_a_misspelt_or_wrong_entry_is_refused_and_not_ignored(folder, functions, named):
    with pytest.raises(UserError, match=named):
        from_config(ppo("reward=function", f"reward.functions={functions}"), None)


# ---- an ensemble


@pytest.fixture
def seeds(tmp_path):
    """The folder of a sweep of reward models, as `python -m recipes.rm -m run=mine seed=1,2` leaves it."""
    for seed in (1, 2):
        member = tmp_path / "mine" / "rm" / f"seed={seed}"
        member.mkdir(parents=True)
        (member / "adapter_config.json").write_text("{}")
        measured(member, 0.68, 0.02)
    (tmp_path / "mine" / "rm" / "checkpoints").mkdir()
    return tmp_path / "mine" / "rm"


def test_the_runs_model_and_a_sweep_of_others_are_one_source_of_reward(seeds):
    found = from_config(ppo(f"reward.model=[run,'{seeds}/seed=2','{seeds}/seed=1']"), measured(seeds, 0.63, 0.02))
    assert found.adapters == [seeds, seeds / "seed=2", seeds / "seed=1"]
    assert found.weights == [1.0]


def test_a_pattern_stands_for_the_adapters_it_matches(seeds):
    found = from_config(ppo(f"reward.model=[run,{seeds}/*]"), measured(seeds, 0.63, 0.02))
    assert found.adapters == [seeds, seeds / "seed=1", seeds / "seed=2"]
    assert from_config(ppo(f"reward.model={seeds}/*"), None).adapters == [seeds / "seed=1", seeds / "seed=2"]
    assert rewards.folders([f"{seeds}/*", "run", "org/rm"]) == [seeds / "seed=1", seeds / "seed=2"]


def test_a_list_of_one_is_that_model(seeds):
    assert from_config(ppo("reward.model=[run]"), measured(seeds, 0.63, 0.02)).adapters == [seeds]
    assert from_config(ppo("reward.model=[org/reward-model]"), None).functions == ["org/reward-model"]


def test_a_classifier_among_several_is_refused_with_the_reason(seeds):
    with pytest.raises(UserError) as error:
        from_config(ppo(f"reward.model=[org/reward-model,{seeds}/*]"), None)
    message = str(error.value)
    assert "org/reward-model is no reward adapter on this base" in message
    assert "a second base in memory" in message
    assert "python -m recipes.rm -m run=<run> seed=1,2" in message


def test_a_pattern_that_matches_nothing_is_refused_among_several(seeds):
    with pytest.raises(UserError, match=r"nothing/\* is no reward adapter"):
        from_config(ppo(f"reward.model=[{seeds}/*,{seeds}/nothing/*]"), None)


def test_a_member_at_chance_is_refused_by_name_unless_insisted_on(seeds):
    measured(seeds / "seed=2", 0.5, 0.02)
    with pytest.raises(UserError, match=f"the reward model in {seeds / 'seed=2'} agrees with its raters on 0.500"):
        from_config(ppo(f"reward.model=[run,{seeds}/*]"), measured(seeds, 0.63, 0.02))
    insisted = ppo(f"reward.model=[run,{seeds}/*]", "reward.min_accuracy=0")
    assert len(from_config(insisted, measured(seeds, 0.63, 0.02)).adapters) == 3


def test_a_member_that_stands_there_twice_is_refused(seeds):
    with pytest.raises(UserError, match="twice, and would agree with itself"):
        from_config(ppo(f"reward.model=['{seeds}/seed=1','{seeds}/../rm/seed=1']"), None)


@pytest.mark.parametrize("how", ["median", "Mean"])
def test_a_way_to_combine_that_does_not_exist_is_refused(how):
    with pytest.raises(UserError, match="expected one of mean, worst, mean_minus_std"):
        ppo(f"reward.ensemble={how}")


# ---- a reward model at chance


def measured(tmp_path, accuracy, half_width, pairs=2198):
    """The folder of a reward model, with what its recipe wrote."""
    from rlhf_recipes.runs import disk

    disk.write_json(tmp_path / "metrics.json", {"accuracy": (accuracy, half_width), "pairs": pairs})
    return tmp_path


def refused(folder, *overrides):
    """The message that `reward=run` is refused with."""
    with pytest.raises(UserError) as error:
        from_config(ppo(*overrides), folder)
    return str(error.value)


@pytest.mark.parametrize(("accuracy", "half_width"), [(0.49, 0.02), (0.51, 0.02), (0.58, 0.29), (0.52, 0.02)])
def test_a_reward_model_at_chance_is_refused_with_the_figure_and_how_to_insist(tmp_path, accuracy, half_width):
    message = refused(measured(tmp_path, accuracy, half_width))
    assert f"{accuracy:.3f} ± {half_width:.3f} of 2,198 held-out pairs" in message
    assert "reward.min_accuracy=0" in message
    assert str(tmp_path) in message


def test_a_good_reward_model_passes_and_is_refused_where_more_is_asked(tmp_path):
    folder = measured(tmp_path, 0.63, 0.02)
    for least in (0.5, 0.6):
        assert from_config(ppo(f"reward.min_accuracy={least}"), folder).adapters == [folder]
    assert "not surely above 0.62" in refused(folder, "reward.min_accuracy=0.62")


@pytest.mark.parametrize(("accuracy", "half_width"), [(0.49, 0.02), (0.2, 0.3), (0.0, 0.0), (0.0, float("nan"))])
def test_a_minimum_of_0_insists_however_bad_the_reward_model_is(tmp_path, accuracy, half_width):
    folder = measured(tmp_path, accuracy, half_width, pairs=5)
    assert from_config(ppo("reward.min_accuracy=0"), folder).adapters == [folder]


def test_one_held_out_pair_proves_nothing(tmp_path):
    assert "reward.min_accuracy=0" in refused(measured(tmp_path, 1.0, float("nan"), pairs=1))


# ---- an endpoint


@pytest.fixture
def server(monkeypatch):
    """A function that starts a server which gives these answers, (status, body), in turn; and what it was asked."""
    monkeypatch.setattr(rewards, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = []

    def start(*answers):
        asked, left = [], list(answers)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                asked.append((self.path, self.headers["Content-Type"], json.loads(body)))
                status, answer = left.pop(0)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

            def log_message(self, *args):
                pass

        listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=listening.serve_forever, args=[0.01], daemon=True).start()
        running.append(listening)
        return f"http://127.0.0.1:{listening.server_port}/score", asked

    yield start
    for listening in running:
        listening.shutdown()
        listening.server_close()


def ask(url, n=2):
    prompts, completions = [f"p{i}" for i in range(n)], [f"c{i}" for i in range(n)]
    return endpoint(url)(prompts=prompts, completions=completions, completion_ids=[[1]] * n, column=["x"] * n)


def test_an_endpoint_is_sent_prompts_and_completions_and_answers_with_rewards(server):
    url, asked = server((200, {"rewards": [0.5, -2]}))
    assert ask(url) == [0.5, -2.0]
    assert asked == [("/score", "application/json", {"prompts": ["p0", "p1"], "completions": ["c0", "c1"]})]


def test_null_is_an_episode_that_does_not_count(server):
    url, _ = server((200, {"rewards": [None, 1]}))
    assert ask(url) == [None, 1.0]


def test_conversations_are_sent_as_they_are(server):
    url, asked = server((200, {"rewards": [1]}))
    chat = [[{"role": "user", "content": "é"}]]
    assert endpoint(url)(prompts=chat, completions=chat) == [1.0]
    assert asked[0][2]["prompts"] == chat


def test_server_errors_are_tried_again(server):
    url, asked = server((500, b""), (503, b""), (200, {"rewards": [1, 2]}))
    assert ask(url) == [1.0, 2.0]
    assert len(asked) == 3 and asked[0] == asked[2]


def test_an_endpoint_that_stays_down_ends_the_run_with_what_to_do(server):
    url, asked = server(*[(500, b"")] * 9)
    with pytest.raises(UserError, match=r"failed 4 times: HTTP Error 500.*run the command again to resume"):
        ask(url)
    assert len(asked) == 4  # the first, and three more


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_refusal_is_not_tried_again(server, status):
    url, asked = server(*[(status, b"no such thing")] * 9)
    with pytest.raises(UserError, match=f"HTTP Error {status}"):
        ask(url)
    assert len(asked) == 1


def test_a_refusal_tells_what_the_endpoint_said(server):
    url, _ = server((422, b'{"detail": "field prompts missing"}'))
    with pytest.raises(UserError, match="field prompts missing"):
        ask(url)


@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        ({"rewards": [1.0]}, "answered 1 rewards"),
        ({"rewards": [1.0, 2.0, 3.0]}, "answered 3 rewards"),
        ({"rewards": []}, "answered 0 rewards"),
        (b"<html>hello</html>", "<html>hello</html>"),
        (b"", "''"),
        ({"scores": [1, 2]}, "scores"),
        ([1, 2], r"\[1, 2\]"),
        ({"rewards": ["a", "b"]}, "rewards"),
        ({"rewards": 3}, "rewards"),
        ({"rewards": {"a": 1, "b": 2}}, "rewards"),
        (b"\xff\xfe", "answered"),
    ],
)
def test_an_answer_that_is_none_is_shown_with_what_is_wanted(server, answer, seen):
    url, asked = server((200, answer))
    with pytest.raises(UserError, match=seen) as refused:
        ask(url)
    assert 'want {"rewards": [...]} with 2 numbers or nulls' in str(refused.value)
    assert len(asked) == 1


def test_a_refused_connection_is_tried_again_and_then_told(monkeypatch):
    monkeypatch.setattr(rewards, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError, match=f"{url} failed 4 times.*refused"):
        ask(url)


def test_an_endpoint_that_does_not_answer_in_time_is_tried_again_and_then_told(monkeypatch):
    monkeypatch.setattr(rewards, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(rewards, "TIMEOUT", 0.1)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(UserError, match=r"failed 4 times.*timed out"):
            ask(f"http://127.0.0.1:{silent.getsockname()[1]}")


def test_waits_grow(server, monkeypatch):
    waits = []
    monkeypatch.setattr(rewards.time, "sleep", waits.append)
    url, _ = server(*[(500, b"")] * 9)
    with pytest.raises(UserError):
        ask(url)
    assert waits == pytest.approx([0.01, 0.02, 0.04])


@pytest.mark.parametrize("url", ["localhost:8000/score", "ftp://127.0.0.1/x", "score"])
def test_what_is_no_http_address_is_refused_plainly(url):
    with pytest.raises(UserError, match="http"):
        from_config(ppo("reward=url", f"reward.url={url}"), None).functions[0](prompts=["p"], completions=["c"])


# ---- what a function may return


def told_of(function, completions=("a", "b"), **kwargs):
    with pytest.raises(UserError) as refused:
        rewards.checked(function)(prompts=["p"] * len(completions), completions=list(completions), **kwargs)
    return str(refused.value)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ([1.0], "returned 1 scores for 2 completions; want a list of 2 numbers, or None where there is no score"),
        (["good", "bad"], "returned 'good' for the completion 'a'; want a list of 2 numbers"),
        ([1.0, [2.0]], r"returned [2.0] for the completion 'b'; want"),
        (None, "returned None; want a list of 2 numbers"),
        ("12", "returned '12'; want a list of 2 numbers"),
        (3.0, "returned 3.0; want a list of 2 numbers"),
    ],
)
def test_a_function_that_returns_anything_but_a_number_or_none_for_each_completion_is_told(answer, told):
    def score(**kwargs):
        return answer

    assert told_of(score).startswith(f"reward function `score` {told}")
    assert "run the command again to resume from the last checkpoint" in told_of(score)


def test_numbers_of_any_library_and_generators_are_taken():
    import numpy as np
    import torch

    for answer in ([1, None], np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), (x for x in (True, 0.5))):
        scores = rewards.checked(lambda answer=answer, **kwargs: answer)(prompts=[], completions=["a", "b"])
        assert [type(score) for score in scores] in ([float, float], [float, type(None)])


def test_a_function_that_raises_is_told_with_its_own_line_wherever_the_error_came_from(folder):
    (folder / "parsing.py").write_text("import json\n\ndef parse(completions, **kwargs):\n    return json.loads('{')\n")
    told = told_of(function("parsing.py:parse"))
    assert told.startswith("reward function `parse` raised JSONDecodeError: Expecting property name")
    assert "(parsing.py:4)" in told


def test_a_function_that_does_not_take_what_it_is_given_is_told_what_that_is():
    def score(completions):
        return completions

    assert "completion_ids, all columns of the data and more: **kwargs)" in told_of(score)


def test_the_secrets_of_an_endpoints_address_stand_in_no_message():
    with pytest.raises(UserError, match=r"the reward endpoint http://\*\*\*@host/\?v=1&key=\*\*\* answered 2 rewards"):
        rewards._read_rewards("http://me:pw@host/?v=1&key=k", b'{"rewards": [1, 2]}', 1)
