"""What a good row is, what a ranking becomes, and what the model sees of a row."""

import pytest

from rlhf_recipes.data.formats import (
    EXAMPLES,
    FORMS,
    MAPPINGS,
    STAGES,
    BadRow,
    convert,
    end_of_turn,
    example,
    extract_prompt,
    find_form,
    prompt_key,
    render,
    render_demonstration,
    render_learned,
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
        ("What color?\nBlue.", "What color?\nGreen."),
        ("天空是蓝色的", "天空是绿色的"),
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


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is bright.", "The sky is"),
        ("It costs 35 euros", "It costs 39 euros", "It costs"),
        ("Q: is it? It is blue.", "Q: is it? It isn't.", "Q: is it? It"),
        ("A: (yes)", "A: (yeah)", "A: ("),
        ("问: 天空是蓝色的", "问: 天空是绿色的", "问: 天空是"),
    ],
)
def test_the_common_beginning_of_two_texts_never_ends_inside_a_word(chosen, rejected, prompt):
    for stage in ("preferences", "prompts"):
        (row,) = converted({"chosen": chosen, "rejected": rejected}, stage)
        assert row["prompt"] == prompt
    (pair,) = converted({"chosen": chosen, "rejected": rejected}, "preferences")
    assert (pair["prompt"] + pair["chosen"], pair["prompt"] + pair["rejected"]) == (chosen, rejected)


def test_spaces_that_a_text_prompt_ends_in_go_to_its_answers_in_every_stage():
    """A tokenizer joins them to the word after them: all stages have to agree on where they are."""
    row = {"prompt": "Q: Sky? A:  ", "completion": "Blue.", "chosen": "Blue.", "rejected": "Green."}
    assert converted(row, "sft") == [{"prompt": "Q: Sky? A:", "completion": "  Blue."}]
    assert converted(row, "preferences") == [{"prompt": "Q: Sky? A:", "chosen": "  Blue.", "rejected": "  Green."}]
    assert converted(row, "prompts") == [{"prompt": "Q: Sky? A:"}]
    ranked = {"prompt": "Sky? ", "responses": ["Green.", "Blue."], "ranking": [2, 1]}
    assert converted(ranked, "preferences")[0] | {"weight": 1} == {
        "prompt": "Sky?", "chosen": " Blue.", "rejected": " Green.", "weight": 1
    }  # fmt: skip
    assert converted({"prompt": "Answer:\n", "completion": "Blue."}, "sft")[0]["prompt"] == "Answer:\n"


@pytest.mark.parametrize("stage", STAGES)
def test_rows_with_images_are_refused_by_the_name_of_their_column(stage):
    row = {"prompt": "What is this?", "completion": "A cat.", "chosen": "A cat.", "rejected": "A dog."}
    with pytest.raises(BadRow, match="`images` holds a list of 1; the recipes train on text alone"):
        converted(row | {"images": [b"png"]}, stage)
    assert converted(row | {"images": [], "image": None}, stage)


def test_a_ranking_gives_each_pair_with_different_ranks():
    # 4 responses make 6 pairs; one is a tie (b, c), so 5 are left.
    row = {"prompt": "Sky?", "responses": ["a", "b", "c", "d"], "ranking": [4, 2, 2, 1]}
    pairs = [(pair["chosen"], pair["rejected"]) for pair in converted(row, "preferences")]
    assert sorted(pairs) == [("b", "a"), ("c", "a"), ("d", "a"), ("d", "b"), ("d", "c")]


def test_a_ranking_of_ties_or_of_one_text_gives_no_pair():
    assert converted({"prompt": "Sky?", "responses": ["a", "b"], "ranking": [1, 1]}, "preferences") == []
    assert converted({"prompt": "Sky?", "responses": ["a", "a"], "ranking": [1, 2]}, "preferences") == []
    assert converted({"prompt": "Sky?", "responses": ["a", "a "], "ranking": [2, 1]}, "preferences") == []


def test_each_pair_of_a_ranking_weighs_one_part_of_all_its_pairs():
    """InstructGPT's 1 / C(K, 2), so that 2 and 8 responses count alike; a repeated response is no other response."""
    for number in (2, 3, 8):
        row = {"prompt": "Sky?", "responses": [str(i) for i in range(number)], "ranking": list(range(number))}
        assert sum(pair["weight"] for pair in converted(row, "preferences")) == pytest.approx(1)
    row = {"prompt": "Sky?", "responses": ["a", "a ", "b", "c"], "ranking": [1, 1, 2, 2]}
    assert [pair["weight"] for pair in converted(row, "preferences")] == [pytest.approx(1 / 3)] * 4


def test_ranked_texts_after_a_conversation_become_the_assistants_turns():
    row = {"prompt": [USER], "responses": ["It is green.", "It is blue."], "ranking": [2, 1]}
    assert converted(row, "preferences") == [{"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN], "weight": 1}]


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
        ("preferences", {"prompt": "Sky?", "chosen": "Blue. ", "rejected": "Blue."}, "are the same"),
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
    assert first != prompt_key({"prompt": [MORE]})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [SYSTEM, USER]},
        {"messages": [SYSTEM, USER, BLUE, MORE, GREEN]},
        {"prompt": "What color  is\nthe sky? "},
        {"prompt": "WHAT COLOR IS THE SKY?"},
        {"prompt": "What color is the sky\uff1f"},  # a full-width mark: another form of the same character
        {"prompt": "\n\nHuman: What color is the sky?\n\nAssistant:"},
        {"prompt": "Human: What color is the sky?\n\nAssistant: Where?\n\nHuman: Here.\n\nAssistant:"},
        {"prompt": "Be kind.\n\n### User:\nWhat color is the sky?\n\n### Assistant:\n"},
        {"prompt": "<|im_start|>user\nWhat color is the sky?<|im_end|>\n<|im_start|>assistant\n"},
        {"prompt": "<|system|>\nBe kind.</s>\n<|user|>\nWhat color is the sky?<|end|>\n<|assistant|>\n"},
        {"prompt": [{"role": "user", "content": "User: What color is the sky?"}]},
    ],
)
def test_a_prompt_in_another_dress_is_the_same_prompt(row):
    assert prompt_key(row) == prompt_key({"prompt": [USER]}) == "what color is the sky?"


def test_a_text_that_speaks_of_users_is_not_taken_for_a_transcript():
    texts = ["Users: how many are there?", "A human is what?", "User guides: why?", "Title: a\nPost: b"]
    assert [prompt_key({"prompt": text}) for text in texts] == [" ".join(text.casefold().split()) for text in texts]


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


def test_a_completion_of_several_turns_is_learned_without_the_users_turns_in_it(chatml):
    row = {"prompt": [SYSTEM, USER], "chosen": [BLUE, MORE, GREEN]}
    prompt_ids, ids, learned = render_learned(row, chatml, "chosen")
    assert (prompt_ids, ids) == render(row, chatml, "chosen")
    user = "<|im_start|>user\nAnd at night?<|im_end|>\n"
    assert chatml.decode(ids) == f"It is blue.<|im_end|>\n{user}<|im_start|>assistant\nIt is green.<|im_end|>"
    assert chatml.decode([i for i, own in zip(ids, learned, strict=True) if own]) == (
        "It is blue.<|im_end|>It is green.<|im_end|>"
    )


def test_a_template_without_an_end_of_turn_gets_eos_at_the_end_and_learns_no_user_turn(chatml):
    chatml.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    assert end_of_turn(chatml) is None
    ids, learned = render_demonstration({"messages": [USER, BLUE, MORE, GREEN]}, chatml)
    assert chatml.decode([i for i, own in zip(ids, learned, strict=True) if own]) == (
        "It is blue.\nIt is green.\n<|im_end|>"
    )


def test_an_answer_that_holds_the_end_of_turn_itself_ends_there(chatml):
    row = {"prompt": [USER], "completion": [{"role": "assistant", "content": "It is blue.<|im_end|>"}]}
    assert render(row, chatml) == render({"prompt": [USER], "completion": [BLUE]}, chatml)


def test_all_of_a_text_is_learned_with_one_eos(chatml):
    ids, learned = render_demonstration({"text": "The sky is blue."}, chatml)
    assert (ids, learned) == (chatml("The sky is blue.<|im_end|>")["input_ids"], [True] * len(ids))
    assert render_demonstration({"text": "The sky is blue.<|im_end|>"}, chatml)[0] == ids
