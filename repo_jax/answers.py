"""A model's answers to a file of prompts, as JSON lines with AlpacaEval's columns; a run that was stopped goes on where it was.

Beside OUTPUT stands OUTPUT.settings.json, which says how the answers were made: answers made otherwise are never mixed in.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import filelock
import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from repo_jax.config import Recipe, StoppedError, recipe_of_model
from repo_jax.data.schema import Fault, PreferenceExample, read_examples
from repo_jax.data.sources import RawRow
from repo_jax.data.special import SpecialTokens
from repo_jax.data.template import RefusedError, Template
from repo_jax.generation import Generator, Sampling
from repo_jax.memory import explained, held_in_scoring
from repo_jax.models.decoder import param_shapes
from repo_jax.models.pretrained import Pretrained, open_model
from repo_jax.models.tensors import fingerprint
from repo_jax.preparation import check_used, check_vocabulary, decoder, resolved
from repo_jax.progress import say
from repo_jax.run_folder import write_whole
from repo_jax.sharding import make_mesh, param_shardings
from repo_jax.stores import let_go, model_files, open_data, tokenizer_of, with_rows

TRANSFORMERS_TOP_K = 50  # what transformers samples with where neither the model nor the caller says
# What a generation_config.json may ask for that is not done here, and the values that ask for nothing.
IGNORED = {
    "repetition_penalty": (None, 1, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "min_p": (None, 0, 0.0),
    "typical_p": (None, 1, 1.0),
    "epsilon_cutoff": (None, 0, 0.0),
    "eta_cutoff": (None, 0, 0.0),
    "penalty_alpha": (None, 0, 0.0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "bad_words_ids": (None, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1, 1.0),
    "sequence_bias": (None, {}, []),
    "stop_strings": (None, []),
}


class Prompt(NamedTuple):
    """One row to be answered."""

    where: str  # file and line, for messages
    ids: np.ndarray  # int32, up to where the answer begins
    instruction: str  # the prompt for people, without what a template writes around it
    row: dict  # its columns, which go into the output too


class Job(NamedTuple):
    """Everything a run needs, looked at."""

    recipe: Recipe  # with the dtypes that auto stands for filled in
    pretrained: Pretrained
    tokenizer: object
    mesh: Mesh
    sampling: Sampling
    prompts: list[Prompt]
    output: pathlib.Path
    kept: list[bytes]  # lines of an earlier run that stay
    generator: str  # the model's name in the output
    batch_size: int
    notes: list[str]  # what should not pass unsaid

    @property
    def settings(self) -> dict:
        """What decides the answers."""
        ids = hashlib.sha256(b"".join(np.int32([len(prompt.ids), *prompt.ids]).tobytes() for prompt in self.prompts))
        model = self.recipe.model
        return {
            "model": model.model_name_or_path,
            "revision": model.model_revision,
            "weights": fingerprint(self.pretrained.files.weights, self.pretrained.files.adapter),
            "generator": self.generator,
            **self.sampling._asdict(),
            "eos_ids": list(self.sampling.eos_ids),
            "seed": self.recipe.run.seed,
            "compute_dtype": model.compute_dtype,
            "param_dtype": model.param_dtype,
            "prompts": len(self.prompts),
            "prompt_ids": ids.hexdigest(),
        }

    @property
    def settings_file(self) -> pathlib.Path:
        return self.output.with_name(f"{self.output.name}.settings.json")


def prepare(
    recipe: Recipe,
    output: str | pathlib.Path,
    *,
    max_new_tokens: int = 512,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    batch_size: int = 16,
    generator: str | None = None,
) -> Job:
    """Looks at everything before any device work; the prompts are data.eval_dataset_name.

    What is None comes from the model's generation_config.json, as in transformers; temperature 0 takes the likeliest token. The
    name `generator` that goes into the output is the model's unless it is given. Raises ValueError or FileNotFoundError with a
    message that says what to change.
    """
    pretrained = open_model(model_files(recipe, weights=True))
    cfg, name = pretrained.cfg, recipe.model.model_name_or_path
    if cfg.labels:
        raise ValueError(f"'{name}' is a classification or reward model, which writes nothing; give a language model")
    tokenizer = tokenizer_of(recipe)
    check_vocabulary(tokenizer, cfg)
    for option, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{option}={value}; give a whole number from 1")
    if recipe.run.seed >= 2**32:
        raise ValueError(f"seed={recipe.run.seed}; give a number below 2**32")
    template_kwargs = recipe.data.chat_template_kwargs or {}
    ends = {tokenizer.eos_token_id, end_of_turn(tokenizer, template_kwargs)} - {None}
    max_new_tokens = min(max_new_tokens, cfg.max_positions - 1)  # there is room for no more
    sampling, notes = read_sampling(pretrained.files.weights, ends, max_new_tokens, temperature, top_k, top_p)
    if recipe.data.eval_dataset_name is None:
        raise ValueError("there is nothing to answer; give --data a file of prompts, or in Python prompts")
    source = open_data(recipe.data, recipe.data.eval_dataset_name, recipe.data.dataset_test_split or "test")
    prompts = read_prompts(source.rows(), tokenizer, template_kwargs)
    if not prompts:
        raise ValueError(f"'{source.name}' has no rows; give a file of prompts")
    check_used(tokenizer, cfg, (np.asarray(prompt.ids) for prompt in prompts))
    if long := [prompt for prompt in prompts if len(prompt.ids) >= cfg.max_positions]:
        more = f", and {len(long) - 1} more are too long" if len(long) > 1 else ""
        raise ValueError(
            f"the prompt of {long[0].where} has {len(long[0].ids)} tokens but the model has {cfg.max_positions} positions, "
            f"which leaves none for an answer{more}; shorten or leave out what is too long"
        )
    if tokenizer.chat_template is None:
        notes.append("the tokenizer has no chat template: prompts are continued as plain text")
    output = pathlib.Path(output)
    if not output.absolute().parent.is_dir():
        raise ValueError(f"--output '{output}' lies in a folder that does not exist; make it first")
    mesh = make_mesh(recipe.mesh.data, recipe.mesh.fsdp, recipe.mesh.tensor)
    param_shardings(param_shapes(cfg), mesh)
    if mesh.shape["fsdp"] > 1:
        notes.append(
            f"mesh.fsdp={mesh.shape['fsdp']} gathers the weights anew for every token; where they fit, fsdp 1 beside mesh.tensor or mesh.data is faster"
        )
    recipe = dataclasses.replace(recipe, model=resolved(recipe.model, exact=pretrained.adapter is not None))
    job = Job(recipe, pretrained, tokenizer, mesh, sampling, prompts, output, [], generator or name, batch_size, notes)
    return job._replace(kept=written_already(job))


def generate(
    recipe_or_model: Recipe | str | os.PathLike, output: str | pathlib.Path | None = None, *, prompts=None, **options
) -> pathlib.Path | list[dict]:
    """A model's answers to prompts, in their order: the file `output` of JSON lines or, without `output`, the lines as a list of dicts with
    the columns instruction, output and generator, and those of the prompts.

    What comes first is a recipe, the path of its YAML file, or a model (a folder, a URL, ORG/NAME). `prompts` is a list of texts, of lists of
    messages or of dicts (prompt, instruction or messages), or a datasets.Dataset or pandas.DataFrame, in place of the recipe's eval_dataset_name;
    `options` are those of prepare. Raises ValueError, FileNotFoundError or TypeError for what cannot be answered.
    """
    if isinstance(prompts, list | tuple):
        prompts = [{"prompt": one} if isinstance(one, str | list) else one for one in prompts]
    recipe = with_rows(recipe_of_model(recipe_or_model), prompts=prompts)
    try:
        if output is not None:
            return run(prepare(recipe, output, **options))
        with tempfile.TemporaryDirectory() as folder:
            answered = run(prepare(recipe, pathlib.Path(folder) / "answers.jsonl", **options))
            # Of several processes the first one has them.
            return [json.loads(line) for line in answered.read_bytes().splitlines()] if answered.exists() else []
    finally:
        let_go(recipe)


def run(job: Job) -> pathlib.Path:
    """Writes the answers that are not there yet. Every process of a mesh takes part; the first one writes, and says what it does."""
    total, done, first = len(job.prompts), len(job.kept), jax.process_index() == 0
    held = held_in_scoring(job.pretrained.shapes(job.mesh, job.recipe.model.param_dtype))
    advice = [f"batch_size: {max(1, job.batch_size // 2)} (now {job.batch_size})", "a lower max_new_tokens"]
    advice += ["more devices, over which mesh.tensor splits parameters and cache, or mesh.fsdp parameters"]
    with only_run(job) if first else contextlib.nullcontext(), explained(job.mesh, held, lambda: advice):
        return _run(job, total, done, first)


def _run(job: Job, total: int, done: int, first: bool) -> pathlib.Path:
    if first:
        say("\n".join(describe(job)))
        write_whole(job.settings_file, json.dumps(job.settings, indent=2) + "\n")
        with open(job.output, "ab") as file:  # made if it is not there
            file.truncate(sum(map(len, job.kept)))
    if done == total:
        return job.output
    variables = load_model(job)
    model = decoder(job.recipe.model, job.pretrained.cfg, job.mesh)
    continue_prompts = Generator(model, job.mesh, job.sampling, batch_size=job.batch_size)
    endless = 0
    bar = tqdm(total=total, initial=done, desc="answering", unit=" prompts", disable=None if first else True)
    with bar, open(job.output if first else os.devnull, "ab") as file:
        for start in range(done, total, job.batch_size):
            group = job.prompts[start : start + job.batch_size]
            rows = range(start, start + len(group))
            answers = continue_prompts(variables, [prompt.ids for prompt in group], rows, job.recipe.run.seed)
            endless += sum(ids[-1] not in job.sampling.eos_ids for ids in answers)
            # Written at once and handed to the system, so that a run that is killed has whole batches to go on from.
            file.write(b"".join(answer_line(job, prompt, ids) for prompt, ids in zip(group, answers, strict=True)))
            file.flush()
            bar.update(len(group))
    if first:
        cut = f"; {endless} of the {total - done} new ones were cut before an end token" if endless else ""
        say(f"{job.output}  ({total} answers{cut})")
    return job.output


@contextlib.contextmanager
def only_run(job: Job) -> Iterator[None]:
    """Keeps a second run from writing into the same file."""
    lock = filelock.FileLock(job.output.with_name(f".{job.output.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise StoppedError(f"another run writes '{job.output}'; wait for it, or name another --output") from None
    try:
        yield
    finally:
        pathlib.Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def describe(job: Job) -> list[str]:
    """What a run is about to do, in a few lines."""
    sampling, done = job.sampling, len(job.kept)
    how = f"temperature {sampling.temperature:g}, top_k {sampling.top_k}, top_p {sampling.top_p:g}"
    how = "the likeliest tokens" if sampling.temperature == 0 else how
    ends = ", ".join(map(str, sampling.eos_ids)) or "none"
    mesh = " x ".join(f"{axis} {size}" for axis, size in job.mesh.shape.items())
    lines = [
        f"{len(job.prompts)} prompts for {job.generator}, in {job.recipe.model.compute_dtype} on {mesh}",
        f"{how}, at most {sampling.max_new_tokens} new tokens, end tokens {ends}, seed {job.recipe.run.seed}",
        *(f"note: {note}" for note in job.notes),
    ]
    if done:
        left = "nothing is left to do" if done == len(job.prompts) else f"going on from prompt {done + 1}"
        lines.append(f"{job.output} holds {done} answers already; {left}")
    return lines


def load_model(job: Job) -> dict:
    """The model's collections of variables; an adapter is part of the parameters."""
    return {"params": job.pretrained.params(job.mesh, job.recipe.model.param_dtype)}


# How tokens are chosen


def read_sampling(
    folder: pathlib.Path,
    ends: set[int],
    max_new_tokens: int,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Sampling, list[str]]:
    """What was asked for, and where nothing was, what the model's generation_config.json says; and notes on what that says in vain.

    A model whose file does not say do_sample answers with the likeliest tokens, unless one of the three is given. `ends` are end
    tokens beside those that the model names.
    """
    config = read_generation_config(folder)
    if not config.get("do_sample") and (temperature, top_k, top_p) == (None, None, None):
        temperature = 0.0
    temperature, top_k, top_p = (
        next(value for value in (given, config.get(name), default) if value is not None)
        for name, given, default in (
            ("temperature", temperature, 1.0),
            ("top_k", top_k, TRANSFORMERS_TOP_K),
            ("top_p", top_p, 1.0),
        )
    )
    if temperature != 0 and not 1e-3 <= temperature < math.inf:  # below, logits leave float32's range
        raise ValueError(f"temperature={temperature}; give 0, which takes the likeliest token, or a number from 0.001")
    if top_k < 0:
        raise ValueError(f"top_k={top_k}; give a number of tokens, or 0 for all")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}; give a probability above 0 and at most 1")
    if temperature == 0:
        top_k, top_p = 0, 1.0
    named = config.get("eos_token_id")
    ends = (set(named if isinstance(named, list) else [named]) | ends) - {None}
    notes = [
        f"{name} {config[name]!r} of generation_config.json is not supported and left out"
        for name, neutral in IGNORED.items()
        if config.get(name) not in neutral
    ]
    return Sampling(max_new_tokens, temperature, top_k, top_p, tuple(sorted(ends))), notes


def read_generation_config(folder: pathlib.Path) -> dict:
    """generation_config.json; without one the end tokens of config.json."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {"eos_token_id": json.loads((folder / "config.json").read_text(encoding="utf-8")).get("eos_token_id")}
    return _read_json(path)


def _read_json(path: pathlib.Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again, or remove it") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not a JSON object; fetch it again, or remove it")
    return found


def end_of_turn(tokenizer, chat_template_kwargs: dict) -> int | None:
    """The special token that the chat template writes behind an answer, up to which answers are trained; None without one."""
    probe = "the answer"
    conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": probe}]
    if tokenizer.chat_template is None:
        return None
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, **chat_template_kwargs)
    except Exception:  # a template may do anything; where it matters, read_prompts says what
        return None
    found = SpecialTokens(tokenizer).search(text.rpartition(probe)[2])
    return found and tokenizer.convert_tokens_to_ids(found[0])


# Prompts


def read_prompts(rows: Iterable[RawRow], tokenizer, chat_template_kwargs: dict) -> list[Prompt]:
    """Every row as ids, in order. Texts are what a user says where there is a chat template, else they are continued as they are.

    Raises ValueError, which names file and line, for a row without a prompt or one that the template refuses.
    """
    special = SpecialTokens(tokenizer)
    template = Template(tokenizer, special, chat_template_kwargs)
    bos = tokenizer.bos_token or ""
    adds_bos = tokenizer("", add_special_tokens=True).input_ids[:1] == [tokenizer.bos_token_id]

    def read(raw: RawRow) -> Prompt:
        row = _parse(raw)
        instruction, said = _said(raw.where, row)
        example = _example(raw, row, said, chat=tokenizer.chat_template is not None)
        if example.conversational:
            if example.prompt[-1]["role"] == "assistant":
                raise ValueError(
                    f"{raw.where} ends with the assistant's words; give a prompt that ends with the user's"
                )
            mark = template.mark(example)
            try:
                text = template.renderer(example, mark)(example.prompt, add_generation_prompt=True)
            except RefusedError as refusal:
                raise ValueError(str(refusal)) from None
            first = special.reveal(bos, mark)
        else:
            text, mark, first = example.prompt, "", bos
        # Exactly one BOS, whoever writes it: the template, the tokenizer, or both.
        while bos and text.startswith(first * 2):
            text = text.removeprefix(first)
        [encoding] = special.encode([text], [mark])
        ids = encoding.ids
        if adds_bos and ids[:1] != [tokenizer.bos_token_id]:
            ids = [tokenizer.bos_token_id, *ids]
        if not ids:
            raise ValueError(f"{raw.where} has an empty prompt; a model needs a token to go on from")
        return Prompt(raw.where, np.asarray(ids, np.int32), instruction, row)

    return [read(raw) for raw in rows]


def _parse(raw: RawRow) -> dict:
    if isinstance(raw.content, dict):
        return raw.content
    try:
        row = json.loads(raw.content)
    except (ValueError, RecursionError):
        row = None
    return row if isinstance(row, dict) else _refuse(raw)


def _refuse(raw: RawRow):
    """Raises what the reader of pairs says of a row that is no JSON object."""
    [fault] = read_examples([raw], schema="explicit")
    raise ValueError(fault.message)


def _said(where: str, row: dict) -> tuple[str, str | list]:
    """The instruction for people, and the text or messages to answer."""
    prompt, instruction, messages = (row.get(name) for name in ("prompt", "instruction", "messages"))
    if prompt is None and isinstance(instruction, str):
        more = row.get("input")  # Alpaca's name for what an instruction is about
        prompt = instruction = f"{instruction}\n\n{more}" if isinstance(more, str) and more else instruction
    elif prompt is None and isinstance(messages, list):
        answered = bool(messages) and isinstance(messages[-1], dict) and _role(messages[-1]) in ("assistant", "gpt")
        prompt = messages[:-1] if answered else messages  # an answer that is there already is not asked for again
    if not isinstance(prompt, str | list):
        found = ", ".join(row) or "nothing"
        raise ValueError(
            f"{where} has no prompt; wanted 'prompt' (text or messages), 'instruction' or 'messages', found {found}"
        )
    if not isinstance(instruction, str):
        instruction = prompt if isinstance(prompt, str) else _transcript(prompt)
    return instruction, prompt


def _role(message: dict):
    return message.get("role", message.get("from"))


def _transcript(messages: list) -> str:
    """A lone message by itself; a conversation with a name before each turn."""
    turns = [(_role(turn), turn.get("content", turn.get("value"))) for turn in messages if isinstance(turn, dict)]
    return str(turns[0][1]) if len(turns) == 1 else "\n\n".join(f"{role}: {content}" for role, content in turns)


def _example(raw: RawRow, row: dict, said: str | list, *, chat: bool) -> PreferenceExample:
    """The row as the pairs of training are read, so that messages, tools and template options mean the same here."""
    if isinstance(said, str) and chat:
        said = [{"role": "user", "content": said}]
    answer = "" if isinstance(said, str) else [{"role": "assistant", "content": ""}]
    columns = {name: row[name] for name in ("id", "tools", "chat_template_kwargs") if name in row}
    pair = columns | {"prompt": said, "chosen": answer, "rejected": answer}
    if isinstance(raw.content, bytes):
        pair = json.dumps(pair).encode()
    [example] = read_examples([raw._replace(content=pair)], schema="explicit")
    if isinstance(example, Fault):
        raise ValueError(example.message)
    return example


# The output


def answer(job: Job, prompt: Prompt, text: str) -> dict:
    """A line of the output: AlpacaEval's three columns, then those of the row."""
    answer = {"instruction": prompt.instruction, "output": text, "generator": job.generator}
    return answer | {name: value for name, value in prompt.row.items() if name not in answer}


def answer_line(job: Job, prompt: Prompt, ids: np.ndarray) -> bytes:
    if ids[-1] in job.sampling.eos_ids:
        ids = ids[:-1]
    text = job.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    # ASCII: some readers end a line at U+2028 too, and half a surrogate pair could not be written otherwise.
    return json.dumps(answer(job, prompt, text), default=str).encode() + b"\n"


def written_already(job: Job) -> list[bytes]:
    """The lines of an earlier run that stay: those of its whole batches, so that the others are as they would have been.

    Raises ValueError if the output is not a part of what this run writes.
    """
    output, wanted = job.output, "name another --output, or remove the file"
    if not output.exists():
        return []
    if output.is_dir():
        raise ValueError(f"--output '{output}' is a folder; name a file")
    *lines, cut = output.read_bytes().split(b"\n")
    if cut and not job.settings_file.exists():  # a file that another program ended without a newline
        raise ValueError(f"--output '{output}' holds something else than answers of this run; {wanted}")
    lines = [line + b"\n" for line in lines]
    if lines and job.settings_file.exists():
        before, now = _read_json(job.settings_file), json.loads(json.dumps(job.settings))
        changes = [
            f"{name} {before.get(name)!r} there, {now[name]!r} here" for name in now if before.get(name) != now[name]
        ]
        if changes:
            raise ValueError(f"--output '{output}' holds answers made otherwise ({'; '.join(changes)}); {wanted}")
    elif lines:
        job.notes.append(
            f"{job.settings_file} is missing: the answers that are there are taken to be made as these will be"
        )
    if len(lines) > len(job.prompts):
        raise ValueError(
            f"--output '{output}' has {len(lines)} lines but there are {len(job.prompts)} prompts; {wanted}"
        )
    for number, (line, prompt) in enumerate(zip(lines, job.prompts, strict=False), 1):
        if not _answers(job, line, prompt):
            raise ValueError(f"line {number} of --output '{output}' does not answer {prompt.where}; {wanted}")
    whole = len(lines) if len(lines) == len(job.prompts) else len(lines) // job.batch_size * job.batch_size
    return lines[:whole]


def _answers(job: Job, line: bytes, prompt: Prompt) -> bool:
    try:
        found = json.loads(line)
        return json.dumps(answer(job, prompt, found["output"]), default=str) == json.dumps(found)
    except (ValueError, TypeError, KeyError):
        return False
