"""Layers and module types from names."""

from __future__ import annotations

from axolotl_spft.module_types import layers_in_order, places_of


def test_llama_with_a_head():
    names = [f"model.layers.{i}.{kind}" for i in (10, 9) for kind in ("self_attn.q_proj", "mlp.up_proj")]
    places = places_of([*names, "lm_head"])
    assert places["model.layers.10.mlp.up_proj"] == ("10", "up_proj")
    assert places["lm_head"] == ("-", "lm_head")
    assert layers_in_order(places.values()) == ["9", "10", "-"]


def test_types_of_the_same_last_name_are_told_apart():
    places = places_of(["transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj", "transformer.h.0.mlp.c_fc"])
    assert [place.kind for place in places.values()] == ["attn.c_proj", "mlp.c_proj", "c_fc"]


def test_experts_are_one_type():
    places = places_of([f"model.layers.1.mlp.experts.{i}.w1" for i in range(3)])
    assert set(places.values()) == {("1", "w1")}


def test_stacks_of_layers_are_told_apart():
    names = ["model.language.layers.0.q_proj", "model.vision.blocks.0.qkv", "model.vision.blocks.1.qkv"]
    places = places_of(names)
    assert [place.layer for place in places.values()] == ["language.layers 0", "vision.blocks 0", "vision.blocks 1"]
    assert layers_in_order(places.values()) == ["language.layers 0", "vision.blocks 0", "vision.blocks 1"]


def test_a_module_that_is_itself_a_number():
    assert places_of(["0", "model.2"]) == {"0": ("-", "0"), "model.2": ("-", "model")}
