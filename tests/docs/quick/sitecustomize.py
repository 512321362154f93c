"""Short trainings and no benchmarks where pages are tried: tiny stand-ins of models have nothing to show by them."""

import runpy
from pathlib import Path

from kdlora import defaults

runpy.run_path(str(Path(__file__).parents[2] / "guard" / "sitecustomize.py"))  # this file stands before it on the path
defaults.STEPS.update(teacher=(3, 40, 400, 20), student=(3, 60, 400, 20))
for recipe in defaults.RECIPES.values():
    recipe["export"] = {"benchmark": False}
