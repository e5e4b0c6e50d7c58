"""Closed forms of the schedule and the average."""

import pytest
import torch
from torch import nn

from kinetok.infra.errors import ConfigError
from kinetok.infra.fit import PlayerConfig
from kinetok.infra.optim import Average, adamw, ema_decay, lr_factor


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    config = PlayerConfig(lr=1.0, warmup=4)
    assert [lr_factor(step, 12, config) for step in range(1, 6)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_falls_to_half_in_the_middle_and_towards_zero() -> None:
    config = PlayerConfig(lr=1.0, warmup=2)
    assert lr_factor(8, 12, config) == pytest.approx(0.5)
    factors = [lr_factor(step, 12, config) for step in range(3, 13)]
    assert factors == sorted(factors, reverse=True)
    assert 0 < factors[-1] < 0.03


def test_constant_stays_at_the_peak_and_a_long_warm_up_never_reaches_it() -> None:
    assert lr_factor(12, 12, PlayerConfig(lr=1.0, schedule="constant")) == 1.0
    assert lr_factor(12, 12, PlayerConfig(lr=1.0, warmup=24)) == 0.5


def test_the_decay_of_the_average_grows_up_to_its_limit() -> None:
    assert ema_decay(1, 0.999) == pytest.approx(2 / 11)
    assert ema_decay(10**6, 0.999) == 0.999


def test_the_average_of_constant_weights_is_the_weights() -> None:
    player = nn.Linear(3, 2)
    average = Average({"model": player}, 0.9)
    for step in range(1, 4):
        average.update(step)
    torch.testing.assert_close(dict(average.full()), {f"model.{name}": p.detach() for name, p in player.named_parameters()})


def test_the_average_continues_from_what_it_yielded() -> None:
    player, other = nn.Linear(3, 2), nn.Linear(3, 2)
    average, second = Average({"model": player}, 0.9), Average({"model": other}, 0.9)
    second.load(dict(average.full()))
    torch.testing.assert_close(dict(second.full()), dict(average.full()))


def test_biases_and_norms_are_not_decayed() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    module[1].weight.requires_grad_(False)
    groups = adamw(module, PlayerConfig(lr=1.0, weight_decay=0.1)).param_groups
    assert [(group["weight_decay"], [p.ndim for p in group["params"]]) for group in groups] == [(0.1, [2]), (0.0, [1, 1])]


def test_all_is_decayed_where_the_player_says_so() -> None:
    module, config = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), PlayerConfig(lr=1.0, weight_decay=0.1, decays="all")
    groups = adamw(module, config).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.1, 4)]
    assert "decays" not in PlayerConfig(lr=1.0).model_dump() and config.model_dump()["decays"] == "all"


def test_a_cosine_ends_at_its_floor() -> None:
    config = PlayerConfig(lr=1.0, floor=0.05)
    assert lr_factor(1, 100, config) == 1.0
    assert lr_factor(100, 100, config) == pytest.approx(0.05, abs=1e-3)
    assert lr_factor(51, 100, config) == pytest.approx(0.525)


def test_fields_that_came_later_are_not_written_at_their_defaults() -> None:
    """Or every key of before would change."""
    assert not {"eps", "floor"} & PlayerConfig(lr=1.0).model_dump().keys()
    changed = PlayerConfig(lr=1.0, eps=1e-6, floor=0.05)
    assert changed.model_dump(mode="json") == PlayerConfig(lr=1.0).model_dump(mode="json") | {"eps": 1e-6, "floor": 0.05}
    assert PlayerConfig.model_validate(changed.model_dump()) == changed


def test_modules_have_rates_of_their_own_and_the_inner_one_counts() -> None:
    module = nn.ModuleDict({"outer": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False)), "other": nn.Linear(3, 3, bias=False)})
    config = PlayerConfig(lr=2.0, weight_decay=0.1, rates={"outer": 0.5, "outer.1": 0.25})
    groups = adamw(module, config).param_groups
    found = {id(p): (group["rate"], group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    outer, other = module["outer"], module["other"]
    assert found[id(outer[0].weight)] == (0.5, 1.0, 0.1) and found[id(outer[0].bias)] == (0.5, 1.0, 0.0)
    assert found[id(outer[1].weight)] == (0.25, 0.5, 0.1) and found[id(other.weight)] == (1.0, 2.0, 0.1)
    assert "rates" not in PlayerConfig(lr=1.0).model_dump()


def test_a_rate_of_what_trains_nothing_is_refused() -> None:
    module = nn.ModuleDict({"encoder": nn.Linear(2, 2), "frozen": nn.Linear(2, 2).requires_grad_(False)})
    with pytest.raises(ConfigError, match="rates: enc, frozen trains nothing; modules of this player are encoder, frozen"):
        adamw(module, PlayerConfig(lr=1.0, rates={"enc": 0.5, "frozen": 0.5, "encoder": 0.5}))
