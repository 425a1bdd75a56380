"""PiSSA and OLoRA start where peft's do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp

torch = pytest.importorskip("torch", reason="the oracle is PyTorch: make parity installs it")
peft = pytest.importorskip("peft", reason="make parity installs the oracle")

pytestmark = pytest.mark.parity

SIDES = [(24, 16), (16, 24)]


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("rank, alpha", [(4, 4), (4, 10), (6, 3)])
@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_factors_and_residual_base_are_those_of_peft(name, rank, alpha, sides):
    n, m = sides
    torch.manual_seed(0)
    w = torch.randn(m, n)
    module = torch.nn.Sequential(torch.nn.Linear(n, m, bias=False))
    module[0].weight.data.copy_(w)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], init_lora_weights=name)
    layer = peft.get_peft_model(module, config).base_model.model[0]
    a = layer.lora_A["default"].weight.detach().numpy().T
    b = layer.lora_B["default"].weight.detach().numpy().T
    rest = layer.base_layer.weight.detach().numpy().T

    params = {"w": jnp.asarray(w.numpy().T)}
    sites = jp.sites(lambda p, x: x @ p["w"], params, jnp.ones((2, n)))
    method = getattr(jp, name)(rank, sites.linear, alpha=alpha, dtype=jnp.float32)
    frozen, adapter = jp.split(method(jax.random.key(0), params))
    # Singular vectors and columns of Q have a sign that each library is free to choose.
    sign = np.sign(np.sum(a * adapter["w/a"], axis=0))
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(adapter["w/a"] * sign, a, **tolerance)
    np.testing.assert_allclose(adapter["w/b"] * sign[:, None], b, **tolerance)
    np.testing.assert_allclose(jp.base_params(jp.combine(frozen, adapter))["w"], rest, **tolerance)
