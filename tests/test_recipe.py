"""Recipes: what the files say, what is refused and with which words."""

import os
from pathlib import Path

import pytest
import yaml

from megatron_patch.recipe import RecipeError, load

FILES = sorted(path.stem for path in Path("recipes").glob("*.yaml") if path.stem != "base")


@pytest.mark.parametrize("name", FILES)
def test_file_loads_and_survives_its_own_yaml(name, tmp_path):
    recipe = load(f"recipes/{name}.yaml")
    assert recipe.name == name
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    assert load(tmp_path / "resolved.yaml") == recipe


def test_the_05b_recipe_is_the_papers_table():
    recipe = load("recipes/mobillama_05b.yaml")
    model = recipe.model
    assert (model.num_layers, model.hidden_size, model.ffn_hidden_size) == (22, 2048, 5632)
    assert (model.num_attention_heads, model.vocab_size, model.sequence_length) == (32, 32000, 2048)
    assert (recipe.batch.global_batch_size, recipe.batch.micro_batch_size) == (800, 5)
    assert (recipe.optimizer.learning_rate, recipe.optimizer.min_learning_rate) == (3e-4, 3e-5)
    assert model.norm_epsilon == 1e-5 and recipe.optimizer.decay_everything


def test_overrides_and_alternatives():
    assert load("recipes/demo.yaml", ["optimizer.learning_rate=3e-4"]).optimizer.learning_rate == 3e-4
    released = load("recipes/mobillama_05b.yaml", ["use=released_batch,paper_epsilon", "batch.micro_batch_size=4"])
    assert (released.batch.global_batch_size, released.batch.micro_batch_size) == (1280, 4)
    assert released.model.norm_epsilon == 1e-6


def test_every_named_alternative_is_what_it_says():
    """Each of base.yaml; where the budget is 100B tokens, whatever the batch, it stays so."""
    named = yaml.safe_load(Path("recipes/base.yaml").read_text())["alternatives"]
    expected = {
        "released_learning_rate": ("optimizer", {"learning_rate": 3e-5, "min_learning_rate": 3e-6}),
        "released_batch": ("batch", {"global_batch_size": 1280, "micro_batch_size": 8}),
        "paper_epsilon": ("model", {"norm_epsilon": 1e-6}),
        "paper_milestones": ("checkpoint", {"milestone_steps": 2000}),
        "usual_weight_decay": ("optimizer", {"decay_everything": False}),
        "paper_100b": ("run", {"steps": 61036}),
        "first_100b": ("run", {"steps": 61036}),
    }
    assert named.keys() == expected.keys()
    plain = load("recipes/mobillama_05b.yaml")
    for name, (section, values) in expected.items():
        recipe = load("recipes/mobillama_05b.yaml", [f"use={name}"])
        changed = {line.split(": ")[0] for line in plain.differences(recipe)}
        assert {f"{section}.{key}" for key in values} == changed - {"optimizer.decay_steps"}
        assert {key: getattr(getattr(recipe, section), key) for key in values} == values
    assert load("recipes/mobillama_05b.yaml", ["use=first_100b"]).optimizer.decay_steps == 767_880
    for baseline in ("baseline1", "baseline2"):
        for overrides in ([], ["use=released_batch"]):
            recipe = load(f"recipes/{baseline}.yaml", overrides)
            tokens = recipe.run.steps * recipe.batch.global_batch_size * recipe.model.sequence_length
            assert 0 <= tokens - 100e9 < recipe.batch.global_batch_size * recipe.model.sequence_length
    both = load("recipes/mobillama_05b.yaml", ["use=first_100b, paper_100b"])
    assert (both.run.steps, both.optimizer.decay_steps) == (61_036, None), "the last one named has the word"
    assert load("recipes/baseline1.yaml", ["use=released_batch"]).run.steps == 38_147
    assert load("recipes/baseline1.yaml", ["use=released_batch", "run.steps=7"]).run.steps == 7
    for null in ("run.initial_weights=null", "run={initial_weights: null, steps: null} # null", "run.folder='a null'"):
        assert load("recipes/mobillama_05b.yaml", [null]).run.initial_weights is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.num_layer=3"], "model.num_layer: unknown key; did you mean num_layers?"),
        (["modle.num_layers=3"], "modle: unknown key; did you mean model?"),
        (["batch.micro_batch_size=abc"], "batch.micro_batch_size: .*'abc'"),
        (["batch.micro_batch_size"], "is not an override; write key.path=value"),
        (["use=paper_100b,released_batch"], "use=released_batch makes .* 1280, but run.steps 61036 counts steps of"),
        (
            ["use=paper_100b", "batch.global_batch_size=1280"],
            "use=paper_100b says run.steps .* 800, which is 1280 here",
        ),
        (["use=first_100b", "batch={global_batch_size: 1280}"], "use=first_100b says run.steps .* 800, which is 1280"),
        (["use=paper_100b", "batch=5"], r"batch: expected a section of settings \(given: 5\)"),
        (["use=paper_milestones", "batch.global_batch_size=1280"], "says checkpoint.milestone_steps .* 800, which is"),
        (["run.initial_weights="], r"nothing stands where a value belongs .* run\.initial_weights=null"),
        (["optimizer.decay_steps=  "], "nothing stands"),
        (["run.steps=# a comment"], "nothing stands"),
        (["run.steps=~"], "nothing stands"),
        (["precision=''"], "nothing stands"),
        (["data={folder: }"], "nothing stands"),
        (["use="], "nothing stands"),
        (["use=paper_epsilon,"], "nothing stands"),
        (["data.folder=\t"], "nothing stands"),
        (["data.folder=\u200b"], "nothing stands"),
        (["run.loggers=['']"], "nothing stands"),
        (["run={folder: , steps: 5} # null"], "nothing stands"),
        (["run={folder: null/a, steps: }"], "nothing stands"),
        (["run={folder: a-null, steps: NULL}"], "nothing stands"),
        (["use= "], "nothing stands"),
        (["run.folder=None"], r"run\.folder: no folder is written null \(given: 'None'\)"),
        (["run.loggers=null"], r"run\.loggers: expected a list, \[\] for none of them \(given: None\)"),
        (["run.tensorboard=null"], r"run\.tensorboard: expected true or false \(given: None\)"),
        (["batch.global_batch_size=null"], r"global_batch_size: expected a whole number \(given: None\)"),
        (["data.folder={}"], r"data\.folder: expected a path$"),
        (["use=released_batch,paper_milestones"], "1280, but checkpoint.milestone_steps 2000 counts steps of another"),
        (["use=nonsense"], "no alternative 'nonsense'; the file names .*released_batch"),
        (["model.hidden_size=2532"], "hidden_size 2532 / num_attention_heads 32 = 79.125"),
        (["parallel.tensor=3"], "num_attention_heads 32 must be divisible by parallel.tensor 3"),
        (
            ["parallel.tensor=32", "model.ffn_hidden_size=5640"],
            "ffn_hidden_size 5640 must be divisible by parallel.tensor 32",
        ),
        (["parallel.tensor=2", "model.vocab_size=32001"], "vocab_size 32001 must be divisible by parallel.tensor 2"),
        (["parallel.pipeline=5"], "neither 22 / 5 = 4.4 nor, .*24 / 5 = 4.8 is whole"),
        (["parallel.pipeline=24"], "leaves the first one the embedding and no layer"),
        (["parallel.virtual_pipeline=2"], "needs parallel.pipeline above 1"),
        (["parallel.pipeline=2", "parallel.zero_stage=2"], "zero_stage 2 with parallel.pipeline 2"),
        (["parallel.zero_stage=3"], "parallel.zero_stage: .*1 or 2"),
        (["parallel.sequence=true"], "parallel.sequence needs parallel.tensor above 1"),
        (["batch.micro_batch_size=801"], "micro_batch_size 801 is larger than batch.global_batch_size 800"),
        (["optimizer.min_learning_rate=1"], "min_learning_rate 1.0 is above learning_rate"),
        (["optimizer.learning_rate=.nan"], "optimizer.learning_rate"),
        (["optimizer.decay_steps=2000"], "decay_steps 2000 is not after warmup_steps 2000"),
        (["checkpoint.keep=yes"], "checkpoint.keep: a switch .* where none is expected"),
        (["run.wall_minutes=true"], "run.wall_minutes: a switch .* where none is expected"),
        (["model=5"], r"model: expected a section of settings \(given: 5\)"),
        (["name=../../elsewhere"], "name: .*pattern"),
        (['name="a\\nb"'], "name: .*pattern"),
        (['run.folder=""'], "nothing stands where a value belongs"),
        (['data.folder="a\\0b"'], r"data.folder: 'a\\x00b' names no folder"),
        (["run={steps: 5, steps: 6}"], r"override .*written twice: \['steps'\]"),
        (["watchdog.spike_window=9223372036854775808"], "watchdog.spike_window: is beyond 64 bits"),
        (["model.hidden_size=" + "9" * 400], "model.hidden_size: is beyond 64 bits"),
        (["watchdog.hang_minutes=1e9"], "watchdog.hang_minutes: .*less than or equal to 525600"),
        (["seed=2024-99-99"], "override 'seed=2024-99-99': the value is not YAML"),
        (["data.order_seed=4294967296"], "data.order_seed: .*less than 2147483648"),
    ],
)
def test_refused_with_the_arithmetic(overrides, message):
    with pytest.raises(RecipeError, match=message):
        load("recipes/mobillama_05b.yaml", overrides)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        load(tmp_path / "missing.yaml")
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("extends: a.yaml")
    with pytest.raises(RecipeError, match=r"in a circle: a\.yaml -> b\.yaml -> a\.yaml"):
        load(tmp_path / "a.yaml")
    (tmp_path / "twice.yaml").write_text("name: x\nname: y\n")
    with pytest.raises(RecipeError, match="written twice: \\['name'\\]"):
        load(tmp_path / "twice.yaml")
    for name, text, reason in (
        ("latin.yaml", b"name: caf\xe9\n", "not valid YAML: 'utf-8'"),
        ("number.yaml", b"extends: 5\n", "extends: expected the name of a file beside it, found 5"),
        ("names.yaml", b"alternatives: [a]\n", "alternatives: expected settings under each name"),
        ("flat.yaml", b"alternatives: {a: 5}\n", "alternatives: expected settings under each name"),
        ("numbered.yaml", b"alternatives: {1: {}, a: {}}\n", "alternatives: expected settings under each name"),
        ("month.yaml", b"name: 2024-99-99\n", "not valid YAML: month must be in 1..12"),
        ("tag.yaml", b"seed: !!timestamp x\n", "not valid YAML"),
        ("mixed.yaml", b"{1: 2, 1: 3, a: 1, a: 2}\n", r"not valid YAML: written twice: \[1, 'a'\]"),
        ("deep.yaml", b"[" * 5000, "not valid YAML: nested deeper than 50"),
    ):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(RecipeError, match=f"{name}: {reason}"):
            load(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in (tmp_path / "pipe.yaml", Path("/dev/zero")):
        with pytest.raises(RecipeError, match=r"cannot be read \(Is not a plain file\)"):
            load(name)
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    with pytest.raises(RecipeError, match=r"loop.yaml: cannot be read \(Too many levels"):
        load(tmp_path / "loop.yaml")
    (tmp_path / "nul.yaml").write_text('extends: "a\\0b"\n')
    with pytest.raises(RecipeError, match="embedded null byte"):
        load(tmp_path / "nul.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(RecipeError, match="expected a mapping"):
        load(tmp_path / "list.yaml")
    (tmp_path / "short.yaml").write_text("name: x\n")
    with pytest.raises(RecipeError, match="model: missing"):
        load(tmp_path / "short.yaml")


def test_anchors_and_merge_keys_are_yaml_too(tmp_path):
    base = Path("recipes/demo.yaml").resolve()
    (tmp_path / "merged.yaml").write_text(
        f"extends: {base}\nmodel: &small {{hidden_size: 64}}\n"
        "alternatives: {wide: {model: {<<: *small, ffn_hidden_size: 512}}}\n"
    )
    model = load(tmp_path / "merged.yaml", ["use=wide"]).model
    assert (model.hidden_size, model.ffn_hidden_size, model.num_layers) == (64, 512, 6)


def test_a_folder_at_home_is_meant_as_the_shell_means_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load("recipes/demo.yaml", ["data.folder=~/amber", "run.folder=~/a run"])
    assert (recipe.data.folder, recipe.run_folder) == (tmp_path / "amber", tmp_path / "a run")


def test_differences_name_the_setting():
    recipe = load("recipes/demo.yaml")
    other = load("recipes/demo.yaml", ["optimizer.learning_rate=1e-3"])
    assert recipe.differences(other) == ["optimizer.learning_rate: 0.003 -> 0.001"]
    assert recipe.differences(recipe) == []


def test_no_section_in_a_sections_place_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: base\nname: mine\nrun: 5\n")
    for use in ([], ["use=released_batch"]):
        with pytest.raises(RecipeError, match=r"run: expected a section of settings \(given: 5\)"):
            load(tmp_path / "mine.yaml", use)
