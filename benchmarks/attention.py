"""Times the forms of attention against each other, forward and backward, in alternating runs on this machine.

python benchmarks/attention.py [--rows 4] [--row_length 512] [--query_heads 8] [--kv_heads 4] [--head_size 8]
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from repo_jax.models.attention import Places
from repo_jax.models.decoder import ATTENTION


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
    segment = 1 + np.arange(a.row_length) * 6 // a.row_length
    prompt = np.where(segment <= 3, 1, 4)
    sixth = -(-a.row_length // 6)
    views = np.full((2, 4 * sixth), a.row_length)
    for side in (0, 1):
        seen = np.flatnonzero((segment == prompt) | (segment == prompt + 1 + side))
        views[side, : len(seen)] = seen
    position = np.arange(a.row_length) % sixth + np.where(segment == prompt, 0, sixth)
    places = Places(
        *(jnp.tile(jnp.asarray(x, jnp.int32), (a.rows, *(1,) * x.ndim)) for x in (position, segment, prompt, views))
    )

    def timed(kernel):
        def squares(q, k, v):
            return (kernel.attend(q, k, v, kernel.sight(places, None), window=None, scale=1.0, cap=None) ** 2).sum()

        step = jax.jit(jax.value_and_grad(squares, argnums=(0, 1, 2)))
        jax.block_until_ready(step(q, k, v))

        def once() -> float:
            start = time.perf_counter()
            jax.block_until_ready(step(q, k, v))
            return time.perf_counter() - start

        return once

    # splash runs on TPUs alone.
    runs = {
        name: timed(kernel) for name, kernel in ATTENTION.items() if name != "splash" or jax.default_backend() == "tpu"
    }
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
