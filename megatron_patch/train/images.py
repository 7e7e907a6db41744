"""Whether a data set's images are ones for the recipe's encoder, and what reads them."""

from __future__ import annotations

from importlib.util import find_spec

from data_tools.files.errors import DataError
from megatron_patch.data.images import Images
from megatron_patch.data.segments import Segments
from megatron_patch.recipe import Recipe, RecipeError


def images_of(resolved: Recipe, segments: Segments) -> Images | None:
    """What the first pipeline stage reads pixels from."""
    if (vision := resolved.model.vision) is None:
        return None
    return Images(segments.folder, segments.manifest, vision.image_size, vision.fit)


def check_images(resolved: Recipe, segments: Segments) -> None:
    """Raises DataError where the data set's images are none for the recipe's encoder, RecipeError where it has none."""
    images, vision = segments.manifest.images, resolved.model.vision
    if images is None and vision is None:
        return
    if find_spec("transformers") is None:
        raise RecipeError("model.vision: transformers has the encoder: pip install -c constraints.txt -e '.[vision]'")
    if vision is None:
        said, remedy = "its rows point to images, and the model has no encoder", "name a recipe with model.vision"
    elif images is None:
        said = "its rows point to no image, and the model's encoder would learn nothing"
        remedy = "name what data_tools/build_vision.py wrote, or set model.vision=null"
    elif (images.tokens, images.placeholder_id) != (vision.tokens, vision.placeholder_id):
        said = (
            f"{images.tokens} placeholders of id {images.placeholder_id} for an image, and model.vision makes "
            f"{vision.tokens} tokens in the place of id {vision.placeholder_id}"
        )
        remedy = f"build it with --image-tokens {vision.tokens}, or change model.vision"
    else:
        return
    raise DataError(said, file=segments.folder, remedy=remedy)
