"""sky jobs launch: the task file is checked against the fields SkyPilot 0.14 knows, and runs on so many nodes."""

import os
import shutil
import sys

import calls
import yaml

VALUES = {
    "--name", "-n", "--env", "--env-file", "--secret", "--secret-file", "--gpus", "--num-nodes", "--infra", "--workdir",
    "--cpus", "--memory", "--disk-size", "--instance-type", "--image-id", "--job-recovery", "--priority",
}  # fmt: skip
SWITCHES = {"--yes", "-y", "--detach-run", "-d", "--use-spot", "--no-use-spot", "--async"}
TASK = {
    "name", "workdir", "event_callback", "num_nodes", "resources", "file_mounts", "service", "pool", "setup", "run",
    "envs", "secrets", "config", "volumes",
}  # fmt: skip
RESOURCES = {
    "infra", "cloud", "region", "zone", "cpus", "memory", "accelerators", "accelerator_args", "instance_type",
    "use_spot", "job_recovery", "disk_size", "disk_tier", "network_tier", "ports", "labels", "image_id", "autostop",
    "priority", "any_of", "ordered",
}  # fmt: skip
RECOVERY = {"strategy", "max_restarts_on_errors", "recover_on_exit_codes"}


def known(mapping, fields, what):
    for key in mapping:
        if key not in fields:
            calls.refuse(f"Invalid {what} YAML: unexpected property {key!r}")


def environment(task, pairs):
    """The envs and secrets of the task: --env NAME=VALUE or --env NAME, taken from where sky is called."""
    found = {**task.get("envs", {}), **task.get("secrets", {})}
    for flag, pair in pairs:
        if flag in ("--env", "--secret"):
            name, equals, value = pair.partition("=")
            found[name] = value if equals else os.environ[name]
    for name, value in found.items():
        if not isinstance(value, str):
            calls.refuse(f"Environment variable {name!r} is {value!r}; set it with --env or --secret")
    return found


def launch(task, pairs):
    options, recovery = dict(pairs), task["resources"]["job_recovery"]
    known(task, TASK, "task")
    known(task["resources"], RESOURCES, "resources")
    known(recovery, RECOVERY, "job_recovery")
    nodes, given, errors = int(options.get("--num-nodes", task["num_nodes"])), environment(task, pairs), 0
    while True:
        machines = len(list(calls.STATE.glob("sky-*-0")))
        ends = []
        for node in range(nodes):
            home = calls.STATE / f"sky-{machines}-{node}"
            shutil.copytree(task["workdir"], home, ignore=shutil.ignore_patterns(".git"))
            sky = {
                "SKYPILOT_NODE_IPS": "\n".join(f"10.0.0.{index}" for index in range(nodes)),
                "SKYPILOT_NUM_NODES": str(nodes),
                "SKYPILOT_NODE_RANK": str(node),
            }
            for part in ("setup", "run"):
                end = calls.shell(task[part], home=home, where=f"sky-{node}", **given, **sky)
                if end and part == "setup":
                    return "FAILED_SETUP"
            ends.append(end)
        if not any(ends):
            return "SUCCEEDED"
        if not set(ends) & set(recovery["recover_on_exit_codes"]):
            errors += 1
        if errors > recovery["max_restarts_on_errors"]:
            return "FAILED"


program, *arguments = sys.argv[1:]
calls.record(program, arguments)
if arguments[:2] != ["jobs", "launch"]:
    calls.refuse(f"No such command: {arguments[:2]}")
words, pairs = calls.read(arguments[2:], VALUES, SWITCHES)
with open(words[0]) as file:
    end = launch(yaml.safe_load(file), pairs)
(calls.STATE / "sky").write_text(end)
sys.exit(end != "SUCCEEDED")
