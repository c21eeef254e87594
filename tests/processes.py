"""`repo-jax train` as several real processes on this machine, each with its own simulated devices, over loopback."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
from examples import ROOT


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Run:
    """Processes of one run, with their output in files of `logs`; in a with statement nothing of them is left."""

    def __init__(self, logs: pathlib.Path, *arguments, processes: int = 1, devices: int = 1, each=None, **env):
        """`each`: process number -> arguments of its own."""
        logs.mkdir(parents=True, exist_ok=True)
        port, self.logs, self.processes = free_port(), [logs / f"{i}.log" for i in range(processes)], []
        for i in range(processes):
            own = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
            own |= {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}  # the tests' own
            own |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
            if processes > 1:
                own |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}
                own |= {"JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(i)}
            command = [sys.executable, "-m", "repo_jax", "train", *map(str, arguments), *(each(i) if each else [])]
            with open(self.logs[i], "w") as log:
                environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | own | env
                self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def wait(self, timeout: float = 300) -> list[int]:
        """The exit statuses."""
        end = time.monotonic() + timeout
        return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]

    def text(self, i: int = 0) -> str:
        return self.logs[i].read_text(errors="replace")

    def until(self, words: str, i: int = 0, timeout: float = 120) -> None:
        """Returns when process i has said this."""
        end = time.monotonic() + timeout
        while words not in self.text(i):
            assert self.processes[i].poll() is None, self.text(i)
            assert time.monotonic() < end, f"'{words}' did not come:\n{self.text(i)}"
            time.sleep(0.05)
