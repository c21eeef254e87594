"""The commands, up to the first update: flags, help, and one line for every mistake."""

import json
import re

import pytest
import yaml
from examples import ASSETS, ROOT, STORIES

import repo_jax
from repo_jax import cli
from repo_jax.config import leaf_fields, load_recipe
from repo_jax.losses import LOSSES, hyperparameters


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def recipe(tmp_path, cache):
    """The quickstart's recipe with absolute paths, as a file; its output goes to tmp_path / 'run'."""
    tree = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    tree["model"]["model_name_or_path"] = str(STORIES)
    tree["data"] |= {"dataset_name": str(ASSETS / "preferences"), "cache_dir": str(cache)}
    tree["run"]["output_dir"] = str(tmp_path / "run")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture
def refusal(capsys, tmp_path):
    """Runs a command that must fail in one line and leave no output behind; returns the line."""

    def run(*argv):
        try:
            code = cli.main([str(arg) for arg in argv])
        except SystemExit as stopped:  # argparse's own way
            code = stopped.code
        out, err = capsys.readouterr()
        assert code == 2
        assert out == ""
        assert err.startswith("repo-jax: ") and err.endswith("\n") and err.count("\n") == 1
        assert not (tmp_path / "run").exists()
        return err.removeprefix("repo-jax: ").removesuffix("\n")

    return run


def read(*argv):
    """The recipe that a command line amounts to."""
    arguments, _, overrides = cli.parse([str(arg) for arg in argv])
    return load_recipe(arguments.config, overrides)


# Flags


@pytest.mark.parametrize("flag", ["--learning_rate", "--optim.learning_rate"])
def test_a_flag_overrides_the_file_under_either_name(recipe, flag):
    assert load_recipe(recipe).optim.learning_rate != 1e-6
    assert read("train", recipe, flag, "1e-6").optim.learning_rate == 1e-6


@pytest.mark.parametrize("flag", ["--gamma", "--loss.gamma"])
def test_a_hyperparameter_of_the_loss_is_a_flag_too(recipe, flag):
    assert load_recipe(recipe).loss["gamma"] != 0.25
    assert read("train", recipe, flag, "0.25").loss == {"loss_type": "repo", "gamma": 0.25}


def test_flags_touch_nothing_else(recipe):
    assert read("train", recipe) == load_recipe(recipe)
    assert read("train", recipe, "--seed", "7") == load_recipe(recipe, {"run.seed": 7}) != load_recipe(recipe)


def test_a_flag_reads_null_and_negative_numbers(recipe):
    after = read("train", recipe, "--row_length", "null", "--fsdp", "-1", "--gamma", "-0.5")
    assert (after.data.row_length, after.mesh.fsdp, after.loss["gamma"]) == (None, -1, -0.5)


@pytest.mark.parametrize("text", ["2024", "1e-6", "[EOS]", "a: b", "true"])
def test_the_flag_of_a_text_takes_it_as_it_stands(recipe, text):
    after = read("train", recipe, "--output_dir", text, "--eos_token", text)
    assert (after.run.output_dir, after.model.eos_token) == (text, text)


def test_evaluate_has_short_flags_for_model_and_data(recipe, refusal):
    # --data is the file here; the mesh's axis of that name goes by its full one.
    assert read("evaluate", recipe, "--data", "x.jsonl", "--mesh.data", "8").mesh.data == 8
    assert refusal("evaluate", recipe, "--model", "nowhere").startswith("'nowhere' is not a folder with a model")
    assert refusal("evaluate", recipe, "--data", "x.jsonl").startswith("'x.jsonl' is neither a file nor a folder;")


def test_a_model_of_the_command_line_has_no_revision_of_the_recipes(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {model_name_or_path: ORG/NAME, model_revision: abc}\n")

    def revision(*flags):
        arguments, _, overrides = cli.parse(["evaluate", str(recipe), *flags])
        return cli.recipe_with_data(arguments, overrides, "data.eval_dataset_name").model.model_revision

    assert revision() == "abc"
    assert revision("--model", "other") is None
    assert revision("--model", "other", "--model_revision", "def") == "def"


@pytest.fixture
def benched(monkeypatch):
    """What bench was asked for, in place of its work."""
    asked = {}

    def prepare(recipe, **options):
        asked.update(options, recipe=recipe)

    def bench(setup, **options):
        asked.update(options)
        return {"pairs_per_second": 2.5}

    monkeypatch.setattr("repo_jax.benchmark.prepare", prepare)
    monkeypatch.setattr("repo_jax.benchmark.bench", bench)
    return asked


@pytest.mark.parametrize("config", [[], ["--config"]])
def test_bench_takes_its_recipe_with_and_without_a_flag(recipe, benched, capsys, config):
    assert cli.main(["bench", *config, str(recipe), "--json", "--learning_rate", "1e-6", "--mesh.data", "8"]) == 0
    assert json.loads(capsys.readouterr().out) == {"pairs_per_second": 2.5}
    wanted = load_recipe(recipe, {"optim.learning_rate": 1e-6, "mesh.data": 8})
    assert benched == {"recipe": wanted, "weights": "read", "steps": 10, "warmup": 2, "split_steps": 2}


def test_bench_is_told_how_much_to_measure(recipe, benched):
    assert cli.main(["bench", str(recipe), "--json", "--steps", "3", "--warmup", "1", "--random_weights"]) == 0
    assert (benched["steps"], benched["warmup"], benched["weights"]) == (3, 1, "random")


def test_bench_wants_one_recipe_and_some_updates(recipe, refusal):
    wanted = "bench takes one recipe, as in: repo-jax bench RECIPE"
    assert refusal("bench") == refusal("bench", recipe, "--config", recipe) == wanted
    said = refusal("bench", recipe, "--steps", "0")
    assert said.startswith("argument --steps: '0' is no number of updates; give 1 or more (")
    assert refusal("bench", recipe, "--model_name_or_path", "nowhere").startswith("'nowhere' is not a folder")


def test_an_output_that_is_a_folder_is_answered_before_any_work(recipe, refusal, tmp_path):
    assert refusal("evaluate", recipe, "--output", str(tmp_path)) == f"--output '{tmp_path}' is a folder; name a file"


@pytest.fixture
def help_of(capsys, monkeypatch):
    """What --help prints of a command, in one line."""
    monkeypatch.setenv("COLUMNS", "1000")  # or words are broken at their hyphens

    def run(command):
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0
        return " ".join(capsys.readouterr().out.split())

    return run


@pytest.mark.parametrize("command", ["train", "evaluate", "inspect", "prepare", "bench"])
def test_help_lists_every_leaf_with_its_default(help_of, command):
    text = help_of(command)
    for name, (section, field) in leaf_fields().items():
        short = "" if command not in ("train", "bench") and name == "data" else rf"--{name}( X)?, "
        default = "none, it must be set" if field.default.is_required() else json.dumps(field.default.default)
        words = re.escape(f"{field.default.description} (default: {default})")
        assert re.search(rf"{short}--{section}\.{name} X {words}", text)


def test_help_lists_every_hyperparameter_with_its_default_in_every_loss(help_of):
    text = help_of("train")
    assert "--loss.gamma X hyperparameter; default 0.5 for repo, 0.5 for repo++, 0.25 for simpo" in text
    assert "--loss.sft_weight X beside any loss: " in text
    for name in {name for loss in LOSSES.values() for name in hyperparameters(loss)}:
        taken = {kind: hyperparameters(loss)[name] for kind, loss in LOSSES.items() if name in hyperparameters(loss)}
        takers = [
            f"{value if isinstance(value, str) else format(value, 'g')} for {kind}" for kind, value in taken.items()
        ]
        words = re.escape(f"hyperparameter; default {', '.join(takers)}")
        assert re.search(rf"--{name}( X)?, --loss\.{name} X {words}", text)


# Mistakes


def test_a_recipe_that_is_not_there_is_answered(refusal):
    assert refusal("train", "nowhere.yaml") == "no recipe at 'nowhere.yaml'; give the path of a YAML file"


def test_a_misspelt_field_is_answered(recipe, refusal):
    recipe.write_text(recipe.read_text().replace("learning_rate:", "learning_rates:"))
    assert refusal("train", recipe) == ("recipe.optim has no field 'learning_rates'; did you mean 'learning_rate'?")


def test_a_recipe_that_is_not_yaml_is_answered(recipe, refusal):
    recipe.write_text("model: {")
    assert refusal("train", recipe).startswith(f"'{recipe}' is not YAML: ")


@pytest.mark.parametrize("flag", ["--learning_rates", "--optim.learning_rates"])
def test_a_misspelt_flag_is_answered(recipe, refusal, flag):
    assert refusal("train", recipe, flag, "1e-6").startswith(
        f"unknown argument {flag}; did you mean --learning_rate? (repo-jax --help "
    )


def test_a_flag_like_no_other_is_answered(recipe, refusal):
    assert refusal("train", recipe, "--wandb", "x").startswith("unknown argument --wandb (repo-jax --help ")


def test_what_is_missing_from_a_command_is_asked_for(recipe, refusal):
    assert refusal("train").startswith("the following arguments are required: config (")
    assert refusal("train", recipe, "--seed").startswith("argument --seed/--run.seed: expected one argument (")
    assert refusal("serve").startswith("argument COMMAND: invalid choice: 'serve' (choose from ")


def test_a_value_of_the_wrong_kind_is_answered(recipe, refusal):
    assert refusal("train", recipe, "--learning_rate", "fast") == (
        "recipe.optim.learning_rate='fast'; wanted a valid number, unable to parse string as a number"
    )


def test_a_moment_that_is_not_kept_is_answered(recipe, refusal):
    assert read("train", recipe, "--optim", "adafactor").optim.optim == "adafactor"
    assert refusal("train", recipe, "--optim", "adafactor", "--moment_dtype", "bfloat16") == (
        "moment_dtype=bfloat16 but adafactor keeps no first moment; leave moment_dtype out"
    )


def test_a_model_folder_that_is_not_there_is_answered(recipe, refusal):
    assert refusal("train", recipe, "--model_name_or_path", "nowhere") == (
        "'nowhere' is not a folder with a model, nor ORG/NAME as models are called on the Hub; give the folder of a Hugging Face "
        "model (config.json, safetensors, tokenizer), a gs:// or s3:// URL of one, or ORG/NAME"
    )


def test_data_that_are_not_there_are_answered(recipe, refusal):
    assert refusal("train", recipe, "--dataset_name", "nowhere").startswith(
        "'nowhere' is neither a file nor a folder nor"
    )
    assert refusal("train", recipe, "--dataset_train_split", "dev").endswith(
        "splits present: edge, test, train; name a split, or give a file itself"
    )


def test_data_that_are_not_named_are_asked_for(recipe, refusal):
    assert refusal("train", recipe, "--dataset_name", "null") == (
        "recipe.data.dataset_name is not set; give a file of preference pairs, a data set's name, or in Python train_dataset"
    )


def test_a_bad_data_line_is_named(recipe, refusal, tmp_path):
    good = (ASSETS / "preferences" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:2]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join([*good, '{"prompt": "a", "chosen": "b"}']), encoding="utf-8")
    assert refusal("train", recipe, "--dataset_name", data) == (
        f"{data} line 3 has no 'rejected'; wanted prompt, chosen, rejected, found prompt (text), chosen (text)"
    )


def test_a_damaged_store_ends_a_command_with_1(recipe, tmp_path, capsys):
    flags = ["--data", str(ASSETS / "preferences"), "--cache_dir", str(tmp_path / "cache")]
    assert cli.main(["prepare", str(recipe), *flags]) == 0
    (damaged, *_) = sorted((tmp_path / "cache").glob("*/preference_tokens/*/*.array_record*"))
    damaged.write_bytes(b"")
    capsys.readouterr()
    assert cli.main(["prepare", str(recipe), *flags]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("repo-jax: '/") and "is damaged (" in said and "prepare it anew" in said


def test_data_of_which_nothing_is_left_are_answered(recipe, refusal):
    said = refusal("train", recipe, "--max_length", "5")
    assert said.startswith(
        f"no pair of {ASSETS / 'preferences' / 'train.jsonl'} can be used (600 of 600 rows dropped (100.0%), pairs over max_length"
    )


def test_a_broken_chat_template_is_answered(recipe, refusal):
    assert "chat template" in refusal("train", recipe, "--chat_template", "{% for %}")


def test_a_max_length_beyond_the_models_positions_is_answered(recipe, refusal):
    assert refusal("train", recipe, "--max_length", "513") == (
        "max_length=513 but the model has 512 positions; lower max_length to at most that"
    )


def test_a_pair_longer_than_a_row_is_answered(recipe, refusal):
    said = refusal("train", recipe, "--row_length", "100")
    assert re.fullmatch(
        r"pair '.+' \(.+ line \d+\) takes \d+ slots \(prompt \d+ \+ chosen \d+ \+ rejected \d+\) but row_length is 100; "
        r"raise row_length to \d+, or lower max_length below \d+ to drop or cut such pairs",
        said,
    )


def test_a_held_out_pair_longer_than_a_row_is_answered(recipe, refusal, tmp_path):
    data = tmp_path / "short.jsonl"
    data.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', encoding="utf-8")
    held_out = ASSETS / "preferences" / "test.jsonl"
    said = refusal("train", recipe, "--dataset_name", data, "--eval_dataset_name", held_out, "--row_length", "100")
    assert f"({held_out} line " in said and "but row_length is 100" in said


def test_a_pair_with_more_scored_tokens_than_a_row_is_answered(recipe, refusal):
    said = refusal("train", recipe, "--scored_length", "100")
    assert re.fullmatch(
        r"pair '.+' \(.+ line \d+\) has \d+ scored tokens but scored_length is 100; raise scored_length to \d+", said
    )


@pytest.mark.parametrize("name", ["row_length", "scored_length"])
def test_the_room_that_is_asked_for_is_enough(recipe, refusal, name):
    (enough,) = re.findall(rf"raise {name} to (\d+)", refusal("train", recipe, f"--{name}", "100"))
    # With that much room the pairs fit, and the next mistake is found.
    said = refusal("train", recipe, f"--{name}", enough, "--train_batch_size", "601")
    assert said == "train_batch_size=601 but there are 600 pairs to train on; lower train_batch_size to at most 600"


def test_a_mesh_that_is_not_the_devices_is_answered(recipe, refusal):
    assert refusal("train", recipe, "--fsdp", "3") == (
        "mesh data=1 fsdp=3 tensor=1 needs 3 devices but 8 are present; "
        "make the axes multiply to 8, or set one of them to -1"
    )
    assert refusal("train", recipe, "--tensor", "3") == (
        "mesh data=1 fsdp=-1 tensor=3 leaves 8 / 3 devices for the axis that is -1; "
        "make the other axes multiply to a divisor of 8"
    )


def test_a_mesh_that_does_not_divide_the_model_is_answered(recipe, refusal):
    said = refusal("train", recipe, "--tensor", "8")
    assert re.fullmatch(
        r"axis F of 'layers_L/mlp/\w+' has size 172, which mesh.tensor=8 does not divide; "
        r"lower mesh.tensor to a divisor of 172",
        said,
    )


def test_an_unknown_loss_is_answered(recipe, refusal):
    said = refusal("train", recipe, "--loss_type", "dpoo")
    assert said == "unknown loss_type 'dpoo'; did you mean 'dpo'? `repo-jax losses` lists what there is"
    assert refusal("train", recipe, "--loss_type", "[repo]").startswith("unknown loss_type ")


def test_a_hyperparameter_of_another_loss_is_answered(recipe, refusal):
    assert refusal("train", recipe, "--beta", "2.0") == "loss 'repo' has no hyperparameter 'beta'; it takes gamma"


@pytest.mark.parametrize("value", ["half", "null", "true", ".nan"])
def test_a_hyperparameter_that_is_no_number_is_answered(recipe, refusal, value):
    said = refusal("train", recipe, "--gamma", value)
    assert said.startswith("loss 'repo': gamma=") and said.endswith(" must be a number, in nats per token")


def test_an_end_token_that_is_not_one_is_answered(recipe, refusal):
    assert refusal("train", recipe, "--eos_token", "<|im_end|>").startswith("eos_token='<|im_end|>' is not one token")


def test_evaluating_on_nothing_is_answered(refusal):
    assert refusal("evaluate", "--model", STORIES) == (
        "there is nothing to evaluate on; give --data a file of preference pairs, or in Python eval_dataset"
    )


def test_evaluating_nothing_is_answered(refusal):
    assert refusal("evaluate", "--data", "x.jsonl").startswith("recipe.model.model_name_or_path is not set;")


def test_exporting_what_is_no_checkpoint_is_answered(refusal, tmp_path):
    assert refusal("export", "--checkpoint", tmp_path, "--output", tmp_path / "out") == (
        f"'{tmp_path}' is not a checkpoint-N folder in the folder of a run; give the path of one"
    )
    assert not (tmp_path / "out").exists()


def test_exporting_over_what_is_no_model_is_answered(refusal, tmp_path):
    (tmp_path / "notes.txt").touch()
    assert refusal("export", "--checkpoint", "checkpoint-1", "--output", tmp_path) == (
        f"output '{tmp_path}' exists and is not an export of repo-jax; name a new folder"
    )
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize(
    "argv, said", [([], "usage: repo-jax"), (["--version"], f"repo-jax {repo_jax.__version__} (jax ")]
)
def test_without_a_command_there_is_help_and_there_is_a_version(capsys, argv, said):
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert not ended.value.code and capsys.readouterr().out.startswith(said)


def test_the_version_is_said_once_and_installed_as_it_is():
    assert 'version = { attr = "repo_jax.__version__" }' in (ROOT / "pyproject.toml").read_text()


def test_ctrl_c_outside_updates_is_one_line_and_its_own_status(recipe, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_recipe", interrupted)
    assert cli.main(["train", str(recipe)]) == 130
    said = capsys.readouterr().err
    assert said.startswith("repo-jax: interrupted; the same command starts again") and said.count("\n") == 1


def test_a_fault_of_the_work_itself_keeps_its_traceback(recipe, monkeypatch):
    def fail(setup):
        raise ValueError("a fault of ours")

    monkeypatch.setattr("repo_jax.training.prepare", lambda recipe: None)
    monkeypatch.setattr("repo_jax.training.run", fail)
    with pytest.raises(ValueError, match="a fault of ours"):
        cli.main(["train", str(recipe)])
