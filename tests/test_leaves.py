"""Trees whose leaves are not all arrays, such as a module with its functions in it."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxpeft as jp

KEY = jax.random.key(0)


@jax.tree_util.register_pytree_with_keys_class
class Layer:
    """As a module of Equinox: a pytree whose leaves are arrays, functions, strings and numbers."""

    names = "weight bias act mode eps inference".split()

    def __init__(self, **fields):
        self.__dict__.update(fields)

    def __call__(self, x):
        if self.mode == "double" and not self.inference:
            x = 2 * x
        return self.act(x @ self.weight + self.bias) + self.eps

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.GetAttrKey(n), getattr(self, n)) for n in self.names], None

    @classmethod
    def tree_unflatten(cls, meta, children):
        return cls(**dict(zip(cls.names, children, strict=True)))


def layers():
    k = jax.random.split(jax.random.key(5), 2)
    more = dict(act=jax.nn.tanh, mode="double", eps=0.5, inference=False)
    return [
        Layer(weight=jax.random.normal(k[0], (6, 5)), bias=jnp.ones(5), **more),
        Layer(weight=jax.random.normal(k[1], (5, 3)), bias=jnp.zeros(3), **more),
    ]


def run(layers, x):
    for layer in layers:
        x = layer(x)
    return x


def test_a_module_with_functions_and_strings_among_its_leaves_is_adapted():
    p, x = layers(), jnp.ones((2, 6))
    sites = jp.sites(run, p, x)
    assert {path: sorted(s.kinds) for path, s in sites.items()} == {
        "0/weight": ["linear"],
        "0/bias": ["bias"],
        "1/weight": ["linear"],
        "1/bias": ["bias"],
    }
    method = jp.chain(jp.quantize("int8", sites.match("0/weight")), jp.lora(2, sites.linear))
    frozen, adapter = jp.split(jp.chain(method, jp.bitfit(sites))(KEY, p))
    adapter = {k: v + 0.1 for k, v in adapter.items()}
    tree = jp.combine(frozen, adapter)
    assert tree[0].act is jax.nn.tanh and tree[1].mode == "double" and tree[1].eps == 0.5
    merged = jp.merge(tree)
    np.testing.assert_allclose(jp.lift(run)(tree, x), run(merged, x), rtol=1e-5)

    def loss(a):
        return jnp.sum(jp.lift(run)(jp.combine(frozen, a), x))

    grads = jax.jit(jax.grad(loss))(adapter)
    assert all(np.any(np.asarray(g) != 0) for g in grads.values())
    assert jp.base_params(tree)[1].weight is p[1].weight
    assert jp.count_params(frozen, adapter).trainable == 2 * 11 + 2 * 8 + 8
    assert jp.estimate_memory(
        lambda a, f, x: jp.lift(run)(jp.combine(f, a), x).sum(), adapter, frozen, x
    )
    moments = jp.calibration.input_moments(run, p, sites.linear, [x])
    assert moments["0/weight"].second.shape == (6, 6)
    of = jp.calibration.mean_gradients(lambda p, x: jnp.sum(run(p, x)), p, sites.linear, [x])
    assert of["1/weight"].shape == (5, 3)
    scores = jp.sparsity.saliency_scores(
        "snip", lambda p, x: jnp.sum(run(p, x)), p, sites.linear, [x]
    )
    assert scores["1/weight"].shape == (5, 3)


def test_labels_of_such_a_module_freeze_its_functions():
    p, x = layers(), jnp.ones((2, 6))
    marked = jp.lora(2, jp.sites(run, p, x).linear)(KEY, p)
    found = jp.param_labels(marked)
    assert found[0].act == found[0].eps == found[0].bias == "freeze"
    assert jax.tree.leaves(found).count("train") == 4
