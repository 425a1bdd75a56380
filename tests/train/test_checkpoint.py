import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import toy
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpeft import train

TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2), optax.add_noise(0.1, 0.5, 3))


def trained(steps=2):
    adapter, frozen = toy.model(jnp.float32)
    adapter["layers.0/['odd'] path"] = jnp.ones((3,), jnp.bfloat16)
    step = jax.jit(train.train_step(toy.loss_fn, TX))
    state = train.init(adapter, TX)
    for _ in range(steps):
        state, _ = step(state, frozen, toy.batch(), None)
    return state


def raw(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def assert_same(got, want):
    def same(g, w):
        assert g.dtype == w.dtype
        np.testing.assert_array_equal(raw(g), raw(w))

    jax.tree.map(same, got, want)


def test_a_state_comes_back_bit_for_bit_with_its_structure(tmp_path):
    state = trained()
    with train.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {"data": {"next_index": 7}})
    with train.Checkpoints(tmp_path) as checkpoints:
        got, run = checkpoints.restore(train.init(state.adapter, TX))
    assert_same(got, state)
    assert run == {"data": {"next_index": 7}}


def test_an_optimizer_state_may_hold_arrays_of_no_elements(tmp_path):
    state = train.State(jnp.int32(3), {"a": jnp.ones(2)}, (jnp.zeros((0, 4)), jnp.ones(1)))
    with train.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {})
        assert_same(checkpoints.restore(state)[0], state)


def test_the_newest_are_kept(tmp_path):
    state = trained(0)
    with train.Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 5, 9):
            checkpoints.save(state._replace(step=jnp.int32(step)), {})
        assert checkpoints.steps() == [5, 9]
        assert checkpoints.restore(state)[0].step == 9
        assert checkpoints.restore(state, 5)[0].step == 5
        with pytest.raises(train.UserError, match=r"no checkpoint of step 1 in .*\[5, 9\]"):
            checkpoints.restore(state, 1)


def test_a_users_own_orbax_manager_restores_the_adapter(tmp_path):
    state = trained()
    with train.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {})
    program = """
        import sys, orbax.checkpoint as ocp
        manager = ocp.CheckpointManager(sys.argv[1])
        items = ocp.args.Composite(adapter=ocp.args.StandardRestore())
        adapter = manager.restore(manager.latest_step(), args=items).adapter
        print({path: (x.shape, float(x.sum())) for path, x in sorted(adapter.items())})
        assert "jaxpeft" not in sys.modules
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), tmp_path], capture_output=True, text=True
    )
    want = {path: (x.shape, float(x.sum())) for path, x in sorted(state.adapter.items())}
    assert out.stdout.strip() == str(want), out.stderr


def test_arrays_come_back_where_the_run_has_them(tmp_path):
    """On a mesh as the adapter is spread there; on one device free to meet any mesh."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, P("model"))
    adapter = {"a": jnp.arange(16.0)}
    state = train.init(adapter, TX)
    with train.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {})
        like = train.init(jax.device_put(adapter, spread), TX)
        got, _ = checkpoints.restore(like)
        assert got.adapter["a"].sharding == spread
        np.testing.assert_array_equal(got.adapter["a"], adapter["a"])
        free, _ = checkpoints.restore(state)
        assert not free.adapter["a"].committed
        jax.jit(jnp.add)(free.adapter["a"], like.adapter["a"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a | {"w/a": jnp.ones((6, 3))},
            r"adapter has shape \(6, 2\) at 'w/a', not \(6, 3\)",
        ),
        (
            lambda a: a | {"w/b": a["w/b"].astype(jnp.float16)},
            r"has dtype float32 at 'w/b', not float16",
        ),
        (lambda a: a | {"new": jnp.ones(1)}, r"adapter lacks 'new'"),
        (lambda a: {"w/b": a["w/b"]}, r"adapter has .*, which this run lacks"),
    ],
)
def test_the_first_difference_of_another_adapter_is_named(tmp_path, change, message):
    state = trained(0)
    with train.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {})
        with pytest.raises(train.UserError, match=message):
            checkpoints.restore(train.init(change(dict(state.adapter)), TX))


def test_another_optimizer_is_named(tmp_path):
    state = trained(0)
    with train.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {})
        with pytest.raises(train.UserError, match=r"its optimizer lacks .*trace\["):
            checkpoints.restore(train.init(state.adapter, optax.sgd(0.1, momentum=0.9)))


def test_a_folder_without_checkpoints_is_named(tmp_path):
    with train.Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(
            train.UserError, match=rf"no checkpoint in {tmp_path}; it has steps \[\]"
        ):
            checkpoints.restore(trained(0))


def test_a_damaged_checkpoint_is_named(tmp_path):
    state = trained(0)
    with train.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {})
        for file in (tmp_path / "0" / "adapter").rglob("*"):
            if file.is_file() and file.parent.name == "d":
                file.write_bytes(file.read_bytes()[:20])
        with pytest.raises(train.UserError, match=rf"checkpoint {tmp_path}/0 cannot be read: \S+"):
            checkpoints.restore(state)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        train.UserError, match=rf"cannot use {tmp_path}/file/run for checkpoints: \S+"
    ):
        train.Checkpoints(tmp_path / "file" / "run")


def test_keep_out_of_range_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"`keep` .* at least 1; got 0"):
        train.Checkpoints(tmp_path, keep=0)


def test_a_full_disk_is_one_line_and_the_last_whole_checkpoint_stands(tmp_path):
    """The limit on a file's size stands for the disk: both fail the write in the kernel."""
    program = """
        import resource, sys
        import jax.numpy as jnp, optax
        import jaxpeft.train as train
        state = train.init({"a": jnp.ones((1000, 1000))}, optax.sgd(0.1))
        with train.one_line_errors(), train.Checkpoints(sys.argv[1]) as checkpoints:
            checkpoints.save(state, {})
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            checkpoints.save(state._replace(step=state.step + 1), {})
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), tmp_path],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert out.returncode == 2
    assert out.stderr == (
        f"error: cannot write the checkpoint of step 1 to {tmp_path}: File too large. The last "
        f"whole one is of step 0. Make room there or choose another folder, then start again to "
        f"go on from it.\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_a_disk_that_fills_up_while_orbax_writes_leaves_nothing_half_written(tmp_path, monkeypatch):
    state = trained(0)
    half = tmp_path / "1.orbax-checkpoint-tmp"

    def no_space(self, step, **options):
        half.mkdir()
        (half / "part").write_text("half")
        raise ValueError("orbax wraps it") from OSError(28, "No space left on device")

    with train.Checkpoints(tmp_path) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(ocp.CheckpointManager, "save", no_space)
            with pytest.raises(
                train.UserError,
                match=r"step 1 to .*: No space left on device. The last whole one is none",
            ):
                checkpoints.save(state._replace(step=jnp.int32(1)), {})
        assert not half.exists()
        assert checkpoints.steps() == []
        checkpoints.save(state, {})
        assert checkpoints.steps() == [0]
