"""The methods that are compared, each as a model that is ready to train and the parameter groups of its optimizer.

Options of a method, as an experiment names them:

- ``spft``: any field of `SpftConfig`; ``relative_rate`` p makes each matrix' learning rate that of the run times
  rms(W) / mean rms(W) times (density / 0.005)^-p.
- ``lora``: ``r``, ``alpha`` (2 r by default), ``use_rslora``, ``use_dora``, ``init_lora_weights`` (as ``pissa``), and
  ``start: quantization_error``: the activation-weighted best low-rank approximation of W - Q(W), as LoftQ-like
  methods start.
- ``both``: those of ``spft``, and ``r``, ``alpha`` (2 r by default) and ``low_rank_rate`` of a low-rank branch beside
  each sparse one (RoSA, arXiv 2401.04679); the run's learning rate is that of the sparse values.
- ``shira``: ``r``. ``full``: none. ``none``: nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from axolotl_spft import DynamicMask, SparseAdamW, SpftConfig, select_mask
from axolotl_spft.tuner.state import spft_layers
from integration.evidence.evaluation import evaluating
from integration.evidence.low_rank import weighted_low_rank

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Ready(NamedTuple):
    """A model to train; ``trained`` counts the numbers that an optimizer changes, ``moved`` says that the model does
    not compute what its base computes, ``dynamic`` changes the mask on the way."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    trained: int
    moved: bool = False
    dynamic: DynamicMask | None = None


class Setting(NamedTuple):
    """What methods are built from; ``unquantized`` loads the base in its own dtype."""

    base: PreTrainedModel
    options: Mapping[str, Any]
    learning_rate: float
    batches: Callable[[], Iterable[dict[str, Tensor]]]
    loss_of: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    seed: int
    unquantized: Callable[[], PreTrainedModel]


def spft(setting: Setting) -> Ready:
    options = {"target_modules": PROJECTIONS, "seed": setting.seed, **setting.options}
    power = options.pop("relative_rate", None)
    model = get_peft_model(setting.base, SpftConfig(**options))
    select_mask(model, setting.batches(), setting.loss_of, learning_rate=setting.learning_rate)
    if power is None:
        groups = [{"params": _trainable(model), "lr": setting.learning_rate}]
    else:
        groups = _relative_groups(model, setting.learning_rate, power)
    # a repaired adapter begins nearer to the unquantized model than its base
    moved = bool(options.get("repair"))
    optimizer = SparseAdamW(groups, lr=setting.learning_rate, weight_decay=0.0)
    dynamic = DynamicMask(model) if options.get("reselect") else None
    return Ready(model, optimizer, _count(model), moved, dynamic)


def _relative_groups(model: nn.Module, learning_rate: float, power: float) -> list[dict]:
    layers = [layer for layer in spft_layers(model).values() if layer.mask("default").nnz]
    scales = [layer.read_weight().float().square().mean().sqrt().item() for layer in layers]
    mean = sum(scales) / len(scales)
    groups = []
    for layer, scale in zip(layers, scales):
        density = layer.mask("default").nnz / (layer.in_features * layer.out_features)
        rate = learning_rate * scale / mean * (density / 0.005) ** -power
        groups.append({"params": [layer.spft_values["default"]], "lr": rate})
    return groups


def lora(setting: Setting) -> Ready:
    options = dict(setting.options)
    start = options.pop("start", None)
    options["lora_alpha"] = options.pop("alpha", 2 * options["r"])
    model = get_peft_model(setting.base, LoraConfig(target_modules=PROJECTIONS, **options))
    if start == "quantization_error":
        _start_at_quantization_error(model, setting)
    # pissa and its like take their start out of the base weight, which rounds it
    moved = start is not None or "init_lora_weights" in options
    return Ready(model, _adamw(_trainable(model), setting.learning_rate), _count(model), moved)


@torch.no_grad()
def _start_at_quantization_error(model: nn.Module, setting: Setting) -> None:
    """B A = the best rank-r approximation of (W - Q(W)) diag(rms of the inputs), times diag(rms)^-1."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import resolve_quantization_backend

    layers = {name: layer for name, layer in model.base_model.model.named_modules() if isinstance(layer, LoraLayer)}
    scales = _input_rms(model, layers, setting.batches())
    weights = setting.unquantized().state_dict()
    for name, layer in layers.items():
        base_layer = layer.get_base_layer()
        quantized = resolve_quantization_backend(base_layer).get_base_weight(base_layer).float()
        error = weights[f"{name}.weight"].to(quantized) - quantized
        up, down = weighted_low_rank(error, scales[name], layer.r["default"])
        # the layer multiplies by its scaling, of which each factor takes its root off
        root = layer.scaling["default"] ** 0.5
        layer.lora_B["default"].weight.copy_(up / root)
        layer.lora_A["default"].weight.copy_(down / root)


def _input_rms(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The root mean square of each layer's input columns over the tokens that are no padding."""
    squares, tokens, kept = {}, 0, None

    def hook(name: str):
        def add(_, args: tuple) -> None:
            squares[name] = squares.get(name, 0) + args[0].float()[kept].square().sum(0)

        return add

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    with evaluating(model):
        for batch in batches:
            kept = batch["attention_mask"].bool()
            tokens += int(kept.sum())
            model(**batch)
    for each in hooks:
        each.remove()
    return {name: (total / tokens).sqrt() for name, total in squares.items()}


class _LowRank(nn.Module):
    """x -> alpha / r x A^T B^T, of (..., in_features); B begins at 0."""

    def __init__(self, in_features: int, out_features: int, r: int, alpha: float, device: torch.device):
        super().__init__()
        self.down = nn.Linear(in_features, r, bias=False, device=device)
        self.up = nn.Linear(r, out_features, bias=False, device=device)
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        nn.init.zeros_(self.up.weight)
        self.scale = alpha / r

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.up(self.down(x.to(self.up.weight.dtype)))


def both(setting: Setting) -> Ready:
    options = dict(setting.options)
    r, rate = options.pop("r"), options.pop("low_rank_rate")
    alpha = options.pop("alpha", 2 * r)
    ready = spft(setting._replace(options=options))
    branches = nn.ModuleList()
    for layer in spft_layers(ready.model).values():
        device = layer.spft_values["default"].device
        branch = _LowRank(layer.in_features, layer.out_features, r, alpha, device)
        branches.append(branch)

        def add(_, args: tuple, y: Tensor, branch: nn.Module = branch) -> Tensor:
            return y + branch(args[0]).to(y.dtype)

        layer.register_forward_hook(add)
    ready.model.low_rank = branches
    ready.optimizer.add_param_group({"params": list(branches.parameters()), "lr": rate})
    return ready._replace(trained=_count(ready.model))


def shira(setting: Setting) -> Ready:
    model = get_peft_model(
        setting.base, ShiraConfig(target_modules=PROJECTIONS, random_seed=setting.seed, **setting.options)
    )
    return Ready(model, _adamw(_trainable(model), setting.learning_rate), _count(model))


def full(setting: Setting) -> Ready:
    # in bf16 most steps would be rounded away: fp32 weights under autocast are how full fine-tuning is done
    model = setting.base.float()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(f".{projection}." in name for projection in PROJECTIONS))
    return Ready(model, _adamw(_trainable(model), setting.learning_rate), _count(model))


def rms_of_projections(model: nn.Module) -> float:
    """The root mean square of all weights that the methods train, of a base that is not quantized."""
    weights = [module.weight for name, module in model.named_modules() if name.rpartition(".")[2] in PROJECTIONS]
    squares = sum(weight.detach().double().square().sum() for weight in weights)
    return (squares / sum(weight.numel() for weight in weights)).sqrt().item()


def none(setting: Setting) -> Ready:
    return Ready(setting.base, None, 0)


METHODS: Mapping[str, Callable[[Setting], Ready]] = {
    "spft": spft,
    "lora": lora,
    "both": both,
    "shira": shira,
    "full": full,
    "none": none,
}


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in _trainable(model))


def _adamw(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
