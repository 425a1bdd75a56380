import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpeft.train import cross_entropy, next_token


def example(dtype=jnp.float64):
    random = np.random.default_rng(0)
    logits = jnp.asarray(3 * random.normal(size=(2, 5, 7)), dtype)
    targets = jnp.asarray(random.integers(7, size=(2, 5)))
    weights = jnp.asarray(random.uniform(size=(2, 5)), jnp.float32).at[0, 2].set(0)
    return logits, targets, weights


def test_is_minus_the_log_of_the_targets_probability():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]))
    total, count = cross_entropy(logits, jnp.array([1, 2]), jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(total, -np.log(0.25) - 3 * np.log(0.7), rtol=1e-12)
    assert count == 4


def test_equals_optax_with_gradient():
    logits, targets, weights = example()

    def ours(logits, weights):
        return cross_entropy(logits, targets, weights)[0]

    def theirs(logits, weights):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(losses * weights)

    np.testing.assert_allclose(ours(logits, weights), theirs(logits, weights), rtol=1e-12)
    for got, want in zip(
        jax.grad(ours, (0, 1))(logits, weights),
        jax.grad(theirs, (0, 1))(logits, weights),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-6 if got.dtype == jnp.float32 else 1e-12)


def test_without_weights_every_token_has_weight_one():
    logits, targets, _ = example()
    total, count = cross_entropy(logits, targets)
    assert count == 10
    np.testing.assert_allclose(total, cross_entropy(logits, targets, jnp.ones((2, 5)))[0])


def test_bfloat16_logits_are_summed_in_float32_and_get_a_bfloat16_gradient():
    logits, targets, weights = example(jnp.bfloat16)
    total, count = cross_entropy(logits, targets, weights)
    assert total.dtype == count.dtype == jnp.float32
    exact = cross_entropy(logits.astype(jnp.float64), targets, weights)[0]
    np.testing.assert_allclose(total, exact, rtol=1e-6)
    assert jax.grad(lambda x: cross_entropy(x, targets)[0])(logits).dtype == jnp.bfloat16


def test_an_ignored_target_may_be_outside_the_vocabulary():
    logits, targets, weights = example()
    gradient = jax.grad(lambda t: cross_entropy(logits * t, targets, weights)[0])
    ignored = targets.at[0, 2].set(-100)
    got = cross_entropy(logits, ignored, weights)
    assert got == cross_entropy(logits, targets, weights)
    assert jnp.isfinite(gradient(1.0))


def test_large_logits_do_not_overflow():
    logits = jnp.array([[1e4, 0.0]], jnp.float32)
    assert cross_entropy(logits, jnp.array([1]))[0] == 1e4
    assert cross_entropy(logits, jnp.array([0]))[0] == 0


def test_the_backward_pass_keeps_the_logits_in_their_dtype_and_no_float32_copy():
    """In bf16, what the backward pass keeps is the logits, and small arrays."""
    tokens, width, vocabulary = 64, 8, 8192
    x = jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16)
    head = jax.ShapeDtypeStruct((width, vocabulary), jnp.bfloat16)
    targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)

    def residual_bytes(loss):
        def saved(x, head, targets):
            return jax.vjp(lambda x: loss(x @ head, targets), x)[1]

        out = jax.eval_shape(saved, x, head, targets)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(out))

    logits = tokens * vocabulary * 2
    small = tokens * 100 + width * vocabulary * 2
    ours = residual_bytes(lambda logits, t: cross_entropy(logits, t)[0])
    assert ours <= logits + small

    def plain(logits, t):
        wide = logits.astype(jnp.float32)
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(wide, t))

    assert residual_bytes(plain) > logits + small  # so the bound says something


def test_shapes_that_do_not_match_are_named():
    logits, targets, weights = example()
    with pytest.raises(ValueError, match=r"logits \(2, 5, 7\) and targets \(2, 4\)"):
        cross_entropy(logits, targets[:, :4])
    with pytest.raises(ValueError, match=r"of the targets \(2, 5\), got \(2, 4\)"):
        cross_entropy(logits, targets, weights[:, :4])


def test_each_position_predicts_the_next_token_of_its_own_segment():
    tokens = jnp.array([[1, 2, 3, 4, 5, 0, 0]])
    weights = jnp.array([[0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]])
    segments = jnp.array([[1, 1, 1, 2, 2, 0, 0]])
    targets, got = next_token(tokens, weights, segments)
    assert targets.tolist() == [[2, 3, 4, 5, 0, 0, 0]]
    assert got.tolist() == [[0.5, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]]
    assert next_token(tokens)[1].tolist() == [[1.0] * 6 + [0.0]]
