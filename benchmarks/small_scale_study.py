"""Does RePO do what its paper says? RePO, RePO++, SimPO, DPO and SFT on two small models and real pairs.

python benchmarks/small_scale_study.py [--json FILE] [--output FILE] [--cache FOLDER] [--quick] [--no_runs]

Runs what the cache folder does not hold yet, two runs at a time, each on one thread; then writes all numbers, the tables and the figures.
Interrupt it at any time: finished runs are kept. `--no_runs` writes what there is. Less than an hour on two quiet cores.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import resource
import sys
import time

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
STORIES, SMALL = "stories260K", "small-llama"

# In nats per token; a gamma of 1.0 is the quickstart's.
GAMMA = 1.0
METHODS = {
    "RePO": {"loss_type": "repo", "gamma": GAMMA},
    "RePO++": {"loss_type": "repo++", "beta": 3.0, "gamma": GAMMA},
    "SimPO": {"loss_type": "simpo", "beta": 3.0, "gamma": GAMMA},
    "DPO": {"loss_type": "dpo", "beta": 0.1},
    "SFT": {"loss_type": "sft"},
}
RATES = [3e-4, 1e-3, 3e-3, 1e-2]
GAMMAS = [0.0, 0.25, 0.5, 1.0, 1.5, 2.0]
BETAS = [1.0, 3.0, 10.0, 30.0, 100.0]  # SimPO's, on its way to RePO
ENOUGH = 0.02  # held-out accuracies that differ by less are taken as equal where a learning rate is chosen
DPO_BETAS = [0.03, 0.1, 0.3]
SCHEDULES = [(1.0, 0.2), (0.2, 1.0), (2.0, 0.4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--json", type=pathlib.Path, help="all numbers (default: in results/, with --quick in the cache)"
    )
    parser.add_argument("--output", type=pathlib.Path, help="where the tables go, between their marks")
    parser.add_argument("--figures", type=pathlib.Path, help="folder of the figures")
    parser.add_argument("--cache", type=pathlib.Path, default=ROOT / "runs" / "small-scale-study")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread")
    parser.add_argument("--quick", action="store_true", help="everything, tiny")
    parser.add_argument("--no_runs", action="store_true", help="write what the cache folder holds")
    arguments = parser.parse_args()
    # Many small operations: a second thread costs more than it gains, a second run does not.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path[:0] = [str(HERE), str(ROOT)]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")])
    from study import figures, tables
    from study.runs import Size

    cache = arguments.cache / "quick" if arguments.quick else arguments.cache
    cache.mkdir(parents=True, exist_ok=True)
    results = cache if arguments.quick or (arguments.no_runs and arguments.json is None) else HERE / "results"
    to_json = arguments.json or results / "small-scale-study.json"
    output = arguments.output or (cache if arguments.quick else HERE) / "small_scale_study.md"
    size = Size(5, 40, 24, 6) if arguments.quick else Size(75, 600, 200, 500)
    plan = plan_of(arguments.quick, arguments.seeds, size)
    began = time.perf_counter()
    with Jobs(cache, size, arguments.workers, running=not arguments.no_runs) as jobs:
        study = gather(plan, jobs)
    study["about"] |= {"workers": arguments.workers, "seconds": round(time.perf_counter() - began)}
    to_json.write_text(as_json(study), encoding="utf-8")
    text = output.read_text(encoding="utf-8") if output.is_file() else "# RePO in small\n"
    output.write_text(tables.put_in(text, tables.as_markdown(study)), encoding="utf-8")
    folder = arguments.figures or to_json.parent / "small-scale-study"
    figures.draw(study, folder)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{study['about']['finished']} of {study['about']['planned']} jobs done, {study['about']['cpu_minutes']:.1f} minutes of CPU time in all; "
        f"this call {(used.ru_utime + used.ru_stime) / 60:.1f} minutes of CPU time, {study['about']['seconds'] / 60:.1f} minutes\n"
        f"numbers {to_json}\ntables  {output}\nfigures {folder}"
    )


def plan_of(quick: bool, seeds: int, size) -> dict:
    """What belongs to the study, but for what its first runs decide."""
    plan = {
        "models": [STORIES, SMALL],
        "methods": {STORIES: METHODS, SMALL: {name: METHODS[name] for name in ("RePO", "SimPO", "DPO", "SFT")}},
        "rates": RATES,
        "gammas": GAMMAS,
        "betas": BETAS,
        "dpo_betas": DPO_BETAS,
        "schedules": SCHEDULES,
        "seeds": list(range(1, 1 + seeds)),
        "chosen": {},
    }
    if quick:
        plan |= {"rates": RATES[1:3], "gammas": GAMMAS[2:4], "betas": BETAS[1:3], "dpo_betas": DPO_BETAS[:2]}
        plan |= {"schedules": SCHEDULES[:1], "seeds": [1, 2]}
    plan["dpo_betas"] = [{"loss_type": "dpo", "beta": beta} for beta in plan["dpo_betas"]]
    plan["schedules"] = [METHODS["RePO"] | {"gamma": first, "gamma_end": last} for first, last in plan["schedules"]]
    return plan | {"updates": size.updates, "train_batch_size": 8}


def gather(plan: dict, jobs: "Jobs") -> dict:
    """All runs, the most telling first; the rate of each method is chosen by its runs of seed 0, which are not reported again."""
    from study.runs import Run

    study = {"about": {}, "plan": plan, "starts": {}, "runs": []}

    def add(runs: list) -> None:
        study["runs"] += [found for found in jobs(unique(runs)) if found]

    def starts(model: str) -> None:
        if found := jobs([model])[0]:
            study["starts"][model] = found

    def rates(model: str) -> None:
        methods = plan["methods"][model]
        add([Run(model, loss, rate, 0) for rate in plan["rates"] for loss in methods.values()])
        plan["chosen"][model] = {
            method: rate for method, loss in methods.items() if (rate := best_rate(study["runs"], model, loss))
        }

    def over_seeds(model: str, losses: list[dict], method: str | None = None) -> list:
        """At the rate of that method, by default each loss's own."""
        chosen, names = plan["chosen"][model], {str(loss): name for name, loss in plan["methods"][model].items()}
        rated = [(loss, chosen.get(method or names[str(loss)])) for loss in losses]
        return [Run(model, loss, rate, seed) for seed in plan["seeds"] for loss, rate in rated if rate]

    pretraining = jobs.ahead("pretraining")
    starts(STORIES)
    rates(STORIES)
    limits = [METHODS["SimPO"] | {"beta": beta} for beta in plan["betas"]]
    add(over_seeds(STORIES, list(METHODS.values())) + over_seeds(STORIES, limits, "RePO"))
    gammas = [METHODS["RePO"] | {"gamma": gamma} for gamma in plan["gammas"]]
    add(over_seeds(STORIES, gammas, "RePO") + over_seeds(STORIES, plan["schedules"], "RePO"))
    if found := jobs.result(pretraining):
        study["pretraining"] = found
        starts(SMALL)
    if SMALL in study["starts"]:
        plan["methods"][SMALL] = with_gamma(plan["methods"][SMALL], study["starts"])
    rates(SMALL)
    add(over_seeds(SMALL, list(plan["methods"][SMALL].values())))
    add(over_seeds(STORIES, plan["dpo_betas"], "DPO"))
    study["runs"] = unique(study["runs"])
    study["limit"] = limit_of(study, jobs.cache)
    every = [*study["starts"].values(), *study["runs"], *([study["pretraining"]] if "pretraining" in study else [])]
    import jax

    study["about"] = {"jax": jax.__version__, "finished": len(every), "planned": len(jobs.asked)}
    study["about"]["cpu_minutes"] = round(sum(one["cpu_s"] for one in every) / 60, 1)
    return study


def unique(runs: list) -> list:
    return [run for i, run in enumerate(runs) if run not in runs[:i]]


def best_rate(runs: list[dict], model: str, loss: dict) -> float | None:
    """The lowest learning rate whose run of seed 0 ranks as many held-out pairs right as the best one, but for ENOUGH."""
    from study import tables

    found = {
        run["learning_rate"]: run["held_out"]["accuracy"] for run in tables.select(runs, model=model, loss=loss, seed=0)
    }
    enough = max(found.values(), default=0.0) - ENOUGH - 1e-9
    return min((rate for rate, accuracy in found.items() if accuracy >= enough), default=None)


def with_gamma(methods: dict, starts: dict) -> dict:
    """Another model's margins are wider or narrower: its gamma lies at the quantile of the first margins at which GAMMA lies for the first."""
    import numpy as np
    from study import tables

    share = tables.share_below(starts[STORIES]["train_margins"], GAMMA)
    gamma = round(float(np.quantile(starts[SMALL]["train_margins"], share)), 2)
    return {name: loss | {"gamma": gamma} if "gamma" in loss else loss for name, loss in methods.items()}


def limit_of(study: dict, cache: pathlib.Path) -> list[dict]:
    """SimPO's runs beside RePO's of the same seed, RePO++'s too, and as a yardstick RePO's of the next seed."""
    import numpy as np
    from study import tables
    from study.runs import Run, path_of

    def params(run: dict) -> np.ndarray:
        return np.load(path_of(cache, Run(*(run[key] for key in Run._fields))).with_suffix(".npy"))

    repos, found = tables.of_repo(study, METHODS["RePO"]), []
    others = [METHODS["SimPO"] | {"beta": beta} for beta in study["plan"]["betas"]] + [METHODS["RePO++"]]
    first = np.load(path_of(cache, STORIES).with_suffix(".npy")) if repos else None
    for i, repo in enumerate(repos):
        way = params(repo) - first
        partners = [run for loss in others for run in tables.of_repo(study, loss) if run["seed"] == repo["seed"]]
        partners += [repos[(i + 1) % len(repos)]] if len(repos) > 1 else []
        for other in partners:
            their_way = params(other) - first
            apart = {"distance": float(np.linalg.norm(their_way - way) / np.linalg.norm(way))}
            apart["cosine"] = float(their_way @ way / (np.linalg.norm(their_way) * np.linalg.norm(way)))
            found.append(tables.of_limit(repo, other, apart))
    return found


def as_json(study: dict) -> str:
    """One run a line."""
    parts = {name: value for name, value in study.items() if name != "runs"}
    runs = ",\n".join(json.dumps(run) for run in study["runs"])
    return json.dumps(parts, indent=1)[:-2] + ',\n "runs": [\n' + runs + "\n]}\n"


class Jobs:
    """Worker processes, and what they have done."""

    def __init__(self, cache: pathlib.Path, size, workers: int, *, running: bool):
        self.cache, self.asked = cache, set()
        self._running = running
        context = multiprocessing.get_context("spawn")
        self._pool = concurrent.futures.ProcessPoolExecutor(
            workers, context, initializer=begin, initargs=(context.Value("i", 0), str(cache), tuple(size))
        )
        self._began, self._done = time.perf_counter(), 0

    def __enter__(self) -> "Jobs":
        return self

    def __exit__(self, *exception) -> None:
        self._pool.shutdown(cancel_futures=True)

    def ahead(self, job):
        """Begins it; `result` waits for it."""
        self.asked.add(str(job))
        kept = self._kept(job)
        return kept if kept is not None or not self._running else self._pool.submit(do, job)

    def result(self, coming) -> dict | None:
        if not isinstance(coming, concurrent.futures.Future):
            return coming
        found = coming.result()
        self._done += 1
        minutes = (time.perf_counter() - self._began) / 60
        name = found.get("loss") or ("pretraining" if "held_out_loss" in found else "before training")
        told = found.get("held_out", {}).get("accuracy", found.get("held_out_loss"))
        print(
            f"{minutes:6.1f} min  {self._done:>3}  {found.get('model', '')} {name} rate {found.get('learning_rate')} seed {found.get('seed')}: "
            f"{told:.3f}   CPU {found['cpu_s']:.0f} s",
            flush=True,
        )
        return found

    def __call__(self, jobs: list) -> list[dict | None]:
        coming = [self.ahead(job) for job in jobs]
        return [self.result(one) for one in coming]

    def _kept(self, job) -> dict | None:
        from study.runs import path_of

        path = path_of(self.cache, job)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def begin(count, cache: str, size: tuple) -> None:
    """Of a worker process: one core of its own, before jax counts them."""
    if hasattr(os, "sched_setaffinity"):
        with count.get_lock():
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[count.value % len(cores)]})
            count.value += 1
    from study.runs import Size, Worker

    globals()["worker"] = Worker(pathlib.Path(cache), Size(*size))


def do(job) -> dict:
    return globals()["worker"](job)


if __name__ == "__main__":
    main()
