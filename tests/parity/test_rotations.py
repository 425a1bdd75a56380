"""OFT, BOFT, HRA and RoAd against `peft`: outputs from its numbers, and how many it trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp

torch = pytest.importorskip("torch", reason="the oracle is PyTorch: make parity installs it")
peft = pytest.importorskip("peft", reason="make parity installs the oracle")

pytestmark = [
    pytest.mark.parity,
    # Their own: an extension for CUDA that they do without elsewhere.
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA", "ignore:Setting boft_n_butterfly"),
]

N, M = 16, 12
X = np.random.default_rng(0).normal(size=(5, N))


def model(p, x):
    return x @ p["w"] + p["b"]


def theirs(config):
    """Their layer with random numbers in it, its outputs, and our parameters."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(N, M)).double()
    layer = module[0]
    params = {
        "w": jnp.asarray(layer.weight.detach().numpy().T),
        "b": jnp.asarray(layer.bias.detach().numpy()),
    }
    adapted = peft.get_peft_model(module, config, autocast_adapter_dtype=False).double().eval()
    count = 0
    with torch.no_grad():
        for tensor in adapted.parameters():
            if tensor.requires_grad:
                tensor += 0.2 * torch.randn_like(tensor)
                count += tensor.numel()
        y = adapted(torch.tensor(X)).numpy()
    return adapted.base_model.model[0], y, params, count


def ours(method, adapter, params):
    sites = jp.sites(model, params, X).linear
    frozen, start = jp.split(method(sites)(jax.random.key(0), params))
    assert {k: v.shape for k, v in start.items()} == {k: v.shape for k, v in adapter.items()}
    y = jp.lift(model, materialize="error")(jp.combine(frozen, adapter), X)
    assert np.abs(y - model(params, X)).max() > 0.05  # the numbers do matter
    return y, sum(v.size for v in start.values())


def numbers(tensor):
    return jnp.asarray(tensor["default"].detach().numpy())


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("terms", [None, 5, 6])
def test_oft(terms, share):
    config = peft.OFTConfig(
        oft_block_size=4,
        target_modules=["0"],
        block_share=share,
        use_cayley_neumann=terms is not None,
        num_cayley_neumann_terms=terms or 5,
    )
    layer, y, params, count = theirs(config)
    skew = jnp.asarray(layer.oft_R["default"].weight.detach().numpy())
    if terms is None:
        skew = -skew  # where they solve, they turn the other way than where they do not
    kept = None if terms is None else terms - 2
    got, number = ours(
        lambda sites: jp.oft(4, sites, block_share=share, neumann_terms=kept, dtype=jnp.float64),
        {"w/skew": skew},
        params,
    )
    np.testing.assert_allclose(got, y, rtol=1e-6, atol=1e-6)  # their identity is in float32
    assert number == count


class BlockDiagonal:
    """What their extension for CUDA computes."""

    def forward(self, blocks):
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]


@pytest.mark.parametrize("factors", [1, 2])  # from 3 on, theirs joins again what 2 has joined
def test_boft(factors, monkeypatch):
    monkeypatch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", BlockDiagonal)
    config = peft.BOFTConfig(
        boft_block_size=4, boft_n_butterfly_factor=factors, target_modules=["0"]
    )
    layer, y, params, count = theirs(config)
    q = numbers(layer.boft_R)
    upper = jnp.triu_indices(4, 1)
    adapter = {
        # Theirs is (I - S) (I + S)^-1 of the skew-symmetric part of a whole block.
        "w/skew": -0.5 * (q - jnp.swapaxes(q, -1, -2))[..., upper[0], upper[1]],
        "w/scale": numbers(layer.boft_s)[:, 0],
    }
    got, number = ours(
        lambda sites: jp.boft(4, sites, n_butterfly_factors=factors, dtype=jnp.float64),
        adapter,
        params,
    )
    np.testing.assert_allclose(got, y, rtol=1e-6, atol=1e-6)
    # The paper's count; they train 16 numbers of a block that has 6.
    assert number - M == factors * N * (4 - 1) // 2 == (count - M) * 6 // 16


def test_hra():
    layer, y, params, count = theirs(peft.HRAConfig(r=6, target_modules=["0"]))
    got, number = ours(
        lambda sites: jp.hra(6, sites, dtype=jnp.float64), {"w/u": numbers(layer.hra_u)}, params
    )
    np.testing.assert_allclose(got, y, rtol=1e-6, atol=1e-6)
    assert number == count


@pytest.mark.parametrize("group", [4, 12])
@pytest.mark.parametrize("variant", [1, 2, 4])
def test_road(variant, group):
    config = peft.RoadConfig(variant=f"road_{variant}", group_size=group, target_modules=["0"])
    layer, y, params, count = theirs(config)

    def by_pair(tensor):
        """Theirs counts, in a group, the kinds first, then the two outputs, then the pairs."""
        split = numbers(tensor).reshape(M // group, variant, group // 2)
        return jnp.swapaxes(split, 1, 2).reshape(M // 2, variant)

    adapter = {"w/theta": by_pair(layer.road_theta), "w/alpha": by_pair(layer.road_alpha)}
    got, number = ours(
        lambda sites: jp.road(sites, variant=variant, group_size=group, dtype=jnp.float64),
        adapter,
        params,
    )
    np.testing.assert_allclose(got, y, rtol=1e-10)
    assert number == count == variant * M
