"""The shape of a base model, from its configuration alone: nothing is downloaded but that, nothing is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from axolotl_spft.bench.shapes import SHAPES as BENCH_SHAPES
from axolotl_spft.errors import SpftError, first_line

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

    from axolotl_spft.tuner.sparse_layer import SparseLayer

_QWEN = {"vocab_size": 152064, "tie_word_embeddings": False, "max_position_embeddings": 32768}
# name: (model_type, what its configuration says otherwise than by default)
SHAPES = {
    **{name: ("llama", shape) for name, shape in BENCH_SHAPES.items()},
    "qwen2.5-7b": ("qwen2", {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, **_QWEN,
    }),
    "qwen2.5-32b": ("qwen2", {
        "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
        "num_key_value_heads": 8, **_QWEN,
    }),
    "mixtral-8x7b": ("mixtral", {"num_hidden_layers": 32, "max_position_embeddings": 32768}),
    "gemma-2-2b": ("gemma2", {
        "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000, "tie_word_embeddings": True,
    }),
}  # fmt: skip
# hub names whose shapes are those above
_HUB_NAMES = {
    "meta-llama/Llama-3.1-8B": "llama-8b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-8b",
    "meta-llama/Llama-3.1-70B": "llama-70b",
    "meta-llama/Llama-3.1-70B-Instruct": "llama-70b",
    "Qwen/Qwen2.5-7B": "qwen2.5-7b",
    "Qwen/Qwen2.5-32B": "qwen2.5-32b",
    "google/gemma-2-2b": "gemma-2-2b",
    "mistralai/Mixtral-8x7B-v0.1": "mixtral-8x7b",
}

_TRUST = ": write `trust_remote_code: true` in the configuration if the code that the model brings may run"


class ModelShape(NamedTuple):
    """What memory depends on.

    Attributes:
        names: of the targeted matrices.
        targets: (out_features, in_features) of each targeted matrix.
        kept_targets: in_features of the targeted matrices whose input no norm can make again.
        dense_inputs: of what a dense gradient needs beside what a frozen model keeps anyway: the in_features of each
            tensor that targeted matrices read, once, but for the output of attention.
        quantizable: (out_features, in_features) of every matrix that a quantized base quantizes.
        other_entries: entries of all other parameters, each once.
        head_entries: of the output head.
        saved_entries: of the modules and biases that are trained whole.
        blocks: how many there are.
        block_norms: widths of one block's norms.
        hidden, intermediate, vocabulary, heads, key_value_heads, head_dim: as in the configuration.
        capped_logits: whether the logits go through a tanh, which keeps them.
        experts: whether there are any, whose activations are estimated.
        expert_entries: of the largest targeted parameter of experts, which backward makes a dense gradient of; 0 where
            none is targeted.
        expert_inputs: numbers that the targeted experts' products keep of each token in one block for backward.
        collected: numbers that a re-selection keeps of each token: what targets read, once, and their output gradients.
        remarks: of `axolotl_spft.planning.model.Model`: what is counted of a model that sees.

    All but the matrices and the entries is that of the text model, through which a token goes.
    """

    names: list[str]
    targets: list[tuple[int, int]]
    kept_targets: list[int]
    dense_inputs: list[int]
    quantizable: list[tuple[int, int]]
    other_entries: int
    head_entries: int
    saved_entries: int
    blocks: int
    block_norms: list[int]
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    key_value_heads: int
    head_dim: int
    capped_logits: bool
    experts: bool
    expert_entries: int = 0
    expert_inputs: int = 0
    collected: int = 0
    remarks: tuple[str, ...] = ()


def find_config(
    base_model: str, shape: str | None, trust_remote_code: bool = False, revision: str | None = None
) -> tuple[PretrainedConfig, str]:
    """The configuration of a base model, and where it came from.

    Args:
        base_model: a folder, or a name on the hub.
        shape: a name of `SHAPES`, or a ``config.json`` (the file or its folder), to be taken instead.
        trust_remote_code: whether code that comes with it may run.
        revision: of ``base_model``, on the hub.

    Raises:
        SpftError: there is none.
    """
    from transformers import AutoConfig

    if shape is not None:
        if shape in SHAPES:
            return _named(shape), f"shape {shape}"
        if not Path(shape).exists():
            raise SpftError(f"`--shape {shape}` is neither a file nor one of {', '.join(SHAPES)}: name one of them")
        try:
            return AutoConfig.from_pretrained(shape, trust_remote_code=trust_remote_code), shape
        except (OSError, ValueError) as error:
            told = f"`--shape {shape}` is no model's config.json ({first_line(error)})"
            raise SpftError(told + (_TRUST if _is_of_code(error) else "")) from error
    try:
        found = AutoConfig.from_pretrained(base_model, trust_remote_code=trust_remote_code, revision=revision)
        return found, f"config.json of {base_model}"
    except (OSError, ValueError) as error:
        if base_model in _HUB_NAMES:
            name = _HUB_NAMES[base_model]
            return _named(name), f"shape {name}, as {base_model}'s config.json cannot be had here"
        told = f"`base_model: {base_model}`: its config.json cannot be had ({first_line(error)})"
        if _is_of_code(error):
            raise SpftError(f"{told}{_TRUST}, or pass `--shape` with one of {', '.join(SHAPES)}") from error
        raise SpftError(f"{told}: pass `--shape` with the path of that file, or one of {', '.join(SHAPES)}") from error


def _is_of_code(error: Exception) -> bool:
    return "trust_remote_code" in str(error)


def _named(name: str) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING

    model_type, options = SHAPES[name]
    return CONFIG_MAPPING[model_type](**options)


def read_shape(config: PretrainedConfig, options: Mapping[str, Any], trust_remote_code: bool = False) -> ModelShape:
    """The shape of a model with a sparse adapter, made on the meta device.

    Args:
        options: of `SpftConfig`.
        trust_remote_code: whether code that comes with the configuration may run.

    Raises:
        SpftError: it is no language model, cannot be made, or has targets that cannot be adapted.
        SpftConfigError: ``target_modules`` names modules that are not there.
    """
    from peft import get_peft_model
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from axolotl_spft.config import SpftConfig
    from axolotl_spft.planning.model import make_model
    from axolotl_spft.plugin.module_names import check_module_names
    from axolotl_spft.salience.install import adapted_layers
    from axolotl_spft.tuner.expert_matrix import ExpertMatrix
    from axolotl_spft.tuner.layer import SpftLinear
    from axolotl_spft.tuner.shared_input import group_by_input
    from axolotl_spft.tuner.state import shapes_of

    model, part, text, remarks = make_model(config, trust_remote_code)
    head = model.get_output_embeddings()
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }
    quantizable = [tuple(module.weight.shape) for module in linear.values() if isinstance(module, nn.Linear)]
    entries = sum(parameter.numel() for parameter in model.parameters())
    block_norms = _norms_of_a_block(part)
    check_module_names(options, model)
    config_of_adapter = SpftConfig(task_type="CAUSAL_LM", **{**options, "init_weights": True, "mask_path": None})
    try:
        adapted = get_peft_model(model, config_of_adapter)
    except TypeError as error:
        # of a module that cannot be adapted, which training would end with too
        raise SpftError(str(error)) from error
    layers = adapted_layers(adapted)
    part_modules = {*part.modules(), adapted.get_output_embeddings()}
    of_text = {name: layer for name, layer in layers.items() if layer in part_modules}
    widths = {name: layer.in_features for name, layer in of_text.items() if isinstance(layer, SpftLinear)}
    saved = [
        p
        for name, p in adapted.named_parameters()
        if ".modules_to_save." in name or ("bias" in name and p.requires_grad)
    ]
    of_experts = [layer for layer in of_text.values() if isinstance(layer, ExpertMatrix)]
    heads = text.num_attention_heads
    experts = getattr(text, "num_experts_per_tok", None)
    intermediate = _most(text, "intermediate_size") or getattr(text, "n_inner", None) or 4 * text.hidden_size
    if experts:
        intermediate = experts * (getattr(text, "moe_intermediate_size", None) or intermediate)
        intermediate += getattr(text, "shared_expert_intermediate_size", None) or 0
    return ModelShape(
        names=list(layers),
        targets=list(shapes_of(layers).values()),
        # by how the field calls them: projections out of attention and out of the feed-forward network
        kept_targets=[
            layer.in_features
            for name, layer in of_text.items()
            if _reads_no_norm(name) and not isinstance(layer, ExpertMatrix)
        ],
        dense_inputs=[widths[names[0]] for names in group_by_input(widths) if not _reads_attention(names[0])],
        quantizable=quantizable,
        other_entries=entries - sum(rows * columns for rows, columns in quantizable),
        head_entries=head.weight.numel() if head is not None else 0,
        saved_entries=sum(parameter.numel() for parameter in saved),
        blocks=text.num_hidden_layers,
        block_norms=block_norms,
        hidden=text.hidden_size,
        intermediate=intermediate,
        vocabulary=text.vocab_size,
        heads=heads,
        key_value_heads=_most(text, "num_key_value_heads") or heads,
        head_dim=_most(text, "head_dim") or text.hidden_size // heads,
        capped_logits=bool(getattr(text, "final_logit_softcapping", None)),
        experts=bool(experts),
        expert_entries=max((layer.out_features * layer.in_features for layer in of_experts), default=0),
        expert_inputs=sum(layer.in_features for layer in of_experts) * (experts or 1) // text.num_hidden_layers,
        collected=_collected(part, of_text, group_by_input(widths), text.hidden_size),
        remarks=remarks,
    )


def _most(config: PretrainedConfig, name: str) -> int | None:
    """A size of the configuration; the largest, where its layers differ, of which it then tells none."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return max(getattr(each, name) for each in config.per_layer_config)


def _collected(part: nn.Module, layers: Mapping[str, SparseLayer], groups: list[list[str]], hidden: int) -> int:
    """What `axolotl_spft.dynamic.collect.Collector` keeps of each token.

    Args:
        part: of the model, that a token goes through, and its ``layers``.
        groups: names of the linear targets, those together that read one tensor.
        hidden: the width of what experts read and give.
    """
    from axolotl_spft.tuner.embedding import SpftEmbedding
    from axolotl_spft.tuner.experts import SpftExperts

    count = sum(layers[names[0]].in_features + sum(layers[name].out_features for name in names) for names in groups)
    for layer in layers.values():
        if isinstance(layer, SpftEmbedding):
            # of its tokens nothing counts beside the gradient of their rows; a tied head reads what it multiplies
            count += layer.in_features + len(layer.readers) * (layer.in_features + layer.out_features)
    return count + 2 * hidden * sum(isinstance(module, SpftExperts) for module in part.modules())


def _reads_no_norm(name: str) -> bool:
    return name.rpartition(".")[2] in ("o_proj", "down_proj", "out_proj", "dense", "fc2", "c_proj", "w2")


def _reads_attention(name: str) -> bool:
    return "att" in name and _reads_no_norm(name)


def _norms_of_a_block(model: nn.Module) -> list[int]:
    """The widths of the norms in the first block."""
    from torch.nn import ModuleList

    blocks: Any = next((module for module in model.modules() if isinstance(module, ModuleList) and len(module)), [])
    return [
        module.weight.numel()
        for module in (blocks[0].modules() if len(blocks) else [])
        if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None
    ]
