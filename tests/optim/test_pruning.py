"""Pruning during training, against the formulas in NumPy: its zeros, masks and states."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import optim, train
from tests.methods.stack import model, normal, params

L, D, F = 2, 4, 6
KEY = jax.random.key(0)
RATE = 0.03
PARAMS = params(L, D, F, 3)
X, Y = normal(3, 8, D), normal(4, 8, 3)
SITES = jp.sites(model, PARAMS, X).linear
FROZEN, START = jp.split(jp.unfreeze(SITES)(KEY, PARAMS))
TOTAL = sum(x.size for x in START.values())


def loss(adapter):
    return jnp.mean((jp.lift(model)(jp.combine(FROZEN, adapter), X) - Y) ** 2)


gradient = jax.jit(jax.grad(loss))


def trained(tx, steps, start=START):
    """Every adapter, state and gradient of a training, the start included."""
    adapter, state = dict(start), tx.init(start)
    update = jax.jit(tx.update)
    history = [(adapter, state, None)]
    for _ in range(steps):
        g = gradient(adapter)
        updates, state = update(g, state, adapter)
        adapter = optax.apply_updates(adapter, updates)
        history.append((adapter, state, g))
    return history


def matrices(x):
    """(matrices, in, out) of an array of this model."""
    return np.asarray(x).reshape(-1, *x.shape[-2:])


def kept(scores, count, rows=1, columns=1):
    """Masks of the groups with the largest mean scores of all, the best of each matrix first."""
    blocks = {
        path: matrices(x)
        .reshape(-1, x.shape[-2] // rows, rows, x.shape[-1] // columns, columns)
        .mean((2, 4))
        for path, x in scores.items()
    }
    groups = [(path, *at) for path, x in blocks.items() for at in np.ndindex(x.shape)]
    best = {(p, m): max(np.ndindex(x[m].shape), key=lambda at, x=x, m=m: x[m][at])
            for p, x in blocks.items() for m in range(len(x))}  # fmt: skip

    def order(group):
        path, m, *at = group
        return (tuple(at) != best[path, m], -blocks[path][m][tuple(at)])

    masks = {path: np.zeros(matrices(x).shape, bool) for path, x in scores.items()}
    for path, m, i, j in sorted(groups, key=order)[: count // (rows * columns)]:
        masks[path][m, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = True
    return {path: mask.reshape(scores[path].shape) for path, mask in masks.items()}


def cubic(steps, begin, final):
    return optax.polynomial_schedule(1.0, final, 3, steps, begin)


@pytest.mark.parametrize("criterion", ["magnitude", "movement", "taylor"])
@pytest.mark.parametrize("structure, sides", [("entry", (1, 1)), ((2, 1), (2, 1))])
def test_each_criterion_is_its_formula_step_by_step(criterion, structure, sides):
    sites = SITES.match("layers/*")  # the head is trained, and not pruned
    total = sum(START[path].size for path in sites)
    schedule = cubic(6, 1, 0.25)
    tx = optim.scheduled_pruning(
        optax.sgd(RATE), sites, schedule, criterion=criterion, structure=structure, update_every=2
    )
    history = trained(tx, 8)
    theta = {path: np.asarray(START[path]) for path in START}
    mask = {path: np.ones(theta[path].shape, bool) for path in sites}
    scores = {path: np.zeros(theta[path].shape) for path in sites}
    for t, (adapter, state, g) in enumerate(history[1:], 1):
        g = {path: np.asarray(x) for path, x in g.items()}
        for path in sites:
            slope = theta[path] * g[path]
            if criterion == "movement":
                scores[path] = scores[path] - slope
            else:
                scores[path] = 0.9 * scores[path] + 0.1 * slope**2
        theta = {p: w - RATE * g[p] * mask.get(p, 1) for p, w in theta.items()}
        if t % 2 == 0:
            ranked = {p: np.abs(theta[p]) for p in sites} if criterion == "magnitude" else scores
            mask = kept(ranked, int(float(schedule(t)) * total + 1e-6), *sides)
        for path, w in theta.items():
            want = w * mask.get(path, 1)
            np.testing.assert_allclose(adapter[path], want, rtol=1e-9, atol=1e-12)
        for path in sites:
            np.testing.assert_allclose(state.dense[path], theta[path], rtol=1e-9)
    assert sum(int((adapter[path] != 0).sum()) for path in sites) == total // 4


def test_an_entry_that_was_pruned_may_return_with_its_value():
    tx = optim.scheduled_pruning(optax.sgd(RATE), SITES, 0.5, criterion="movement", update_every=1)
    history = trained(tx, 12)
    returned = 0
    for (before, old, _), (after, new, _) in zip(history, history[1:], strict=False):
        for path in SITES:
            back = new.masks[path] & ~old.masks[path]
            returned += int(back.sum())
            np.testing.assert_array_equal(after[path][back], old.dense[path][back])
            assert not before[path][back].any()
    assert returned > 3


@pytest.mark.parametrize("criterion", ["magnitude", "movement"])
def test_a_pruned_entry_is_changed_by_neither_momentum_nor_decay(criterion):
    tx = optim.scheduled_pruning(
        optax.adamw(RATE, weight_decay=0.1), SITES, 0.5, criterion=criterion, update_every=3
    )
    history = trained(tx, 9)
    gone = 0
    for (_, old, _), (_, new, _) in zip(history, history[1:], strict=False):
        for path in SITES:
            out = ~old.masks[path]
            gone += int(out.sum())
            np.testing.assert_array_equal(new.dense[path][out], old.dense[path][out])
    assert gone > 100


def test_zeros_are_zeros_and_the_rest_moves_as_under_the_optimizer_alone():
    """Up to the first decision there is no difference, to the last bit."""
    tx = optim.scheduled_pruning(optax.adam(0.05), SITES, 0.3, update_every=4)
    history = trained(tx, 6)
    alone = trained(optax.adam(0.05), 3)
    for path in START:
        np.testing.assert_array_equal(history[3][0][path], alone[3][0][path])
    for adapter, state, _ in history[4:]:
        for path in SITES:
            np.testing.assert_array_equal(adapter[path] != 0, state.masks[path])
        count = sum(int(x.sum()) for x in state.masks.values())
        assert count == int(0.3 * TOTAL)


def test_every_matrix_keeps_its_best_entry():
    small = {**START, "layers/up": START["layers/up"].at[1].multiply(1e-6)}
    ((_, state, _),) = trained(
        optim.scheduled_pruning(optax.sgd(0.0), SITES, 0.2, update_every=1), 1, small
    )[1:]
    mask = state.masks["layers/up"][1]
    assert sum(int(x.sum()) for x in state.masks.values()) == int(0.2 * TOTAL)
    assert mask.sum() == 1 and mask.ravel()[jnp.argmax(jnp.abs(small["layers/up"][1]))]
    tx = optim.scheduled_pruning(optax.sgd(0.0), SITES, 0.25, update_every=1, scope="matrix")
    ((_, state, _),) = trained(tx, 1, small)[1:]
    assert [int(m.sum()) for m in state.masks["layers/up"]] == [D * F // 4] * 2


def test_blocks_follow_the_layout_of_a_kernel_by_heads():
    def heads(params, x):
        return jnp.einsum("td,dhk->thk", x, params["q"])

    q = normal(0, D, 3, 2) * jnp.array([1.0, 9, 5])[:, None]
    sites = jp.sites(heads, {"q": q}, X).linear
    tx = optim.scheduled_pruning(optax.sgd(0.0), sites, 0.67, structure=(None, 2), update_every=1)
    updates, state = tx.update({"q": jnp.zeros_like(q)}, tx.init({"q": q}), {"q": q})
    assert not (q + updates["q"])[:, 0].any() and state.masks["q"][:, 1:].all()


def test_rewinding_goes_back_to_an_early_step_under_the_new_mask():
    falling = optax.piecewise_constant_schedule(1.0, {4: 0.5, 8: 0.5})
    tx = optim.scheduled_pruning(optax.adam(0.05), SITES, falling, update_every=1, rewind_step=2)
    history = trained(tx, 10)
    early, early_state, _ = history[2]
    fell = []
    for t, ((_, old, _), (adapter, state, _)) in enumerate(
        zip(history, history[1:], strict=False), 1
    ):
        if sum(m.sum() for m in state.masks.values()) == sum(m.sum() for m in old.masks.values()):
            continue
        fell.append(t)
        for path in START:
            want = early[path] * state.masks.get(path, 1)
            np.testing.assert_allclose(adapter[path], want, rtol=1e-12)
        for x, y in zip(
            jax.tree.leaves(state.inner_state),
            jax.tree.leaves(early_state.inner_state),
            strict=True,
        ):
            np.testing.assert_array_equal(x, y)
    assert len(fell) == 2
    dense = history[-1][1].dense["head"]
    assert (jnp.abs(dense - early["head"]) < 0.05 * 3).all()  # two steps of Adam from there


def test_rigl_drops_and_grows_as_the_paper_says():
    masks = jp.sparsity.topk_mask(
        jp.sparsity.magnitude_scores(PARAMS, SITES), SITES, 0.5, scope="matrix"
    )
    tx = optim.rigl(optax.sgd(RATE), SITES, masks, end_step=8, update_every=3, drop_fraction=0.6)
    start = {path: jnp.where(masks[path], x, 0) for path, x in START.items()}
    history = trained(tx, 9, start)
    changed = []
    for t, ((before, old, _), (after, new, g)) in enumerate(
        zip(history, history[1:], strict=False), 1
    ):
        for path in SITES:
            w = matrices(before[path]) - RATE * matrices(g[path]) * matrices(old.masks[path])
            for m, mask in enumerate(matrices(old.masks[path])):
                now = matrices(new.masks[path])[m]
                assert now.sum() == mask.sum()
                if t % 3 or t >= 8:
                    np.testing.assert_array_equal(now, mask)
                    continue
                count = int(0.3 * (1 + np.cos(np.pi * t / 8)) * mask.sum())
                active = np.argwhere(mask)
                order = np.argsort([abs(w[m][tuple(at)]) for at in active], kind="stable")
                stays = mask.copy()
                for at in active[order[:count]]:
                    stays[tuple(at)] = False
                free = np.argwhere(~stays)
                slope = [-abs(matrices(g[path])[m][tuple(at)]) for at in free]
                for at in free[np.argsort(slope, kind="stable")[:count]]:
                    stays[tuple(at)] = True
                np.testing.assert_array_equal(now, stays)
                assert not matrices(after[path])[m][now & ~mask].any()
                changed.append((now != mask).sum())
    assert sum(changed) > 6


def test_entries_outside_of_masks_stay_zero_under_any_optimizer():
    masks = jp.sparsity.topk_mask(jp.sparsity.magnitude_scores(PARAMS, SITES), SITES, 0.4)
    frozen, start = jp.split(jp.chain(jp.prune(masks, SITES), jp.unfreeze(SITES))(KEY, PARAMS))
    del frozen
    history = trained(optim.fixed_mask(optax.adamw(0.05), masks), 4, start)
    for path, mask in masks.items():
        np.testing.assert_array_equal(history[-1][0][path] != 0, mask)
    # Those that stay take Adam's steps as if the others were not there.
    assert float(loss(history[-1][0])) < float(loss(start))


def summed(frozen, adapter, batch, key):
    out = jp.lift(model)(jp.combine(frozen, adapter), batch[0])
    return jnp.sum((out - batch[1]) ** 2), jnp.float64(out.size)


def test_it_runs_in_the_train_step_and_is_compiled_once():
    traces = []

    def loss_fn(*args):
        traces.append(1)
        return summed(*args)

    tx = optim.scheduled_pruning(
        optax.adam(0.02),
        SITES,
        cubic(6, 0, 0.2),
        criterion="movement",
        update_every=2,
        rewind_step=1,
    )
    step = jax.jit(train.train_step(loss_fn, tx, max_grad_norm=1.0), donate_argnums=0)
    state = train.init(jax.tree.map(jnp.copy, START), tx)
    first = None
    for _ in range(8):
        state, metrics = step(state, FROZEN, (X, Y), None)
        first = metrics.loss if first is None else first
    assert len(traces) == 1
    assert sum(int((x != 0).sum()) for x in state.adapter.values()) == int(0.2 * TOTAL)


@pytest.mark.parametrize("criterion, rewind_step", [("magnitude", None), ("movement", 1)])
def test_training_goes_on_from_a_checkpoint_to_the_bit(criterion, rewind_step, tmp_path):
    tx = optim.scheduled_pruning(
        optax.adam(0.02), SITES, 0.4, criterion=criterion, update_every=2, rewind_step=rewind_step
    )
    step = jax.jit(train.train_step(summed, tx))
    half = state = train.init(START, tx)
    for i in range(6):
        half = state if i == 3 else half
        state, _ = step(state, FROZEN, (X, Y), None)
    with train.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(half, {})
        again, _ = checkpoints.restore(train.init(START, tx))
    for _ in range(3):
        again, _ = step(again, FROZEN, (X, Y), None)
    jax.tree.map(np.testing.assert_array_equal, again, state)


ADAM = optax.adam(0.1)
MASKS = {path: jnp.ones(x.shape, bool) for path, x in START.items()}


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: optim.scheduled_pruning(ADAM, SITES, 0.0),
            r"density=0.0\)`: `density` must be in \(0, 1\]",
        ),
        (
            lambda: optim.scheduled_pruning(ADAM, SITES, 0.5, criterion="size"),
            "criterion='size'.*magnitude, movement",
        ),
        (
            lambda: optim.scheduled_pruning(ADAM, SITES, 0.5, scope="row"),
            "scope='row'.*'all' or 'matrix'",
        ),
        (
            lambda: optim.scheduled_pruning(ADAM, SITES, 0.5, update_every=0),
            r"update_every=0\)`: `update_every` must be at least 1",
        ),
        (
            lambda: optim.scheduled_pruning(ADAM, SITES, 0.5, rewind_step=-1),
            r"rewind_step=-1\)`: `rewind_step` must be at least 0",
        ),
        (
            lambda: optim.scheduled_pruning(ADAM, SITES, 0.5, decay=1.0),
            r"decay=1.0\)`: `decay` must be in \[0, 1\)",
        ),
        (
            lambda: optim.rigl(ADAM, SITES, MASKS, end_step=9, drop_fraction=1.0),
            r"drop_fraction=1.0\)`: `drop_fraction` must be in \(0, 1\)",
        ),
        (
            lambda: optim.scheduled_pruning(ADAM, SITES, 0.5, structure=(5, 1)),
            r"blocks of 5 x 1 do not divide '.*', which is 4 x 3|which is 4 x 6|which is 6 x 4",
        ),
        (
            lambda: optim.scheduled_pruning(ADAM, SITES, 0.5).init({"head": START["head"]}),
            r"`scheduled_pruning` prunes 'layers/down' of shape \(2, 6, 4\), .* does not have it",
        ),
        (
            lambda: optim.scheduled_pruning(ADAM, SITES, 0.5).init(
                {**START, "head": jnp.ones((2, 2))}
            ),
            r"'head' of shape \(4, 3\), but the adapter has an array of shape \(2, 2\) there",
        ),
        (
            lambda: optim.scheduled_pruning(ADAM, SITES.match("head").output_slice(0, 3), 0.5),
            "`scheduled_pruning`: a part of the columns of 'head' is selected",
        ),
        (
            lambda: optim.scheduled_pruning(ADAM, SITES - SITES, 0.5),
            "`scheduled_pruning` selects no weight",
        ),
        (
            lambda: ADAM and optim.scheduled_pruning(ADAM, SITES, 0.5).update(START, None),
            "`scheduled_pruning` needs the parameters",
        ),
        (
            lambda: optim.rigl(ADAM, SITES, MASKS, end_step=0),
            "end_step=0, update_every=100",
        ),
        (
            lambda: optim.rigl(ADAM, SITES, {}, end_step=9).init(START),
            "the mask of .* has shape None",
        ),
        (
            lambda: optim.rigl(
                ADAM, SITES, {**MASKS, "layers/up": MASKS["layers/up"].at[1].set(False)}, end_step=9
            ).init(START),
            "mask of 'layers/up' leaves a matrix without entries",
        ),
        (
            lambda: optim.fixed_mask(ADAM, MASKS).init({}),
            "`fixed_mask` prunes '.*' of shape .*, but the adapter does not have it",
        ),
        (
            lambda: optim.fixed_mask(ADAM, MASKS).update(START, None),
            "`fixed_mask` needs the parameters",
        ),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
