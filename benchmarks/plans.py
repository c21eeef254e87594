"""The README's table of plans, from benchmarks/results/plans; with --run, after planning each row again (minutes for each, no accelerator needed).

python benchmarks/plans.py [--run]
"""

import argparse
import json
import pathlib
import shlex
import subprocess
import sys

FOLDER = pathlib.Path(__file__).parent
CONFIGS, RESULTS = FOLDER / "data" / "model_configs", FOLDER / "results" / "plans"
ROWS = [  # model, topology, slices
    ("llama-3-8b", "v5e:4x4", 1),
    ("llama-3-8b", "v5p:2x2x2", 1),
    ("llama-3-8b", "v6e:16x16", 1),
    ("llama-3-8b", "v6e:4x4", 2),
    ("llama-3-8b", "h200:1x1x8", 1),
    ("gemma-2-9b", "v5p:2x2x4", 1),
    ("llama-3-70b", "v5p:4x4x4", 1),
    ("llama-3-8b", "v5e:2x2", 1),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true")
    if parser.parse_args().run:
        for row in ROWS:
            print(shlex.join(words(*row)), flush=True)
            done = subprocess.run([sys.executable, "-m", *words(*row)])
            if done.returncode not in (0, 1):  # 1: it does not fit
                sys.exit(done.returncode)
    print(
        "| model | `--topology` | fits | peak of GiB per device | of it held: parameters, gradients, moments | sent per device, GiB | at most pairs/s |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in ROWS:
        print(line(*row))


def path(model: str, topology: str, slices: int) -> pathlib.Path:
    shape = topology.replace(":", "-") + (f"x{slices}" if slices > 1 else "")
    return RESULTS / f"{model}-{shape}.json"


def words(model: str, topology: str, slices: int) -> list[str]:
    """The command of a row."""
    several = ["--slices", str(slices)] if slices > 1 else []
    config, result = CONFIGS / f"{model}.json", path(model, topology, slices)
    where = ["--topology", topology, *several, "--max_length", "2048", "--json", str(result)]
    return ["repo_jax", "plan", "--model_config", str(config), *where]


def line(model: str, topology: str, slices: int) -> str:
    plan = json.loads(path(model, topology, slices).read_text())
    held = ", ".join(f"{plan['memory_gib'][kind]:.1f}" for kind in ("parameters", "gradients", "moments"))
    fits, sent, speed = "yes", "", ""
    if not plan["fits"]:
        ways = [f"{one['changes'] or 'as it is'} on {one['topology']}" for one in plan["would_fit"] if one["fits"]]
        fits = f"**no**, {plan['missing_gib']:.1f} GiB are missing; compiled and found to fit: " + "; ".join(ways)
    else:
        roofline = plan["roofline"]
        sent = f"{sum(plan['sent_gib_per_device_and_update'].values()):.0f}"
        speed = f"{roofline['pairs_per_second']:.0f} ({roofline['limit']})"
    target = topology + (f" --slices {slices}" if slices > 1 else "")
    return f"| {model} | `{target}` | {fits} | {plan['peak_gib']:.1f} of {plan['hbm_gib']:.1f} | {held} | {sent} | {speed} |"


if __name__ == "__main__":
    main()
