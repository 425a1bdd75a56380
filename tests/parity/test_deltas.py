"""DoRA, HiRA, VeRA, LoHa, LoKr and MiSS against `peft`, in float64.

Every trained array of a module of `peft` is drawn at random and copied into our adapter: outputs
and merged weights agree to 1e-10, and both train as many numbers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft._view import map_views

torch = pytest.importorskip("torch", reason="the oracle is PyTorch: make parity installs it")
peft = pytest.importorskip("peft", reason="make parity installs the oracle")

pytestmark = pytest.mark.parity

# (in, out), and those of a second layer, so that what is shared is cut to both.
SIDES = {"wide": ((12, 20), (20, 9)), "narrow": ((24, 10), (10, 36)), "prime": ((13, 8), (8, 17))}
NAMES = ("up", "down")

each_side = pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)


class Net(torch.nn.Module):
    def __init__(self, sides):
        super().__init__()
        self.up, self.down = (torch.nn.Linear(n, m) for n, m in sides)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def model(p, x):
    h = jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"])
    return h @ p["down"]["kernel"] + p["down"]["bias"]


def array(tensor):
    return jnp.asarray(tensor.detach().numpy())


class Pair:
    """A network of PyTorch under an adapter of `peft`, and the same weights for ours."""

    def __init__(self, sides, config):
        torch.manual_seed(0)
        net = Net(sides).double()
        self.params = {
            name: {"kernel": array(layer.weight).T, "bias": array(layer.bias)}
            for name, layer in net.named_children()
        }
        self.x = np.random.default_rng(1).normal(size=(5, sides[0][0]))
        self.sites = jp.sites(model, self.params, self.x)
        self.theirs = peft.get_peft_model(net, config).double().eval()
        self.trained = [x for x in self.theirs.parameters() if x.requires_grad]
        self.start = self.outputs()
        with torch.no_grad():
            for tensor in self.trained:
                tensor.add_(0.4 * torch.randn_like(tensor))

    def outputs(self):
        with torch.no_grad():
            return self.theirs(torch.as_tensor(self.x)).numpy()

    def field(self, layer, name):
        """A trained array of a layer, as (in, out) where it is a matrix."""
        found = getattr(self.theirs.base_model.model.get_submodule(layer), name)["default"]
        return array(getattr(found, "weight", found)).T

    def split(self, method):
        return jp.split(method(jax.random.key(0), self.params))

    def check(self, frozen, adapter, fields):
        """`fields`: from the name of ours to the name of theirs."""
        own = {
            f"{layer}/kernel/{ours}": self.field(layer, name)
            for layer in NAMES
            for ours, name in fields.items()
        }
        self.compare(frozen, adapter, own)

    def compare(self, frozen, adapter, own):
        assert {k: v.shape for k, v in adapter.items()} == {k: v.shape for k, v in own.items()}
        assert sum(x.size for x in own.values()) == sum(x.numel() for x in self.trained)
        np.testing.assert_allclose(self.start, model(self.params, self.x), rtol=1e-10)
        want, tree = self.outputs(), jp.combine(frozen, own)
        assert np.abs(want - self.start).max() > 0.05
        np.testing.assert_allclose(jp.lift(model)(tree, self.x), want, rtol=1e-10, atol=1e-10)
        merged, theirs = jp.merge(tree), self.theirs.merge_and_unload()
        for name, layer in theirs.named_children():
            kernel = array(layer.weight).T
            np.testing.assert_allclose(merged[name]["kernel"], kernel, rtol=1e-10, atol=1e-10)


FACTORS = {"a": "lora_A", "b": "lora_B"}


@each_side
@pytest.mark.parametrize("rank, alpha", [(1, 4), (4, 3), (8, 8)])
def test_dora(sides, rank, alpha):
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=NAMES, use_dora=True)
    pair = Pair(sides, config)
    method = jp.dora(rank, pair.sites.linear, alpha=alpha, dtype=jnp.float64)
    frozen, adapter = pair.split(method)
    for layer in NAMES:  # theirs starts at the same lengths
        length = jnp.linalg.norm(pair.params[layer]["kernel"], axis=0)
        np.testing.assert_allclose(adapter[f"{layer}/kernel/magnitude"], length, rtol=1e-10)
    pair.check(frozen, adapter, FACTORS | {"magnitude": "lora_magnitude_vector"})


@each_side
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_hira(sides, rank):
    pair = Pair(sides, peft.HiraConfig(r=rank, target_modules=NAMES))
    method = jp.hira(rank, pair.sites.linear, dtype=jnp.float64)
    pair.check(*pair.split(method), {"a": "hira_A", "b": "hira_B"})


@each_side
@pytest.mark.parametrize("rank", [1, 5, 40])
def test_vera(sides, rank):
    """Over their random matrices, which are as large as the largest sides and cut like ours."""
    pair = Pair(sides, peft.VeraConfig(r=rank, target_modules=NAMES))
    n, m = (max(side) for side in zip(*sides, strict=True))
    theirs = pair.theirs.base_model
    left, right = (array(x["default"]).T for x in (theirs.vera_A, theirs.vera_B))
    assert left.shape == (n, rank) and right.shape == (rank, m)
    method = jp.vera(rank, pair.sites.linear, dtype=jnp.float64)
    frozen, adapter = pair.split(method)

    def with_theirs(view):
        w = view.weight
        for ours, bound in ((w.left, (6 / n) ** 0.5), (w.right, (6 / rank) ** 0.5)):
            assert bound * 0.5 < jnp.abs(ours).max() <= bound
        cut = dict(left=left[: w.left.shape[0]], right=right[:, : w.right.shape[1]])
        return dataclasses.replace(view, weight=dataclasses.replace(w, **cut))

    assert jnp.abs(left).max() <= (6 / n) ** 0.5 and jnp.abs(right).max() <= (6 / rank) ** 0.5
    frozen = map_views(with_theirs, frozen)
    pair.check(frozen, adapter, {"d": "vera_lambda_d", "b": "vera_lambda_b"})


@each_side
# Quotients that float32 has: `peft` rounds alpha / r to it.
@pytest.mark.parametrize("rank, alpha", [(1, 3), (2, 5), (6, 3)])
def test_loha(sides, rank, alpha):
    config = peft.LoHaConfig(r=rank, alpha=alpha, target_modules=NAMES)
    pair = Pair(sides, config)
    method = jp.loha(rank, pair.sites.linear, alpha=alpha, dtype=jnp.float64)
    names = {"a1": "hada_w1_b", "b1": "hada_w1_a", "a2": "hada_w2_b", "b2": "hada_w2_a"}
    pair.check(*pair.split(method), names)


LOKR = {"w1": "lokr_w1", "a1": "lokr_w1_b", "b1": "lokr_w1_a"}
LOKR |= {"w2": "lokr_w2", "a2": "lokr_w2_b", "b2": "lokr_w2_a"}


@pytest.mark.parametrize("rank, alpha", [(1, 2), (2, 3), (30, 10)])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("name, factor", [*((n, None) for n in SIDES), ("narrow", 2), ("wide", 1)])
def test_lokr(name, factor, rank, alpha, both):
    config = peft.LoKrConfig(
        r=rank,
        alpha=alpha,
        target_modules=NAMES,
        decompose_both=both,
        decompose_factor=factor or -1,
        init_weights="lycoris",
    )
    pair = Pair(SIDES[name], config)
    method = jp.lokr(
        rank,
        pair.sites.linear,
        decompose_factor=factor,
        decompose_both=both,
        alpha=alpha,
        dtype=jnp.float64,
    )
    frozen, adapter = pair.split(method)
    own = {}
    for path in adapter:
        layer, _, field = path.split("/")
        own[path] = pair.field(layer, LOKR[field])
    pair.compare(frozen, adapter, own)


@each_side
@pytest.mark.parametrize("rank", [1, 3, 4, 8])
def test_miss(sides, rank):
    """Ranks that divide the inputs, and ranks that do not."""
    pair = Pair(sides, peft.MissConfig(r=rank, target_modules=NAMES))
    method = jp.miss(rank, pair.sites.linear, dtype=jnp.float64)
    frozen, adapter = pair.split(method)
    own = {f"{layer}/kernel/b": pair.field(layer, "miss_block").T for layer in NAMES}
    pair.compare(frozen, adapter, own)
