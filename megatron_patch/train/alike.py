"""All ranks have one recipe and one data set, or none begins: a node may have read an older copy of either."""

from __future__ import annotations

import platform
import re
from datetime import timedelta

import torch.distributed as dist

from megatron_patch.recipe import Recipe, RecipeError
from megatron_patch.train.side_channel import SideChannel

_SLOWEST_RANK = timedelta(minutes=10)
_PLACE = re.compile(r"\w+\.(folder|stage_folder|initial_weights): ")  # a node may have its own


def check_alike(recipe: Recipe, data_digest: str) -> None:
    """Raises RecipeError, on every rank the same, where a rank's recipe or data set differs from rank 0's."""
    channel = SideChannel(_SLOWEST_RANK)
    first = channel.from_first({"recipe": recipe.model_dump(mode="json"), "data": data_digest})
    unlike = [line for line in Recipe.model_validate(first["recipe"]).differences(recipe) if not _PLACE.match(line)]
    if data_digest != first["data"]:
        unlike.append(f"data set in {recipe.data.folder}: {first['data']} -> {data_digest}")
    mine = f"rank {dist.get_rank()} on {platform.node()} differs from rank 0: {'; '.join(unlike)}" if unlike else ""
    for said in channel.gather(mine):
        if said:
            raise RecipeError(f"{said}; give every node the same recipe, overrides and data set")
