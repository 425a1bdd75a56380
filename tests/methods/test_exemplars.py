"""One exemplar of each kind of method, against the model with the method written into it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp

from . import toy

F8 = jnp.float64
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def sites():
    return jp.sites(toy.model, toy.params(), toy.ids())


def lifted(frozen, adapter, ids, **call):
    return jax.jit(jp.lift(toy.model))(jp.combine(frozen, adapter, **call), ids)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
    base = toy.model(toy.params(), toy.ids())
    assert np.linalg.norm(np.asarray(a)[:, -1] - np.asarray(base)[:, -1]) > 0.1


def test_the_model_by_hand_is_the_model():
    out = toy.by_hand(toy.params(), toy.ids())
    np.testing.assert_allclose(out, toy.model(toy.params(), toy.ids()), rtol=1e-10)


def test_ia3_scales_outputs_with_their_biases_and_inputs_of_the_feed_forward(sites):
    method = jp.ia3(sites.match("*/[kv]/kernel"), sites.match("*/down/kernel"), dtype=F8)
    frozen, adapter = jp.split(method(KEY, toy.params()))
    start = lifted(frozen, adapter, toy.ids())
    np.testing.assert_allclose(start, toy.model(toy.params(), toy.ids()), rtol=1e-12)
    adapter = toy.perturbed(adapter)

    def after(name, y, i):
        return y * adapter[f"layers/{name}/kernel/scale"][i] if name in "kv" else y

    def inner(y, i):
        return y * adapter["layers/down/kernel/scale"][i]

    by_hand = toy.by_hand(toy.params(), toy.ids(), after=after, inner=inner)
    close(lifted(frozen, adapter, toy.ids()), by_hand)
    merged = jp.merge(jp.combine(frozen, adapter))
    close(toy.model(merged, toy.ids()), by_hand)


def test_a_bottleneck_sees_the_bias_and_adds_behind_it(sites):
    method = jp.bottleneck_adapter(4, sites.match("*/o/kernel", "*/down/kernel"), dtype=F8)
    frozen, adapter = jp.split(method(KEY, toy.params()))
    start = lifted(frozen, adapter, toy.ids())
    np.testing.assert_allclose(start, toy.model(toy.params(), toy.ids()), rtol=1e-12)
    d, m = toy.D, 4
    assert sum(x.size for x in adapter.values()) == 2 * toy.L * (2 * m * d + d + m)
    adapter = toy.perturbed(adapter)

    def after(name, y, i):
        if name not in ("o", "down"):
            return y
        a = {k: adapter[f"layers/{name}/kernel/{k}"][i] for k in ("down", "up")}
        b = {k: adapter[f"layers/{name}/kernel/{k}_bias"][i] for k in ("down", "up")}
        return y + jax.nn.relu(y @ a["down"] + b["down"]) @ a["up"] + b["up"]

    close(lifted(frozen, adapter, toy.ids()), toy.by_hand(toy.params(), toy.ids(), after=after))


def test_a_bottleneck_follows_a_bias_that_is_trained_too(sites):
    """The adapter reads the trained bias, not a copy of where it started."""
    p = toy.params()
    method = jp.chain(
        jp.bitfit(sites), jp.bottleneck_adapter(4, sites.match("*/o/kernel"), dtype=F8)
    )
    frozen, adapter = jp.split(method(KEY, p))
    adapter = toy.perturbed(adapter)
    for name in ("q", "k", "v", "o", "up", "down"):
        p["layers"][name]["bias"] = adapter[f"layers/{name}/bias"]

    def after(name, y, i):
        if name != "o":
            return y
        a = {k.split("/")[-1]: x[i] for k, x in adapter.items() if "kernel" in k}
        return y + jax.nn.relu(y @ a["down"] + a["down_bias"]) @ a["up"] + a["up_bias"]

    close(lifted(frozen, adapter, toy.ids()), toy.by_hand(p, toy.ids(), after=after))


def test_a_parallel_adapter_goes_around_the_feed_forward_block(sites):
    method = jp.parallel_adapter(
        4, sites.match("*/up/kernel"), sites.match("*/down/kernel"), scale=2.0, dtype=F8
    )
    frozen, adapter = jp.split(method(KEY, toy.params()))
    adapter = toy.perturbed(adapter)
    tap, add = "layers/up/kernel", "layers/down/kernel"

    def beside(h, i):
        h = jax.nn.relu(h @ adapter[f"{tap}/down"][i] + adapter[f"{tap}/down_bias"][i])
        return 2.0 * (h @ adapter[f"{add}/up"][i] + adapter[f"{add}/up_bias"][i])

    close(lifted(frozen, adapter, toy.ids()), toy.by_hand(toy.params(), toy.ids(), beside=beside))


def test_a_parallel_adapter_meets_itself_across_a_remat_but_not_across_a_loop():
    p = {"up": toy.normal(0, 8, 12), "down": toy.normal(1, 12, 8)}
    x = toy.normal(2, 5, 8)

    def across_remat(p, x):
        return jax.checkpoint(lambda x: jnp.tanh(x @ p["up"]))(x) @ p["down"]

    def across_loop(p, x):
        body = lambda h, _: (jnp.tanh(x @ p["up"]), None)  # noqa: E731
        h, _ = jax.lax.scan(body, jnp.zeros((5, 12), F8), None, length=2)
        return h @ p["down"]

    sites = jp.sites(across_remat, p, x)
    method = jp.parallel_adapter(3, sites.match("up"), sites.match("down"), dtype=F8)
    frozen, adapter = jp.split(method(KEY, p))
    adapter = toy.perturbed(adapter)
    tree = jp.combine(frozen, adapter)
    h = jax.nn.relu(x @ adapter["up/down"] + adapter["up/down_bias"])
    by_hand = across_remat(p, x) + h @ adapter["down/up"] + adapter["down/up_bias"]
    np.testing.assert_allclose(jp.lift(across_remat)(tree, x), by_hand, rtol=1e-12)
    with pytest.raises(TypeError, match="adapter 'down' reads its input inside a loop"):
        jp.lift(across_loop)(tree, x)
    with pytest.raises(ValueError, match="has reached the output of the parallel adapter 'down'"):
        jp.lift(lambda p, x: x @ p["down"])({"down": tree["down"]}, toy.normal(3, 5, 12))


def test_prompts_are_rows_beyond_the_table_and_get_no_logits(sites):
    n = 4
    frozen, adapter = jp.split(
        jp.prompt_tuning(n, sites.embedding & sites.match("embed"))(KEY, toy.params())
    )
    adapter = toy.perturbed({k: v.astype(F8) for k, v in adapter.items()})
    virtual = jp.prompts.virtual_token_ids(sites["embed"], n)
    ids = jnp.concatenate([jnp.broadcast_to(virtual, (toy.B, n)), toy.ids()], axis=1)
    p = toy.params()
    longer = p | {"embed": jnp.concatenate([p["embed"], adapter["embed/rows"]])}
    by_hand = toy.by_hand(longer, ids)[..., : toy.V]
    out = lifted(frozen, adapter, ids)
    assert out.shape[-1] == toy.V
    np.testing.assert_allclose(out, by_hand, rtol=1e-10)
    # Prompts of several tasks in one batch: only the rows that a row's ids name are trained.
    mixed = ids.at[0, :n].set(virtual[0]).at[1:, :n].set(virtual[1])
    grad = jax.grad(lambda a: lifted(frozen, a, mixed)[0].sum())(adapter)["embed/rows"]
    assert (jnp.abs(grad).max(1) > 0).tolist() == [True, False, False, False]


def test_an_id_without_a_prompt_is_nan_and_named(sites):
    tree = jp.combine(*jp.split(jp.prompt_tuning(2, sites.match("embed"))(KEY, toy.params())))
    ids = toy.ids().at[0, 0].set(toy.V + 2)
    assert jnp.isnan(jp.lift(toy.model)(tree, ids)[0]).all()
    jp.prompts.check_token_ids(tree, sites["embed"], ids.at[0, 0].set(toy.V + 1))
    with pytest.raises(ValueError, match=r"id 52 has no row: 'embed' has 50 rows and 2 virtual"):
        jp.prompts.check_token_ids(tree, sites["embed"], ids)


@pytest.mark.parametrize(
    "read",
    [
        lambda p, ids: p["embed"][jnp.clip(ids, 0, toy.V - 1)],
        lambda p, ids: p["embed"][ids % toy.V],
        lambda p, ids: p["embed"][ids] + jnp.take(p["second"], ids, axis=0, mode="clip"),
        lambda p, ids: p["embed"][ids] * (ids < toy.V)[..., None],
        lambda p, ids: p["embed"][ids.astype(jnp.int8) % 50],
    ],
    ids=["clamped", "modulo", "second table", "masked", "modulo of bytes"],
)
def test_a_model_that_does_more_with_ids_is_found_out(read):
    p = {"embed": toy.normal(0, toy.V, 8), "second": toy.normal(1, toy.V, 8)}

    def fn(p, ids):
        return jnp.tanh(read(p, ids).cumsum(1))

    sites = jp.sites(fn, p, toy.ids())
    with pytest.raises(ValueError, match="does more with ids than look them up in 'embed'"):
        jp.prompts.check_prompt(fn, p, sites["embed"], toy.ids())


def test_a_model_that_only_looks_ids_up_passes(sites):
    jp.prompts.check_prompt(toy.model, toy.params(), sites["embed"], toy.ids())


def test_a_one_hot_product_has_no_virtual_tokens():
    p = {"embed": toy.normal(0, toy.V, 8)}
    sites = jp.sites(lambda p, ids: jax.nn.one_hot(ids, toy.V, dtype=F8) @ p["embed"], p, toy.ids())
    with pytest.raises(ValueError, match="uses 'embed' as linear, one-hot"):
        jp.prompt_tuning(2, sites.match("embed"))(KEY, p)


def test_a_prefix_is_keys_and_values_before_the_input(sites):
    n = 4
    keys, values = sites.match("*/k/kernel"), sites.match("*/v/kernel")
    frozen, adapter = jp.split(jp.prefix_tuning(n, keys, values, dtype=F8)(KEY, toy.params()))
    adapter = toy.perturbed(adapter)
    ids, virtual_positions = jp.prompts.prepend_virtual_tokens(toy.ids(), n)

    def before(k, v, i):
        rows = [adapter[f"layers/{name}/kernel/rows"][i] for name in "kv"]
        rows = [
            jnp.broadcast_to(r.reshape(1, n, toy.H, -1), (toy.B, n, *k.shape[2:])) for r in rows
        ]
        return *(jnp.concatenate([r, x], axis=1) for r, x in zip(rows, (k, v), strict=True)), n

    by_hand = toy.by_hand(toy.params(), toy.ids(), first=n, prefix=before)
    out = jp.prompts.drop_virtual_positions(
        lifted(frozen, adapter, ids, virtual_positions=virtual_positions), n
    )
    close(out, by_hand)
    # Real tokens read nothing that the placeholders are.
    other = lifted(frozen, adapter, ids.at[:, :n].set(7), virtual_positions=virtual_positions)
    np.testing.assert_allclose(jp.prompts.drop_virtual_positions(other, n), out, rtol=1e-12)


def test_a_prefix_refuses_a_model_that_merges_batch_and_time():
    p = {"embed": toy.normal(0, toy.V, 8), "k": toy.normal(1, 8, 8)}

    def flat(p, ids):
        return (p["embed"][ids].reshape(-1, 8) @ p["k"]).reshape(*ids.shape, 8)

    sites = jp.sites(flat, p, toy.ids())
    none = sites.match("k") - sites.match("k")
    frozen, adapter = jp.split(jp.prefix_tuning(2, sites.match("k"), none, dtype=F8)(KEY, p))
    ids, virtual_positions = jp.prompts.prepend_virtual_tokens(toy.ids(), 2)
    with pytest.raises(
        ValueError, match=r"prefix at 'k' was given virtual positions of shape \(3, 8\)"
    ):
        jp.lift(flat)(jp.combine(frozen, adapter, virtual_positions=virtual_positions), ids)
    one = jax.vmap(
        lambda ids, virtual_positions: jp.lift(flat)(
            jp.combine(frozen, adapter, virtual_positions=virtual_positions[None][0]), ids
        )
    )
    out = one(ids, virtual_positions)
    np.testing.assert_allclose(out[:, :2], jnp.broadcast_to(adapter["k/rows"], (3, 2, 8)))


def test_int8_is_within_half_a_step_of_the_weight_and_under_lora(sites):
    p = toy.params()
    tree = jp.quantize("int8", sites.linear)(KEY, p)
    merged = jp.merge(tree)
    for name in ("q", "up", "down"):
        w = np.asarray(p["layers"][name]["kernel"])
        step = np.abs(w).max(axis=1, keepdims=True) / 127
        error = np.abs(np.asarray(merged["layers"][name]["kernel"]) - w)
        assert (error <= step / 2 * (1 + 1e-12)).all() and error.max() > 0
    for method in (
        jp.chain(jp.quantize("int8", sites.linear), jp.lora(2, sites.linear, dtype=F8)),
        jp.chain(jp.lora(2, sites.linear, dtype=F8), jp.quantize("int8", sites.linear)),
    ):
        frozen, adapter = jp.split(method(KEY, p))
        adapter = toy.perturbed(adapter)
        tree = jp.combine(frozen, adapter)
        close(lifted(frozen, adapter, toy.ids()), toy.model(jp.merge(tree), toy.ids()))
        assert tree["layers"]["q"]["kernel"].weight.w.values.dtype == jnp.int8


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda s: jp.quantize("int3", s.linear), r"int3.*'fp4', .*'nf4'"),
        (
            lambda s: jp.chain(jp.quantize("int8", s.linear), jp.quantize("int8", s.linear)),
            "is PerChannel already",
        ),
        (lambda s: jp.chain(jp.full_finetuning(s), jp.quantize("int8", s.linear)), "is trained"),
        (
            lambda s: jp.chain(jp.quantize("int8", s.linear), jp.full_finetuning(s)),
            "no floating-point array",
        ),
        (lambda s: jp.bottleneck_adapter(0, s.linear), r"bottleneck_dim=0"),
        (lambda s: jp.bottleneck_adapter(2, s.linear, activation="step"), r"activation='step'"),
        (
            lambda s: jp.parallel_adapter(2, s.linear, s.match("*/q/kernel")),
            "takes the first and the last kernel",
        ),
        (lambda s: jp.prompt_tuning(0, s.embedding), r"length=0"),
        (lambda s: jp.prefix_tuning(0, s.linear, s.linear), r"length=0"),
        (lambda s: jp.prefix_tuning(2, s.embedding, s.linear), "which is not a projection"),
        (
            lambda s: jp.prefix_tuning(
                2, s.match("*/k/kernel"), s.match("*/v/kernel"), rope=[1, 1, 1]
            ),
            r"3 frequencies.*has 16 outputs",
        ),
    ],
)
def test_refusals_name_the_thing(sites, make, message):
    with pytest.raises(ValueError, match=message):
        make(sites)(KEY, toy.params())


def test_a_weight_without_a_dense_equivalent_can_be_neither_merged_nor_materialized(sites):
    tree = jp.combine(
        *jp.split(jp.bottleneck_adapter(2, sites.match("*/o/kernel"))(KEY, toy.params()))
    )
    with pytest.raises(jp.NotMergeableError, match="Bottleneck at 'layers/o/kernel' has no dense"):
        jp.merge(tree)
    with pytest.raises(
        jp.NotMergeableError, match="Bottleneck at 'layers/o/kernel'.*`tanh`.*test_"
    ):
        jp.lift(lambda p: jnp.tanh(p["layers"]["o"]["kernel"]))(tree)
