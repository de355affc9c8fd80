"""Access to the LM head of a model, with or without an adapter on it.

The loss multiplies hidden states with the head itself, so it must know every step from the hidden states to the model's
logits: `check_head` compares the logits of both on a probe batch and refuses a model whose logits differ.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from sftmix.functional import logits_of
from sftmix.model.compared import ROUNDING, n_embeddings, probe_ids, probing, some
from sftmix.model.packing import attending, attention_of, is_flash
from sftmix.model.varlen import VARLEN
from sftmix.words.errors import ConfigError

ADAPTER = "default"
"""PEFT's name of the one adapter that a model of ours has."""
FEWER = "all-linear also takes experts and routers: name others, as --model.lora.target_modules '[q_proj, v_proj]'"
"""The remedy where a model does not run with its adapters."""


def adapter_config(model: nn.Module) -> Any:
    """Return the PEFT config of the model's adapters; None for a model without adapters."""
    return getattr(model, "peft_config", {}).get(ADAPTER)


@dataclass(frozen=True)
class Head:
    """logits = softcap tanh(scale (hidden W^T + bias) / softcap), without the cap if softcap is None.

    Weight and bias are read from the module at each use: FSDP replaces them. With an adapter on the head, W is the
    effective weight, which each use of `weight` computes anew.
    """

    module: nn.Module
    softcap: float | None
    scale: float

    @property
    def weight(self) -> Tensor:
        """[V, D], the weight that a possibly adapted linear layer applies, differentiable in its adapters.

        With an adapter: W + scaling B A (LoRA, arXiv 2106.09685, equation 3), in the dtype of W. A module of
        modules_to_save: its trained copy. Read this once per forward: each use writes [V, D] anew.
        """
        layer = active(gathered(self.module))
        if not hasattr(layer, "base_layer"):
            return layer.weight
        weight_VD, a_RD, b_VR = layer.base_layer.weight, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        # scaling is alpha / r, with rsLoRA alpha / sqrt(r)
        return weight_VD + (layer.scaling[ADAPTER] * (b_VR @ a_RD)).to(weight_VD.dtype)

    @property
    def bias(self) -> Tensor | None:
        """[V], the bias that belongs to the effective weight; None if the layer has none."""
        layer = active(gathered(self.module))
        return getattr(getattr(layer, "base_layer", layer), "bias", None)

    def copied(self, *, base: bool = False) -> dict[str, Any]:
        """Return this formula with a copy of weight and bias, detached.

        base  without the adapter on the head, or of the module whose trained copy modules_to_save has
        """
        layer: Any = self
        if base:
            module = gathered(self.module)
            layer = getattr(module, "base_layer", getattr(module, "original_module", module))
        weight, bias = layer.weight, getattr(layer, "bias", None)
        copy = None if bias is None else bias.detach().clone()
        return {"weight": weight.detach().clone(), "bias": copy, "softcap": self.softcap, "scale": self.scale}

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of this formula, for probes and measurements; float32 or better."""
        return logits_of(hidden, self.weight, self.bias, softcap=self.softcap, scale=self.scale)


def head_of(model: PreTrainedModel) -> Head:
    """Return the LM head with its scale and soft-cap by the config; if this is ambiguous, by `check_head`.

    A model on the meta device has no logits to compare: it gets the first candidate, until `check_head` can decide.
    """
    candidates = _candidates(model)
    return candidates[0] if len(candidates) == 1 or model.device.type == "meta" else check_head(model)


def check_head(model: PreTrainedModel, *, trains: bool = False) -> Head:
    """Return the head whose logits equal `model(...).logits` on a probe batch.

    trains  the model is to be trained: its own loss must then be the mean NLL, and nothing else
    Raises ConfigError if the logits are not finite, if no formula fits them, if a state depends on later tokens, if the
    model changes its weights, or if it adds terms to the loss, which nobody would train.
    """
    candidates = _candidates(model)
    name = f"{type(model).__name__} ({model.config.model_type})"
    ids = probe_ids(model, 2, 8)
    later = 4
    remedy = FEWER if hasattr(model, "peft_config") else ""  # Phimoe fails with adapters on its experts
    changed = ids.clone()
    changed[:, later:] = (ids[:, later:] + 1) % n_embeddings(model)
    own = attention_of(model)
    # Neither a CPU nor float32 has flash attention; the formula of the head is the same.
    attention = "eager" if is_flash(own) or own == VARLEN else own
    runs = probing(model, f"{name} does not run as backbone and head", remedy)
    with _keeping_weights(model, name), attending(model, attention), runs:
        decoder = model.get_decoder()
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
        moved = (decoder(input_ids=changed, use_cache=False).last_hidden_state - hidden).abs()  # [2, 8, D]
        out = model(input_ids=ids, labels=ids if trains else None, use_cache=False)
        theirs = out.logits.double()
        differences = {head: float((head.logits(hidden).double() - theirs).abs().max()) for head in candidates}
    if not theirs.isfinite().all():
        raise _not_finite(model, name)
    # Both are the same matmul: only the rounding of a scale or cap may differ.
    limit = ROUNDING.get(hidden.dtype, 1e-2) * float(theirs.abs().max())
    best, difference = min(differences.items(), key=lambda entry: entry[1])
    if not difference <= limit:
        raise ConfigError(
            f"model.path: {name} is not supported: its logits differ from softcap(scale (hidden W^T + bias)) by up to "
            f"{difference:.3g} on a probe batch (allowed: {limit:.3g}), so the loss would train another model."
        )
    # Earlier states are equal to the bit, but for experts, whose matmuls get other shapes: in float32 they change 3e-7
    # times as much as the later ones. If later tokens are seen, 0.3 to 0.7 times as much; with random weights 0.004.
    if moved[:, :later].max() > ROUNDING.get(hidden.dtype, 0.1) * moved[:, later:].max():
        raise ConfigError(
            f"model.path: {name} sees later tokens: a change of them changes the states before them, so its NLL would "
            "be the NLL of tokens it has seen. If it is a causal model, mend its config.json (is_causal, "
            "use_bidirectional_attention); else name another model"
        )
    if trains:
        _check_loss(name, out, ids)
    return best


@contextmanager
def _keeping_weights(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Raise ConfigError if the model changes its own weights within: others would be exported than were trained."""
    # FSDP's forward puts other tensors into their place, so the weights are held.
    held = [(key, weight, weight._version) for key, weight in model.named_parameters()]
    yield
    for key, weight, version in held:
        if weight._version != version:
            raise ConfigError(
                f"model.path: {name} changes its own weights when it runs ({key}), so its export would have others "
                "than were trained. Set rescale_every to 0 in its config.json (RWKV; for a hub id in a copy: hf "
                "download ID --local-dir DIR), or name another model"
            )


def _check_loss(name: str, out: Any, ids: Tensor) -> None:
    """Raise ConfigError for a model whose own loss is not the mean NLL; some take labels that are shifted already."""
    logits = out.logits.float()
    pairs = (logits[:, :-1], ids[:, 1:]), (logits, ids)  # the latter as BART's decoder
    either = [F.cross_entropy(z.flatten(0, 1), labels.flatten()) for z, labels in pairs]
    if all(abs(out.loss - nll) > 1e-5 * nll for nll in either):
        raise ConfigError(
            f"model.path: the loss of {name} has another term than the NLL, such as the balance of experts, which is "
            "not trained here. To train without it, set in config.json the coefficient of the term "
            "(router_aux_loss_coef) to 0, or output_router_logits to false, which TRL undoes unless that is 0 (for a "
            "hub id in a copy: hf download ID --local-dir DIR)"
        )


def _not_finite(model: PreTrainedModel, name: str) -> ConfigError:
    """Return the error of a model whose logits are not finite."""
    broken = []
    for key, weight in model.named_parameters():  # of which a rank may hold a sound shard
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        if not whole.isfinite().all():
            broken.append(key)
    return ConfigError(
        f"model.path: the logits of {name} are not finite numbers, and neither are {some(broken)}: name an "
        "undamaged copy of it"
    )


def _candidates(model: PreTrainedModel) -> list[Head]:
    """Return every head that the config can mean; a single one for a model without scale or cap.

    Raises ConfigError for a model without a head, or with an adapter on it that is not a constant sum of matrices.
    """
    module = model.get_output_embeddings()
    if module is None or model.config.is_encoder_decoder or model.get_decoder() in (model, module):
        raise ConfigError(
            f"model.path: {type(model).__name__} is not a decoder with an LM head, or gives no states before it "
            "(get_decoder)."
        )
    layer = active(module)
    if hasattr(layer, "base_layer"):
        dora = layer.use_dora[ADAPTER]
        if dora or getattr(layer.lora_dropout[ADAPTER], "p", 0.0):
            option, neutral = ("use_dora", "false") if dora else ("lora_dropout", "0")
            raise ConfigError(
                f"model.lora.{option} and an adapter on the LM head exclude each other: the fused loss takes the head "
                f"as one weight matrix. Leave the head out of model.lora.target_modules, set {option} to {neutral}, or "
                "train the head in full (model.lora.modules_to_save)."
            )
    config = model.config.get_text_config()

    def number(key: str) -> float:
        value = getattr(config, key, None)  # None, or a text: MPT's logit_scale may be "inv_sqrt_d_model"
        return float(value) if isinstance(value, (int, float)) else 0.0  # no formula has 0

    # Cohere, Falcon-H1, Muse Glimmer
    scales = [number(key) for key in ("logit_scale", "lm_head_multiplier", "output_multiplier")]
    if scaling := number("logits_scaling"):
        scales += [1 / scaling, scaling]  # Granite divides by it, HyperCLOVA X multiplies
    # Gemma 2, RecurrentGemma, xLSTM
    caps = (number(key) for key in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"))
    cap = next(filter(None, caps), None)
    return [Head(module, cap, scale) for scale in dict.fromkeys(filter(None, scales)) or [1.0]]


def gathered(module: nn.Module) -> Any:
    """Return the module with whole weights, which FSDP gathers unless a forward has; all ranks call it."""
    if isinstance(module, FSDPModule):
        module.unshard()
    return module


def active(module: nn.Module) -> Any:
    """Return the layer that computes: the module, or the trained copy of it (`modules_to_save`)."""
    return getattr(module, "modules_to_save", {ADAPTER: module})[ADAPTER]  # PEFT has the copies in a ModuleDict
