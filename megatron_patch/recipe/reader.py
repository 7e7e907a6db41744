"""Reading a recipe file: `extends`, named alternatives, overrides, validation, and what is refused in words."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pydantic import ValidationError

from data_tools.files.strict_yaml import NotYaml, parse_yaml, read_yaml, stands_for_nothing
from megatron_patch.recipe.settings import Recipe, from_ffn_switch

_INSTALLED = Path(__file__).parents[1] / "recipes"  # where setup.py puts them
RECIPES = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[2] / "recipes"  # else the repository's folder


class RecipeError(ValueError):
    """A recipe that cannot be run: names the file or key, what was expected and what to do."""


def find(recipe: Path | str) -> Path:
    """The file of a recipe: a path, or the name of one of RECIPES (`mobillama_05b`) where no such file is here."""
    path = Path(recipe)
    return path if path.is_file() or str(path) not in _names() else RECIPES / f"{path}.yaml"


def _names() -> list[str]:
    return sorted(str(file.relative_to(RECIPES).with_suffix("")) for file in RECIPES.rglob("*.yaml"))


def load(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or one of RECIPES by its name.

    `overrides` are `key.path=value` strings, the value read as YAML; `use=NAME[,NAME]` applies named alternatives
    of the file (`alternatives:` in it or in a base) before the other overrides.
    Raises RecipeError naming the file, the key and the remedy.
    """
    path = find(path)
    tree, alternatives = _read(path, seen=())
    names, settings = [], []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise RecipeError(f"{text!r} is not an override; write key.path=value, e.g. batch.micro_batch_size=4")
        try:
            if key == "use":
                names += (named := [name.strip() for name in value.split(",")])
                is_nothing = not all(named)
            else:
                settings.append((key, parse_yaml(value)))
                is_nothing = stands_for_nothing(value)
        except NotYaml as e:
            if not value.strip():  # a tab
                is_nothing = True
            else:
                raise RecipeError(f"override {text!r}: the value is not YAML ({e})") from e
        if is_nothing:
            raise RecipeError(
                f"override {text!r}: nothing stands where a value belongs (a variable that is not set?); what means "
                "none is written null, e.g. run.initial_weights=null"
            )
    for name in names:
        if name not in alternatives:
            raise RecipeError(
                f"{path}: no alternative {name!r}; the file names {', '.join(sorted(alternatives)) or 'none'}"
            )
        tree = _merge(tree, _current(alternatives[name].settings, path))
    used, given = [(name, alternatives[name]) for name in names], {key for key, _ in settings}
    _check_steps_said(tree, used, given)
    for key, value in settings:
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        tree = _merge(tree, _current(nested, path))
    _check_batch_kept(tree, used, given)
    return _validated(tree, path)


def from_text(text: str, source: Path) -> Recipe:
    """The recipe that `Recipe.to_yaml` wrote, which extends no other. Raises RecipeError naming `source`."""
    try:
        tree = parse_yaml(text)
    except NotYaml as e:
        raise RecipeError(f"{source}: not valid YAML: {e}") from e
    if not isinstance(tree, dict):
        raise RecipeError(f"{source}: expected a mapping of sections, found {type(tree).__name__}")
    return _validated(_current(tree, source), source)


def _validated(tree: dict[str, Any], path: Path) -> Recipe:
    try:
        return Recipe.model_validate(tree)
    except ValidationError as e:
        raise RecipeError("\n".join([f"{path} is refused:", *(f"  {_explain(d)}" for d in e.errors())])) from e


class _Alternative(NamedTuple):
    """Settings under a name, and the global batch size of the recipe that they stand in, which their steps count."""

    settings: dict[str, Any]
    batch: Any


_COUNTS = (
    ("run", "steps", "38147 for 100B tokens at batch 1280, or run.steps=null for every row once"),
    ("checkpoint", "milestone_steps", "1250 for 3.3B tokens at batch 1280, or null for one a segment"),
)
"""What counts steps: section, key and an example."""


def _check_steps_said(tree: dict[str, Any], used: Sequence[tuple[str, _Alternative]], given: set[str]) -> None:
    """Steps of one batch are no budget of another: an alternative that changes the batch must say the steps too."""
    batch, _ = _last_with("batch", "global_batch_size", used)
    for section, key, example in _COUNTS:
        count = _value(tree, section, key)
        says, _ = _last_with(section, key, used)
        if not batch or not count or given & {section, f"{section}.{key}"} or says == batch:
            continue
        size = _value(tree, "batch", "global_batch_size")
        raise RecipeError(
            f"use={batch} makes batch.global_batch_size {size}, but {section}.{key} {count} counts steps of another "
            f"batch; say how many there are, e.g. {section}.{key}={example}"
        )


def _check_batch_kept(tree: dict[str, Any], used: Sequence[tuple[str, _Alternative]], given: set[str]) -> None:
    """An alternative that says the steps says a budget, by the batch of its recipe: no other recipe's or override's."""
    size = _value(tree, "batch", "global_batch_size")
    for section, key, example in _COUNTS:
        name, counted = _last_with(section, key, used)
        if not (name and size and _value(tree, section, key)) or counted == size:
            continue
        if given & {section, f"{section}.{key}"}:
            continue
        raise RecipeError(
            f"use={name} says {section}.{key} in steps of batch.global_batch_size {counted}, which is {size} here; say "
            f"how many there are, e.g. {section}.{key}={example}"
        )


def _last_with(section: str, key: str, used: Sequence[tuple[str, _Alternative]]) -> tuple[str, Any]:
    """The last of the alternatives that has the key, empty where none has; and the batch that its steps count."""
    for name, (settings, batch) in reversed(used):
        if _value(settings, section, key) is not None:
            return name, _value(settings, "batch", "global_batch_size") or batch
    return "", None


def _value(tree: Mapping[str, Any], section: str, key: str) -> Any:
    """None where there is none, and where no section stands in the section's place, which is refused later."""
    settings = tree.get(section)
    return settings.get(key) if isinstance(settings, Mapping) else None


def _read(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, _Alternative]]:
    try:
        tree = read_yaml(path)
    except OSError as e:
        raise RecipeError(
            f"{path}: cannot be read ({e.strerror}); recipes are in {RECIPES}, each may be given by its name: "
            + ", ".join(_names())
        ) from e
    except NotYaml as e:
        raise RecipeError(f"{path}: not valid YAML: {e}") from e
    if path.resolve() in seen:
        raise RecipeError(f"{path}: `extends` runs in a circle: {' -> '.join(p.name for p in (*seen, path))}")
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
    tree = _current(tree, path)
    alternatives = tree.pop("alternatives", None) or {}
    if not (
        isinstance(alternatives, dict)
        and all(isinstance(name, str) and isinstance(a, dict) for name, a in alternatives.items())
    ):
        raise RecipeError(f"{path}: alternatives: expected settings under each name, as in recipes/base.yaml")
    base, base_alternatives = tree.pop("extends", None), dict[str, _Alternative]()
    if base is not None:
        if not isinstance(base, str):
            raise RecipeError(f"{path}: extends: expected the name of a file beside it, found {base!r}")
        beside = path.parent / base
        base_tree, base_alternatives = _read(beside if beside.is_file() else find(base), (*seen, path.resolve()))
        tree = _merge(base_tree, tree)
    size = _value(tree, "batch", "global_batch_size")
    return tree, base_alternatives | {name: _Alternative(settings, size) for name, settings in alternatives.items()}


def _current(tree: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Settings under today's names, before a base's could stand beside them."""
    try:
        return {key: from_ffn_switch(value) if key == "model" else value for key, value in tree.items()}
    except ValueError as e:
        raise RecipeError(f"{path}: model: {e}") from None


def _merge(base: Any, over: Any) -> Any:
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)):
        return over
    return {**base, **{k: _merge(base[k], v) if k in base else v for k, v in over.items()}}


_EXPECTED = {
    "tuple_type": "expected a list, [] for none of them",
    "int_type": "expected a whole number",
    "float_type": "expected a number",
    "bool_type": "expected true or false",
    "string_type": "expected a text",
    "path_type": "expected a path",
}
"""By pydantic's type of error, where its own message names a type of Python."""


def _explain(error: Any) -> str:
    where = [str(part) for part in error["loc"]]
    place = ".".join(where)
    if error["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in where[:-1]:
            section = section.model_fields[part].annotation
            section = next((kind for kind in get_args(section) if hasattr(kind, "model_fields")), section)
        known = list(section.model_fields)
        near = difflib.get_close_matches(where[-1], known, n=1, cutoff=0.5)
        return f"{place}: unknown key; " + (f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}")
    message = _EXPECTED.get(error["type"]) or error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{place}: missing; write it, or inherit it with `extends: base.yaml` where base.yaml has it"
    if error["type"] == "model_type":
        return f"{place}: expected a section of settings (given: {error['input']!r})"
    given = f" (given: {error['input']!r})" if place and not isinstance(error["input"], Mapping) else ""
    return f"{place + ': ' if place else ''}{message}{given}"
