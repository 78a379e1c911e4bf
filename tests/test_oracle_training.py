"""Sparse training equals masked dense training."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from axolotl_spft import SparseAdamW, SpftConfig, select_mask
from axolotl_spft.ops.mask.csr import positions
from axolotl_spft.ops.weight.stacked import as_stored
from axolotl_spft.salience.install import adapted_layers
from axolotl_spft.tuner.expert_matrix import ExpertMatrix
from tests.experts import EXPERT_MODELS, IDLE, PARAMETERS, tiny_gpt_oss, tiny_qwen3_moe
from tests.interpreter import DEVICE
from tests.models import ARCHITECTURES, token_batch

STEPS = 20
CLIP = 0.5


def dense_masks(model) -> dict[str, torch.Tensor]:
    """For each targeted weight where it is trained: bool, in the layout of storage."""
    masks = {}
    for name, layer in adapted_layers(model).items():
        mask = torch.zeros(layer.out_features, layer.in_features, dtype=torch.bool, device=DEVICE)
        mask.view(-1)[positions(layer.mask("default"), layer.in_features)] = True
        stored = as_stored(mask, layer.stored_weight.shape, layer.transposed)
        masks[name if isinstance(layer, ExpertMatrix) else f"{name}.weight"] = stored
    for name, parameter in model.base_model.model.named_parameters():
        if parameter.requires_grad and name.endswith("bias"):
            masks[name.replace(".base_layer.", ".")] = torch.ones_like(parameter, dtype=torch.bool)
    return masks


def train(model, parameters, optimizer, accumulate: int, before_clipping=lambda: None) -> list[float]:
    losses = []
    for step in range(STEPS):
        total = 0.0
        for part in range(accumulate):
            loss = model(**token_batch(seed=100 + step * accumulate + part)).loss / accumulate
            loss.backward()
            total += loss.item()
        before_clipping()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


BLOCK = (4, 5)


def is_of_whole_blocks(mask: torch.Tensor) -> bool:
    blocks = [block for rows in mask.split(BLOCK[0]) for block in rows.split(BLOCK[1], dim=1)]
    return all(block.all() or not block.any() for block in blocks)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_sparse_adamw_equals_masked_dense_adamw(architecture, accumulate, weight_decay):
    check_against_masked_dense(architecture, accumulate, weight_decay)


def test_blocks_train_as_masked_dense_adamw_does():
    masks = check_against_masked_dense("llama", 1, 0.1, pattern="block", block_size=list(BLOCK))
    assert all(map(is_of_whole_blocks, masks.values()))
    assert sum(bool(mask.any()) for mask in masks.values()) > len(masks) / 2


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [
        ("llama", ["embed_tokens", "lm_head", "q_proj"]),
        ("qwen2", ["lm_head", "q_proj"]),
        ("gpt2", ["wte", "wpe", "c_attn"]),
    ],
)
def test_embeddings_and_heads_train_as_masked_dense_adamw_does(architecture, targets):
    """Qwen2's and GPT-2's are tied: one delta, whose gradient both uses add to."""
    masks = check_against_masked_dense(
        architecture, 2, 0.1, tie_word_embeddings=architecture != "llama", target_modules=targets
    )
    assert sum(not any(part.isdigit() for part in name.split(".")) for name in masks) == 1 + (architecture != "qwen2")


@pytest.mark.parametrize("family", list(EXPERT_MODELS))
def test_experts_train_as_masked_dense_adamw_does(family):
    make, scope = EXPERT_MODELS[family], "row" if family == "mixtral" else "layer"
    masks = check_against_masked_dense(make, 1, 0.1, target_parameters=PARAMETERS, scope=scope)
    of_experts = {name: mask for name, mask in masks.items() if mask.ndim == 3}
    assert len(of_experts) == (2 if family == "deepseek_v3" else 4) and len(masks) > len(of_experts)
    # by rows, the expert that no token comes to has its share, which no gradient reaches
    assert all(bool(mask[IDLE].any()) == (family == "mixtral") for mask in of_experts.values())


@pytest.mark.parametrize("make", [tiny_qwen3_moe, tiny_gpt_oss])
def test_experts_in_one_grouped_product_train_as_masked_dense_adamw_does(make):
    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "intermediate_size": 16, "head_dim": 16}
    check_against_masked_dense(
        lambda: make("grouped_mm", **sizes), 1, 0.0, target_modules=[], target_parameters=PARAMETERS
    )


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_biases_train_as_dense_adamw_does(architecture):
    # the bias of keys hardly has a gradient: with the usual eps Adam would make steps of its rounding
    masks = check_against_masked_dense(architecture, 1, 0.0, eps=1e-3, bias="all")
    assert sum(name.endswith("bias") for name in masks) == {"qwen2": 6, "gpt2": 2 * 6 + 1}[architecture]


def check_against_masked_dense(
    architecture, accumulate, weight_decay, tie_word_embeddings=None, eps=1e-8, **options
) -> dict[str, torch.Tensor]:
    """The masks of the targeted weights, after the run with them has been compared.

    Args:
        architecture: a name of `ARCHITECTURES`, or what makes a model.
    """
    changes = {} if tie_word_embeddings is None else {"tie_word_embeddings": tie_word_embeddings}
    make = ARCHITECTURES.get(architecture, architecture)
    pretrained = make(**changes)
    start = {name: tensor.clone() for name, tensor in pretrained.state_dict().items()}
    sparse = get_peft_model(make(**changes), SpftConfig(density=0.07, samples=8, **options))
    select_mask(sparse, [token_batch(rows=4, seed=1), token_batch(rows=4, seed=2)])
    masks = dense_masks(sparse)

    values = [parameter for parameter in sparse.parameters() if parameter.requires_grad]
    optimizer = SparseAdamW(values, lr=1e-2, eps=eps, weight_decay=weight_decay)
    sparse_losses = train(sparse, values, optimizer, accumulate)
    trained = sparse.merge_and_unload().state_dict()

    dense = pretrained
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_(name in masks)
    weights = {name: parameter for name, parameter in dense.named_parameters() if name in masks}
    # decay toward the pretrained weights: AdamW on the difference D in W = W0 + D
    deltas = {name: torch.zeros_like(weight, requires_grad=True) for name, weight in weights.items()}
    reference = torch.optim.AdamW(deltas.values(), lr=1e-2, eps=eps, weight_decay=weight_decay)

    def write_weights() -> None:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(start[name] + deltas[name])

    def masked_gradients() -> None:
        for name, weight in weights.items():
            deltas[name].grad = weight.grad * masks[name]
            weight.grad = None

    reference.register_step_post_hook(lambda *_: write_weights())
    dense_losses = train(dense, deltas.values(), reference, accumulate, masked_gradients)

    assert trained.keys() == start.keys()
    for name, before in start.items():
        if tie_word_embeddings and name == "lm_head.weight":
            assert torch.equal(trained[name], sparse.get_input_embeddings().weight)
        elif name not in masks:
            assert torch.equal(trained[name], before)
        if name not in masks:
            continue
        changed = (weights[name].detach() - before)[masks[name]]
        # a matrix may have no room for a block
        assert not changed.numel() or changed.abs().max() > 1e-3  # training moved them by far more than the tolerance
        assert (trained[name] - weights[name]).abs().max() <= 1e-5 * weights[name].abs().max()
        assert torch.equal(trained[name][~masks[name]], before[~masks[name]])
        assert masks[name].ndim < 3 or torch.equal(trained[name][IDLE], before[IDLE])
    assert sparse_losses == pytest.approx(dense_losses, rel=1e-5)
    return masks
