"""Short trainings and no benchmarks where pages are tried: tiny stand-ins of models have nothing to show by them."""

from kdlora import defaults

defaults.STEPS.update(teacher=(3, 40, 400), student=(3, 60, 400))
for recipe in defaults.RECIPES.values():
    recipe["export"] = {"benchmark": False}
