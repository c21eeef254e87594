"""A model's answers to a file of prompts: what is asked, how it is sampled, what is written, and going on where a run was killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import filelock
import jax
import numpy as np
import pytest
import safetensors.numpy
from examples import ROOT, STORIES
from families import FAMILIES

from repo_jax import answers, cli
from repo_jax.answers import end_of_turn, read_prompts, read_sampling
from repo_jax.config import load_recipe
from repo_jax.data.chat import load_tokenizer
from repo_jax.data.sources import RawRow

REFERENCE = json.loads((STORIES / "reference.json").read_text(encoding="utf-8"))["greedy"]
BARE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
USER = {"role": "user", "content": "the cat sat"}
ANSWER = {"role": "assistant", "content": "on the mat"}
AGAIN = {"role": "user", "content": "a dog ran"}


def rows(*contents):
    return [RawRow("p", f"p.jsonl line {i}", f"p:{i}", json.dumps(row).encode()) for i, row in enumerate(contents, 1)]


def read_one(tokenizer, row, **kwargs):
    [prompt] = read_prompts(rows(row), tokenizer, kwargs)
    return prompt


# What is asked


@pytest.mark.parametrize("family", FAMILIES.values(), ids=str)
@pytest.mark.parametrize("conversation", [[USER], [USER, ANSWER, AGAIN]], ids=["one-turn", "two-turns"])
def test_a_prompt_is_what_apply_chat_template_asks_with(family, conversation):
    tokenizer = family.tokenizer
    expected = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    ids = read_one(tokenizer, {"messages": conversation}).ids.tolist()
    if family.name == "zephyr":  # whose template writes no BOS, though its tokenizer adds one
        expected = [tokenizer.bos_token_id, *expected]
    assert ids[:2] != ids[1:2] * 2
    assert ids == expected


@pytest.mark.parametrize("written", [0, 1, 2])
@pytest.mark.parametrize("adds", [True, False])
def test_there_is_one_bos_whoever_writes_it(written, adds):
    tokenizer = load_tokenizer(str(STORIES), chat_template="{{ bos_token }}" * written + BARE)
    if not adds:
        tokenizer.backend_tokenizer.post_processor = None
    ids = read_one(tokenizer, {"prompt": "Once upon a time"}).ids.tolist()
    assert ids.count(tokenizer.bos_token_id) == int(adds or written > 0)


ONE = "the cat sat"


@pytest.mark.parametrize(
    "row, messages, instruction",
    [
        ({"prompt": ONE}, [USER], ONE),
        ({"instruction": ONE}, [USER], ONE),
        ({"instruction": ONE, "input": ""}, [USER], ONE),
        ({"instruction": ONE, "input": "?"}, [{"role": "user", "content": f"{ONE}\n\n?"}], f"{ONE}\n\n?"),
        ({"prompt": [USER]}, [USER], ONE),
        ({"messages": [USER]}, [USER], ONE),
        ({"messages": [USER, ANSWER]}, [USER], ONE),  # the answer is what is to be written
        ({"messages": [{"from": "human", "value": ONE}, {"from": "gpt", "value": "no"}]}, [USER], ONE),
        (
            {"messages": [USER, ANSWER, AGAIN]},
            [USER, ANSWER, AGAIN],
            f"user: {ONE}\n\nassistant: on the mat\n\nuser: a dog ran",
        ),
        ({"prompt": [AGAIN], "instruction": "told otherwise"}, [AGAIN], "told otherwise"),
        ({"prompt": ONE, "chosen": "x", "rejected": 3, "margin": "no number"}, [USER], ONE),
    ],
)
def test_every_kind_of_row_is_asked_in_the_words_of_the_template(row, messages, instruction):
    tokenizer = FAMILIES["qwen-2"].tokenizer
    prompt = read_one(tokenizer, row)
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt.ids.tolist() == expected
    assert prompt.instruction == instruction and prompt.row == row


def test_template_options_come_from_the_command_and_from_the_row():
    tokenizer = FAMILIES["qwen-3"].tokenizer
    plain, thoughtless = (
        tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=False, **options)
        for options in ({}, {"enable_thinking": False})
    )
    assert read_one(tokenizer, {"prompt": ONE}).ids.tolist() == plain != thoughtless
    assert read_one(tokenizer, {"prompt": ONE}, enable_thinking=False).ids.tolist() == thoughtless
    row = {"prompt": ONE, "chat_template_kwargs": {"enable_thinking": False}}
    assert read_one(tokenizer, row).ids.tolist() == thoughtless


def test_what_looks_like_a_special_token_in_a_prompt_is_text():
    tokenizer = FAMILIES["qwen-2"].tokenizer
    ids = read_one(tokenizer, {"prompt": "a <|im_end|> b"}).ids.tolist()
    ends = tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=False).count(
        tokenizer.eos_token_id
    )
    assert ids.count(tokenizer.eos_token_id) == ends
    assert "a <|im_end|> b" in tokenizer.decode(ids)


def test_without_a_template_a_text_is_continued_as_it_is():
    tokenizer = load_tokenizer(str(STORIES))
    assert read_one(tokenizer, {"prompt": ""}).ids.tolist() == [1]
    assert read_one(tokenizer, {"prompt": "Once upon a time"}).ids.tolist() == REFERENCE["ids"][:5]
    assert read_one(tokenizer, {"prompt": "<s><s>Once upon a time"}).ids.tolist() == REFERENCE["ids"][:5]
    with pytest.raises(ValueError, match=r"p.jsonl line 1 holds messages but the tokenizer has no chat template"):
        read_one(tokenizer, {"prompt": [USER]})


@pytest.mark.parametrize(
    "row, said",
    [
        ({"question": "x", "id": 1}, "has no prompt; wanted 'prompt' (text or messages), 'instruction' or 'messages', found question, id"),
        ({"prompt": 3}, "has no prompt; wanted "),
        ({"prompt": [USER, ANSWER]}, "ends with the assistant's words; give a prompt that ends with the user's"),
        ({"messages": [ANSWER]}, "has an empty list as 'prompt'"),
        ({"messages": [{"role": "user"}]}, "as message 0 of 'prompt'; wanted {'role': text, 'content': text}"),
        ({"messages": [{"role": "poet", "content": "x"}]}, "the chat template cannot write this conversation"),
        ("text", "is a JSON text; wanted an object"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_asked_is_named(row, said):
    tokenizer = FAMILIES["mistral"].tokenizer
    with pytest.raises(ValueError) as refused:
        read_prompts(rows({"prompt": ONE}, row), tokenizer, {})
    assert str(refused.value).startswith("p.jsonl line 2") and said in str(refused.value)


def test_a_line_that_is_not_json_is_named():
    with pytest.raises(ValueError, match=r"p.jsonl line 1 is not JSON: .* mend or remove the line"):
        read_prompts([RawRow("p", "p.jsonl line 1", "p:1", b'{"prompt": ')], FAMILIES["mistral"].tokenizer, {})


def test_an_empty_prompt_needs_a_bos():
    tokenizer = load_tokenizer(str(STORIES))
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(ValueError, match=r"p.jsonl line 1 has an empty prompt"):
        read_one(tokenizer, {"prompt": ""})


# How it is sampled


def config(tmp_path, **generation_config):
    (tmp_path / "generation_config.json").write_text(json.dumps(generation_config))
    return tmp_path


LLAMA_3 = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [9, 7]}


@pytest.mark.parametrize(
    "file, given, expected",
    [
        ({}, {}, (0, 0, 1)),
        ({"temperature": 0.6, "top_k": 3}, {}, (0, 0, 1)),  # do_sample is not said
        (LLAMA_3, {}, (0.6, 50, 0.9)),
        (LLAMA_3 | {"top_k": 0}, {}, (0.6, 0, 0.9)),
        (LLAMA_3, {"temperature": 1.0, "top_k": 0}, (1.0, 0, 0.9)),
        (LLAMA_3, {"temperature": 0}, (0, 0, 1)),
        ({}, {"temperature": 0.7}, (0.7, 50, 1)),
        ({"do_sample": False, "top_p": 0.8}, {"top_k": 5}, (1.0, 5, 0.8)),
        ({"do_sample": True, "temperature": None}, {}, (1.0, 50, 1)),
    ],
)
def test_what_is_not_given_comes_from_the_models_own_file(tmp_path, file, given, expected):
    sampling, notes = read_sampling(config(tmp_path, **file), {2}, 5, **given)
    assert sampling[:4] == (5, *expected) and notes == []


def test_end_tokens_are_those_of_the_file_the_tokenizer_and_the_template(tmp_path):
    assert read_sampling(config(tmp_path, eos_token_id=[9, 7]), {2}, 5)[0].eos_ids == (2, 7, 9)
    assert read_sampling(config(tmp_path, eos_token_id=9), set(), 5)[0].eos_ids == (9,)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text('{"eos_token_id": 4}')
    assert read_sampling(tmp_path, {2}, 5)[0].eos_ids == (2, 4)
    for family in FAMILIES.values():
        assert end_of_turn(family.tokenizer, {}) == family.tokenizer.convert_tokens_to_ids(family.end)
    assert end_of_turn(load_tokenizer(str(STORIES)), {}) is None
    assert end_of_turn(load_tokenizer(str(STORIES), chat_template=BARE), {}) is None


def test_what_the_models_file_asks_for_in_vain_is_said(tmp_path):
    _, notes = read_sampling(
        config(tmp_path, repetition_penalty=1.1, num_beams=1, min_p=0.0, no_repeat_ngram_size=None), {2}, 5
    )
    assert notes == ["repetition_penalty 1.1 of generation_config.json is not supported and left out"]


def test_a_models_file_that_is_not_json_is_answered(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config.json is not JSON .*; fetch it again"):
        read_sampling(tmp_path, {2}, 5)


# What is written


PROMPTS = [
    {"prompt": "", "dataset": "none"},
    *(
        {"instruction": f"Lily and the {what} ", "output": "a reference's", "n": i}
        for i, what in enumerate(["ball", "dog \u2028", "tree", "big red car and the little red car", "cup", "cat"])
    ),
]
PROMPTS[3]["note"] = "half a character: \ud83d"  # fmt: skip


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS), encoding="utf-8")
    return path


@pytest.fixture
def generate(data, tmp_path):
    """Runs the command with two prompts at a time; returns the lines of its output."""

    def run(*flags, output="out.jsonl", code=0, model=STORIES):
        argv = ["generate", "--model", model, "--data", data, "--output", tmp_path / output, "--batch_size", 2]
        assert cli.main([str(arg) for arg in (*argv, *flags)]) == code
        return (tmp_path / output).read_bytes().splitlines(keepends=True) if code == 0 else []

    return run


@pytest.fixture
def refused(generate, capsys):
    """Runs the command, which must fail in one line; returns the line."""

    def run(*flags, **given):
        capsys.readouterr()
        generate(*flags, **{"code": 2} | given)
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("repo-jax: ") and err.count("\n") == 1
        return err.removeprefix("repo-jax: ").removesuffix("\n")

    return run


SHORT = ("--max_new_tokens", 16, "--temperature", 0.9)


@pytest.fixture
def never(monkeypatch):
    """Whoever loads the model fails."""

    monkeypatch.setattr(answers, "load_model", None)


def test_lines_have_alpaca_evals_columns_and_the_rows_own_in_the_order_of_the_prompts(generate, capsys):
    lines = generate("--max_new_tokens", 16, "--generator", "storyteller")
    found = [json.loads(line) for line in lines]
    said = capsys.readouterr().out
    assert "the likeliest tokens, at most 16 new tokens, end tokens 2, seed 42\n" in said
    assert "note: the tokenizer has no chat template: prompts are continued as plain text\n" in said
    assert said.endswith("(7 answers; 7 of the 7 new ones were cut before an end token)\n")
    assert [list(row)[:3] for row in found] == [["instruction", "output", "generator"]] * len(PROMPTS)
    for row, prompt in zip(found, PROMPTS, strict=True):
        assert row["instruction"] == prompt.get("instruction", prompt.get("prompt"))
        assert row["generator"] == "storyteller"
        assert {name: row[name] for name in prompt if name != "output"} == {
            name: value for name, value in prompt.items() if name != "output"
        }
        assert row["output"] != "a reference's"
    # From <s> alone: the model's published sample.
    assert found[0]["output"] == load_tokenizer(str(STORIES)).decode(REFERENCE["ids"][1:17])
    assert len({row["output"] for row in found}) > 3


def test_an_answer_ends_where_the_model_ends_it(generate):
    tokenizer = load_tokenizer(str(STORIES))
    # " named", which the published sample has as its tenth word.
    named = tokenizer.convert_ids_to_tokens(REFERENCE["ids"][14])
    [first, *_] = generate("--max_new_tokens", 30, "--eos_token", named)
    assert json.loads(first)["output"] == tokenizer.decode(REFERENCE["ids"][1:14])


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(generate):
    one, again, other = (
        generate(*SHORT, "--seed", seed, output=f"{name}.jsonl") for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert one == again
    assert sum(a != b for a, b in zip(one, other, strict=True)) == len(PROMPTS)


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(generate, data, tmp_path):
    rows = "".join(json.dumps({"prompt": f"Lily had {i} red balls and"}) + "\n" for i in range(100))
    data.write_text(rows, encoding="utf-8")
    output = tmp_path / "killed.jsonl"
    argv = ["--model", STORIES, "--data", data, "--output", output, "--batch_size", 2, *SHORT]
    start = "import jax; jax.config.update('jax_num_cpu_devices', 8); from repo_jax import cli; cli.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", start, "generate", *map(str, argv)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not (output.exists() and output.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = output.read_bytes()
    assert 2 <= before.count(b"\n") < 100
    assert before.endswith(b"\n") and before.count(b"\n") % 2 == 0  # whole batches, written at once
    whole = generate(*SHORT, output="whole.jsonl")
    assert b"".join(whole).startswith(before)
    assert generate(*SHORT, output="killed.jsonl") == whole


def test_a_batch_is_in_the_file_before_the_next_one_begins(generate, tmp_path, monkeypatch):
    written = []

    class Watched(answers.Generator):
        def __call__(self, *args):
            written.append((tmp_path / "out.jsonl").read_bytes().count(b"\n"))
            return super().__call__(*args)

    monkeypatch.setattr(answers, "Generator", Watched)
    generate(*SHORT)
    assert written == [0, 2, 4, 6]


@pytest.mark.parametrize("kept, cut, on_from", [(0, 9, None), (4, 0, 5), (5, 9, 5)])
def test_a_batch_that_was_cut_is_written_again(generate, tmp_path, capsys, kept, cut, on_from):
    whole = generate(*SHORT)
    (tmp_path / "out.jsonl").write_bytes(b"".join(whole[:kept]) + whole[kept][:cut])
    capsys.readouterr()
    assert generate(*SHORT) == whole
    said = f"out.jsonl holds {kept // 2 * 2} answers already; going on from prompt {on_from}\n"
    assert (said in capsys.readouterr().out) == (on_from is not None)


def test_a_finished_output_is_left_alone(generate, monkeypatch, capsys):
    whole = generate(*SHORT)
    capsys.readouterr()
    monkeypatch.setattr(answers, "load_model", None)
    assert generate(*SHORT) == whole
    assert "holds 7 answers already; nothing is left to do\n" in capsys.readouterr().out


def test_answers_to_other_prompts_are_not_gone_on_with(generate, refused, data, tmp_path):
    output = tmp_path / "out.jsonl"
    whole = generate(*SHORT)
    (tmp_path / "out.jsonl.settings.json").unlink()
    output.write_bytes(b"".join([whole[0], whole[2]]))
    said = refused(*SHORT)
    assert (
        said
        == f"line 2 of --output '{output}' does not answer {data} line 2; name another --output, or remove the file"
    )
    output.write_bytes(b"no JSON\n")
    assert refused(*SHORT).startswith(f"line 1 of --output '{output}' does not answer ")
    output.write_bytes(b"".join(whole) + whole[0])
    assert refused(*SHORT).startswith(f"--output '{output}' has 8 lines but there are 7 prompts; ")
    assert output.read_bytes() == b"".join(whole) + whole[0]
    output.write_bytes(b"".join(whole[:4]))
    assert refused(*SHORT, "--generator", "another").startswith(f"line 1 of --output '{output}' does not answer ")


def test_answers_made_otherwise_are_not_gone_on_with(generate, refused, data, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_bytes(generate(*SHORT)[0])
    for flags, said in (
        (("--temperature", 0.5), "temperature 0.9 there, 0.5 here"),
        (("--seed", 7), "seed 42 there, 7 here"),
        (("--top_k", 7), "top_k 50 there, 7 here"),
        (("--chat_template", BARE + "!"), "prompt_ids "),
    ):
        answer = refused(*SHORT, *flags)
        assert answer.startswith(f"--output '{output}' holds answers made otherwise ({said}")
        assert answer.endswith("); name another --output, or remove the file")
    # Nothing is there yet that could be mixed.
    output.write_bytes(b"")
    assert len(generate("--max_new_tokens", 16, "--temperature", 0.5)) == len(PROMPTS)


def test_answers_of_other_weights_are_not_gone_on_with(generate, refused, tmp_path):
    model = shutil.copytree(STORIES, tmp_path / "model")
    generate(*SHORT, model=model)
    same = shutil.copytree(model, tmp_path / "copy")
    model.rename(tmp_path / "moved")
    same.rename(model)
    generate(*SHORT, model=model)  # a copy is the same model
    weights = safetensors.numpy.load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * np.float32(1.01)
    safetensors.numpy.save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert "holds answers made otherwise (weights '" in refused(*SHORT, model=model)


@pytest.mark.parametrize("content", ['{"instruction": "mine"}', '[{"a": 1}]', "precious"])
def test_a_file_without_a_newline_is_not_taken_for_one_that_was_cut(refused, tmp_path, content):
    (tmp_path / "out.jsonl").write_text(content)
    assert "holds something else than answers of this run; name another --output, or remove the file" in refused(*SHORT)
    assert (tmp_path / "out.jsonl").read_text() == content


def test_two_runs_never_write_into_one_file(refused, tmp_path):
    with filelock.FileLock(tmp_path / ".out.jsonl.lock"):
        assert refused(*SHORT, code=1).startswith(f"another run writes '{tmp_path / 'out.jsonl'}'; wait for it")
    assert not (tmp_path / "out.jsonl").exists()


def test_an_answer_gets_no_more_room_than_the_model_has_positions(data, tmp_path):
    fields = {"model.model_name_or_path": str(STORIES), "data.eval_dataset_name": str(data)}
    job = answers.prepare(load_recipe(None, fields), tmp_path / "out.jsonl", max_new_tokens=10**12)
    assert job.sampling.max_new_tokens == 511


def test_settings_that_are_missing_are_noted(generate, tmp_path, capsys):
    whole = generate(*SHORT)
    (tmp_path / "out.jsonl.settings.json").unlink()
    (tmp_path / "out.jsonl").write_bytes(whole[0] + whole[1])
    capsys.readouterr()
    assert generate(*SHORT) == whole
    assert "out.jsonl.settings.json is missing: the answers that are there are taken to be made as these" in (
        capsys.readouterr().out
    )


# Mistakes


@pytest.mark.parametrize(
    "flags, said",
    [
        (
            ("--max_prompt_length", 9, "--schema", "hh"),
            "generate does not read max_prompt_length, schema; leave it out",
        ),
        (("--learning_rate", 1), "generate does not read learning_rate; leave it out"),
        (("--temperature", -1), "temperature=-1.0; give 0, which takes the likeliest token, or a number from 0.001"),
        (("--temperature", "nan"), "temperature=nan; give 0, which takes the likeliest token, or a number from 0.001"),
        (("--top_k", -1), "top_k=-1; give a number of tokens, or 0 for all"),
        (("--top_p", 0), "top_p=0.0; give a probability above 0 and at most 1"),
        (("--max_new_tokens", 0), "max_new_tokens=0; give a whole number from 1"),
        (("--batch_size", 0), "batch_size=0; give a whole number from 1"),
        (("--seed", 2**32), "seed=4294967296; give a number below 2**32"),
    ],
)
def test_an_option_out_of_range_is_answered(refused, never, flags, said, tmp_path):
    assert refused(*flags) == said
    assert not (tmp_path / "out.jsonl").exists()


def test_a_prompt_beyond_the_models_positions_is_answered_before_the_model_is_loaded(refused, never, data):
    long = {"prompt": "cat " * 600}
    data.write_text("".join(json.dumps(row) + "\n" for row in [PROMPTS[0], long, long]), encoding="utf-8")
    said = refused(*SHORT)
    assert said.startswith(f"the prompt of {data} line 2 has ") and "tokens but the model has 512 positions" in said
    assert said.endswith("and 1 more are too long; shorten or leave out what is too long")


def test_what_is_missing_is_asked_for(refused, never, data, tmp_path):
    assert (
        refused("--eval_dataset_name", "null")
        == "there is nothing to answer; give --data a file of prompts, or in Python prompts"
    )
    assert refused(output="nowhere/out.jsonl").endswith(" lies in a folder that does not exist; make it first")
    (tmp_path / "folder").mkdir()
    assert refused(output="folder").endswith("' is a folder; name a file")
    data.write_text("", encoding="utf-8")
    assert refused() == f"'{data}' has no rows; give a file of prompts"


def test_help_states_the_defaults_that_there_are(capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    defaults = answers.prepare.__kwdefaults__
    assert set(cli.GENERATE_FLAGS) == set(defaults)
    assert f"tokens of an answer at most (default: {defaults['max_new_tokens']})" in text
    assert f"prompts taken at a time, over all devices (default: {defaults['batch_size']})" in text
    assert f"else {answers.TRANSFORMERS_TOP_K}, as in transformers)" in text
