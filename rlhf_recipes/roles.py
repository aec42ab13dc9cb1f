"""Policy, reference, reward and value as LoRA adapters on one base model, over one trunk that all of them share.

    role        adapter     head
    policy      `default`   the base's LM head
    reference   `ref`       the base's LM head
    reward      `reward`    a scalar head
    value       `value`     a scalar head

Reward models beyond the first of an ensemble are `reward_1`, `reward_2` ...; those that training does not see are
`guard`, `guard_1` ...

The *trunk* is the lower decoder layers: those in which all adapters are equal and none is trained. Its output is
computed once for a batch and serves every role and every pass.
"""

import copy
import inspect
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import pad, selective_log_softmax_and_entropy

from rlhf_recipes.config.options import adapter_faults
from rlhf_recipes.ensembles import Ensemble
from rlhf_recipes.errors import UserError
from rlhf_recipes.logps import TokenLogps
from rlhf_recipes.runs.manifest import MANIFEST

logger = logging.getLogger(__name__)

POLICY, REFERENCE, REWARD, VALUE, GUARD = "default", "ref", "reward", "value", "guard"
"""Adapter names. PEFT loads and saves `default` without being told, and TRL trains it."""

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
SCALING = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
"""What an adapter's tensors mean depends on these fields of its config."""
KL_LOGITS = {"cpu": 2**21, "cuda": 2**24}
"""Logits of each of two policies that are held at once to compare them, by device: 8 and 64 MB in float32."""
HEAD_KEY = "base_model.model.score.weight"
"""Where PEFT keeps the scalar head of a sequence classification adapter."""
HEAD_FILE = "head.json"
"""`mean` and `std` that the head's output is normalised by; PEFT's file has no place for them."""


class Roles:
    """The adapters of one PEFT model, the scalar heads beside it, and the trunk below them.

    Heads are modules of their own, in float32, never inside the model: nothing that walks over the model (generation,
    saving, quantization) can meet them.

    Args:
        model: a PEFT model of a causal LM whose policy is the adapter `default`.
        trunk: share of the decoder layers, from the bottom, that no role trains (0 to 1).
        frozen_top: likewise from the top, so that a window between the two is trained.
    """

    def __init__(self, model: PeftModel, trunk: float, frozen_top: float = 0.0):
        self.model = model
        self.decoder: nn.Module = model.get_base_model().base_model
        self.heads: dict[str, nn.Linear] = {}
        self.ensembles: dict[str, tuple[list[str], Ensemble]] = {}
        layers = getattr(self.decoder, "layers", None)
        if not isinstance(layers, nn.ModuleList):
            logger.warning("%s has no list of decoder layers: no trunk is shared", type(self.decoder).__name__)
            layers = nn.ModuleList()
        self.layers: list[nn.Module] = list(layers)
        # what a trunk is computed on: an adapter may sit there too
        self.below = [*itertools.takewhile(lambda child: child is not layers, self.decoder.children())]
        self.frozen_layers = int(trunk * len(self.layers))
        if self.frozen_layers and (names := list(self.layer_parameters(POLICY, self.below))):
            logger.warning("below the trunk, and so not trained (trunk=0 would): %s", ", ".join(names))
        self.frozen_top = self.layers[len(self.layers) - int(frozen_top * len(self.layers)) :]
        self.trunk_layers = 0
        self.trained: dict[str, list[nn.Parameter]] = {}
        self.full_precision(POLICY)
        if (lm_head := model.get_output_embeddings()) is not None:
            lm_head.register_forward_pre_hook(_contiguous_on_cpu)
        keep_as_packed(model)
        _positions_from_mask(self.decoder)
        _leave_casts_to_autocast(model)

    # ---- adapters and heads

    def parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters under the names that PEFT saves them by."""
        part = re.compile(rf"(\.lora_\w+|\.modules_to_save|\.trainable_tokens_delta)\.{adapter}(?=\.|$)")
        return {
            part.sub(lambda found: found[1].replace(".modules_to_save", ""), name): parameter
            for name, parameter in self.model.named_parameters()
            if part.search(name)
        }

    def layer_parameters(self, adapter: str, layers: list[nn.Module]) -> dict[str, nn.Parameter]:
        """Those of the adapter's parameters that sit in the given decoder layers."""
        inside = {id(p) for layer in layers for p in layer.parameters()}
        return {name: p for name, p in self.parameters(adapter).items() if id(p) in inside}

    def _add(self, adapter: str, config: PeftConfig) -> None:
        """Add an adapter whose tensors come next, in place of one that an earlier trainer left on the model."""
        if adapter in self.model.peft_config:
            logger.warning("the model has an adapter `%s` already, from an earlier trainer: it is replaced", adapter)
            self.model.delete_adapter(adapter)
        config = copy.copy(config)
        config.init_lora_weights = True  # some initializations would change the base
        type(self.model).add_adapter(self.model, adapter, config)
        self.full_precision(adapter)
        _leave_casts_to_autocast(self.model)

    def add_copy(self, adapter: str, source: str) -> None:
        """Add an adapter equal to another one in every tensor."""
        self._add(adapter, self.model.peft_config[source])
        copies = self.parameters(adapter)
        for name, parameter in self.parameters(source).items():
            copies[name].data.copy_(parameter.data)

    def full_precision(self, adapter: str) -> None:
        """Hold the adapter in float32: a bf16 weight of 0.02 does not feel an update of 1e-5."""
        for parameter in self.parameters(adapter).values():
            parameter.data = parameter.data.float()

    def add_saved(self, adapter: str, folder: Path) -> None:
        """Add the adapter in a folder with its own rank, scaling and layers, and its scalar head where it has one.

        Raises:
            UserError: the folder holds no adapter, or one of another base or of a kind that no role can be.
        """
        config = read_adapter_config(folder)
        base, name = config.base_model_name_or_path, self.model.get_base_model().name_or_path
        # by name where no stage made it; a stage knows its base by fingerprint, wherever that lies by now
        if base and name and Path(base).name != Path(name).name and not (folder / MANIFEST).exists():
            raise UserError(
                f"the adapter in {folder} was made on the base {base}, and this model is {name}. If their weights are "
                f"the same, say so: put {name!r} as base_model_name_or_path into its {CONFIG_FILE}."
            )
        try:
            self._add(adapter, on_a_causal_model(config))
        except ValueError as error:  # its layers are not in this model
            raise UserError(f"the adapter in {folder} does not fit: {error}") from error
        self.load(adapter, folder)

    def load(self, adapter: str, folder: Path, *, bias: float | None = None) -> None:
        """Put an adapter's saved tensors, and its scalar head where it has one, into an adapter that exists.

        Args:
            bias: of the head, which is then taken bit by bit as it was trained, and not in the units of its file.

        Raises:
            UserError: the folder holds no adapter, or one of another base, rank, scaling or set of target modules.
        """
        config, saved = read_adapter_config(folder), read_adapter(folder)
        head = saved.pop(HEAD_KEY, None)
        base = {name for name, _ in self.model.named_parameters()}  # PEFT saves embeddings too, adapted ones
        saved = {name: tensor for name, tensor in saved.items() if name not in base}
        if self.model.get_output_embeddings() is None:  # a classifier has no use for an LM head
            saved = {name: tensor for name, tensor in saved.items() if ".lm_head." not in name}
        held = get_peft_model_state_dict(self.model, adapter_name=adapter, save_embedding_layers=False)
        own_head = {HEAD_KEY: held.pop(HEAD_KEY)} if HEAD_KEY in held else {}
        shapes, wanted = ({n: tuple(t.shape) for n, t in tensors.items()} for tensors in (saved, held))
        configs = config, self.model.peft_config[adapter]
        scaling, own_scaling = ({name: getattr(c, name) or None for name in SCALING} for c in configs)
        for there, here in ((shapes, wanted), (scaling, own_scaling)):
            if there != here:
                name = min(n for n in there.keys() | here.keys() if there.get(n) != here.get(n))
                raise UserError(
                    f"the adapter in {folder} does not fit: {name} is {there.get(name, 'missing')} there and "
                    f"{here.get(name, 'missing')} in this model. It is fixed where the SFT adapter is made, as the "
                    "base is."
                )
        set_peft_model_state_dict(self.model, own_head | saved, adapter_name=adapter)
        if head is not None:
            scale = json.loads((folder / HEAD_FILE).read_text()) if (folder / HEAD_FILE).exists() else {}
            self.add_head(adapter, head, **(scale if bias is None else {"mean": -bias}))

    def hold(self, role: str, folders: Sequence[Path], ensemble: Ensemble | None = None) -> None:
        """Add the reward model in a folder as a frozen role, or those in several as an ensemble: a role each.

        Raises:
            UserError: a folder holds no reward model, or one of another base.
        """
        names = [member(role, index) for index in range(len(folders))]
        for name, folder in zip(names, folders, strict=True):
            self.add_saved(name, folder)
            if name not in self.heads:
                raise UserError(f"the adapter in {folder} has no scalar head: it is no reward model")
        self.ensembles[role] = (names, ensemble or Ensemble())
        self.activate(POLICY)

    def share_trunk(self, role: str) -> None:
        """Tie a held role's tensors to the policy's in those layers of the trunk where they are equal."""
        for layer in self.layers[: self.frozen_layers]:
            for name in self.members(role):
                self._tie([POLICY, name], layer)

    def members(self, role: str) -> list[str]:
        """The adapters of a role: itself, or those of its ensemble."""
        return self.ensembles[role][0] if role in self.ensembles else [role]

    def combine(self, role: str, scores: Tensor) -> Tensor:
        """The score of each episode (b,) by a role, from those of its members (m, b)."""
        ensemble = self.ensembles[role][1] if role in self.ensembles else Ensemble()
        return ensemble.combine(scores)

    def add_head(self, adapter: str, weight: Tensor | None = None, *, mean: float = 0.0, std: float = 1.0) -> nn.Linear:
        """Give the adapter a scalar head whose output is (w h - mean) / std; the weight (1, hidden) is zeros if None.

        A head that is there keeps its parameters and takes the new values: an optimizer may hold them.
        """
        hidden = self.model.config.get_text_config().hidden_size
        if adapter not in self.heads:
            head = nn.Linear(hidden, 1, device=self.model.device, dtype=torch.float32)
            self.heads[adapter] = head.requires_grad_(False)
        head = self.heads[adapter]
        head.weight.data.copy_(torch.zeros(1, hidden) if weight is None else weight.float() / std)
        head.bias.data.fill_(-mean / std)
        return head

    def save_scalar(self, adapter: str, folder: Path, mean: float = 0.0, std: float = 1.0) -> None:
        """Write an adapter and its head as PEFT writes a reward model: it loads here, and as a sequence classifier.

        Args:
            mean: with `std`, the units of the head's output: what it predicts is output * std + mean.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors = get_peft_model_state_dict(self.model, adapter_name=adapter, save_embedding_layers=False)
        tensors[HEAD_KEY] = self.heads[adapter].weight.data
        save_file({k: v.contiguous().cpu().clone() for k, v in tensors.items()}, folder / ADAPTER_FILE)
        config = copy.copy(self.model.peft_config[adapter])
        config.task_type, config.modules_to_save = "SEQ_CLS", ["score", *(config.modules_to_save or ())]
        config.inference_mode = True
        config.save_pretrained(folder)
        offset = self.heads[adapter].bias.item() + mean / std
        (folder / HEAD_FILE).write_text(json.dumps({"mean": -offset, "std": 1 / std}))

    # ---- which adapter is active, which weights train

    def train(self, *adapters: str) -> None:
        """From now on exactly these adapters are trainable, but for the frozen layers, with their heads.

        PEFT changes what is trainable whenever an adapter is switched or loaded, and saves every adapter it has. TRL
        and the Trainer call those methods; so they are shadowed on the model to keep to what was settled here: what
        trains stays trainable, what is frozen stays frozen, and the policy alone is saved (frozen roles are in the
        folders they came from).
        """
        self.trained = {}
        below = self.below if self.frozen_layers else []
        for adapter in adapters:
            frozen = self.layer_parameters(adapter, self.layers[: self.frozen_layers] + self.frozen_top + below)
            own = [p for name, p in self.parameters(adapter).items() if name not in frozen]
            self.trained[adapter] = own + list(self.heads[adapter].parameters() if adapter in self.heads else ())
            if not self.trained[adapter]:
                raise UserError(
                    f"nothing would be trained: all layers with an adapter are frozen, {self.frozen_layers} of "
                    f"{len(self.layers)} from the bottom (`trunk`) and {len(self.frozen_top)} from the top "
                    "(`frozen_top`). Lower them, or adapt other layers where the SFT adapter is made "
                    "(`layers_to_transform`)."
                )
        for module in (self.model, *self.heads.values()):
            module.requires_grad_(False)
        peft_class = type(self.model)

        def set_adapter(adapter_name: str, inference_mode: bool = False) -> None:
            self.activate(adapter_name)

        def load_adapter(*args: Any, **kwargs: Any) -> Any:
            loaded = peft_class.load_adapter(self.model, *args, **kwargs)
            self.activate(POLICY)
            return loaded

        self.model.set_adapter, self.model.load_adapter = set_adapter, load_adapter
        self.model.save_pretrained = partial(peft_class.save_pretrained, self.model, selected_adapters=[POLICY])
        self.activate(POLICY)

    def activate(self, adapter: str) -> None:
        """Make one adapter the active one, and leave what is trainable as it is."""
        type(self.model).set_adapter(self.model, adapter, inference_mode=True)
        for parameters in self.trained.values():
            for parameter in parameters:
                parameter.requires_grad_(True)

    @contextmanager
    def active(self, adapter: str | None) -> Iterator[None]:
        """Run as one role, or as the bare base (None), and as the policy again afterwards.

        A backward pass belongs inside: checkpointing recomputes with the adapter that is active *then*.
        """
        try:
            if adapter is None:
                with self.model.disable_adapter():
                    yield
            else:
                self.activate(adapter)
                yield
        finally:
            self.activate(POLICY)

    # ---- the trunk

    def find_trunk(self) -> int:
        """Settle how many lower layers all adapters share, tie their tensors to one storage, and return the number."""
        adapters = list(self.model.peft_config)
        equal = [self._tie(adapters, module) for module in (self.below if self.frozen_layers else [])]
        self.trunk_layers = 0
        for layer in self.layers[: self.frozen_layers] if all(equal) else []:
            if not self._tie(adapters, layer):
                break
            self.trunk_layers += 1
        return self.trunk_layers

    def _tie(self, adapters: Sequence[str], module: nn.Module) -> bool:
        """Let adapters share the first one's tensors in a module, unless they differ there, in tensors or scaling."""
        first, *others = [self.layer_parameters(adapter, [module]) for adapter in adapters]
        scalings = [
            [layer.scaling.get(adapter) for layer in module.modules() if isinstance(layer, LoraLayer)]
            for adapter in adapters
        ]
        for other, scaling in zip(others, scalings[1:], strict=True):
            if scaling != scalings[0] or other.keys() != first.keys():
                return False
            if any(not torch.equal(p, other[name]) for name, p in first.items()):
                return False
        for other in others:
            for name, parameter in first.items():
                other[name].data = parameter.data
        return True

    @contextmanager
    def _layers_replaced(self, layers: list[nn.Module], first: Tensor | None = None) -> Iterator[None]:
        """Let layers pass their input on; with `first`, the first of them emits that in place of its output."""

        def emit(hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
            return hidden_states if first is None else first

        def pass_on(hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
            return hidden_states

        with _forward_replaced({layer: emit if layer is layers[0] else pass_on for layer in layers}):
            yield

    @contextmanager
    def trunk_given(self, states: Tensor | None) -> Iterator[None]:
        """Inside, every forward pass takes the trunk's output (b, s, hidden) as given; None: nothing is replaced."""
        if states is None or self.trunk_layers == 0:
            yield
            return
        with self._layers_replaced(self.layers[: self.trunk_layers], first=states):
            yield

    @torch.no_grad()
    def trunk_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor | None:
        """Output of the trunk (b, s, hidden) for ids and mask (b, s); None where nothing is shared."""
        if self.trunk_layers == 0:
            return None
        kept: list[Tensor] = []
        hook = self.layers[self.trunk_layers - 1].register_forward_hook(
            lambda module, args, output: kept.append(output)
        )
        try:
            with self._layers_replaced(self.layers[self.trunk_layers :]):
                self.decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        finally:
            hook.remove()
        return kept[0]

    # ---- what the roles compute

    @contextmanager
    def decoder_outputs(self) -> Iterator[list[Any]]:
        """Inside, a list takes what the decoder returns in each forward pass."""
        kept: list[Any] = []
        hook = self.decoder.register_forward_hook(lambda module, args, output: kept.append(output))
        try:
            yield kept
        finally:
            hook.remove()

    @torch.no_grad()
    def exact_kl(
        self, adapters: Sequence[str | None], outputs: Sequence[Any], mask: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """KL(first || second) of the next token, in nats, at each token (b, t) of the completions; 0 outside the mask.

        It is the sum over the whole vocabulary: along a sampled completion it adds up to an unbiased estimate of the
        sequence's KL, of far lower variance than any estimate from the sampled tokens (arXiv 2504.10637). Logits are
        made again from hidden states, of a few tokens at once, and padding has none.

        Args:
            adapters: the two policies; None is the bare base.
            outputs: what `decoder_outputs` kept of a forward pass under each of them.
            mask: (b, t) of the completions' tokens, which come last.
        """
        columns = slice(-mask.size(1) - 1, -1)  # the states that say the next token
        states = [output.last_hidden_state[:, columns][mask] for output in outputs]
        most = KL_LOGITS.get(mask.device.type, KL_LOGITS["cuda"])
        size = max(most // self.model.config.get_text_config().vocab_size, 1)
        adapted = isinstance(self.model.get_output_embeddings(), BaseTunerLayer | AuxiliaryTrainingWrapper)
        parts = []
        for chunk in zip(*(x.split(size) for x in states), strict=True):
            logps = []
            for adapter, output, some in zip(adapters, outputs, chunk, strict=True):
                with self.active(adapter) if adapted else nullcontext():  # which takes long, for many small chunks
                    logps.append((self._logits(output, some).float().div_(temperature)).log_softmax(-1))
            difference = logps[0] - logps[1]
            parts.append(logps[0].exp_().mul_(difference).sum(-1))
        kl = torch.zeros(mask.shape, device=mask.device)
        kl[mask] = torch.cat(parts) if parts else kl[mask]
        return kl

    def _logits(self, output: Any, states: Tensor) -> Tensor:
        """Logits (n, vocabulary) of last hidden states (n, hidden), by the model's own head, scaling and all."""
        decoded = type(output)(**{**output, "last_hidden_state": states[None]})
        with _forward_replaced({self.decoder: lambda *args, **kwargs: decoded}):
            return self.model(input_ids=torch.zeros_like(states[None, :, 0], dtype=torch.long)).logits[0]

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states (b, s, hidden) under the active adapter; the LM head is not run."""
        return self.decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state

    def scalars(self, adapter: str, hidden: Tensor) -> Tensor:
        """The adapter's head on hidden states (..., hidden), in float32 whatever autocast says: (...)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.heads[adapter](hidden.float()).squeeze(-1)

    def scores(self, input_ids: Tensor, attention_mask: Tensor, pad_token_id: int, role: str = REWARD) -> Tensor:
        """Rewards (b,) of prompts with their completions by a reward role, whose adapter has to be active."""
        hidden = self.hidden_states(input_ids, attention_mask)
        rows = torch.arange(len(hidden), device=hidden.device)
        return self.scalars(role, hidden[rows, last_real_token(input_ids, pad_token_id)])

    def token_logps(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        completion_length: int,
        *,
        model: nn.Module | None = None,
        temperature: float = 1.0,
        entropy_grad: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and entropies (b, t) of the last `completion_length` tokens, under the active adapter.

        Only their logits are computed: memory does not grow with prompt length times vocabulary. Without gradients the
        entropies are None.

        Args:
            model: this model as a trainer wrapped it, so that gradients are reduced over processes.
        """
        logits = (self.model if model is None else model)(  # a compiled model would answer `or` with its length
            input_ids=input_ids,
            attention_mask=attention_mask,
            # the states that say the next token; as indices, since the one too many that a number keeps costs logits
            logits_to_keep=torch.arange(-completion_length - 1, -1, device=input_ids.device),
            use_cache=False,
        ).logits
        if temperature != 1:
            logits = logits / temperature
        tokens = input_ids[:, -completion_length:]
        if entropy_grad:
            return selective_log_softmax_and_entropy(logits, tokens)
        return TokenLogps.apply(logits, tokens)


def member(role: str, index: int) -> str:
    """The name of a member of an ensemble, counted from 0: `reward`, `reward_1`, `reward_2` ..."""
    return f"{role}_{index}" if index else role


@dataclass
class Episodes:
    """`b` prompts, padded on the left to `p` tokens, with their completions, padded on the right to `t`."""

    input_ids: Tensor  # (b, p + t)
    attention_mask: Tensor  # (b, p + t)
    mask: Tensor  # (b, t), bool: the completion's tokens, EOS included

    @classmethod
    def padded(
        cls,
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        pad_token_id: int,
        device: torch.device,
        pad_to_multiple_of: int | None = None,
    ) -> Self:
        """From rows of token ids, padded as TRL pads them."""

        def tensors(rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
            ids = [torch.tensor(row, dtype=torch.long) for row in rows]
            ones = [torch.ones_like(row) for row in ids]
            options = {"padding_side": side, "pad_to_multiple_of": pad_to_multiple_of}
            return pad(ids, pad_token_id, **options).to(device), pad(ones, 0, **options).to(device)

        (prompts, prompt_mask), (completions, mask) = tensors(prompt_ids, "left"), tensors(completion_ids, "right")
        return cls(torch.cat([prompts, completions], 1), torch.cat([prompt_mask, mask], 1), mask.bool())

    @property
    def completion_length(self) -> int:
        """`t`, the width of the completions."""
        return self.mask.size(1)


@contextmanager
def _forward_replaced(replacements: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, modules compute something else. Their attributes, which some models read, stay in place."""
    shadowed = {module: module.__dict__.get("forward") for module in replacements}
    for module, forward in replacements.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in shadowed.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved adapter, on the CPU.

    Raises:
        UserError: there is no adapter in the folder.
    """
    file = folder / ADAPTER_FILE
    if not file.exists():
        raise UserError(f"no adapter in {folder} (looked for {ADAPTER_FILE})")
    return load_file(file)


def check_adapter(config: PeftConfig | None) -> None:
    """Refuse an adapter that cannot stand beside others on one base.

    Raises:
        UserError: no LoRA adapter, one with biases, or one whose initialization changes the base.
    """
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        kind = "the model has no adapter `default`" if config is None else f"{config.peft_type.value} is no LoRA"
        raise UserError(
            f"{kind}: policy, reference, reward and value are LoRA adapters on one base. Use a LoraConfig "
            "(use_dora, use_rslora, rank_pattern and alpha_pattern may be set)."
        )
    if faults := adapter_faults(vars(config)):
        raise UserError("; ".join(faults))


def disable_dropout(model: nn.Module) -> None:
    """Switch off every dropout of a model, those too that its layers call as a function, and layers dropped whole."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):  # some layers read their config as they run
            for name, value in vars(holder).items() if holder is not None else ():
                if isinstance(value, float) and re.search("dropout|pdrop|layerdrop", name):
                    setattr(holder, name, 0.0)


def keep_as_packed(model: nn.Module) -> None:
    """Leave 4-bit weights as they are packed: on a CPU with bf16 instructions, bitsandbytes packs them anew at the
    first pass without gradients, and rounds their scales. The model would change in the middle of a run."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _positions_from_mask(decoder: nn.Module) -> None:
    """Let a decoder count the positions of padded rows (b, s) from their first real token, as generation does.

    Without it, models with absolute positions see a row padded on the left somewhere else than they generated it.
    """
    names = list(inspect.signature(decoder.forward).parameters)
    config = getattr(decoder, "config", None)
    if "position_ids" not in names or config is None or config.get_text_config() is not config:
        return  # without positions, or with those of images too, which the model counts itself

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if given.get("position_ids") is not None or ids is None or mask is None or ids.shape != mask.shape:
            return None  # they are given, or there is a cache
        return args, kwargs | {"position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}

    decoder.register_forward_pre_hook(count, with_kwargs=True)


def read_adapter_config(folder: Path) -> LoraConfig:
    """What a saved adapter says of itself.

    Raises:
        UserError: there is no adapter in the folder, or one that no role can be.
    """
    if not (folder / CONFIG_FILE).exists():
        raise UserError(f"no adapter in {folder} (looked for {CONFIG_FILE})")
    config = PeftConfig.from_pretrained(str(folder))
    check_adapter(config)
    return config


def on_a_causal_model(config: LoraConfig) -> LoraConfig:
    """The config of a reward model's adapter for the causal model, which has no scalar head."""
    config = copy.copy(config)
    saved = set(config.modules_to_save or ()) - {"score", "classifier"}
    config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", sorted(saved) or None, True
    return config


def _contiguous_on_cpu(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A forward pre-hook: on a CPU, a bf16 linear layer on a slice copies its weight once for every row of it."""
    return tuple(x.contiguous() if x.device.type == "cpu" else x for x in args)


def _leave_casts_to_autocast(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module._cast_input_dtype = _cast_outside_autocast


def _cast_outside_autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a LoRA layer does to its input. PEFT copies it to the adapter's float32 first, once for each of the layers
    that read it; autocast copies that back, and keeps each copy for the backward pass."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(dtype)


def last_real_token(input_ids: Tensor, pad_token_id: int) -> Tensor:
    """Index (b,) of the last token that is not padding: where a sequence classifier of transformers reads its score.

    Ids are compared, not the attention mask, since transformers does so: with a pad token that is the EOS token, the
    score is read before the EOS. A reward model is trained and used by this one rule.
    """
    positions = torch.arange(input_ids.size(1), device=input_ids.device)
    return (positions * (input_ids != pad_token_id)).argmax(dim=1)


def check_padding(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a reward model that was trained to read its scores at another token than `last_real_token` would find.

    Raises:
        UserError: of the tokenizer that is saved in its folder and of this one, one pads with its EOS.
    """
    file = folder / "tokenizer_config.json"
    saved = json.loads(file.read_text()) if file.exists() else {}
    tokens = [saved.get(name) for name in ("pad_token", "eos_token")]
    pad, eos = (token["content"] if isinstance(token, dict) else token for token in tokens)
    if pad is not None and (pad == eos) != (tokenizer.pad_token == tokenizer.eos_token):
        raise UserError(
            f"the reward model in {folder} pads with {pad} and ends answers with {eos}, but here {tokenizer.pad_token} "
            f"pads and {tokenizer.eos_token} ends: its scores would be read at another token than it was trained on. "
            f"Pad with {pad} (model.pad_token={pad!r}, or tokenizer.pad_token in a script)"
        )
