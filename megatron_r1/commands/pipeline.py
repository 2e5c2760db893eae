"""pipeline: runs the stages of a recipe that are not up to date, or shows them."""

from __future__ import annotations

import logging
from contextlib import nullcontext

from megatron_r1.config.load import write_yaml
from megatron_r1.config.run import RunConfig
from megatron_r1.pipeline.launched import follow, leading
from megatron_r1.pipeline.recipe import ComposedRecipe
from megatron_r1.pipeline.run import RecipeRun, console, start_here
from megatron_r1.pipeline.show import show, show_dry_run
from megatron_r1.platform.launcher import is_rank_zero, world_size
from megatron_r1.track.recipe import track_recipe

logger = logging.getLogger(__name__)
PAGE = "report.html"


def run(config: RunConfig) -> None:
    """Run every selected stage that is not up to date; an interrupted recipe resumes where it stopped."""
    if not is_rank_zero():
        follow(config)
        return
    recipe = ComposedRecipe(config)
    if config.pipeline.show:
        recipe.note_running()
        show(recipe, config.pipeline.show)
        return
    if config.pipeline.dry_run:
        show_dry_run(recipe)
        return
    recipe.check_selection()
    recipe.folder.mkdir(parents=True, exist_ok=True)
    with recipe.lock(), leading(recipe) if world_size() > 1 else nullcontext(start_here) as start:
        write_yaml(config, recipe.folder / "config.yaml")
        recipe.write()
        RecipeRun(recipe, config.pipeline.workers, lambda: write_page(recipe), start).run()
        if not (recipe.folder / PAGE).exists():
            write_page(recipe)
        track_recipe(recipe.folder, config.name, config.track)
    console.print(f"finished: {recipe.folder}")


def write_page(recipe: ComposedRecipe) -> None:
    """Write `report.html` over the stages until now; a fault of the page stops no stage."""
    from megatron_r1.report.page import write_report  # what draws its figures takes seconds to import

    try:
        write_report(recipe.folder, recipe.folder / PAGE)
    except Exception:
        logger.exception("%s could not be written", recipe.folder / PAGE)
