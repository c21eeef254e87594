"""Times updates here and in another trainer, in alternating runs: same model shape, same real pairs, same pairs per update, same precision.

python benchmarks/side_by_side.py --peer trl --per_device_train_batch_size 8 1 --rounds 3 --steps 2 [--output results.jsonl]
python benchmarks/side_by_side.py --peer tunix --peer_python VENV/bin/python
python benchmarks/side_by_side.py --peer easydel --peer_python VENV/bin/python --shape 1b --precision bfloat16

Environments of the peers (Python 3.11):
    trl      SimPO     pip install torch==2.13.0 && pip install trl==1.16.0
    tunix    DPO       pip install google-tunix==0.1.7                        (it has no SimPO; here SimPO runs)
    easydel  SimPO     pip install easydel==0.3.0 pillow torch==2.13.0

Every run is a process of its own; compilation, model loading and tokenizing are not timed, and neither are the first `warmup` updates.
Both sides train on the pairs of the same updates, which is checked by counting tokens. --ours and --theirs hand flags on:
    --ours "--remat dots --mode two_pass"   --theirs "--gradient_checkpointing false"
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import shlex
import shutil
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "peers")]
import make_inputs  # noqa: E402 - found by the line above

SCRIPTS = {"trl": "trl_simpo.py", "tunix": "tunix_dpo.py", "easydel": "easydel_simpo.py"}
# Flags of each side. bfloat16 keeps float32 parameters; Tunix cannot, and has what pure_bfloat16 says.
PRECISIONS = {
    "float32": {
        "ours": "--compute_dtype float32 --param_dtype float32",
        "trl": "",
        "tunix": "",
        "easydel": "",
    },
    "bfloat16": {
        "ours": "--compute_dtype bfloat16 --param_dtype float32",
        "trl": "--bf16",
        "tunix": "--dtype bfloat16",
        "easydel": "--dtype bfloat16",
    },
    "pure_bfloat16": {
        "ours": "--compute_dtype bfloat16 --param_dtype bfloat16",
        "trl": "--bf16 --dtype bfloat16",
        "tunix": "--dtype bfloat16",
        "easydel": "--dtype bfloat16 --param_dtype bfloat16",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", choices=SCRIPTS, required=True)
    parser.add_argument("--peer_python", default=sys.executable, help="the interpreter of the peer's environment")
    parser.add_argument(
        "--per_device_train_batch_size", type=int, nargs="+", default=[1], help="of the peer, one table each"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="updates that a run times")
    parser.add_argument("--warmup", type=int, default=1, help="updates of a run before those")
    parser.add_argument("--shape", choices=make_inputs.SHAPES, default="24m")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--pairs_per_update", type=int, default=32)
    parser.add_argument("--ours", default="", help="more flags for repo-jax bench")
    parser.add_argument("--theirs", default="", help="more flags for the peer's script")
    parser.add_argument(
        "--folder", type=pathlib.Path, help="where model and pairs are put; left out: under ~/.cache/repo_jax"
    )
    parser.add_argument("--output", type=pathlib.Path, help="a .jsonl file to which each table's numbers are added")
    a = parser.parse_args()
    folder = a.folder or pathlib.Path("~/.cache/repo_jax/side_by_side").expanduser()
    folder = folder / f"{a.shape}-{a.max_length}-{a.pairs_per_update}"
    if not (folder / "inputs.json").exists():  # written last
        make_inputs.make(folder, shape=a.shape, max_length=a.max_length, pairs_per_update=a.pairs_per_update)
    flags = ["--steps", str(a.steps), "--warmup", str(a.warmup)]
    ours = [
        sys.executable,
        "-m",
        "repo_jax",
        "bench",
        str(folder / "recipe.yaml"),
        "--json",
        "--split_steps",
        "0",
        *flags,
    ]
    ours += shlex.split(PRECISIONS[a.precision]["ours"]) + shlex.split(a.ours)
    for size in a.per_device_train_batch_size:
        theirs = [a.peer_python, str(HERE / "peers" / SCRIPTS[a.peer]), str(folder), *flags]
        theirs += ["--per_device_train_batch_size", str(size)]
        theirs += shlex.split(PRECISIONS[a.precision][a.peer]) + shlex.split(a.theirs)
        found = about(a) | {"per_device_train_batch_size": size, "ours": [], a.peer: []}
        for number in range(a.rounds):
            # Who goes first changes, so that a machine that slows down slows both.
            for side in ("ours", a.peer) if number % 2 else (a.peer, "ours"):
                load = os.getloadavg()[0]
                found[side].append(run(ours if side == "ours" else theirs, own=side == "ours") | {"load_before": load})
        found["tokens"] = counted(found, folder, a)
        found["ratios"] = [
            one["pairs_per_second"] / other["pairs_per_second"]
            for one, other in zip(found["ours"], found[a.peer], strict=True)
        ]
        show(found, a)
        if a.output:
            with open(a.output, "a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")


def run(command: list[str], *, own: bool) -> dict:
    """The JSON that a run ends with."""
    paths = {"PYTHONPATH": str(HERE.parent)} if own else {}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | paths
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{done.stderr[-4000:]}\nended with {done.returncode}")
    # A peer's line comes last, behind its log; ours is all there is, over many lines.
    return json.loads(done.stdout if own else done.stdout.strip().splitlines()[-1])


def counted(found: dict, folder: pathlib.Path, a: argparse.Namespace) -> dict:
    """Tokens of the timed updates: in the pairs, and what each side says it took."""
    timed = range(a.warmup * a.pairs_per_update, (a.warmup + a.steps) * a.pairs_per_update)
    with open(folder / "updates.jsonl", encoding="utf-8") as file:
        rows = [row for i, row in enumerate(map(json.loads, file)) if i in timed]
    prompts = sum(len(row["prompt_ids"]) for row in rows)
    answers = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    ours = found["ours"][0]
    taken = round(ours["tokens_per_second"] * len(rows) / ours["pairs_per_second"])  # its prompts count once
    if taken != prompts + answers:
        raise SystemExit(f"repo-jax took {taken} tokens, but these updates hold {prompts + answers}: other pairs")
    return {
        "two_sequences_a_pair": 2 * prompts + answers,
        "prompts_once": prompts + answers,
        "ours": taken,
        a.peer: found[a.peer][0]["tokens"],
    }


def about(a: argparse.Namespace) -> dict:
    """What was run where."""
    models = [line for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    gpus = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit.stdout.strip(),
        "cpu": models[0].partition(": ")[2] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": subprocess.run(gpus, capture_output=True, text=True).stdout.split("\n")[:-1]
        if shutil.which("nvidia-smi")
        else [],
        "peer": a.peer,
        "shape": a.shape,
        "precision": a.precision,
        "max_length": a.max_length,
        "pairs_per_update": a.pairs_per_update,
        "steps": a.steps,
        "warmup": a.warmup,
    }


def show(found: dict, a: argparse.Namespace) -> None:
    sides, tokens, ratios = (found["ours"], found[a.peer]), found["tokens"], found["ratios"]
    versions = ", ".join(
        " ".join(f"{name} {version}" for name, version in side[0]["versions"].items() if name != "platform")
        for side in sides
    )
    print(f"\n{found['date']}  {found['command']}  (commit {found['commit']})")
    print(f"{found['cpu']}, {found['cores']} cores{''.join(f', {gpu}' for gpu in found['gpus'])}; {versions}")
    print(
        f"{a.shape} Llama, {a.precision}, max_length {a.max_length}, {a.pairs_per_update} pairs per update, {a.steps} updates timed "
        f"after {a.warmup}; {a.peer} ({sides[1][0]['loss']}) takes {found['per_device_train_batch_size']} pairs at a time"
    )
    print(
        f"tokens: {tokens['two_sequences_a_pair']} as two sequences a pair ({a.peer} took {tokens[a.peer]}), {tokens['ours']} with prompts once"
    )
    print(f"{'round':>6} {'repo-jax':>12} {a.peer:>12} {'ratio':>8} {'load before':>14}")
    for number, (one, other, ratio) in enumerate(zip(*sides, ratios, strict=True), 1):
        loads = f"{one['load_before']:.1f}, {other['load_before']:.1f}"
        print(
            f"{number:>6} {one['pairs_per_second']:>12.3f} {other['pairs_per_second']:>12.3f} {ratio:>8.2f} {loads:>14}"
        )
    medians = [statistics.median(run["pairs_per_second"] for run in side) for side in sides]
    print(
        f"{'median':>6} {medians[0]:>12.3f} {medians[1]:>12.3f} {statistics.median(ratios):>8.2f}   ratios {min(ratios):.2f} to {max(ratios):.2f}; "
        "pairs a second",
        flush=True,
    )


if __name__ == "__main__":
    main()
