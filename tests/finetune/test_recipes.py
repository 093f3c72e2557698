"""Named sets of hyperparameters: the paper's values, and where every value comes from."""

from __future__ import annotations

from typing import Any

import pytest

from qlformat.finetune import options, recipes

# Table of the Guanaco runs on OASST1, arXiv 2305.14314.
GUANACO = {
    "rank": 64, "alpha": 16, "target": "all-linear", "max_steps": 1875, "seq_len": 512, "schedule": "constant",
    "beta2": 0.999, "grad_norm": 0.3, "group_by_length": True, "packing": False,
}  # fmt: skip
BY_SIZE = {7: (2e-4, 0.1), 13: (2e-4, 0.1), 33: (1e-4, 0.05), 65: (1e-4, 0.05)}


def in_force(
    recipe: str, billions: float, given: dict[str, Any] | None = None
) -> tuple[options.Options, dict[str, str]]:
    values, sources = recipes.resolve(
        recipe, round(billions * 1e9), {"seed": 3}, {"base": "b", "data": "d", **(given or {})}
    )
    return options.make(values), sources


@pytest.mark.parametrize("billions", BY_SIZE)
def test_guanaco_is_what_the_paper_says(billions: int) -> None:
    found, sources = in_force("guanaco", billions)
    assert {name: getattr(found, name) for name in GUANACO} == GUANACO
    assert (found.lr, found.dropout) == BY_SIZE[billions]
    assert found.batch_size * found.grad_accum == 16
    assert all("2305.14314" in sources[name] for name in GUANACO)


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_every_value_has_a_source(recipe: str) -> None:
    settings = recipes.RECIPES[recipe](7_000_000_000)
    assert set(settings) <= set(options.NAMES)
    assert all(len(setting.source) > 20 for setting in settings.values())
    found, sources = in_force(recipe, 7)
    assert all(sources[name].startswith(f"recipe {recipe}: ") for name in settings)
    assert sources["seed"] == "config file" and found.seed == 3


def test_the_defaults_of_the_options_are_those_of_qlora() -> None:
    defaults = options.Options("b", "d")
    assert {name: setting.value for name, setting in recipes.RECIPES["qlora"](1).items()} == {
        name: getattr(defaults, name) for name in recipes.RECIPES["qlora"](1)
    }


def test_who_wins() -> None:
    found, sources = in_force("guanaco", 7, {"seed": 4, "rank": 8})
    assert (found.seed, found.rank, found.alpha) == (4, 8, 16)
    assert sources["rank"] == "command line"
