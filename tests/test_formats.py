"""What a good row is, what a ranking becomes, and what the model sees of a row."""

import pytest

from rlhf_recipes.data.formats import (
    EXAMPLES,
    FORMS,
    MAPPINGS,
    STAGES,
    BadRow,
    convert,
    example,
    extract_prompt,
    find_form,
    prompt_key,
    render,
    shown,
)

USER = {"role": "user", "content": "What color is the sky?"}
BLUE = {"role": "assistant", "content": "It is blue."}
GREEN = {"role": "assistant", "content": "It is green."}
SYSTEM = {"role": "system", "content": "Be brief."}
MORE = {"role": "user", "content": "And at night?"}


def converted(row, stage):
    form = find_form(row, stage)
    assert form is not None
    return convert(row, form, stage)


@pytest.mark.parametrize(("stage", "form"), [(stage, form) for stage in STAGES for form in FORMS[stage]])
def test_each_form_has_an_example_that_is_good(stage, form):
    rows = convert(EXAMPLES[form], form, stage)
    assert rows and example(form).startswith("{")
    assert example(form, conversational=True).count('"role"') >= (form != ("text",))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "The sky is", "completion": " blue."},
        {"prompt": [SYSTEM, USER], "completion": [BLUE]},
        {"messages": [SYSTEM, USER, BLUE, MORE, {"role": "assistant", "content": "Black."}]},
        {"text": "The sky is blue."},
        {"prompt": [USER], "completion": [BLUE], "tools": [{"name": "look"}]},
    ],
)
def test_sft_rows_stay_as_they_are(row):
    assert converted(row, "sft") == [row]


def test_sft_leaves_the_columns_of_others_behind():
    assert converted({"text": "Blue.", "source": "a"}, "sft") == [{"text": "Blue."}]


def test_preferences_keep_prompt_answers_and_margin():
    row = {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green.", "margin": 2, "source": "a"}
    assert converted(row, "preferences") == [{"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green.", "margin": 2.0}]


def test_the_common_beginning_of_two_conversations_is_their_prompt():
    row = {"prompt": "as plain text, for reading", "chosen": [SYSTEM, USER, BLUE], "rejected": [SYSTEM, USER, GREEN]}
    assert converted(row, "preferences") == [{"prompt": [SYSTEM, USER], "chosen": [BLUE], "rejected": [GREEN]}]


def test_the_common_beginning_of_two_texts_is_their_prompt():
    row = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    assert converted(row, "preferences") == [{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("The sky is blue.", "The sky is green."),
        ("The sky is blue.", "The sky is bright."),
        ("abc", "abcd"),
        ("abcd", "abc"),
        ([USER, BLUE], [USER, GREEN]),
        ([SYSTEM, USER, BLUE, MORE, BLUE], [SYSTEM, USER, BLUE, MORE, GREEN]),
        ([USER, BLUE], [USER, BLUE, MORE, GREEN]),
    ],
)
def test_extract_prompt_does_what_trl_does(chosen, rejected):
    from trl import extract_prompt as of_trl

    assert extract_prompt(chosen, rejected) == of_trl({"chosen": chosen, "rejected": rejected})


def test_a_ranking_gives_each_pair_with_different_ranks():
    # 4 responses make 6 pairs; one is a tie (b, c), so 5 are left.
    row = {"prompt": "Sky?", "responses": ["a", "b", "c", "d"], "ranking": [4, 2, 2, 1]}
    pairs = [(pair["chosen"], pair["rejected"]) for pair in converted(row, "preferences")]
    assert sorted(pairs) == [("b", "a"), ("c", "a"), ("d", "a"), ("d", "b"), ("d", "c")]


def test_a_ranking_of_ties_or_of_one_text_gives_no_pair():
    assert converted({"prompt": "Sky?", "responses": ["a", "b"], "ranking": [1, 1]}, "preferences") == []
    assert converted({"prompt": "Sky?", "responses": ["a", "a"], "ranking": [1, 2]}, "preferences") == []


def test_ranked_texts_after_a_conversation_become_the_assistants_turns():
    row = {"prompt": [USER], "responses": ["It is green.", "It is blue."], "ranking": [2, 1]}
    assert converted(row, "preferences") == [{"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Sky?"}, "Sky?"),
        ({"prompt": "Sky?", "completion": "Blue."}, "Sky?"),
        ({"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green."}, "Sky?"),
        ({"prompt": "Sky?", "responses": ["a", "b"], "ranking": [1, 2]}, "Sky?"),
        ({"messages": [SYSTEM, USER]}, [SYSTEM, USER]),
        ({"messages": [USER, BLUE, MORE, GREEN]}, [USER, BLUE, MORE]),
        ({"chosen": [USER, BLUE], "rejected": [USER, GREEN]}, [USER]),
        ({"prompt": "Sky?", "chosen": [USER, BLUE], "rejected": [USER, GREEN]}, [USER]),
    ],
)
def test_ppo_takes_the_prompt_part_of_any_row_and_keeps_the_columns_for_rewards(row, prompt):
    assert converted(row | {"answer": "blue", "n": 3}, "prompts") == [{"prompt": prompt, "answer": "blue", "n": 3}]


@pytest.mark.parametrize(
    ("stage", "row", "message"),
    [
        ("sft", {"prompt": "", "completion": "Blue."}, "`prompt` is empty"),
        ("sft", {"prompt": "Sky?", "completion": "  "}, "`completion` is empty"),
        ("sft", {"prompt": "Sky?", "completion": 3}, "`completion` must be text, found the number 3"),
        ("sft", {"prompt": None, "completion": "Blue."}, "`prompt` must be text, found null"),
        ("sft", {"text": ["Blue."]}, "`text` must be text, found a list of 1"),
        ("sft", {"prompt": [USER], "completion": "Blue."}, "both must be text, or both messages"),
        ("sft", {"messages": []}, "`messages` has no messages"),
        ("sft", {"messages": [USER]}, "ends with the turn of `user`; the last must be of assistant"),
        ("sft", {"messages": [USER, USER, BLUE]}, '`messages[1]` has the role the text "user"; after `user` comes '),
        ("sft", {"messages": [BLUE]}, "first comes system or user"),
        ("sft", {"messages": [USER, {"role": "assistant", "content": ""}]}, "`messages[1].content` is empty"),
        ("sft", {"messages": [{"from": "human", "value": "Sky?"}]}, "found an object with the keys from, value"),
        ("sft", {"prompt": [USER, BLUE], "completion": [BLUE]}, "the last must be of user or tool"),
        ("sft", {"prompt": [USER], "completion": [USER, BLUE]}, "after `user` comes assistant"),
        ("preferences", {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Blue."}, "are the same"),
        ("preferences", {"chosen": [USER, BLUE], "rejected": [USER, BLUE]}, "are the same"),
        ("preferences", {"chosen": "Blue.", "rejected": "Green."}, "no common beginning"),
        ("preferences", {"chosen": "Blue.", "rejected": [GREEN]}, "but `rejected` is a list of 1"),
        ("preferences", {"prompt": "Sky?", "chosen": "B", "rejected": "G", "margin": "2"}, '`margin` must be a number'),
        ("preferences", {"prompt": "S", "responses": ["a", "b"], "ranking": [1]}, "one rank for each of the 2"),
        ("preferences", {"prompt": "S", "responses": ["a", "b"], "ranking": [1, "x"]}, "`ranking[1]` must be a number"),
        ("preferences", {"prompt": "S", "responses": ["a", "b"], "ranking": [True, 2]}, "the truth value true"),
        ("preferences", {"prompt": "S", "responses": ["a"], "ranking": [1]}, "a list of two or more"),
        ("preferences", {"prompt": "S", "responses": ["a", ""], "ranking": [1, 2]}, "`responses[1]` is empty"),
        ("prompts", {"prompt": [USER, BLUE]}, "the last must be of user or tool"),
    ],
)  # fmt: skip
def test_a_bad_row_is_told_by_key_and_by_what_was_found(stage, row, message):
    with pytest.raises(BadRow) as told:
        converted(row, stage)
    assert message in str(told.value)


def test_a_missing_key_names_the_nearest():
    with pytest.raises(
        BadRow, match=r"`rejected` is missing \(did you mean `reject`\?\); keys: prompt, chosen, reject"
    ):
        convert({"prompt": "Sky?", "chosen": "Blue.", "reject": "Green."}, ("chosen", "rejected"), "preferences")


def test_a_long_value_is_shown_in_short():
    assert len(shown("x" * 1000)) < 70
    assert shown(True) == "the truth value true" and shown(2.5) == "the number 2.5"


def test_a_conversation_and_its_continuation_count_as_one_prompt():
    first = prompt_key({"prompt": [USER], "completion": [BLUE]})
    assert first == prompt_key({"messages": [USER, BLUE, MORE, GREEN]}) == prompt_key({"prompt": USER["content"] + " "})
    assert first != prompt_key({"prompt": [SYSTEM, USER]}) != prompt_key({"prompt": [MORE]})


# The rows below are written by hand in the shape that the dataset cards show.

HH = {
    "chosen": "\n\nHuman: What color is the sky?\n\nAssistant: Where?\n\nHuman: Here.\n\nAssistant: Blue,\n\nI think.",
    "rejected": "\n\nHuman: What color is the sky?\n\nAssistant: Where?\n\nHuman: Here.\n\nAssistant: No idea.",
}
HH_PROMPT = [USER, {"role": "assistant", "content": "Where?"}, {"role": "user", "content": "Here."}]


def test_a_transcript_of_hh_becomes_turns_and_two_last_answers():
    assert converted(MAPPINGS["hh_transcript"](HH), "preferences") == [
        {
            "prompt": HH_PROMPT,
            "chosen": [{"role": "assistant", "content": "Blue,\n\nI think."}],
            "rejected": [{"role": "assistant", "content": "No idea."}],
        }
    ]
    assert converted(MAPPINGS["hh_transcript"](HH), "prompts") == [{"prompt": HH_PROMPT}]


def test_sft_on_hh_learns_the_chosen_answer():
    assert converted(MAPPINGS["hh_chosen"](HH), "sft") == [
        {"prompt": HH_PROMPT, "completion": [{"role": "assistant", "content": "Blue,\n\nI think."}]}
    ]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("What color is the sky?", "must be a transcript that starts with"),
        (HH["rejected"], "are the same"),
        ("\n\nHuman: Sky?\n\nAssistant:", r"content` is empty"),
        (None, "must be text, found null"),
    ],
)
def test_a_broken_transcript_of_hh_is_a_bad_row(chosen, message):
    with pytest.raises(BadRow, match=message):
        converted(MAPPINGS["hh_transcript"](HH | {"chosen": chosen}), "preferences")


def test_chat_makes_plain_text_a_conversation():
    row = {"prompt": "What color is the sky?", "chosen": " It is blue.", "rejected": "It is green."}
    assert MAPPINGS["chat"](row) == {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}


# What the model sees.


def test_a_rendered_chat_ends_in_eos_as_a_rollout_does_though_the_template_goes_on(chatml):
    row = {"prompt": [SYSTEM, USER], "chosen": [BLUE], "rejected": [GREEN]}
    prompt_ids, completion_ids = render(row, chatml, "chosen")
    assert chatml.decode(prompt_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat color is the sky?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert chatml.decode(completion_ids) == "It is blue.<|im_end|>"
    assert chatml.decode(render(row, chatml, "rejected")[1]) == "It is green.<|im_end|>"
    assert completion_ids.count(chatml.eos_token_id) == 1


def test_a_rendered_prompt_has_the_ids_that_trl_generates_from(chatml):
    row = {"prompt": [USER], "completion": [BLUE]}
    batch = chatml.apply_chat_template(
        conversation=[row["prompt"]], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert render(row, chatml)[0] == batch["input_ids"][0]


def test_prompt_and_completion_together_are_what_sft_trains_on_up_to_eos(chatml):
    row = {"prompt": [USER, BLUE, MORE], "completion": [GREEN]}
    prompt_ids, completion_ids = render(row, chatml)
    whole = chatml.apply_chat_template(row["prompt"] + row["completion"], tokenize=True, return_dict=True)["input_ids"]
    assert prompt_ids + completion_ids == whole[: len(prompt_ids) + len(completion_ids)]
    assert chatml.decode(whole[len(prompt_ids) + len(completion_ids) :]) == "\n"


def test_plain_text_is_rendered_as_it_is_with_one_eos(chatml):
    prompt_ids, completion_ids = render({"prompt": "The sky is", "completion": " blue."}, chatml)
    assert chatml.decode(prompt_ids) == "The sky is"
    assert chatml.decode(completion_ids) == " blue.<|im_end|>"
    assert render({"prompt": "The sky is", "completion": " blue.<|im_end|>"}, chatml)[1] == completion_ids


def test_a_template_that_opens_the_answer_itself_is_cut_where_prompt_and_conversation_part(chatml):
    chatml.chat_template = chatml.chat_template.replace(r"assistant\n", r"assistant\n<think>\n")
    prompt_ids, completion_ids = render({"prompt": [USER], "completion": [BLUE]}, chatml)
    assert chatml.decode(prompt_ids).endswith("assistant\n<think>\n")
    assert chatml.decode(completion_ids) == "It is blue.<|im_end|>"
