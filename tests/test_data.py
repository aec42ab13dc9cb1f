"""One way in: what is read from where, what is held out, what is refused and how it is told."""

import csv
import gzip
import json
import logging
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rlhf_recipes import data
from rlhf_recipes.data.formats import prompt_key
from rlhf_recipes.errors import UserError

PRESETS = Path(__file__).parents[1] / "conf" / "data"


def pairs(n, start=0):
    return [
        {"prompt": f"Question {i}?", "chosen": f"Yes {i}.", "rejected": f"No {i}."} for i in range(start, start + n)
    ]


def written(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def loaded(stage, sources, heldout=0.1, seed=0, **others):
    return data.load({stage: sources, "heldout": heldout, **others}, stage, seed)


def refused(stage, sources, **kwargs):
    with pytest.raises(UserError) as told:
        loaded(stage, sources, **kwargs)
    return str(told.value)


def column(dataset, name="prompt"):
    return list(dataset[name])


# Reading.


def test_jsonl_json_csv_and_parquet_give_the_same_rows(tmp_path):
    from datasets import Dataset

    rows = pairs(20)
    written(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    read = [
        loaded("preferences", {"path": str(tmp_path / name)})
        for name in ("a.jsonl", "a.json", "a.jsonl.gz", "a.csv", "a.parquet")
    ]
    assert [one.train.to_list() for one in read] == [read[0].train.to_list()] * 5
    assert sorted(read[0].train.to_list() + read[0].test.to_list(), key=lambda r: rows.index(r)) == rows


def test_a_folder_and_a_glob_read_all_their_files(tmp_path):
    written(tmp_path / "in" / "a.jsonl", pairs(10))
    written(tmp_path / "in" / "deep" / "b.json", pairs(10, 10))
    (tmp_path / "in" / "README.md").write_text("not data")
    written(tmp_path / "in" / ".cache" / "c.json", [{"not": "data"}])
    folder = loaded("preferences", {"path": str(tmp_path / "in")})
    assert len(folder.train) + len(folder.test) == 20
    some = loaded("preferences", {"path": str(tmp_path / "in" / "*.jsonl")})
    assert len(some.train) + len(some.test) == 10


def test_lists_in_csv_are_json_and_other_cells_are_text(tmp_path):
    rows = [("Sky?", ["Blue.", "Green."], [1, 2]), ("[1]", ["a", "b"], [2, 1])]
    with (tmp_path / "ranked.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "answers", "ranking"])
        writer.writerows([prompt, json.dumps(answers), json.dumps(ranks)] for prompt, answers, ranks in rows)
    source = {"path": str(tmp_path / "ranked.csv"), "columns": {"responses": "answers"}}
    both = loaded("preferences", source, heldout=1)
    assert {(row["prompt"], row["chosen"]) for row in (*both.train, *both.test)} == {("Sky?", "Blue."), ("[1]", "b")}


def test_messages_keep_their_tool_calls_and_nothing_is_filled_in(tmp_path):
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "look", "arguments": {"at": "sky"}}}],
    }
    turns = [{"role": "user", "content": "Sky?"}, call, {"role": "tool", "content": "blue"}]
    rows = [
        {"messages": [*turns, {"role": "assistant", "content": "Blue."}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
    ]
    both = loaded("sft", {"path": written(tmp_path / "a.jsonl", rows)}, heldout=1)
    assert sorted(map(str, [*both.train, *both.test])) == sorted(map(str, rows))


def test_columns_and_mapping_bring_other_names_and_plain_text_into_form(tmp_path):
    rows = [{"instruction": f"Q{i}?", "output": f"A{i}."} for i in range(10)]
    source = {
        "path": written(tmp_path / "a.jsonl", rows),
        "columns": {"prompt": "instruction", "completion": "output"},
        "mapping": "chat",
    }
    row = loaded("sft", source).train[0]
    assert row["prompt"][0]["role"] == "user" and row["completion"][0]["role"] == "assistant"


def test_rewards_get_the_columns_of_the_prompts(tmp_path):
    rows = [{"prompt": f"Q{i}?", "answer": i, "chosen": "a", "rejected": "b"} for i in range(10)]
    train = loaded("prompts", {"path": written(tmp_path / "a.jsonl", rows)}).train
    assert train.column_names == ["prompt", "answer"]


def test_a_column_that_only_later_rows_have_is_kept(tmp_path):
    rows = [{"prompt": f"Q{i}?"} | ({"answer": i} if i else {}) for i in range(10)]
    both = loaded("prompts", {"path": written(tmp_path / "a.jsonl", rows)}, heldout=1)
    assert "answer" in both.train.column_names


def test_rankings_become_pairs_and_both_numbers_are_told(tmp_path, caplog):
    rows = [{"prompt": f"Q{i}?", "responses": ["a", "b", "c"], "ranking": [1, 2, 2]} for i in range(9)]
    rows.append({"prompt": "tie?", "responses": ["a", "b"], "ranking": [1, 1]})
    with caplog.at_level(logging.INFO):
        both = loaded("preferences", {"path": written(tmp_path / "a.jsonl", rows)})
    assert len(both.train) + len(both.test) == 18
    assert (
        "18 pairs of 10 rankings (1 with nothing but ties gave none); "
        "10 pairs of equal rank or equal text are left out" in caplog.text
    )


def test_short_and_long_rankings_weigh_the_same_and_equal_ones_need_no_weights(tmp_path):
    def ranked(number, of):
        return [
            {"prompt": f"Q{of}.{i}?", "responses": list("abcdefgh"[:of]), "ranking": list(range(of))}
            for i in range(number)
        ]

    mixed = loaded("preferences", {"path": written(tmp_path / "a.jsonl", ranked(11, 2) + ranked(11, 8))}, heldout=2)
    weight = {"2": 0.0, "8": 0.0}
    for row in mixed.train:
        weight[row["prompt"][1]] += row["weight"]
    prompts = {key: len({p for p in column(mixed.train) if p[1] == key}) for key in weight}
    assert weight["2"] / prompts["2"] == pytest.approx(weight["8"] / prompts["8"])
    assert sum(weight.values()) == pytest.approx(len(mixed.train))  # the mean is 1: no other learning rate
    assert "weight" not in mixed.test.column_names
    alike = loaded("preferences", {"path": written(tmp_path / "b.jsonl", ranked(11, 4))}, heldout=1)
    assert "weight" not in alike.train.column_names


def test_a_column_that_a_reward_calls_weight_is_left_alone(tmp_path):
    rows = [{"prompt": f"Q{i}?", "weight": i} for i in range(10)]
    assert "weight" in loaded("prompts", {"path": written(tmp_path / "a.jsonl", rows)}).train.column_names


@pytest.mark.parametrize("again", ["a.jsonl", "./b/../a.jsonl", "*.jsonl"])
def test_a_file_that_is_named_twice_is_refused(tmp_path, monkeypatch, again):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "a.jsonl", pairs(20))
    (tmp_path / "b").mkdir()
    message = refused("preferences", [{"path": "a.jsonl"}, {"path": again}])
    assert f"{tmp_path / 'a.jsonl'} is read twice (by data.preferences[0] and by data.preferences[1])" in message
    columns = {"chosen": "rejected", "rejected": "chosen"}
    assert loaded("preferences", [{"path": "a.jsonl"}, {"path": again, "columns": columns}])  # other rows of one file


# Presets, with rows written by hand in the shape of the dataset cards.


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def ultrafeedback(i):
    good, bad = turns(f"Question {i}?", f"Yes {i}."), turns(f"Question {i}?", f"No {i}.")
    scores = {"score_chosen": 8.5, "score_rejected": 7.0}
    return {"prompt": f"Question {i}?", "prompt_id": str(i), "chosen": good, "rejected": bad, "messages": good} | scores


def hh(i):
    return {key: f"\n\nHuman: Question {i}?\n\nAssistant: {key} {i}." for key in ("chosen", "rejected")}


def capybara(i):
    return {"source": "LessWrong", "messages": turns(f"Question {i}?", "Yes.") + turns("Why?", "So."), "num_turns": 2}


def tldr(i):
    return {"prompt": f"SUBREDDIT: r/a\n\nTITLE: {i}\n\nPOST: Long.\n\nTL;DR:", "completion": f" Short {i}."}


def tldr_pair(i):
    return {"prompt": tldr(i)["prompt"], "chosen": f" Short {i}.", "rejected": f" Shrt {i}."}


HUB = {
    "HuggingFaceH4/ultrafeedback_binarized": {
        f"{part}_{of}": [ultrafeedback(i) for i in range(start, start + 5)]
        for part, start in (("train", 0), ("test", 100))
        for of in ("sft", "prefs", "gen")
    },
    "Anthropic/hh-rlhf": {"train": [hh(i) for i in range(5)], "test": [hh(i) for i in range(100, 103)]},
    "trl-lib/Capybara": {"train": [capybara(i) for i in range(5)], "test": [capybara(i) for i in range(100, 103)]},
    "trl-lib/tldr": {
        "train": [tldr(i) for i in range(5)],
        "validation": [tldr(i) for i in range(200, 203)],
        "test": [tldr(i) for i in range(100, 103)],
    },
    "trl-lib/tldr-preference": {
        "train": [tldr_pair(i) for i in range(5)],
        "validation": [tldr_pair(i) for i in range(200, 203)],
    },
}


@pytest.fixture
def hub(monkeypatch):
    """The hub's `load_dataset`, with a few rows of the presets' datasets."""
    monkeypatch.setattr("datasets.load_dataset", lambda path, name=None, revision=None: HUB[path])


CHAT = [{"role": "user", "content": "Question 0?"}]
FIRST_ROWS = {
    ("ultrafeedback", "sft"): {"messages": turns("Question 0?", "Yes 0.")},
    ("ultrafeedback", "preferences"): {
        "prompt": CHAT,
        "chosen": turns("", "Yes 0.")[1:],
        "rejected": turns("", "No 0.")[1:],
    },
    ("ultrafeedback", "prompts"): {"prompt": CHAT, "prompt_id": "0", "score_chosen": 8.5, "score_rejected": 7.0},
    ("hh", "sft"): {"prompt": CHAT, "completion": turns("", "chosen 0.")[1:]},
    ("hh", "preferences"): {
        "prompt": CHAT,
        "chosen": turns("", "chosen 0.")[1:],
        "rejected": turns("", "rejected 0.")[1:],
    },
    ("hh", "prompts"): {"prompt": CHAT},
    ("tldr", "sft"): tldr(0),
    ("tldr", "preferences"): tldr_pair(0),
    ("tldr", "prompts"): {"prompt": tldr(0)["prompt"]},
    ("capybara", "sft"): {"messages": capybara(0)["messages"]},
    ("capybara", "prompts"): {"prompt": capybara(0)["messages"][:3], "source": "LessWrong", "num_turns": 2},
}


@pytest.mark.parametrize(("preset", "stage"), FIRST_ROWS)
def test_a_preset_serves_its_stages(hub, preset, stage):
    both = data.load(OmegaConf.load(PRESETS / f"{preset}.yaml"), stage, seed=0)
    assert both.train[0] == FIRST_ROWS[preset, stage]
    assert len(both.train) == 5 and len(both.test) in (3, 5)


def test_every_hub_preset_is_tested():
    assert {path.stem for path in PRESETS.glob("*.yaml")} == {preset for preset, _ in FIRST_ROWS} | {"world", "files"}


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
@pytest.mark.parametrize("stage", data.STAGES)
def test_every_preset_parses_or_says_what_it_has_not(preset, stage):
    cfg = OmegaConf.load(PRESETS / f"{preset}.yaml")
    if preset == "files" or (preset, stage) == ("capybara", "preferences"):
        with pytest.raises(UserError, match=rf"no {stage}, which .* needs?\. .*data\.{stage}\.path=<file or hub id>"):
            data.parse(cfg, stage)
    else:
        assert data.parse(cfg, stage)[0]


def test_the_hubs_bad_rows_are_skipped_with_their_number(hub, monkeypatch, caplog):
    equal = hh(7) | {"rejected": hh(7)["chosen"]}
    monkeypatch.setitem(HUB, "Anthropic/hh-rlhf", {"train": [equal, *HUB["Anthropic/hh-rlhf"]["train"]]})
    both = data.load(OmegaConf.merge(OmegaConf.load(PRESETS / "hh.yaml"), {"heldout": 1}), "preferences", seed=0)
    assert len(both.train) == 4
    assert "1 of 6 rows of Anthropic/hh-rlhf are skipped" in caplog.text and "train row 1: `chosen`" in caplog.text


def test_an_unknown_split_names_those_there_are(hub):
    source = {"path": "HuggingFaceH4/ultrafeedback_binarized", "split": "train_pref"}
    assert "has no split train_pref (did you mean `train_prefs`?); it has train_sft" in refused("preferences", source)


def test_an_unreachable_hub_says_that_it_is_no_file_either():
    message = refused("preferences", {"path": "nobody/nothing"})
    assert "data.preferences: nobody/nothing is no file or folder here, and the hub did not give it" in message


def test_the_world_serves_all_stages_with_the_same_held_out_prompts():
    cfg = OmegaConf.load(PRESETS / "world.yaml")
    read = {stage: data.load(cfg, stage, seed=1) for stage in data.STAGES}
    held = {stage: set(column(both.test)) for stage, both in read.items()}
    assert held["sft"] == held["preferences"] == held["prompts"]
    assert not held["sft"] & {prompt for both in read.values() for prompt in column(both.train)}


# Held out.


def test_a_tenth_of_the_prompts_is_held_out_by_hash_with_every_seed(tmp_path):
    path = written(tmp_path / "a.jsonl", pairs(100) + pairs(100))  # each prompt twice
    one, two = (loaded("preferences", {"path": path}, seed=seed) for seed in (0, 1))
    assert len(set(column(one.test))) == 10 and len(one.test) == 20
    assert not set(column(one.test)) & set(column(one.train))
    assert column(one.test) == column(two.test)


def test_a_number_of_prompts_can_be_held_out(tmp_path):
    assert len(loaded("preferences", {"path": written(tmp_path / "a.jsonl", pairs(50))}, heldout=7).test) == 7


def test_no_stage_trains_on_what_another_holds_out(tmp_path, caplog):
    # Three files with other rows in each, 60 of 100 prompts in common.
    cfg = {
        "sft": {
            "path": written(tmp_path / "a.jsonl", [{"prompt": r["prompt"], "completion": "Y."} for r in pairs(100)])
        },
        "preferences": {"path": written(tmp_path / "b.jsonl", pairs(100, 20))},
        "prompts": {"path": written(tmp_path / "c.jsonl", [{"prompt": r["prompt"]} for r in pairs(100, 40)])},
    }
    read = {stage: data.load(cfg, stage, seed=0) for stage in data.STAGES}
    held = {prompt for both in read.values() for prompt in column(both.test)}
    trained = {prompt for both in read.values() for prompt in column(both.train)}
    assert len(held) > 10 and not held & trained
    assert "training rows left out: data." in caplog.text


def test_a_conversation_is_held_out_with_its_continuations(tmp_path):
    short = [{"messages": turns(f"Q{i}?", "A.")} for i in range(20)]
    long = [{"messages": turns(f"Q{i}?", "A.") + turns("Why?", "So.")} for i in range(20)]
    both = loaded("sft", {"path": written(tmp_path / "a.jsonl", short + long)})
    assert len(both.test) == 4
    assert not {r["messages"][0]["content"] for r in both.test} & {r["messages"][0]["content"] for r in both.train}


@pytest.mark.parametrize(
    "dress",
    [
        lambda q: {"messages": [{"role": "system", "content": "Be kind."}, *speech(q, "Yes.")]},
        lambda q: {"prompt": q.replace(" ", "  "), "completion": "Yes."},
        lambda q: {"prompt": q.upper(), "completion": "Yes."},
        lambda q: {"prompt": unicodedata.normalize("NFD", q), "completion": "Yes."},
        lambda q: {"prompt": f"\n\nHuman: {q}\n\nAssistant:", "completion": "Yes."},
    ],
    ids=["system", "spaces", "case", "NFD", "transcript"],
)
def test_a_held_out_prompt_stays_out_in_another_dress(tmp_path, dress):
    questions = [f"Is café number {i} open?" for i in range(50)]
    ranked = [{"prompt": q, "chosen": "Yes.", "rejected": "No."} for q in questions]
    cfg = {
        "sft": {"path": written(tmp_path / "a.jsonl", list(map(dress, questions)))},
        "preferences": {"path": written(tmp_path / "b.jsonl", ranked)},
        "heldout": 0.2,
    }
    sft, preferences = (data.load(cfg, stage, seed=0) for stage in ("sft", "preferences"))
    keys = [{prompt_key(row) for row in part} for part in (sft.train, preferences.test)]
    assert len(keys[0]) == 40 and len(keys[1]) == 10 and not keys[0] & keys[1]


def test_texts_without_a_prompt_are_said_to_be_unchecked(tmp_path, caplog):
    cfg = {
        "sft": {"path": written(tmp_path / "a.jsonl", [{"text": f"Question {i}? Yes."} for i in range(20)])},
        "preferences": {"path": written(tmp_path / "b.jsonl", pairs(20))},
    }
    data.load(cfg, "sft", seed=0)
    assert "data.sft: `text` rows have no prompt, so it cannot be checked whether they contain prompts" in caplog.text


def test_a_test_file_is_held_out_and_its_prompts_leave_training_with_their_number(tmp_path, caplog):
    written(tmp_path / "in" / "train.jsonl", pairs(20))
    written(tmp_path / "in" / "test.jsonl", pairs(5, 18))  # two of them are in train
    both = loaded("preferences", {"path": str(tmp_path / "in")})
    assert (len(both.train), len(both.test)) == (18, 5)
    assert "2 of 20 training rows left out: data.preferences holds their prompts out" in caplog.text


def test_a_test_file_can_be_named_and_cut_to_a_number_of_prompts(tmp_path, caplog):
    source = {
        "path": written(tmp_path / "a.jsonl", pairs(20)),
        "test": written(tmp_path / "b.jsonl", pairs(9, 15)),  # five of them are in train
    }
    with caplog.at_level(logging.INFO):
        both = loaded("preferences", source, heldout=4)
    assert (len(both.train), len(both.test)) == (15, 4)
    assert "4 of the 9 rows of its test part are used" in caplog.text


def test_a_broken_source_of_another_stage_is_told_and_stops_nothing(tmp_path, caplog):
    both = loaded("preferences", {"path": written(tmp_path / "a.jsonl", pairs(20))}, sft={"path": "gone.jsonl"})
    assert len(both.train) == 18
    assert "data.preferences may train on prompts that data.sft holds out, which cannot be read" in caplog.text


def test_nothing_left_to_train_on_is_refused(tmp_path):
    message = refused("preferences", {"path": written(tmp_path / "a.jsonl", pairs(3))}, heldout=5)
    assert "data.preferences has no training rows: 0 training and 3 held-out rows" in message


# Mixtures.


def test_weights_are_the_shares_of_what_is_drawn(tmp_path, caplog):
    sources = [
        {"path": written(tmp_path / "a.jsonl", pairs(100)), "weight": 3},
        {"path": written(tmp_path / "b.jsonl", pairs(100, 1000)), "weight": 1},
    ]
    with caplog.at_level(logging.INFO):
        one, two, other = (loaded("preferences", sources, seed=seed) for seed in (0, 0, 1))
    # 90 rows of each train; all 90 of the first are three quarters, so 30 of the second
    from_b = [prompt for prompt in column(one.train) if len(prompt) > len("Question 99?")]
    assert (len(one.train), len(from_b)) == (120, 30)
    assert column(one.train) == column(two.train) != column(other.train)
    assert f"data.preferences[1]: 30 of the 90 training rows of {sources[1]['path']}" in caplog.text


def test_with_no_weights_a_mixture_has_all_rows(tmp_path):
    sources = [
        {"path": written(tmp_path / "a.jsonl", pairs(100))},
        {"path": written(tmp_path / "b.jsonl", pairs(10, 1000))},
    ]
    assert len(loaded("preferences", sources).train) == 99


def test_a_prompt_that_one_source_holds_out_is_trained_on_from_none(tmp_path):
    sources = [
        {"path": written(tmp_path / "a.jsonl", pairs(40))},
        {"path": written(tmp_path / "b.jsonl", pairs(40, 20))},
    ]
    both = loaded("preferences", sources)
    assert not set(column(both.train)) & set(column(both.test))


def test_max_rows_draws_a_sample_and_says_so(tmp_path, caplog):
    source = {"path": written(tmp_path / "a.jsonl", pairs(100)), "max_rows": 20}
    with caplog.at_level(logging.INFO):
        both = loaded("preferences", source)
    assert (len(both.train), len(both.test)) == (20, 2)
    assert "data.preferences: 20 of the 98 training rows" in caplog.text


def test_a_test_part_of_another_format_is_refused(tmp_path):
    chats = [{"chosen": turns("Q?", "Yes."), "rejected": turns("Q?", "No.")}]
    source = {"path": written(tmp_path / "a.jsonl", pairs(9)), "test": written(tmp_path / "b.jsonl", chats)}
    assert "data.preferences, test part: prompt + chosen + rejected as messages" in refused("preferences", source)


def test_a_mixture_of_formats_is_refused(tmp_path):
    sources = [
        {"path": written(tmp_path / "a.jsonl", [{"messages": turns(f"Q{i}?", "A.")} for i in range(5)])},
        {"path": written(tmp_path / "b.jsonl", [{"prompt": f"P{i}?", "completion": "B."} for i in range(5)])},
    ]
    message = refused("sft", sources)
    assert "data.sft[0]: messages as messages" in message and "data.sft[1]: prompt + completion as text" in message


# Refusals: one message with file, place, key, what was found, and an example.


def test_bad_rows_are_listed_with_line_key_and_a_good_row(tmp_path):
    rows = pairs(10)
    rows[2]["chosen"] = ""
    rows[4]["rejected"] = rows[4]["chosen"]
    del rows[6]["rejected"]
    message = refused("preferences", {"path": (path := written(tmp_path / "a.jsonl", rows))})
    assert message.splitlines() == [
        f"data.preferences: 3 of 10 rows of {path} cannot be used:",
        f"  {path}, line 3: `chosen` is empty",
        f'  {path}, line 5: `chosen` and `rejected` are the same: the text "Yes 4."',
        f"  {path}, line 7: `rejected` is missing; keys: prompt, chosen",
        "A good row:",
        '  {"prompt": "What color is the sky?", "chosen": "It is blue.", "rejected": "It is green."}',
        "Mend them, or leave them out: data.preferences.bad_rows=skip",
    ]


def test_five_of_many_bad_rows_are_listed(tmp_path):
    rows = pairs(10) + [{"prompt": "", "chosen": "a", "rejected": "b"}] * 20
    message = refused("preferences", {"path": written(tmp_path / "a.jsonl", rows)})
    assert "20 of 30 rows" in message and message.count("`prompt` is empty") == 5 and "... and 15 more" in message


def test_a_fault_of_every_row_is_told_once(tmp_path):
    source = {"path": written(tmp_path / "a.jsonl", pairs(10)), "columns": {"prompt": "promt"}}
    message = refused("preferences", source)
    assert message.count("`promt` (data.preferences.columns.prompt) is missing (did you mean `prompt`?)") == 1
    assert "every row:" in message


def test_bad_rows_are_skipped_on_request_and_told(tmp_path, caplog):
    rows = [*pairs(10), {"prompt": "", "chosen": "a", "rejected": "b"}]
    both = loaded("preferences", {"path": written(tmp_path / "a.jsonl", rows), "bad_rows": "skip"})
    assert len(both.train) + len(both.test) == 10
    assert "1 of 11 rows" in caplog.text and "line 11: `prompt` is empty" in caplog.text


def test_a_file_of_another_form_names_its_columns_and_the_nearest(tmp_path):
    rows = [{"prompt": "Sky?", "choosen": "Blue.", "reject": "Green."}]
    message = refused("preferences", {"path": (path := written(tmp_path / "a.jsonl", rows))})
    assert (
        f"{path}, line 1: no `chosen` (did you mean `choosen`?) and no `rejected` (did you mean `reject`?); "
        "columns: prompt, choosen, reject; allowed: prompt + responses + ranking, or chosen + rejected" in message
    )
    assert "data.preferences.columns.chosen=choosen data.preferences.columns.rejected=reject" in message


def test_a_first_row_with_no_known_columns_can_be_skipped(tmp_path):
    source = {"path": written(tmp_path / "a.jsonl", [{"about": "these pairs"}, *pairs(10)])}
    assert "line 1: no preferences can be read from its keys: about" in refused("preferences", source)
    both = loaded("preferences", source | {"bad_rows": "skip"})
    assert len(both.train) + len(both.test) == 10


def test_rows_of_two_formats_in_one_file_are_refused(tmp_path):
    rows = [*pairs(3), {"chosen": turns("Q?", "A."), "rejected": turns("Q?", "B.")}]
    message = refused("preferences", {"path": written(tmp_path / "a.jsonl", rows)})
    assert "line 4: this row has prompt + chosen + rejected as messages, but the rows before have" in message


def test_bad_conversations_get_a_conversation_as_example(tmp_path):
    rows = [{"messages": turns("Q?", "A.")}, {"messages": turns("Q?", "A.")[::-1]}]
    message = refused("sft", {"path": written(tmp_path / "a.jsonl", rows)})
    assert '`messages[0]` has the role the text "assistant"; first comes system or user' in message
    assert '{"messages": [{"role": "user"' in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3: not valid JSON: Expecting value at column 9"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "line 2: a row must be an object {column: value, ...}, found a list"),
        ("a.jsonl", b'{"text": "a"}\n"b"\n', 'line 2: a row must be an object {column: value, ...}, found the text'),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "line 2: not UTF-8 (byte 0xe9); save the file as UTF-8"),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.json", b'[{"text": "a"},\n{"text" "b"}]', "line 2: not valid JSON: Expecting ':' delimiter at column 9"),
        ("a.json", b'{"data":\n[]}', "line 1: the file must be a list of rows [{...}, {...}], found an object"),
        ("a.json", b"[]", "a.json is empty"),
        ("a.json", b'[{"text": "a"},\n{"text": "\xe9"}]', "line 2: not UTF-8"),
        ("a.csv", b'text,b\n"two\nlines",1\nonly one\n', "line 4: 1 cells under a header of 2 (text, b)"),
        ("a.csv", b'text\n"a\n', "not valid CSV: unexpected end of data"),
        ("a.csv", b"text\nb\n\xe9\n", "not UTF-8"),
        ("a.csv", b"text\n", "a.csv is empty"),
        ("a.parquet", b"no parquet", "row 1: not valid Parquet"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz cannot be read: Not a gzipped file"),
        ("a.txt", b"text", "is not in a known format; known are .jsonl, .json, .csv, .parquet"),
    ],
)  # fmt: skip
def test_a_broken_file_is_told_with_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    told = refused("sft", {"path": str(tmp_path / name)})
    assert message in told and str(tmp_path / name) in told and "data.sft" in told


def test_json_with_a_row_per_line_is_read_as_jsonl(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert len(loaded("sft", {"path": str(tmp_path / "a.json")}).train) == 1


def test_a_missing_file_names_the_nearest(tmp_path):
    path = written(tmp_path / "pairs.jsonl", pairs(3))
    assert f"did you mean {path}?" in refused("preferences", {"path": str(tmp_path / "pair.jsonl")})


def test_a_glob_or_folder_with_no_data_says_what_is_there(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    assert "leads to no data files (.jsonl, .json, .csv, .parquet); found notes.txt" in refused(
        "sft", {"path": str(tmp_path)}
    )
    assert "found nothing" in refused("sft", {"path": str(tmp_path / "*.jsonl")})


def test_all_faults_of_the_config_are_in_one_message():
    cfg = {
        "stf": 1,
        "heldout": 1.5,
        "sft": [
            {"path": "a.jsonl", "wieght": 1, "mapping": "chta", "max_rows": -1, "columns": "a"},
            {"path": "b.jsonl", "split": "train", "bad_rows": "drop"},
            {"weight": 1},
        ],
    }
    with pytest.raises(UserError) as told:
        data.parse(cfg, "sft")
    for part in (
        "data.stf is unknown (did you mean `sft`?)",
        "data.heldout is the number 1.5; it must be a share between 0 and 1, or a number of prompts",
        "data.sft[0].wieght is unknown (did you mean `weight`?); a source has path, name,",
        "data.sft[0].mapping=chta is unknown (did you mean `chat`?)",
        "data.sft[0].max_rows is the number -1; it must be a number above 0",
        'data.sft[0].columns is the text "a"; it must be a table {ours: theirs}',
        "data.sft[1].split=train can only be for a hub dataset, and data.sft[1].path=b.jsonl is none",
        "data.sft[1].bad_rows=drop is unknown; it can be refuse, skip",
        "data.sft[2] is an object with the keys weight; a source is {path:",
    ):
        assert part in str(told.value)


def test_a_weight_on_some_sources_only_is_refused():
    with pytest.raises(UserError, match="give a weight to each of the 2 sources, or to none"):
        data.parse({"sft": [{"path": "a.jsonl", "weight": 1}, {"path": "b.jsonl"}]}, "sft")


# Cost, fingerprints, lengths.


def test_reading_checking_and_describing_import_no_torch(tmp_path):
    path = written(tmp_path / "a.jsonl", pairs(20))
    code = (
        "import sys; from rlhf_recipes import data\n"
        f"cfg = {{'preferences': {{'path': {path!r}}}}}\n"
        "data.describe(cfg, 'preferences'); assert 'datasets' not in sys.modules\n"
        "data.load(cfg, 'preferences', 0); assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PRESETS.parents[1])


def test_the_fingerprint_changes_with_a_files_content_and_with_nothing_else(tmp_path):
    path = Path(written(tmp_path / "a.jsonl", pairs(20)))
    cfg = {"preferences": {"path": str(path), "columns": {"prompt": "prompt"}}}
    before = data.describe(cfg, "preferences")
    path.touch()
    assert data.describe(OmegaConf.create(cfg), "preferences") == before == json.loads(json.dumps(before))
    written(path, pairs(19) + pairs(1, 30))
    assert data.describe(cfg, "preferences") != before


def test_fewer_prompts_than_a_rollout_batch_are_refused_and_the_last_incomplete_one_is_counted():
    assert data.check_batch(64, 64) == data.check_batch(128, 64) == ""
    assert data.check_batch(1029, 64).startswith("5 of 1,029 prompts")
    with pytest.raises(UserError, match=r"63 training prompts .* do not fill a rollout batch, which takes 64"):
        data.check_batch(63, 64)


# Token ids, as the trainers take them.


def speech(*said):
    """A conversation in which user and assistant take turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def learned(row, tokenizer):
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def test_sft_learns_of_messages_what_it_learns_of_the_same_rows_as_prompt_and_completion(chatml):
    from datasets import Dataset

    whole = speech("Sky?", "It is blue.")
    rows = Dataset.from_list([{"messages": whole}]), Dataset.from_list([{"prompt": whole[:1], "completion": whole[1:]}])
    one, other = (data.demonstrations(part, chatml) for part in rows)
    assert one.to_list() == other.to_list() and one.column_names == ["input_ids", "labels"]
    assert learned(one[0], chatml) == "It is blue.<|im_end|>"


def test_sft_learns_every_turn_of_the_assistant_and_no_other_unless_it_is_asked_to(chatml):
    from datasets import Dataset

    rows = Dataset.from_list([{"messages": speech("Sky?", "Blue.", "Grass?", "Green.")}])
    assert learned(data.demonstrations(rows, chatml)[0], chatml) == "Blue.<|im_end|>Green.<|im_end|>"
    everything = data.demonstrations(rows, chatml, prompts_too=True)[0]
    assert everything["labels"] == everything["input_ids"]


def test_dpo_compares_the_assistants_turns_alone(chatml):
    from datasets import Dataset

    pair = {
        "prompt": speech("Sky?"),
        "chosen": speech("", "Blue.", "Sure?", "Yes.")[1:],
        "rejected": speech("", "No.")[1:],
    }
    (row,) = data.comparisons(Dataset.from_list([pair]), chatml)
    whole = row["prompt_ids"] + row["chosen_ids"]
    assert chatml.decode([i for i, own in zip(whole, row["chosen_mask"], strict=True) if own]) == (
        "Blue.<|im_end|>Yes.<|im_end|>"
    )
    assert row["rejected_mask"] == [0] * len(row["prompt_ids"]) + [1] * len("No.") + [1]


def test_trl_trains_on_the_tokens_and_labels_it_is_given(chatml, tiny_llama, tmp_path):
    """SFTTrainer takes `input_ids` and `labels` as they are, packed or not."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = data.demonstrations(
        Dataset.from_list([{"messages": speech("Sky?", "Blue.", "Grass?", "Green.")}] * 3), chatml
    )
    model = tiny_llama()
    model.resize_token_embeddings(len(chatml))
    for packing in (False, True):
        args = SFTConfig(str(tmp_path), packing=packing, max_length=256, report_to="none", use_cpu=True, bf16=False)
        given = SFTTrainer(model, args, train_dataset=rows, processing_class=chatml).train_dataset
        assert [label for row in given for label in row["labels"]] == [label for row in rows for label in row["labels"]]


def lengths(*numbers):
    from datasets import Dataset

    return Dataset.from_list([{"input_ids": [1] * n, "labels": [1] * n} for n in numbers])


def test_what_is_too_long_is_left_out_of_every_part_and_counted_in_one_line(chatml):
    from datasets import Dataset

    pairs = Dataset.from_list([{"prompt_ids": [1], "chosen_ids": [1] * n, "rejected_ids": [1]} for n in (3, 9)])
    asked = Dataset.from_list([{"prompt": "Q" * n} for n in (9, 10)])  # one byte a token, and one for the answer
    parts = {"training rows": lengths(1, 10, 11, 50), "pairs": pairs, "held-out prompts": asked, "nothing": None}
    (train, pairs, asked, nothing), said = data.fit(parts, chatml, 10)
    assert [len(row["input_ids"]) for row in train] == [1, 10]
    assert [len(row["chosen_ids"]) for row in pairs] == [3, 9]
    assert asked["prompt"] == ["Q" * 9] and nothing is None
    assert said == (
        "3 of 8 rows are longer than max_length=10 and left out everywhere: 2 training rows, 1 held-out prompts "
        "(longest: 50 tokens)"
    )


def test_rows_that_fit_stay_as_they_are(chatml):
    rows = lengths(1, 5)
    assert data.fit({"training rows": rows}, chatml, 5) == (
        [rows], "all 2 rows fit max_length=5 (longest: 5 tokens)"
    )  # fmt: skip
    assert data.fit({"training rows": rows}, chatml, None)[0] == [rows]


def test_texts_have_no_answer_to_lose_and_are_left_to_the_trainer_to_cut(chatml):
    rows = lengths(1, 50)
    parts, said = data.fit({"training rows": rows}, chatml, 10, texts=True)
    assert parts == [rows] and "1 of 2 rows are longer than max_length=10 and cut there" in said


def test_nothing_short_enough_is_refused_before_a_model_is_loaded(chatml):
    with pytest.raises(UserError, match=r"There are no training rows left: raise training\.max_length"):
        data.fit({"training rows": lengths(20, 30)}, chatml, 10)
