"""The micro-batches of a rollout batch: every episode once, none with more padding than its longest fellow needs."""

import torch
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

from rlhf_recipes.ppo.rollout import Rollout

PROMPTS = [[3] * n for n in (2, 9, 1, 4, 9, 3)]
COMPLETIONS = [[7] * n for n in (5, 1, 1, 2, 6, 8)]  # 7, 10, 2, 6, 15, 11 tokens in all


def rollout(size=2, multiple=None):
    made = Rollout.padded(PROMPTS, COMPLETIONS, 0, torch.device("cpu"), multiple)
    made.sort(size, multiple)
    return made


def test_episodes_are_sorted_by_length_and_each_micro_batch_is_cut_to_its_longest():
    made = rollout()
    assert [m.rows.tolist() for m in made.micro_batches] == [[2, 3], [0, 1], [5, 4]]
    shapes = [tuple(made.inputs(m)[0].shape) for m in made.micro_batches]
    assert shapes == [(2, 4 + 2), (2, 9 + 5), (2, 9 + 8)]
    ids, mask = made.inputs(made.micro_batches[0])
    assert ids.tolist() == [[0, 0, 0, 3, 7, 0], [3, 3, 3, 3, 7, 7]]
    assert mask.tolist() == [[0, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]]


def test_no_token_is_cut_off():
    made = rollout()
    tokens = sum(int(made.inputs(m)[1].sum()) for m in made.micro_batches)
    assert tokens == sum(map(len, PROMPTS)) + sum(map(len, COMPLETIONS))


def test_widths_stay_multiples_where_trl_pads_to_multiples():
    made = rollout(multiple=4)
    for micro_batch in made.micro_batches:
        prompts, completions = micro_batch.of_prompts(made.input_ids[:, :12]), micro_batch.of_completions(made.mask)
        assert prompts.size(1) % 4 == completions.size(1) % 4 == 0


def test_what_was_split_joins_to_what_it_was():
    made = rollout()
    values, scores = torch.rand(6, 8) * made.mask, torch.rand(6)
    parts = made.split({"values": values, "scores": scores})
    assert torch.equal(made.join(parts["values"]), values)
    assert torch.equal(made.join(parts["scores"]), scores)


def test_trl_shuffles_micro_batches_and_hands_each_out_whole():
    made = rollout()
    batch = {"prompt_ids": made.input_ids[:, :9], "values": made.mask * 1.0, "count": torch.tensor(23), "absent": None}
    handed_out = split_tensor_dict(shuffle_sequence_dict(made.split(batch)), 3)
    assert sorted(int(b["micro_batch"]) for b in handed_out) == [0, 1, 2]
    for b in handed_out:
        micro_batch = made.micro_batches[int(b["micro_batch"])]
        assert torch.equal(b["prompt_ids"][0], micro_batch.of_prompts(batch["prompt_ids"]))
        assert torch.equal(b["values"][0], micro_batch.of_completions(batch["values"]))
        assert b["count"] == 23 and b["absent"] is None
