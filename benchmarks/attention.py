"""Times the forms of attention against each other, forward and backward, in alternating runs on this machine.

python benchmarks/attention.py [--rows 4] [--row_length 512] [--query_heads 8] [--kv_heads 4] [--head_size 8]
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from repo_jax.models.attention import ATTENTION, visible


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("rows", 4),
        ("row_length", 512),
        ("query_heads", 8),
        ("kv_heads", 4),
        ("head_size", 8),
        ("rounds", 7),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(a.rows, a.row_length, heads, a.head_size)), jnp.float32)
        for heads in (a.query_heads, a.kv_heads, a.kv_heads)
    )
    # Two pairs a row: prompt, chosen, rejected, each a sixth of it.
    segments = jnp.tile(1 + jnp.arange(a.row_length) * 6 // a.row_length, (a.rows, 1))
    mask = visible(segments, jnp.where(segments <= 3, 1, 4))

    def timed(attend):
        step = jax.jit(jax.value_and_grad(lambda q, k, v: (attend(q, k, v, mask) ** 2).sum(), argnums=(0, 1, 2)))
        jax.block_until_ready(step(q, k, v))

        def once() -> float:
            start = time.perf_counter()
            jax.block_until_ready(step(q, k, v))
            return time.perf_counter() - start

        return once

    runs = {name: timed(attend) for name, attend in ATTENTION.items()}
    times = {name: [] for name in runs}
    for _ in range(a.rounds):
        for name, once in runs.items():
            times[name].append(once())
    base = times["dense"]
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {vars(a)}")
    for name, seconds in times.items():
        ratio = statistics.median(d / s for d, s in zip(base, seconds, strict=True))
        print(f"{name:<10} {1e3 * statistics.median(seconds):8.1f} ms   {ratio:5.2f} x dense")


if __name__ == "__main__":
    main()
