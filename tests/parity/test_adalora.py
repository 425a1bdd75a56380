"""AdaLoRA's deltas and the ranks that it gives up, against `peft`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import optim

torch = pytest.importorskip("torch", reason="the oracle is PyTorch: make parity installs it")
peft = pytest.importorskip("peft", reason="make parity installs the oracle")

pytestmark = pytest.mark.parity

SIDES = {"first": (12, 20), "second": (20, 8)}
RANK, TARGET, STEPS, WARMUP, FINAL, EVERY = 4, 2, 24, 3, 5, 2
NAMES = {"a": "lora_A", "values": "lora_E", "b": "lora_B"}


def model(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (torch.nn.Linear(*s, bias=False) for s in SIDES.values())

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(
        init_r=RANK,
        target_r=TARGET,
        lora_alpha=6,
        tinit=WARMUP,
        tfinal=FINAL,
        deltaT=EVERY,
        total_step=STEPS,
        target_modules=list(SIDES),
    )
    found = peft.get_peft_model(Model(), config)
    for name, x in found.named_parameters():
        if "lora_" in name:
            x.data.normal_()
    return found


def array(model, site, name):
    """One of peft's arrays as ours lie."""
    layer = getattr(model.base_model.model, site)
    x = getattr(layer, NAMES[name])["default"].detach().numpy()
    return jnp.asarray(x[:, 0] if name == "values" else x.T)


def adapter_of(model):
    return {f"{site}/{name}": array(model, site, name) for site in SIDES for name in NAMES}


def test_outputs_are_those_of_peft(theirs):
    params = {
        site: jnp.asarray(
            getattr(theirs.base_model.model, site).base_layer.weight.detach().numpy().T
        )
        for site in SIDES
    }
    x = torch.randn(5, 12)
    sites = jp.sites(model, params, jnp.ones((2, 12))).linear
    frozen, _ = jp.split(jp.adalora(RANK, sites, alpha=6)(jax.random.key(0), params))
    got = jp.lift(model)(jp.combine(frozen, adapter_of(theirs)), jnp.asarray(x.numpy()))
    np.testing.assert_allclose(got, theirs(x).detach().numpy(), rtol=2e-5, atol=2e-5)


def test_the_same_values_are_pruned_at_the_same_steps(theirs):
    adapter, rng = adapter_of(theirs), np.random.default_rng(0)
    tx = optim.rank_allocator(
        optax.sgd(0.0),
        TARGET * 2,
        total_steps=STEPS,
        warmup_steps=WARMUP,
        final_steps=FINAL,
        update_every=EVERY,
    )
    state, seen = tx.init(adapter), set()
    for step in range(1, STEPS + 1):
        slope = {path: rng.normal(size=x.shape).astype("float32") for path, x in adapter.items()}
        for path, g in slope.items():
            site, name = path.split("/")
            layer = getattr(theirs.base_model.model, site)
            g = g[:, None] if name == "values" else g.T
            getattr(layer, NAMES[name])["default"].grad = torch.tensor(np.ascontiguousarray(g))
        theirs.base_model.update_and_allocate(step)
        updates, state = tx.update(slope, state, adapter)
        adapter = optax.apply_updates(adapter, updates)
        for site in SIDES:
            want = array(theirs, site, "values")
            np.testing.assert_array_equal(adapter[f"{site}/values"] == 0, want == 0, str(step))
            seen.add(int(np.count_nonzero(want)))
    assert sum(int(np.sum(kept)) for kept in state.kept.values()) == TARGET * 2
    assert len(seen) > 2  # ranks fell step by step
