"""How the miniature world's recipe is named on a command line: `recipe:gpu`, and its fields behind it."""

from __future__ import annotations

import tyro

from instantbooth.miniature.recipe import RECIPES

RecipeOption = tyro.extras.subcommand_type_from_defaults(RECIPES, prefix_names=True)
"""The type of a configuration's field `recipe`."""
