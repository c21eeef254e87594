import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from examples import STORIES, stories

from repo_jax.checkpoint import Checkpoints, restore_params
from repo_jax.config import StoppedError
from repo_jax.models.config import DecoderConfig
from repo_jax.models.decoder import param_shapes
from repo_jax.sharding import make_mesh
from repo_jax.state import TrainState, initial_state, state_shapes, state_shardings

CFG = DecoderConfig.from_hf(STORIES)
OPTIMIZER = optax.adamw(1e-2)


def state_on(mesh):
    shapes = state_shapes(param_shapes(CFG), OPTIMIZER)
    shardings = state_shardings(shapes, OPTIMIZER, mesh)
    return initial_state(stories(mesh)[1], OPTIMIZER, shardings), shapes, shardings


@jax.jit
def advance(state):
    """An update with a made-up gradient, so that moments and counters are not zero."""
    updates, opt_state = OPTIMIZER.update(jax.tree.map(jnp.sin, state.params), state.opt_state, state.params)
    params, active_2 = (
        optax.apply_updates(state.params, updates),
        jnp.stack([state.active_2[1], 0.9 * state.active_2[1]]),
    )
    return TrainState(state.step + 1, params, opt_state, active_2)


def assert_bit_for_bit(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("axes", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_a_state_comes_back_bit_for_bit_onto_the_same_and_another_mesh(tmp_path, axes):
    state, _, _ = state_on(make_mesh(1, 4, 2))
    state = advance(advance(state))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(state, 2)
    _, shapes, shardings = state_on(make_mesh(*axes))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore(checkpoints.latest(), shapes, shardings)
    assert_bit_for_bit(state, restored)
    assert restored.step == 2
    placed = jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, restored, shardings)
    assert all(jax.tree.leaves(placed))


def test_the_copy_is_of_the_moment_though_training_goes_on_and_donates(tmp_path):
    state, shapes, shardings = state_on(make_mesh())
    donating = jax.jit(advance, donate_argnums=0)
    saved = {}
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step in range(1, 5):
            state = donating(state)
            checkpoints.save(state, step)
            saved[step] = jax.tree.map(np.array, state)
        state = donating(donating(state))
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step, wanted in saved.items():
            assert_bit_for_bit(wanted, checkpoints.restore(step, shapes, shardings))


def test_the_newest_are_kept_under_the_names_that_trainers_use(tmp_path):
    state, _, _ = state_on(make_mesh())
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() is None
        for step in (5, 10, 100):
            checkpoints.save(state, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100"]


def test_a_write_that_was_cut_off_is_not_a_checkpoint(tmp_path):
    state, _, _ = state_on(make_mesh())
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(state, 1)
    (tmp_path / "checkpoint-2.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "base").mkdir()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.save(state, 2)
    assert (tmp_path / "checkpoint-2").is_dir() and (tmp_path / "base").is_dir()


def test_parameters_can_be_restored_alone(tmp_path):
    state, _, _ = state_on(make_mesh(1, 4, 2))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state, 3)
    _, shapes, shardings = state_on(make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    params = restore_params(tmp_path / "checkpoint-3", shapes.params, shardings.params)
    assert_bit_for_bit(state.params, params)


def test_what_is_not_a_checkpoint_is_said_to_be_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a checkpoint-N folder of a run; give the path of one"):
        restore_params(tmp_path, {}, {})


@pytest.fixture
def full_disk():
    """Stands in for a full disk: from when it is called on, this process cannot write files of more than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size or before[0], before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_cannot_be_written_is_said_and_the_ones_before_stay(tmp_path, full_disk, capsys):
    state, shapes, shardings = state_on(make_mesh(1, 1, 1, jax.devices()[:1]))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(state, 1, last=True)
        full_disk(100_000)
        checkpoints.save(state, 2)
        with pytest.raises(
            StoppedError, match=r"checkpoint-3 could not be written; checkpoint-1 stays the newest; make room in"
        ):
            checkpoints.save(state, 3, last=True)
        said = capsys.readouterr().err
        assert "checkpoint-2 could not be written (" in said and "File too large" in said and "training goes on" in said
        assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1"}
        full_disk(None)
        checkpoints.save(advance(state), 4)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-4"}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert_bit_for_bit(checkpoints.restore(1, shapes, shardings), state)
        assert_bit_for_bit(checkpoints.restore(4, shapes, shardings), advance(state))


def test_a_folder_that_cannot_be_written_to_is_said_too(tmp_path, capsys):
    state = state_on(make_mesh(1, 1, 1, jax.devices()[:1]))[0]
    with Checkpoints(tmp_path / "run", keep=2) as checkpoints:
        (tmp_path / "run").rmdir()
        (tmp_path / "run").write_text("no folder any more")
        with pytest.raises(StoppedError, match=r"checkpoint-1 could not be written; there is none yet"):
            checkpoints.save(state, 1, last=True)
