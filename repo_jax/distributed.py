"""Several processes as one run: how they find each other, what they have to agree on, and how they end together.

Transport, heartbeats and barriers are jax.distributed's and XLA's; here stands when to call them and what to tell people.
"""

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Iterator

import jax
import jax.experimental.multihost_utils as multihost_utils
import numpy as np

from repo_jax.config import InterruptedRunError
from repo_jax.hardware import visible

ADDRESS, PROCESSES, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
TIMEOUT = "REPO_JAX_START_TIMEOUT"  # seconds that processes wait for each other at the start
VM = "TPU VM: how many there are stands in its metadata"
HEARTBEAT = 20  # seconds without a sign of life until a process counts as lost and the others end
# What XLA says where the other side of a connection is gone.
LOST = re.compile(r"UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|Gloo|NCCL|[Cc]onnection|[Ss]ocket closed")
TOLD = 1 << 16  # bytes in which a process says what it runs


def join() -> None:
    """Makes this process part of a run of several, where the environment says that there are several; nothing on one machine.

    Told by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or found by JAX itself on TPU slices and under Slurm or
    Open MPI. Call it before the first use of a device. Where the others do not come in time the process ends with a line that says
    so. Raises ValueError where the three are not given together or make no sense.
    """
    if jax.distributed.is_initialized():
        return
    told = _told()
    if told is None and not (found := _found()):
        return
    seconds = _seconds()
    whole = (
        f"process {told['process_id']} of {told['num_processes']} at {told['coordinator_address']}" if told else found
    )
    print(f"waiting for the other processes of this run, {seconds} s at most ({whole})", file=sys.stderr, flush=True)
    alarm = threading.Timer(seconds, _nobody_came, [whole, seconds])
    alarm.daemon = True
    alarm.start()
    try:
        # JAX's own limits would abort the process with a stack trace: that for the start lies behind the alarm, and that for the end
        # behind the longest push to the Hub, for which the others wait.
        limits = {"initialization_timeout": seconds + 60, "shutdown_timeout_seconds": 24 * 3600}
        jax.distributed.initialize(**(told or {}), **limits, heartbeat_timeout_seconds=HEARTBEAT)
    except RuntimeError as error:
        if told is not None or found != VM:
            raise ValueError(f"{whole}, but {error}; call repo_jax.distributed.join() before that") from None
    finally:
        alarm.cancel()


def _told() -> dict | None:
    given = {name: os.environ.get(name, "") for name in (ADDRESS, PROCESSES, PROCESS)}
    if not any(given.values()):
        return None
    said = " ".join(f"{name}={value or 'unset'}" for name, value in given.items())
    if not all(given.values()):
        raise ValueError(f"{said}; set all three, or none of them")
    address, processes, process = given.values()
    if not (processes.isdecimal() and process.isdecimal() and int(process) < int(processes)):
        raise ValueError(f"{said}; give the number of processes, and this one's own number from 0 to that less 1")
    if not address.rpartition(":")[2].isdecimal() or not address.rpartition(":")[0]:
        raise ValueError(f"{said}; give the host of process 0 and a free port there, as in {ADDRESS}=10.0.0.2:1234")
    return {"coordinator_address": address, "num_processes": int(processes), "process_id": int(process)}


def _found() -> str:
    """What says that there are several processes, or that JAX has to ask; empty where nothing does."""
    env = os.environ
    for name, cluster in (("SLURM_STEP_NUM_TASKS", "Slurm"), ("OMPI_COMM_WORLD_SIZE", "Open MPI")):
        if env.get(name, "").isdecimal() and int(env[name]) > 1:
            return f"{cluster}: {name}={env[name]}"
    if "cpu" in env.get("JAX_PLATFORMS", ""):
        return ""
    if "," in env.get("TPU_WORKER_HOSTNAMES", ""):
        return f"TPU slice: TPU_WORKER_HOSTNAMES={env['TPU_WORKER_HOSTNAMES']}"
    if env.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return f"TPU slices: MEGASCALE_COORDINATOR_ADDRESS={env['MEGASCALE_COORDINATOR_ADDRESS']}"
    if "TPU_WORKER_HOSTNAMES" in env or "TPU_SKIP_MDS_QUERY" in env or (visible() or [""])[0] != "TPU":
        return ""
    return VM if importlib.util.find_spec("libtpu") else ""


def _seconds() -> int:
    given = os.environ.get(TIMEOUT, "300")
    if not given.isdecimal() or not int(given):
        raise ValueError(f"{TIMEOUT}={given}; give a number of seconds")
    return int(given)


def _nobody_came(whole: str, seconds: int) -> None:
    print(
        f"repo-jax: not all processes of this run came within {seconds} s ({whole}); start the same command on all hosts (on a TPU slice on "
        f"all its workers: --worker=all), see that process 0's port can be reached, or raise {TIMEOUT}",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def primary() -> bool:
    """Whether this is the process that writes files and speaks to people."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns once every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def from_primary(tree):
    """Process 0's numpy arrays, on every process."""
    return multihost_utils.broadcast_one_to_all(tree) if jax.process_count() > 1 else tree


def on_all(fact: bool) -> bool:
    """Whether it holds on every process."""
    return bool(np.all(multihost_utils.process_allgather(np.bool_(fact)))) if jax.process_count() > 1 else fact


def text_from_primary(text: str) -> str:
    """Process 0's text of at most TOLD bytes, on every process."""
    return _text(from_primary(_bytes(text)))


def _bytes(text: str) -> np.ndarray:
    data = text.encode()
    if len(data) > TOLD:
        raise ValueError(f"{len(data)} bytes do not go into {TOLD}: {text[:80]}...")
    return np.frombuffer(data.ljust(TOLD, b"\0"), np.uint8)


def _text(data: np.ndarray) -> str:
    return bytes(np.asarray(data)).rstrip(b"\0").decode()


def agree(runs: dict[str, str]) -> None:
    """Compares what every process runs, {what it is: its name}. Raises ValueError, on all of them, naming the odd one and what differs."""
    if jax.process_count() == 1:
        return
    said = multihost_utils.process_allgather(_bytes(json.dumps({"host": socket.gethostname(), "runs": runs})))
    if wrong := differences([json.loads(_text(one)) for one in said]):
        raise ValueError("; ".join(wrong) + "; start the same command with the same files on all hosts")


def differences(said: list[dict]) -> list[str]:
    """What differs from what most processes run; process i says {"host": name, "runs": {what it is: its name}}."""
    found = []
    for what in dict.fromkeys(what for one in said for what in one["runs"]):
        names = [one["runs"].get(what, "not there") for one in said]
        [(usual, n), *_] = Counter(names).most_common()
        found += [
            f"process {i} ({one['host']}) has {what} {name}, {n} of {len(said)} have {usual}"
            for i, (one, name) in enumerate(zip(said, names, strict=True))
            if name != usual
        ]
    return found


class Interruption:
    """Whether the run was told to stop: by SIGTERM, which clusters send before they take a machine away, or by Ctrl-C.

    In a with statement. `due` is asked once after every update, by all processes for the same updates. Of several processes any one
    may be told; JAX's preemption service then finds the update after which all stop.
    """

    def __init__(self):
        self._signal, self._before = None, {}

    def __enter__(self):
        # With several processes SIGTERM belongs to JAX's service; threads that are not the main one may not take signals at all.
        wanted = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, _frame):
        if self._signal is not None or (number == signal.SIGINT and jax.process_count() > 1):
            raise KeyboardInterrupt
        self._signal = number
        print("\nstopping after this update; once more stops at once", file=sys.stderr, flush=True)

    def due(self, step: int) -> bool:
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._signal is not None

    def error(self, saved: str) -> InterruptedRunError:
        """What to raise when the run has stopped with everything saved."""
        by_hand = self._signal == signal.SIGINT
        why = "interrupted" if by_hand else "told to stop (SIGTERM)"
        return InterruptedRunError(f"{why}; {saved} is saved, and the same command goes on from there", by_hand=by_hand)


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """SIGTERM ends the run where it is, with the status that starts it again: before the first update and after the last.

    Of several processes only after the last: until then JAX's service has SIGTERM, which never gives it back.
    """

    def stop(number, _frame):
        raise InterruptedRunError("told to stop (SIGTERM); the same command goes on from what is saved")

    if threading.current_thread() is not threading.main_thread():  # which may not take signals
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        # None stands for a handler that Python does not know: JAX's service, which is not needed any more.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """In a run of several processes, what ends one ends it at once, with its reason in words, so that the others end as well.

    Nothing is changed where there is one process. With several, leaving the interpreter would wait for processes that will never answer.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "code", 1)
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        if isinstance(error, KeyboardInterrupt):
            why = "interrupted; the same command on all hosts goes on from the newest checkpoint"
        elif isinstance(error, jax.errors.JaxRuntimeError) and LOST.search(reason):
            why = f"another process is lost or has failed ({reason}); the newest checkpoint is whole, and the same command on all hosts goes on from it"
        elif hasattr(error, "code") or isinstance(error, FloatingPointError):
            why = str(error)
        else:
            why = "".join(traceback.format_exception(error))
        print(f"repo-jax: process {jax.process_index()} of {jax.process_count()}: {why}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
