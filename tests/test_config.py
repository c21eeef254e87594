"""Recipes: what is read, and the words for every mistake."""

import collections
import dataclasses
import typing

import pytest
import yaml
from examples import ROOT

from repo_jax.config import SECTIONS, DataSection, OptimSection, Recipe, dump_recipe, leaf_fields, load_recipe
from repo_jax.data.chat import TokenOptions
from repo_jax.data.schema import SCHEMAS

MODEL = "model: {model_name_or_path: some/model}\n"
SECTION_NAMES = "model, data, loss, optim, mesh, run"
RUN_FIELDS = "output_dir, seed, logging_steps, report_to, eval_steps, save_steps, profile_steps, compile_cache_dir, save_total_limit, push_to_hub, hub_model_id, hub_revision, hub_private_repo"


@pytest.fixture
def load(tmp_path):
    """Loads a recipe from YAML text, with the model named, and overrides."""

    def load_text(text="", overrides=None, model=MODEL):
        path = tmp_path / "recipe.yaml"
        path.write_text(model + text, encoding="utf-8")
        return load_recipe(path, overrides)

    return load_text


@pytest.fixture
def refusal(load):
    """What is said of a YAML text."""

    def said(*args, **kwargs):
        with pytest.raises(ValueError) as refused:
            load(*args, **kwargs)
        return str(refused.value)

    return said


# What is read


def test_what_a_recipe_leaves_out_has_its_default(load):
    recipe = load("optim: {learning_rate: 0.5}")
    assert recipe.optim == OptimSection(learning_rate=0.5)
    assert recipe.data == DataSection()
    assert recipe.model.model_name_or_path == "some/model"


def test_a_section_left_empty_has_its_defaults(load):
    assert load("optim:\nloss:\n") == load()


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-6", 1e-6), ("1E-6", 1e-6), ("2.5e-6", 2.5e-6), (".5e-6", 0.5e-6), ("1.e+2", 100.0), ("3", 3.0)],
)
def test_numbers_are_read_however_they_are_written(load, text, value):
    assert load(f"optim: {{learning_rate: {text}}}").optim.learning_rate == value
    assert load(f"loss: {{gamma: {text}}}").loss["gamma"] == value


def test_words_that_look_like_numbers_stay_words(load):
    assert load("run: {output_dir: 1e-6-run}").run.output_dir == "1e-6-run"


def test_null_is_a_value_where_a_field_allows_it(load):
    assert load("optim: {max_grad_norm: null}").optim.max_grad_norm is None


def test_overrides_lie_over_the_file(load):
    overrides = {"optim.learning_rate": 0.25, "loss.gamma": 0.75, "run.seed": 7}
    recipe = load("optim: {learning_rate: 0.5, weight_decay: 0.125}\nloss: {loss_type: repo}", overrides)
    assert (recipe.optim.learning_rate, recipe.optim.weight_decay, recipe.run.seed) == (0.25, 0.125, 7)
    assert recipe.loss == {"loss_type": "repo", "gamma": 0.75}


def test_overrides_alone_make_a_recipe():
    assert load_recipe(None, {"model.model_name_or_path": "m"}).model.model_name_or_path == "m"


def test_leaf_names_are_unique_across_sections():
    names = [
        field.name for name, section in SECTIONS.items() if name != "loss" for field in dataclasses.fields(section)
    ]
    assert [name for name, count in collections.Counter(names).items() if count > 1] == []
    assert sorted(leaf_fields()) == sorted(names)


def test_every_field_is_described():
    assert [name for name, (_, field) in leaf_fields().items() if not field.default.description] == []


def test_a_dumped_recipe_loads_as_the_same_recipe(load, tmp_path):
    recipe = load(
        'model: {model_name_or_path: m, chat_template: "a: é\\n  {{ b }}\'\\n", eos_token: <s>}\n'
        "data: {dataset_mixer: {a.jsonl: 0.5, owner/name: 1}, chat_template_kwargs: {enable_thinking: false, n: [1, a]}, "
        "dataset_test_split: null, schema: hh, truncation: keep_end, max_length: 64, ld_alpha: 0.25}\n"
        "loss: {loss_type: simpo, beta: 2.5, gamma: 1e-3}\n"
        "optim: {learning_rate: 3e-7, adam_epsilon: 1e-12, max_grad_norm: null, max_steps: 5}\n"
        "mesh: {fsdp: 2, tensor: -1}\n"
        "run: {output_dir: '2024'}\n",
        model="",
    )
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_a_dumped_recipe_names_every_field(load):
    tree = yaml.safe_load(dump_recipe(load()))
    assert {name for section, fields in tree.items() if section != "loss" for name in fields} == leaf_fields().keys()
    assert list(tree) == list(SECTIONS)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_of_the_repository_loads(path):
    assert isinstance(load_recipe(path), Recipe)


def test_a_recipe_is_frozen(load):
    recipe = load()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.optim = OptimSection()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.optim.learning_rate = 1.0


# What is refused


MISTAKES = {
    "model: {model_name_or_path: m, lora_r: 8}": "lora_r given without use_peft: true, so there are no adapters; add it",
    # names
    "optim: {learning_rates: 1}": "recipe.optim has no field 'learning_rates'; did you mean 'learning_rate'?",
    "run: {logs: 1}": f"recipe.run has no field 'logs'; it has {RUN_FIELDS}",
    "optim: {fsdp: 1}": "recipe.optim has no field 'fsdp'; it belongs to recipe.mesh",
    "optimizer: {learning_rate: 1}": "recipe has no section 'optimizer'; did you mean 'optim'?",
    "wandb: {project: x}": f"recipe has no section 'wandb'; it has {SECTION_NAMES}",
    "learning_rate: 1": "recipe has no section 'learning_rate'; write it as optim.learning_rate",
    # choices
    "optim: {lr_scheduler_type: cos}": "recipe.optim.lr_scheduler_type='cos'; choose one of 'cosine', 'linear', 'constant'",
    "optim: {optim: adamw_torch}": "recipe.optim.optim='adamw_torch'; choose one of 'adamw', 'adafactor', 'lion'",
    "optim: {moment_dtype: float16}": "recipe.optim.moment_dtype='float16'; choose one of 'float32', 'bfloat16'",
    "model: {model_name_or_path: m, remat: true}": "recipe.model.remat=True; choose one of 'none', 'dots', 'attention', 'full', 'offload'",
    "data: {schema: pairs}": "recipe.data.schema='pairs'; choose one of 'auto', 'explicit', 'implicit', 'hh', 'unpaired', 'conversations', 'sft'",
    "data: {on_bad_rows: drop}": "recipe.data.on_bad_rows='drop'; choose one of 'error', 'skip'",
    "data: {compat: simpo}": "recipe.data.compat='simpo'; choose one of 'none', 'official'",
    "data: {append_eos: true}": "recipe.data.append_eos=True; choose one of 'auto', 'always', 'never'",
    "data: {truncation: keep}": "recipe.data.truncation='keep'; choose one of 'drop', 'keep_end', 'keep_start', 'official'",
    # ranges
    "optim: {learning_rate: 0}": "recipe.optim.learning_rate=0; wanted greater than 0",
    "optim: {train_batch_size: 0}": "recipe.optim.train_batch_size=0; wanted greater than or equal to 1",
    "optim: {warmup_ratio: 1.5}": "recipe.optim.warmup_ratio=1.5; wanted less than or equal to 1",
    "optim: {adam_beta1: 1}": "recipe.optim.adam_beta1=1; wanted less than 1",
    "data: {max_length: 1}": "recipe.data.max_length=1; wanted greater than or equal to 2",
    "data: {max_prompt_length: 0}": "recipe.data.max_prompt_length=0; wanted greater than or equal to 1",
    "data: {ld_alpha: 1.5}": "recipe.data.ld_alpha=1.5; wanted less than or equal to 1",
    "data: {ld_alpha: -0.1}": "recipe.data.ld_alpha=-0.1; wanted greater than or equal to 0",
    "data: {temporal_decay: 0}": "recipe.data.temporal_decay=0; wanted greater than 0",
    # kinds
    "data: {dataset_mixer: {a.jsonl: half}}": "recipe.data.dataset_mixer.a.jsonl='half'; wanted a valid number, unable to parse string as a number",
    "data: {dataset_mixer: a.jsonl}": "recipe.data.dataset_mixer='a.jsonl'; wanted a section, `dataset_mixer:` with its fields indented below",
    "data: {use_poet: both}": "recipe.data.use_poet='both'; wanted a valid boolean, unable to interpret input",
    "optim: {learning_rate: fast}": "recipe.optim.learning_rate='fast'; wanted a valid number, unable to parse string as a number",
    "optim: {max_steps: 1.5}": "recipe.optim.max_steps=1.5; wanted a valid integer, got a number with a fractional part",
    "run: {output_dir: 2024}": "recipe.run.output_dir=2024; wanted a valid string",
    "data: {max_length: []}": "recipe.data.max_length=[]; wanted a valid integer",
    "data: {chat_template_kwargs: {date_string: 2024-07-26}}": "chat_template_kwargs={'date_string': datetime.date(2024, 7, 26)}: Object of type date is not JSON serializable; give texts, numbers, lists and mappings (quote a date)",
    "data: {chat_template_kwargs: {add_generation_prompt: true}}": "chat_template_kwargs has 'add_generation_prompt', which is decided here; leave it out",
    "data: {chat_template_kwargs: {tokenize: true}}": "chat_template_kwargs has 'tokenize', which is decided here; leave it out",
    # sections
    "optim: 1e-6": "recipe.optim=1e-06; wanted a section, `optim:` with its fields indented below",
    "loss: repo": "recipe.loss='repo'; wanted a section, `loss:` with its fields indented below",
    "mesh: [1, 8]": "recipe.mesh=[1, 8]; wanted a section, `mesh:` with its fields indented below",
    # moments
    "optim: {optim: adafactor, moment_dtype: bfloat16}": "moment_dtype=bfloat16 but adafactor keeps no first moment; leave moment_dtype out",
    "optim: {optim: lion, moment_dtype: bfloat16}": "moment_dtype=bfloat16 but adam_beta2=0.999: a moment that changes by less than 1/256 of itself does not change in bfloat16; lower adam_beta2 to at most 0.99, or leave moment_dtype out",
    "optim: {adam_beta1: 0.999, moment_dtype: bfloat16}": "moment_dtype=bfloat16 but adam_beta1=0.999: a moment that changes by less than 1/256 of itself does not change in bfloat16; lower adam_beta1 to at most 0.99, or leave moment_dtype out",
    # the forms of an update and of attention
    "optim: {mode: two}": "recipe.optim.mode='two'; choose one of 'auto', 'direct', 'two_pass'",
    "optim: {mode: two_pass, two_pass_below: 0.5}": "two_pass_below=0.5 but mode=two_pass; leave one of them out",
    "optim: {mode: direct, keep_layer_inputs: true}": "keep_layer_inputs=true but mode=direct, which takes one pass; leave one of them out",
    "optim: {mode: direct, two_pass_below: 0}": "two_pass_below=0 but mode=direct; leave one of them out",
    "optim: {two_pass_below: 1.5}": "recipe.optim.two_pass_below=1.5; wanted less than or equal to 1",
    "model: {model_name_or_path: m, attn_implementation: sdpa}": "recipe.model.attn_implementation='sdpa'; choose one of 'auto', 'dense', 'blocked', 'splash', 'triton', 'flash'",
    "data: {rows_per_device: 0}": "recipe.data.rows_per_device=0; wanted greater than or equal to 1",
    "data: {slots_per_device: 2}": "recipe.data.slots_per_device=2; wanted greater than or equal to 3",
    # what is traced
    **{
        f"run: {{profile_steps: '{text}'}}": f"profile_steps='{text}'; give the first and the last update to trace, such as 10-12"
        for text in ("10", "0-2", "12-10", "a-b", "1-", "-3", "1-2-3", "")
    },
    "run: {profile_steps: 10}": "recipe.run.profile_steps=10; wanted a valid string",
    # the mesh
    "mesh: {data: -1}": "only one mesh axis may be -1, given data=-1 fsdp=-1 tensor=1; name a number for the others",
    "mesh: {tensor: 0}": "mesh.tensor=0; give a number of devices from 1, or -1 for those that are left",
    "mesh: {fsdp: -2}": "mesh.fsdp=-2; give a number of devices from 1, or -1 for those that are left",
}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("dataset_name: a.jsonl", "dataset_mixer: {b.jsonl: 1}"),
        ("ld_alpha: 0.5", "temporal_decay: 0.5"),
        ("ld_alpha: 0", "temporal_decay: 1"),
        ("use_poet: true", "ld_alpha: 0.5"),
        ("use_poet: true", "ld_alpha: 0"),
    ],
)
def test_what_excludes_each_other_is_not_given_together(load, refusal, one, other):
    names = [text.split(":")[0] for text in (one, other)]
    assert refusal(f"data: {{{one}, {other}}}") == f"{names[0]} and {names[1]} are both given; choose one of them"
    for alone in (one, other):
        assert load(f"data: {{{alone}}}").data != DataSection()
    assert load("data: {use_poet: false, ld_alpha: 0.5}").data.ld_alpha == 0.5
    assert load("data: {use_poet: true, temporal_decay: 0.5}").data.temporal_decay == 0.5


def test_the_recipe_knows_every_schema_and_every_choice_of_the_token_options():
    types = typing.get_type_hints(DataSection)
    assert typing.get_args(types["schema"]) == ("auto", *SCHEMAS)
    for name, kind in typing.get_type_hints(TokenOptions).items():
        ours = types[name]
        choices = {
            *typing.get_args(ours),
            *(choice for part in typing.get_args(ours) for choice in typing.get_args(part)),
        }
        assert {*typing.get_args(kind)} <= choices, name


@pytest.mark.parametrize(("text", "message"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistake_is_answered(refusal, text, message):
    assert refusal(text, model="" if text.startswith("model") else MODEL) == message


@pytest.mark.parametrize(
    "text", ["optim: adafactor", "optim: lion, adam_beta2: 0.99, moment_dtype: bfloat16", "moment_dtype: bfloat16"]
)
def test_every_optimizer_can_be_had(load, text):
    assert load(f"optim: {{{text}}}").optim != OptimSection()


@pytest.mark.parametrize("name", ["loss_type", "gamma", "beta"])
def test_a_field_of_the_loss_in_another_section_is_sent_home(refusal, name):
    assert refusal(f"optim: {{{name}: 1}}") == f"recipe.optim has no field '{name}'; it belongs to recipe.loss"
    assert refusal(f"{name}: 1") == f"recipe has no section '{name}'; write it as loss.{name}"


@pytest.mark.parametrize("text", ["", "optim: {learning_rate: 1e-6}", "model:", "model: {eos_token: <s>}"])
def test_a_model_that_is_not_named_is_asked_for(refusal, text):
    assert refusal(text, model="") == (
        "recipe.model.model_name_or_path is not set; it has no default (--model_name_or_path on the command line)"
    )


def test_a_misspelt_model_section_is_one_mistake(refusal):
    assert refusal("modle: {model_name_or_path: m}", model="") == "recipe has no section 'modle'; did you mean 'model'?"


def test_several_mistakes_have_a_line_each(refusal):
    said = refusal("optim: {learning_rate: 0, learning_rates: 1}\nrun: {seed: -1}")
    assert sorted(said.splitlines()) == [
        "recipe.optim has no field 'learning_rates'; did you mean 'learning_rate'?",
        "recipe.optim.learning_rate=0; wanted greater than 0",
        "recipe.run.seed=-1; wanted greater than or equal to 0",
    ]


def test_a_section_that_is_no_section_is_refused_under_an_override_too(refusal):
    assert refusal("optim: 3", {"optim.learning_rate": 1.0}) == (
        "recipe.optim=3; wanted a section, `optim:` with its fields indented below"
    )


def test_a_value_out_of_range_is_refused_from_an_override_too(refusal):
    assert refusal("", {"optim.learning_rate": 0}) == "recipe.optim.learning_rate=0; wanted greater than 0"


@pytest.mark.parametrize("value", [".inf", ".nan"])
def test_a_number_that_is_not_finite_is_refused(refusal, value):
    assert refusal(f"optim: {{num_train_epochs: {value}}}").startswith("recipe.optim.num_train_epochs=")


def test_a_recipe_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path / "nowhere.yaml", tmp_path):
        with pytest.raises(FileNotFoundError) as refused:
            load_recipe(path)
        assert str(refused.value) == f"no recipe at '{path}'; give the path of a YAML file"


def test_what_is_not_yaml_is_refused_in_one_line_with_its_place(refusal, tmp_path):
    said = refusal("optim: {learning_rate: 1e-6\nrun: {seed: 1}\n")
    assert said.startswith(f"'{tmp_path / 'recipe.yaml'}' is not YAML: while parsing a flow mapping")
    assert "line 3, column 4" in said
    assert "\n" not in said


def test_yaml_that_wants_python_is_refused(refusal, tmp_path):
    touched = tmp_path / "touched"
    said = refusal(f"loss: !!python/object/apply:pathlib.Path.touch [{touched}]")
    assert "python/object" in said and not touched.exists()


def test_yaml_that_holds_no_sections_is_refused(refusal, tmp_path):
    path = tmp_path / "recipe.yaml"
    assert refusal("- a\n- b\n", model="") == f"'{path}' holds a list; wanted the sections {SECTION_NAMES}"
    assert refusal("repo", model="") == f"'{path}' holds a str; wanted the sections {SECTION_NAMES}"


def test_a_tilde_is_the_home_folder_in_every_path(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    recipe = load(
        "data: {dataset_name: ~/pairs, eval_dataset_name: ~/held_out}\nrun: {output_dir: ~/runs}\n",
        model="model: {model_name_or_path: ~/model}\n",
    )
    assert recipe.model.model_name_or_path == "/home/somebody/model"
    assert (recipe.data.dataset_name, recipe.data.eval_dataset_name) == (
        "/home/somebody/pairs",
        "/home/somebody/held_out",
    )
    assert (recipe.run.output_dir, recipe.data.cache_dir) == ("/home/somebody/runs", "/home/somebody/.cache/repo_jax")


@pytest.mark.parametrize("text", ["optim: {seed: 1}\noptim: {learning_rate: 1}\n", "run:\n  seed: 1\n  seed: 2\n"])
def test_a_key_given_twice_is_a_mistake(refusal, text):
    assert "is given twice" in refusal(text)


@pytest.mark.parametrize(
    "given, found",
    [("none", ()), (None, ()), ("wandb", ("wandb",)), ("tensorboard,wandb", ("tensorboard", "wandb")), (["trackio"], ("trackio",))],
)  # fmt: skip
def test_report_to_is_one_or_several_trackers_or_none(given, found):
    recipe = load_recipe(None, {"model.model_name_or_path": "m", "run.report_to": given})
    assert recipe.run.trackers == found


@pytest.mark.parametrize("given", ["wanb", "tensorboard,none", ["wandb", "all"]])
def test_a_tracker_that_does_not_exist_is_answered_with_those_that_do(given):
    with pytest.raises(
        ValueError, match=r"report_to='(wanb|none|all)'; choose one or several of tensorboard, wandb, trackio, or none$"
    ):
        load_recipe(None, {"model.model_name_or_path": "m", "run.report_to": given})
