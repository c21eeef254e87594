"""gcloud for TPU machines: a machine is a folder with a home for each worker, and it is preempted when a test says so.

The tables are those of `gcloud compute tpus ... --help` (528), without the options for keys and tunnels.
"""

import json
import os
import shutil
import sys

import calls

WIDE = {"--project", "--format", "--verbosity", "--account"}
CREATE = {
    "--zone", "--accelerator-type", "--topology", "--type", "--data-disk", "--description", "--labels", "--metadata",
    "--metadata-from-file", "--network", "--range", "--scopes", "--service-account", "--subnetwork", "--tags",
}  # fmt: skip
CREATE_SWITCHES = {"--async", "--internal-ips", "--reserved", "--shielded-secure-boot", "--spot"}
QUEUE = {
    "--runtime-version", "--node-id", "--node-count", "--node-prefix", "--valid-after-duration", "--valid-after-time",
    "--valid-until-duration", "--valid-until-time",
}  # fmt: skip
SSH = {"--zone", "--worker", "--ssh-flag", "--ssh-key-file", "--command", "--output-directory"}
SCP = {"--zone", "--worker", "--scp-flag", "--ssh-key-file"}
# command: options with a value, options without, options that must be there
COMMANDS = {
    "compute tpus tpu-vm create": (CREATE | {"--version"}, CREATE_SWITCHES | {"--preemptible"}, {"--version"}),
    "compute tpus tpu-vm describe": ({"--zone"}, set(), set()),
    "compute tpus tpu-vm delete": ({"--zone"}, {"--async"}, set()),
    "compute tpus tpu-vm ssh": (SSH, {"--internal-ip", "--plain"}, set()),
    "compute tpus tpu-vm scp": (SCP, {"--internal-ip", "--recurse", "--compress"}, set()),
    "compute tpus queued-resources create": (CREATE | QUEUE, CREATE_SWITCHES | {"--guaranteed"}, {"--runtime-version"}),
    "compute tpus queued-resources describe": ({"--zone"}, set(), set()),
    "compute tpus queued-resources delete": ({"--zone"}, {"--async", "--force"}, set()),
    "compute tpus queued-resources ssh": (SSH | {"--node", "--batch-size"}, {"--internal-ip"}, {"--command"}),
    "compute tpus queued-resources scp": (SCP | {"--node", "--batch-size"}, {"--recurse", "--compress"}, set()),
    "secrets versions access": ({"--secret", "--location", "--out-file"}, set(), {"--secret"}),
}
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
NEXT = {"WAITING_FOR_RESOURCES": "PROVISIONING", "PROVISIONING": "ACTIVE", "SUSPENDING": "SUSPENDED"}
WORKERS = 2  # of a node
MACHINE = calls.STATE / "machine.json"


def fail(message):
    print(f"ERROR: (gcloud.{'.'.join(command.split())}) {message}", file=sys.stderr)
    sys.exit(1)


def machine():
    """The machine as it is now; a preemption that the training was told of shows here."""
    if not MACHINE.exists():
        fail(f"NOT_FOUND: Resource 'projects/p/locations/{options['--zone']}/{kind}/{words[0]}' was not found.")
    found = json.loads(MACHINE.read_text())
    if (found["kind"], found["zone"]) != (kind, options["--zone"]):
        fail(f"NOT_FOUND: there is none among the {kind} of {options['--zone']}")
    if (calls.STATE / "preempted").exists():
        (calls.STATE / "preempted").unlink()
        found["state"] = "SUSPENDING" if kind == "queued-resources" else "PREEMPTED"
        MACHINE.write_text(json.dumps(found))
    return found


def create():
    if MACHINE.exists():
        fail(f"ALREADY_EXISTS: Resource {words[0]} already exists.")
    if ("--node-id" in options) == ("--node-count" in options) and kind == "queued-resources":
        calls.refuse("give exactly one of --node-id and --node-count")
    if int(options.get("--node-count", 2)) < 2:
        calls.refuse("Node count must be greater than 1")
    family = options["--accelerator-type"].split("-")[0]
    if RUNTIMES[family] != options.get("--version", options.get("--runtime-version")):
        fail(f"INVALID_ARGUMENT: the runtime does not fit {family}")
    if (calls.STATE / "no_room").exists():
        fail("RESOURCE_EXHAUSTED: There is no more capacity in the zone")
    made = len(list(calls.STATE.glob("machine-*")))
    nodes = int(options.get("--node-count", 1))
    for node in range(nodes):
        for worker in range(WORKERS):
            (calls.STATE / f"machine-{made}" / f"node-{node}-worker-{worker}").mkdir(parents=True)
    state = "WAITING_FOR_RESOURCES" if kind == "queued-resources" else "READY"
    what = {"kind": kind, "zone": options["--zone"], "state": state, "homes": f"machine-{made}", "nodes": nodes}
    MACHINE.write_text(json.dumps(what))


def describe():
    found = machine()
    wanted = "value(state.state)" if kind == "queued-resources" else "value(state)"
    print(found["state"] if options.get("--format") == wanted else found)
    MACHINE.write_text(json.dumps({**found, "state": NEXT.get(found["state"], found["state"])}))


def delete():
    found = machine()
    if kind == "queued-resources" and "--force" not in options and found["state"] != "SUSPENDED":
        fail("FAILED_PRECONDITION: the queued resource has nodes; use --force")
    MACHINE.unlink()


def homes():
    found = machine()
    if found["state"] not in ("READY", "ACTIVE"):
        fail(f'TPU VM is in state "{found["state"]}" and cannot be reached')
    nodes = range(found["nodes"]) if options.get("--node") == "all" else [int(options.get("--node", 0))]
    workers = range(WORKERS) if options.get("--worker") == "all" else [int(options.get("--worker", 0))]
    names = [f"node-{node}-worker-{worker}" for node in nodes for worker in workers]
    return [calls.STATE / found["homes"] / name for name in names]


def ssh():
    print("SSH: Attempting to connect to worker...", file=sys.stderr)
    path = f"{calls.STATE / 'on_workers'}:{os.environ['PATH']}"
    ends = [calls.shell(options["--command"], home=home, where=home.name, PATH=path) for home in homes()]
    sys.exit(next((end for end in ends if end), 0))


def scp():
    source, target = words
    for home in homes():
        shutil.copy(source, home / target.partition(":")[2])


def access():
    print(f"token-in-{options['--secret']}")


program, *arguments = sys.argv[1:]
calls.record(program, arguments)
command = next((name for name in COMMANDS if " ".join(arguments).startswith(name + " ")), None)
if command is None:
    calls.refuse(f"Invalid choice: {' '.join(arguments[:4])}")
values, switches, needed = COMMANDS[command]
words, pairs = calls.read(arguments[len(command.split()) :], values | WIDE, switches | {"--quiet"})
options = dict(pairs)
for flag in needed | ({"--zone"} if "tpus" in command else set()):
    if not options.get(flag):
        calls.refuse(f"argument {flag}: Must be specified.")
kind, action = command.split()[-2:]
if len(words) != (2 if action == "scp" else 1):
    calls.refuse(f"{command} takes other words than {words}")
globals()[action]()
