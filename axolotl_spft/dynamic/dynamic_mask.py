"""`DynamicMask`: exchanges the least of an adapter's values for the most promising positions outside of its mask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from tqdm import tqdm

from axolotl_spft.config import SpftConfig, option_names
from axolotl_spft.dynamic.collect import Collector
from axolotl_spft.dynamic.exchange import Exchange, exchange
from axolotl_spft.dynamic.history import FILE, Figures, History
from axolotl_spft.dynamic.originals import open_grown_originals
from axolotl_spft.engine.ranks import Ranks
from axolotl_spft.engine.zero3 import all_values
from axolotl_spft.engine.zero_state import is_zero_optimizer, rearrange_zero_
from axolotl_spft.errors import SpftConfigError, SpftError
from axolotl_spft.metrics import METRICS
from axolotl_spft.ops.mask.csr import positions
from axolotl_spft.optim import SparseAdamW
from axolotl_spft.optim.mask_changes import Slot
from axolotl_spft.optim.rearrange import check_follows, rearrange_, rearranged
from axolotl_spft.reselect_rules import VALUE_GRADIENT, Reselect, problems_beside, problems_of_block
from axolotl_spft.salience.install import adapted_layers, check_same_slots
from axolotl_spft.salience.metrics.metric import Metric, load_metric
from axolotl_spft.salience.metrics.statistics import GRADIENT, WEIGHT
from axolotl_spft.salience.scores import check_base, scorer
from axolotl_spft.tuner.load import record_mask
from axolotl_spft.tuner.state import shapes_of, slots_of
from axolotl_spft.tuner.targets import check_is_peft_model

# in the record of where a mask came from
RECORDED = "reselections"


class DynamicMask:
    """Changes the mask of an adapter while it is trained; the number of values of each matrix stays.

    ::

        mask = DynamicMask(model, fraction=0.2)
        for step, batch in enumerate(batches, 1):
            due = step % 200 == 0
            with mask.collecting(due):
                model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if due:
                print(mask.reselect(optimizer, step))

    Attributes:
        layers: those whose mask changes, by name.

    Args:
        model: a `PeftModel` whose adapter has a mask.
        fraction: share of each matrix' values that is exchanged; by default that of the config's ``reselect``, or 0.2.
        drop: ``value`` or ``value_gradient``, see `axolotl_spft.reselect_rules.Reselect`; by default the config's.
        adapter_name: the active adapter by default.

    Raises:
        SpftError: the adapter has no mask, or its mask cannot change.
        SpftConfigError: an option breaks its rule, or does not go with the adapter's others.
        SpftFileError: the adapter repairs a quantized base, and the unquantized weights cannot be read.
    """

    def __init__(
        self,
        model: nn.Module,
        fraction: float | None = None,
        drop: str | None = None,
        adapter_name: str | None = None,
    ):
        check_is_peft_model(model)
        self.model, self.adapter_name = model, adapter_name or model.active_adapter
        config = model.peft_config[self.adapter_name]
        self.options = _options_of(config, {"fraction": fraction, "drop": drop})
        self.metric = metric_on_the_way(config.salience)
        self.config = config
        self.layers = {
            name: layer
            for name, layer in adapted_layers(model).items()
            if self.adapter_name in layer.spft_values and layer.mask(self.adapter_name).nnz
        }
        if not self.layers:
            raise SpftError(f"adapter `{self.adapter_name}` has no mask that could change: call select_mask() first")
        check_base(self.metric, self.layers)
        self._originals = open_grown_originals(
            model.base_model.model, config, self.adapter_name, self.layers, Ranks.current()
        )
        self.collector = Collector(model.base_model.model, self.layers, self.adapter_name)
        self.history = History(self._masks(), shapes_of(self.layers))

    @contextmanager
    def collecting(self, when: bool = True) -> Iterator[None]:
        """Within the block, if ``when``, the backward passes of the model say where the mask may grow.

        What an earlier block has collected is added to, until `reselect` uses it.
        """
        if when:
            self.collector.start()
        try:
            yield
        finally:
            if when:
                self.collector.stop()

    @torch.no_grad()
    @torch.inference_mode(False)
    def reselect(self, optimizer: Any, step: int) -> Figures:
        """Exchange values by what was collected, after an optimizer step; all ranks must call it together.

        Dropped positions hold W again, bit for bit, and grown values begin with 0, their moments too; the optimizer's
        count of steps stays. Where the adapter repairs a quantized W, dropped positions are quantized again, and grown
        ones begin at the unquantized weight. A matrix whose gradient is not finite, or that no backward pass reached,
        keeps its mask.

        Args:
            optimizer: that trains the values: `SparseAdamW`, Adam or SGD of torch's, what accelerate or DeepSpeed's
                ZeRO wrap around one of them.
            step: how many steps it has made, for the ages.

        Raises:
            SpftError: nothing was collected, or the optimizer's state does not follow the values.
            SpftFileError: the unquantized weights of a repaired matrix cannot be read any more.
        """
        ranks, optimizer = Ranks.current(), _unwrapped(optimizer)
        zero = is_zero_optimizer(optimizer)
        inner = optimizer.optimizer if zero else optimizer
        self._check(optimizer, inner, zero)
        reached = ranks.sum_numbers(*self.collector.passes())
        if not any(reached):
            raise SpftError(
                "no gradients were collected: run the forward and the backward pass before a re-selection within "
                "`with dynamic_mask.collecting():`"
            )
        exchanged, passes = 0, dict(zip(self.layers, reached))
        with tqdm(
            total=len(self.layers), desc="Re-selection", unit="matrix", leave=False, disable=ranks.rank != 0, delay=2
        ) as bar:
            for group in self.collector.groups():
                whole = {
                    name: all_values(self.layers[name].spft_values[self.adapter_name], ranks)
                    for name in group
                    if passes[name]
                }
                found = {name: self._exchange(name, values, ranks) for name, values in whole.items()}
                for name, each in found.items():
                    if each is not None:
                        self._install(name, each, whole[name], optimizer, zero, ranks)
                        self.history.move(name, each.sources, step)
                        exchanged += int((each.sources < 0).sum())
                bar.update(len(group))
        self.collector.forget()
        slots = self.slots()
        check_same_slots(slots, ranks)
        if isinstance(inner, SparseAdamW):
            inner.keep_moments(slots)
        figures = self.history.summarize(self._masks(), exchanged, step)
        if exchanged:
            self._record(figures)
        return figures

    def slots(self) -> dict[str, Slot]:
        """What the values of all layers stand for now, as `SparseAdamW` takes it."""
        return slots_of(adapted_layers(self.model), self.adapter_name)

    def save(self, folder: str | Path) -> None:
        """Write the first mask and the ages of the values to a folder, beside the adapter."""
        self.history.save(Path(folder, FILE))

    def load(self, folder: str | Path) -> None:
        """Go on from what `save` wrote; the adapter's mask must be loaded already.

        Raises:
            SpftFileError: the file is damaged or belongs to another adapter.
        """
        self.history.load(Path(folder, FILE))

    def _check(self, optimizer: Any, inner: Any, zero: bool) -> None:
        merged = [name for name, layer in self.layers.items() if layer.merged]
        if merged:
            raise SpftError(f"the mask cannot change while an adapter is merged ({merged[0]}): call unmerge_adapter()")
        if isinstance(inner, SparseAdamW):
            inner.check_moments()
        if not zero:
            values = [layer.spft_values[self.adapter_name] for layer in self.layers.values()]
            check_follows(optimizer, [each for each in values if each.requires_grad])

    def _exchange(self, name: str, values: Tensor, ranks: Ranks) -> Exchange | None:
        layer = self.layers[name]
        mask, gradient = layer.mask(self.adapter_name), self.collector.take_gradient(name, ranks)
        values = values.to(mask.columns.device)
        if ranks.sum_numbers(int(torch.isfinite(gradient).all()))[0] < ranks.world:
            return None
        importance = values.to(torch.float32).abs()
        if self.options.drop == VALUE_GRADIENT:
            held = positions(mask, layer.in_features)
            own = ranks.own_positions(held, (layer.out_features, layer.in_features))
            importance *= ranks.concatenate(gradient.view(-1)[own.to(gradient.device)]).abs().to(importance.device)
        score_of = scorer(
            self.metric, {name: layer}, {GRADIENT: {name: gradient}}, ranks, self.config.seed or 0,
            self.config.lift_rank,
        )  # fmt: skip
        scores, per_row = score_of(0).contiguous(), self.config.scope == "row"
        if self.config.salience not in METRICS:
            # a function of the user's own may give back what it was given, the weight itself
            scores = scores.clone()
        return exchange(mask, layer.in_features, importance, scores, self.options.fraction, per_row, ranks)

    def _install(self, name: str, found: Exchange, whole: Tensor, optimizer: Any, zero: bool, ranks: Ranks) -> None:
        layer = self.layers[name]
        values = layer.spft_values[self.adapter_name]
        originals = None if self._originals is None else self._originals.after(name, found, ranks)
        if zero:
            rearrange_zero_(optimizer, values, found.sources, ranks)
        else:
            rearrange_(optimizer, values, found.sources)
        layer.set_mask(self.adapter_name, found.mask, rearranged(whole, found.sources.to(whole.device)), originals)

    def _masks(self) -> dict:
        return {name: layer.mask(self.adapter_name) for name, layer in self.layers.items()}

    def _record(self, figures: Figures) -> None:
        source = dict(self.config.mask_source or {})
        source[RECORDED] = source.get(RECORDED, 0) + 1
        source |= {
            "last re-selection after step": figures.step,
            "turnover": round(figures.turnover, 4),
            "of the first mask": round(figures.first_mask, 4),
            "mean age": round(figures.mean_age, 1),
        }
        record_mask(self.model.base_model, self.adapter_name, source)


def metric_on_the_way(salience: str) -> Metric:
    """The metric of the option ``salience``.

    Raises:
        SpftError: its score is not made of the gradient and the weight, which alone are at hand while a model trains.
    """
    metric = load_metric(salience)
    if GRADIENT not in metric.needs or metric.needs - {GRADIENT, WEIGHT}:
        raise SpftError(
            "`reselect` grows where the salience of the training's own gradients is largest, and "
            f"`salience: {salience}` needs {', '.join(sorted(metric.needs)) or 'no gradient'}: use one made of the "
            "gradient and the weight, such as `gradient`, or leave `reselect` out"
        )
    return metric


def _options_of(config: SpftConfig, given: dict[str, Any]) -> Reselect:
    block = {"every": 1, **(config.reselect or {}), **{name: each for name, each in given.items() if each is not None}}
    problems = problems_of_block(block) + problems_beside({name: getattr(config, name) for name in option_names()})
    if problems:
        raise SpftConfigError(problems)
    return Reselect(**block)


def _unwrapped(optimizer: Any) -> Any:
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
