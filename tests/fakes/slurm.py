"""sbatch, srun and scontrol: a job runs at once, from a copy of its script, and again when it is requeued."""

import os
import pathlib
import re
import subprocess
import sys

import calls

VALUES = {
    "--account", "--chdir", "--constraint", "--cpus-per-gpu", "--cpus-per-task", "--error", "--export", "--gpus",
    "--gpus-per-node", "--gpus-per-task", "--gres", "--job-name", "--mem", "--nodes", "--ntasks", "--ntasks-per-node",
    "--open-mode", "--output", "--partition", "--qos", "--reservation", "--signal", "--time", "-N", "-n", "-p", "-t",
}  # fmt: skip
SWITCHES = {"--exclusive", "--requeue", "--no-requeue", "--parsable", "--wait"}
SRUN = VALUES | {"--kill-on-bad-exit", "--label", "--cpu-bind", "--wait"}
JOB = "7"


def sbatch(arguments):
    words, given = calls.read(arguments, VALUES, SWITCHES, stop_at_word=True)
    script = pathlib.Path(words[0])
    written = [line.split(None, 1)[1] for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    _, defaults = calls.read(written, VALUES, SWITCHES)
    options = dict(defaults) | dict(given)
    if not re.fullmatch(r"([RB]*:)?\w+(@\d+)?", options.get("--signal", "TERM")):
        calls.refuse(f"Invalid --signal specification: {options['--signal']}")
    copy = calls.STATE / "spool" / "slurm_script"
    copy.parent.mkdir(exist_ok=True)
    copy.write_text(script.read_text())
    job = {
        "SLURM_JOB_ID": JOB,
        "SLURM_SUBMIT_DIR": os.getcwd(),
        "FAKE_NODES": options["--nodes"],
        "FAKE_TASKS": options["--ntasks-per-node"],
        "FAKE_GPUS": options["--gpus-per-node"],
        "FAKE_WHERE": "job",
    }
    requeued = calls.STATE / "requeued"
    while True:
        requeued.unlink(missing_ok=True)
        subprocess.run(["bash", copy, *words[1:]], env={**os.environ, **job}, cwd="/")
        if not requeued.exists():
            break
    print(f"Submitted batch job {JOB}")


def srun(arguments):
    words, options = calls.read(arguments, SRUN, SWITCHES, stop_at_word=True)
    if dict(options).get("--kill-on-bad-exit", "0") not in ("0", "1"):
        calls.refuse("--kill-on-bad-exit is 0 or 1")
    per_node, ends = int(os.environ["FAKE_TASKS"]), []
    for task in range(int(os.environ["FAKE_NODES"]) * per_node):
        slurm = {
            "SLURM_PROCID": str(task),
            "SLURM_LOCALID": str(task % per_node),
            "SLURM_GPUS_ON_NODE": os.environ["FAKE_GPUS"],
            "FAKE_WHERE": f"task-{task}",
        }
        ends.append(subprocess.run(words, env={**os.environ, **slurm}).returncode)
    sys.exit(max(ends))


def scontrol(arguments):
    if arguments != ["requeue", JOB]:
        calls.refuse(f"invalid keyword or job: {arguments}")
    (calls.STATE / "requeued").touch()


program, *arguments = sys.argv[1:]
calls.record(program, arguments)
{"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[program](arguments)
