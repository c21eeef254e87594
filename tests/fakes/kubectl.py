"""kubectl with a JobSet controller behind it: fields are checked strictly, pods end as the test has said."""

import re
import sys

import calls
import yaml

VALUES = {"--filename", "-f", "--namespace", "-n", "--context", "--selector", "-l", "--tail", "--container", "--since"}
SWITCHES = {"--follow", "--validate", "--wait"}
# The fields that the API knows, of those a training may want; an unknown one is an error, as on the server.
TEXT, NUMBER, ANY = str, int, object
RULE = {"name": TEXT, "action": TEXT, "onJobFailureReasons": [TEXT], "targetReplicatedJobs": [TEXT]}
EXIT_CODES = {"containerName": TEXT, "operator": TEXT, "values": [NUMBER]}
POD_RULE = {"action": TEXT, "onExitCodes": EXIT_CODES, "onPodConditions": [{"type": TEXT, "status": TEXT}]}
VARIABLE = {
    "name": TEXT,
    "value": TEXT,
    "valueFrom": {"secretKeyRef": {"name": TEXT, "key": TEXT, "optional": bool}},
}
CONTAINER = {
    "name": TEXT,
    "image": TEXT,
    "command": [TEXT],
    "args": [TEXT],
    "env": [VARIABLE],
    "ports": [{"containerPort": NUMBER}],
    "resources": {"limits": ANY, "requests": ANY},
}
POD = {
    "restartPolicy": TEXT,
    "terminationGracePeriodSeconds": NUMBER,
    "serviceAccountName": TEXT,
    "nodeSelector": ANY,
    "tolerations": ANY,
    "containers": [CONTAINER],
}
JOB = {
    "parallelism": NUMBER,
    "completions": NUMBER,
    "backoffLimit": NUMBER,
    "podFailurePolicy": {"rules": [POD_RULE]},
    "template": {"spec": POD},
}
JOBSET = {
    "apiVersion": TEXT,
    "kind": TEXT,
    "metadata": {"name": TEXT, "annotations": ANY, "labels": ANY, "namespace": TEXT},
    "spec": {
        "failurePolicy": {"maxRestarts": NUMBER, "restartStrategy": TEXT, "rules": [RULE]},
        "replicatedJobs": [{"name": TEXT, "replicas": NUMBER, "template": {"spec": JOB}}],
    },
}


def check(value, schema, path):
    if isinstance(schema, dict):
        for key in value:
            if key not in schema:
                calls.refuse(f'strict decoding error: unknown field "{path}.{key}"')
            check(value[key], schema[key], f"{path}.{key}")
    elif isinstance(schema, list):
        for index, item in enumerate(value):
            check(item, schema[0], f"{path}[{index}]")
    elif not isinstance(value, schema):
        calls.refuse(f"{path} is {value!r}, not a {schema.__name__}")


def expand(argument):
    """$$ is a $, $(X) a variable; none of ours is known to the pod."""
    return re.sub(r"\$(\$|\((\w+)\))", lambda found: "$" if found[1] == "$" else f"<{found[2]}>", argument)


def job_failure(job, code):
    """The reason the controller gives: a rule of podFailurePolicy that fits comes before backoffLimit."""
    for rule in job.get("podFailurePolicy", {"rules": []})["rules"]:
        if rule["action"] == "FailJob" and code in rule.get("onExitCodes", {}).get("values", []):
            return "PodFailurePolicy"
        if rule["action"] == "FailJob" and code == "disrupted" and "onPodConditions" in rule:
            return "PodFailurePolicy"
    return "BackoffLimitExceeded"


def create(jobset):
    check(jobset, JOBSET, "jobset")
    if (jobset["apiVersion"], jobset["kind"]) != ("jobset.x-k8s.io/v1alpha2", "JobSet"):
        calls.refuse("no matches for kind")
    policy, (replicated,) = jobset["spec"]["failurePolicy"], jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    if "podFailurePolicy" in job and pod["restartPolicy"] != "Never":
        calls.refuse("podFailurePolicy needs restartPolicy Never")
    counted = 0
    while True:
        outcome = calls.next_outcome()
        for slice_ in range(replicated["replicas"]):
            for host in range(job["parallelism"]):
                arguments = [expand(argument) for argument in pod["containers"][0]["args"]]
                calls.record("pod", arguments, slice=slice_, host=host)
        if outcome == "0":
            return "Completed"
        reason = job_failure(job, outcome if outcome == "disrupted" else int(outcome))
        fits = [rule for rule in policy.get("rules", []) if reason in rule.get("onJobFailureReasons", [reason])]
        action = fits[0]["action"] if fits else "RestartJobSet"
        if action == "FailJobSet" or (action == "RestartJobSet" and counted == policy["maxRestarts"]):
            return "Failed"
        counted += action == "RestartJobSet"


program, *arguments = sys.argv[1:]
if not arguments or arguments[0] not in ("create", "logs", "delete"):
    calls.refuse(f"unknown command: {arguments}")
words, pairs = calls.read(arguments[1:], VALUES, SWITCHES)
options = dict(pairs)
if arguments[0] == "create":
    if options.get("--filename") != "-":
        calls.refuse("must specify --filename")
    text = sys.stdin.read()
    calls.record(program, arguments, manifest=text)
    (calls.STATE / "jobset").write_text(create(yaml.safe_load(text)))
else:
    calls.record(program, arguments)
    if arguments[0] == "logs" and not words and "--selector" not in options:
        calls.refuse("expected POD or a selector")
    if arguments[0] == "delete" and (len(words) != 2 or words[0] != "jobset"):
        calls.refuse("expected TYPE and NAME")
