"""Adam in 8 bits against bitsandbytes on the CPU: its map, its codes, its optimizer's steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpeft import optim
from jaxpeft.optim._adam8bit import block_scales, dynamic_map, quantize

torch = pytest.importorskip("torch", reason="the oracle is PyTorch: make parity installs it")
bnb = pytest.importorskip("bitsandbytes", reason="the oracle is bitsandbytes (pip install it)")

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_theirs(signed):
    theirs = bnb.functional.create_dynamic_map(signed).numpy()
    np.testing.assert_allclose(dynamic_map(signed), theirs, rtol=4e-7)  # a few last digits


@pytest.mark.parametrize("signed", [True, False])
def test_codes_and_scales_are_theirs(signed):
    """Theirs of float64 arrays are searched for in the whole map, so that they are nearest."""
    random = np.random.default_rng(0)
    x = random.normal(size=(512, 64)) * 10.0 ** random.integers(-5, 1, (512, 64))
    x = (x if signed else x**2).astype(np.float32)
    table = bnb.functional.create_dynamic_map(signed)
    flat = torch.tensor(x.T.copy(), dtype=torch.float64)  # (out, in): blocks along `in`
    theirs, absmax = torch.ops.bitsandbytes.quantize_blockwise(flat, table, 256)
    scales = block_scales(x)
    np.testing.assert_array_equal(np.asarray(scales).T.ravel(), absmax.numpy())
    ours, theirs = np.asarray(quantize(x, scales, signed=signed)).T, theirs.numpy()

    differ = ours != theirs
    # They multiply by 1 / absmax, we divide: a last digit, and so a code, may differ at a middle.
    assert differ.mean() < 1e-3
    share = np.abs(x.T.reshape(64, 2, 256) / absmax.numpy().reshape(64, 2, 1)).reshape(64, 512)
    sign = np.sign(x.T)
    near = [np.abs(share * sign - table.numpy()[codes]) for codes in (ours, theirs)]
    assert (np.abs(near[0] - near[1])[differ] < 1e-6 * share[differ]).all()


def test_steps_are_those_of_their_optimizer():
    """Ten steps of AdamW8bit on a weight (out, in) with `in` a multiple of 256.

    Their CPU kernel for float32 takes, for one number in 700, the second nearest code where the two
    are nearly as near; from there on that number's moments differ in their last digit.
    """
    random = np.random.default_rng(0)
    start = random.normal(size=(512, 24)).astype(np.float32)  # (in, out)
    options = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    theirs = torch.nn.Parameter(torch.tensor(start.T.copy()))
    optimizer = bnb.optim.AdamW8bit([theirs], lr=1e-2, **options)
    tx = optim.adamw8bit(1e-2, 0.9, 0.99, 1e-6, weight_decay=0.1)
    ours, state = jnp.asarray(start), tx.init(jnp.asarray(start))
    update = jax.jit(tx.update)

    for step in range(10):
        g = (random.normal(size=start.shape) + start).astype(np.float32)
        theirs.grad = torch.tensor(g.T.copy())
        optimizer.step()
        updates, state = update(jnp.asarray(g), state, ours)
        ours = optax.apply_updates(ours, updates)
        off = np.abs(np.asarray(ours) - theirs.detach().numpy().T)
        if step == 0:  # both start from zeros: the rule alone
            assert off.max() < 1e-6
    moved = np.abs(np.asarray(ours) - start).mean()
    assert off.mean() < 1e-3 * moved
    assert np.quantile(off, 0.95) < 2e-3 * moved

    kept = optimizer.state[theirs]
    assert kept["state1"].dtype == torch.uint8 and kept["absmax1"].numel() == 24 * 2
    for moment, name in [(state[0].mu, "1"), (state[0].nu, "2")]:
        codes, scales = (kept[key + name].numpy() for key in ("state", "absmax"))
        np.testing.assert_allclose(np.asarray(moment.scales).T.ravel(), scales, rtol=2e-2)
        differ = np.abs(np.asarray(moment.values).T.astype(int) - codes)
        assert (differ > 0).mean() < 0.05 and np.quantile(differ, 0.999) <= 1
