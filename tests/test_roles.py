"""Four adapters on one base: who is active, what trains, what is shared, what is saved."""

import copy
import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForSequenceClassification

from rlhf_recipes.errors import UserError
from rlhf_recipes.roles import HEAD_FILE, POLICY, REFERENCE, REWARD, VALUE, Roles, check_padding, last_real_token

IDS = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 10, 11, 1]])
ATTENTION = (IDS != 0).long()


@pytest.fixture
def roles(tiny_policy):
    roles = Roles(tiny_policy(), trunk=0.5)
    for adapter in (REFERENCE, REWARD, VALUE):
        roles.add_copy(adapter, POLICY)
    for adapter in (REWARD, VALUE):
        roles.add_head(adapter, torch.randn(1, 32))
    roles.train(POLICY, VALUE)
    roles.find_trunk()
    return roles


def trainable(roles):
    return {name for name, p in roles.model.named_parameters() if p.requires_grad}


def test_exactly_the_upper_layers_of_policy_and_value_and_the_value_head_train(roles):
    names = trainable(roles)
    assert names and all(".layers.2." in n or ".layers.3." in n for n in names)
    assert {n.split(".")[-2] for n in names} == {POLICY, VALUE}
    assert len(names) == 2 * 2 * 7 * 2  # adapters, layers, linear layers, A and B
    assert all(p.requires_grad for p in roles.heads[VALUE].parameters())
    assert not any(p.requires_grad for p in roles.heads[REWARD].parameters())


def test_a_window_of_layers_trains_where_the_top_is_frozen_too(tiny_policy):
    roles = Roles(tiny_policy(), trunk=0.25, frozen_top=0.5)
    roles.train(POLICY)
    assert {name.split(".layers.")[1][0] for name in trainable(roles)} == {"1"}


def test_embeddings_of_chosen_tokens_train_with_the_adapter_and_are_copied_with_it(tiny_llama):
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", trainable_token_indices=[7, 8])
    roles = Roles(get_peft_model(tiny_llama(), lora), trunk=0)
    roles.train(POLICY)
    (name,) = (name for name in trainable(roles) if "trainable_tokens_delta" in name)
    before = dict(roles.model.named_parameters())[name].clone()
    roles.model(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD(roles.trained[POLICY], lr=1.0).step()
    assert (dict(roles.model.named_parameters())[name] != before).any(dim=-1).all()
    roles.add_copy(REFERENCE, POLICY)
    policy, reference = (roles.parameters(adapter) for adapter in (POLICY, REFERENCE))
    assert all(torch.equal(policy[key], reference[key]) for key in policy) and policy.keys() == reference.keys()


def test_switching_adapters_in_any_way_leaves_what_is_trainable_as_it_was(roles):
    before = trainable(roles)
    with roles.active(REWARD):
        assert trainable(roles) == before
    roles.model.set_adapter(REFERENCE)  # as TRL's use_adapter does
    roles.model.set_adapter(POLICY)
    assert trainable(roles) == before


def test_a_role_is_active_inside_and_the_policy_afterwards_even_after_an_error(roles):
    with pytest.raises(RuntimeError), roles.active(VALUE):
        assert roles.model.active_adapter == VALUE
        raise RuntimeError
    assert roles.model.active_adapter == POLICY


def test_a_copy_equals_its_source_and_lives_apart_from_it(roles):
    policy, reference = roles.parameters(POLICY), roles.parameters(REFERENCE)
    assert policy.keys() == reference.keys()
    assert all(torch.equal(p, reference[n]) for n, p in policy.items())
    upper = next(n for n in policy if ".layers.3." in n)
    policy[upper].data.add_(1)
    assert not torch.equal(policy[upper], reference[upper])


def test_all_adapters_are_float32_whatever_the_base_is(tiny_policy):
    model = tiny_policy().to(torch.bfloat16)
    roles = Roles(model, trunk=0.5)
    roles.add_copy(REFERENCE, POLICY)
    assert {p.dtype for a in (POLICY, REFERENCE) for p in roles.parameters(a).values()} == {torch.float32}
    assert all(torch.equal(p, roles.parameters(REFERENCE)[n]) for n, p in roles.parameters(POLICY).items())


def test_lora_layers_take_bf16_as_it_is_and_compute_what_they_do_on_pefts_float32_copies(tiny_policy):
    """PEFT's copies are made again for each layer that reads an input, and kept for the backward pass."""
    results, kept = [], []
    for peft_alone in (True, False):
        torch.manual_seed(0)
        model = tiny_policy().to(torch.bfloat16)
        roles = Roles(model, trunk=0)
        roles.train(POLICY)
        if peft_alone:
            for module in model.modules():
                module.__dict__.pop("_cast_input_dtype", None)
        storages = {}

        def keep(x, storages=storages):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
            hidden = roles.hidden_states(IDS, ATTENTION)
        hidden.float().square().mean().backward()
        results.append([hidden, *(p.grad for p in roles.trained[POLICY])])
        kept.append(sum(storages.values()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] < kept[0]


def test_without_autocast_a_lora_layer_reads_its_input_in_float32(tiny_policy):
    roles = Roles(tiny_policy().to(torch.bfloat16), trunk=0)
    assert roles.hidden_states(IDS, ATTENTION).isfinite().all()


def test_the_lower_tensors_of_all_adapters_are_one_storage(roles):
    for layer in roles.layers[:2]:
        storages = [
            {p.data_ptr() for p in roles.layer_parameters(a, [layer]).values()}
            for a in (POLICY, REFERENCE, REWARD, VALUE)
        ]
        assert all(storage == storages[0] for storage in storages)
    upper = [next(iter(roles.layer_parameters(a, [roles.layers[3]]).values())).data_ptr() for a in (POLICY, VALUE)]
    assert upper[0] != upper[1]


def test_the_trunk_ends_where_an_adapter_differs(roles):
    assert roles.trunk_layers == 2
    lower = next(iter(roles.layer_parameters(REWARD, [roles.layers[1]]).values()))
    lower.data = lower.data + 1
    assert roles.find_trunk() == 1


def test_the_trunk_ends_where_a_scaling_differs(roles):
    roles.layers[1].mlp.up_proj.scaling[REWARD] *= 4
    assert roles.find_trunk() == 1


def test_adapters_on_the_embeddings_are_below_the_trunk_frozen_and_without_one_where_they_differ(tiny_llama, caplog):
    lora = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM", init_lora_weights=False)
    roles = Roles(get_peft_model(tiny_llama(), lora), trunk=0.5)
    roles.add_copy(REWARD, POLICY)
    roles.train(POLICY)
    assert roles.find_trunk() == 2 and not any("embed_tokens" in name for name in trainable(roles))
    assert "not trained (trunk=0 would): base_model.model.model.embed_tokens.lora_embedding_A" in caplog.text
    roles.layer_parameters(REWARD, roles.below).popitem()[1].data = torch.ones(32, 4)
    assert roles.find_trunk() == 0
    roles = Roles(roles.model, trunk=0)
    roles.train(POLICY)
    assert any("embed_tokens" in name for name in trainable(roles))


def test_token_embeddings_trained_with_the_adapter_are_part_of_it(tiny_llama):
    lora = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 4], task_type="CAUSAL_LM")
    roles = Roles(get_peft_model(tiny_llama(), lora), trunk=0)
    roles.add_copy(REFERENCE, POLICY)
    roles.train(POLICY)
    [name] = [name for name in roles.parameters(POLICY) if "trainable_tokens_delta" in name]
    policy, reference = (roles.parameters(adapter)[name] for adapter in (POLICY, REFERENCE))
    assert policy.requires_grad and torch.equal(policy, reference) and policy.data_ptr() != reference.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_with_the_trunk_equal_those_without_to_the_last_bit(tiny_policy, dtype):
    model = tiny_policy().to(dtype)
    roles = Roles(model, trunk=0.5)
    roles.add_copy(VALUE, POLICY)
    roles.train(POLICY, VALUE)
    assert roles.find_trunk() == 2
    results = []
    for trunk in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            states = roles.trunk_states(IDS, ATTENTION) if trunk else None
            with roles.trunk_given(states):
                logits = model(input_ids=IDS, attention_mask=ATTENTION, use_cache=False).logits[ATTENTION.bool()]
        logits.float().square().mean().backward()
        results.append((logits, [p.grad for p in roles.trained[POLICY]]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_layers_are_themselves_again_after_a_pass_with_the_trunk_given(roles):
    whole = roles.hidden_states(IDS, ATTENTION)
    with roles.trunk_given(roles.trunk_states(IDS, ATTENTION)):
        pass
    assert not any("forward" in layer.__dict__ for layer in roles.layers)
    assert torch.equal(roles.hidden_states(IDS, ATTENTION), whole)


def test_no_gradient_reaches_the_trunk_under_checkpointing(roles):
    roles.model.enable_input_require_grads()
    roles.model.gradient_checkpointing_enable({"use_reentrant": False})
    roles.model.train()
    reached = []
    roles.layers[0].self_attn.q_proj.register_full_backward_hook(lambda *_: reached.append(0))
    with roles.trunk_given(roles.trunk_states(IDS, ATTENTION)):
        roles.model(input_ids=IDS, attention_mask=ATTENTION, use_cache=False).logits.sum().backward()
    assert not reached
    assert roles.trained[POLICY][0].grad is not None


def test_rows_padded_on_the_left_are_scored_as_they_are_alone_where_positions_are_absolute():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=43, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2))
    lora = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    roles = Roles(get_peft_model(base, lora).eval(), trunk=0)
    padded = roles.token_logps(IDS, ATTENTION, 2)[0][1]
    alone = roles.token_logps(IDS[1:, 2:], ATTENTION[1:, 2:], 2)[0][0]
    torch.testing.assert_close(padded, alone)
    hidden = [roles.hidden_states(ids, mask)[-1, -1] for ids, mask in ((IDS, ATTENTION), (IDS[1:, 2:], None))]
    torch.testing.assert_close(*hidden)


def test_a_compiled_model_is_scored_with_though_it_answers_for_its_length(roles):
    class Compiled(torch.nn.Module):  # as torch.compile's
        def forward(self, **kwargs):
            return roles.model(**kwargs)

        def __len__(self):
            raise TypeError("object of type 'OptimizedModule' has no len()")

    logps = [roles.token_logps(IDS, ATTENTION, 2, model=model)[0] for model in (None, Compiled())]
    torch.testing.assert_close(*logps)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "eva"])
def test_a_copy_leaves_the_base_as_it_is_however_its_source_began(tiny_llama, init):
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=init)
    model = get_peft_model(tiny_llama(), lora)
    before = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.clone()
    roles = Roles(model, trunk=0)
    roles.add_copy(REFERENCE, POLICY)
    assert torch.equal(model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight, before)
    assert all(torch.equal(p, roles.parameters(REFERENCE)[n]) for n, p in roles.parameters(POLICY).items())


def reward_classifier(policy, **adapter):
    """A reward model as RewardTrainer leaves it, on the policy's base: a classifier with adapter and score head."""
    base = policy.get_base_model()
    torch.manual_seed(1)
    base.config.num_labels = 1
    classifier = LlamaForSequenceClassification(base.config)
    plain = {n.replace(".base_layer", ""): p for n, p in base.model.state_dict().items() if "lora_" not in n}
    classifier.model.load_state_dict(plain)
    adapter = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | adapter
    config = LoraConfig(task_type=TaskType.SEQ_CLS, modules_to_save=["score"], **adapter)
    return get_peft_model(classifier, config).eval()


@pytest.mark.parametrize(
    "adapter",
    [
        {},
        {"lora_alpha": 32},
        {"use_rslora": True},
        {"use_dora": True},
        {"r": 2, "target_modules": ["q_proj", "up_proj", "embed_tokens"]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ],
)
def test_the_reward_on_the_shared_base_equals_that_of_the_reward_model_alone(tiny_policy, tmp_path, adapter):
    policy = tiny_policy()
    classifier = reward_classifier(policy, **adapter)
    classifier.save_pretrained(tmp_path)
    alone = classifier(input_ids=IDS, attention_mask=ATTENTION).logits[:, 0]

    roles = Roles(policy.eval(), trunk=0)
    roles.add_saved(REWARD, tmp_path)
    with roles.active(REWARD):
        hidden = roles.hidden_states(IDS, ATTENTION)
        together = roles.scalars(REWARD, hidden[torch.arange(2), last_real_token(IDS, pad_token_id=0)])
    torch.testing.assert_close(together, alone)


def test_a_saved_critic_is_read_again_here_and_by_plain_peft(roles, tmp_path, tiny_llama):
    head = roles.heads[VALUE]
    head.bias.data.fill_(0.25)
    with roles.active(VALUE):
        hidden = roles.hidden_states(IDS, ATTENTION)
    values = roles.scalars(VALUE, hidden)
    roles.save_scalar(VALUE, tmp_path)
    assert json.loads((tmp_path / HEAD_FILE).read_text()) == {"mean": -0.25, "std": 1.0}

    roles.heads[VALUE].weight.data.zero_()
    roles.load(VALUE, tmp_path)
    assert torch.equal(roles.scalars(VALUE, hidden), values)

    base = tiny_llama()
    base.config.num_labels = 1
    classifier = LlamaForSequenceClassification(base.config)
    classifier.model.load_state_dict(base.model.state_dict())
    alone = PeftModel.from_pretrained(classifier, tmp_path).eval()(input_ids=IDS, attention_mask=ATTENTION).logits[:, 0]
    torch.testing.assert_close(alone + 0.25, values[torch.arange(2), last_real_token(IDS, pad_token_id=0)])


def test_a_head_is_normalised_to_the_mean_and_spread_it_was_measured_to_have(roles):
    weight = torch.randn(1, 32)
    raw = roles.add_head(REWARD, weight)(torch.ones(32)).item()
    scaled = roles.add_head(REWARD, weight, mean=2.0, std=4.0)(torch.ones(32)).item()
    assert scaled == pytest.approx((raw - 2) / 4, rel=1e-5)


def test_the_model_saves_its_policy_alone(roles, tmp_path):
    roles.model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_an_adapter_of_another_rank_is_refused_with_both_shapes(roles, tiny_llama, tmp_path):
    get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(
        tmp_path
    )
    with pytest.raises(UserError, match=r"does not fit.*\(8, \d+\) there and \(4, "):
        roles.load(REWARD, tmp_path)


@pytest.mark.parametrize("field", [{"lora_alpha": 32}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}])
def test_an_adapter_of_another_scaling_is_not_loaded_into_one_that_exists(roles, tiny_llama, tmp_path, field):
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **field)
    get_peft_model(tiny_llama(), lora).save_pretrained(tmp_path)
    [[name, value]] = field.items()
    with pytest.raises(UserError, match=re.escape(f"does not fit: {name} is {value} there and ")):
        roles.load(REWARD, tmp_path)


def test_an_adapter_made_on_another_base_is_refused_by_the_names_of_both(tiny_policy, tmp_path):
    def with_base(name):
        model = tiny_policy()
        model.get_base_model().name_or_path = model.peft_config[POLICY].base_model_name_or_path = name
        return model

    with_base("someone/large-instruct").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"made on the base someone/large-instruct, and this model is someone/large\."):
        Roles(with_base("someone/large"), trunk=0).add_saved(REWARD, tmp_path)
    Roles(with_base("/models/large-instruct"), trunk=0).add_saved(REWARD, tmp_path)  # the same, from a folder


def test_an_adapter_of_that_name_from_an_earlier_trainer_is_replaced(roles, caplog):
    again = Roles(roles.model, trunk=0.5)
    again.add_copy(REFERENCE, POLICY)
    assert "has an adapter `ref` already, from an earlier trainer: it is replaced" in caplog.text
    assert again.model.active_adapter == POLICY


def test_a_folder_without_an_adapter_is_named(roles, tmp_path):
    with pytest.raises(UserError, match=f"no adapter in {tmp_path}"):
        roles.load(REWARD, tmp_path)


def test_the_score_is_read_at_the_last_token_that_is_not_padding():
    ids = torch.tensor([[0, 5, 6, 1, 0, 0], [5, 6, 7, 8, 9, 1]])
    assert last_real_token(ids, pad_token_id=0).tolist() == [3, 5]
    # pad is EOS, as in SmolLM2: transformers' classifiers read the score before the EOS, and so does PPO
    assert last_real_token(ids, pad_token_id=1).tolist() == [5, 4]


def test_a_reward_model_that_reads_its_scores_elsewhere_is_refused(tokenizer, tmp_path):
    """Trained with the EOS as pad it reads before the EOS; with another pad, at it."""
    check_padding(tmp_path, tokenizer)  # no tokenizer is saved beside it: nothing is known
    tokenizer.save_pretrained(tmp_path)
    check_padding(tmp_path, tokenizer)
    other = copy.deepcopy(tokenizer)
    other.pad_token = other.eos_token
    with pytest.raises(UserError, match=r"pads with <pad> and ends answers with <eos>, but here <eos> pads.*'<pad>'"):
        check_padding(tmp_path, other)
    other.save_pretrained(tmp_path)
    check_padding(tmp_path, other)
    with pytest.raises(UserError, match=r"model\.pad_token='<eos>'"):
        check_padding(tmp_path, tokenizer)
