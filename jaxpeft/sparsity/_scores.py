"""How important the entries of a weight are: {path: numbers of the weight's shape}.

All are the larger, the more an entry is worth keeping or training; `keep` turns them into masks.
w is an entry, g the gradient of the loss, H its second derivatives.

    magnitude   |w|                                          Han et al. 2015
    snip        |w E[g]|                                     Lee et al. 2019
    taylor      E[(w g)^2], over batches                     Molchanov et al. 2019
    fisher      E[g^2], over batches                         Sung et al. 2021, for training
    obd         w^2 diag(H) / 2                              LeCun et al. 1990
    grasp       w (H E[g]), the flow of gradients it keeps   Wang et al. 2020
    obs         w^2 / diag((X^T X)^-1), by row of inputs     Hassibi and Stork 1993
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxpeft._lift import lift
from jaxpeft._method import takes_sites
from jaxpeft._sites import Sites
from jaxpeft._tree import arrays_of
from jaxpeft.calibration._statistics import (
    Moments,
    check_finite_statistics,
    check_moments,
    chosen_arrays,
    mean_gradients,
    taken,
    widened,
)

Rule = Literal["snip", "taylor", "fisher", "obd", "grasp"]


@takes_sites
def magnitude_scores(params: Any, sites: Sites) -> dict[str, jax.Array]:
    """|w|.

    References:
      Han et al., Learning both Weights and Connections for Efficient Neural Networks, 2015.
      https://arxiv.org/abs/1506.02626
    """
    chosen, _ = chosen_arrays(params, sites, "magnitude_scores")
    return {path: jnp.abs(w) for path, w in chosen.items()}


@takes_sites
def saliency_scores(
    rule: Rule,
    loss_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    sites: Sites,
    batches: Iterable[Any],
    *,
    steps: int | None = None,
    key: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Scores from the gradients of a few batches; see the top of this module.

    They are averaged in float32 at least, whatever the weights are.

    Args:
      rule: "snip", "taylor" or "fisher", from one gradient a batch; "obd", from a product of each
        batch's Hessian (forward over reverse); "grasp", from the mean gradient and then such
        products with it, so that the batches taken are held until the end.
      loss_fn: `loss_fn(params, batch)`, a number.
      params: Parameters; the selected ones are plain arrays.
      sites: The weights.
      batches: Any iterable of batches, all of one shape.
      steps: How many are taken; `None` takes all.
      key: For "obd", whose diagonal is estimated with random signs, anew for each batch
        (Hutchinson).

    Raises:
      ValueError: An unknown rule, "obd" without a key; there is no batch, or fewer than `steps`;
        scores are not finite (names the weight and the batch); a selected weight is no plain array.

    References:
      Lee et al., SNIP, 2019. https://arxiv.org/abs/1810.02340
      Molchanov et al., Importance Estimation for Neural Network Pruning, 2019, equation 8.
      https://arxiv.org/abs/1906.10771
      Sung et al., Training Neural Networks with Fixed Sparse Masks, 2021, equation 7.
      https://arxiv.org/abs/2111.09839
      LeCun et al., Optimal Brain Damage, 1990, equation 5.
      Wang et al., Picking Winning Tickets Before Training by Preserving Gradient Flow (GraSP),
      2020, equation 8. https://arxiv.org/abs/2002.07376
    """
    of_gradient: dict[str, Callable[[Any, Any], Any]] = {
        "snip": lambda w, g: g,
        "taylor": lambda w, g: (w * g) ** 2,
        "fisher": lambda w, g: g**2,
    }
    # h = H d along a direction d; random signs d make d * h an estimate of H's diagonal.
    of_product: dict[str, Callable[[Any, Any, Any], Any]] = {
        "obd": lambda w, h, d: w**2 * (d * h) / 2,
        "grasp": lambda w, h, d: w * h,
    }
    if rule not in of_gradient | of_product:
        known = ", ".join(of_gradient | of_product)
        raise ValueError(f"`saliency_scores('{rule}')`: choose one of {known}.")
    if rule == "obd" and key is None:
        raise ValueError("`saliency_scores('obd')` draws random signs: give it a key.")
    chosen, with_chosen = chosen_arrays(params, sites, "saliency_scores")
    arrays, rebuilt = arrays_of(params)
    lifted = lift(loss_fn)

    @jax.jit
    def scored(chosen: Any, arrays: Any, batch: Any, key: Any, direction: Any) -> Any:
        rest = rebuilt(arrays)

        def gradient(chosen: Any) -> Any:
            return jax.grad(lambda chosen: lifted(with_chosen(chosen, rest), batch))(chosen)

        w = widened(chosen)
        if rule in of_gradient:
            g = widened(gradient(chosen))
            return {path: of_gradient[rule](w[path], g[path]) for path in w}
        if rule == "obd":
            keys = jax.random.split(key, len(chosen))
            direction = {
                path: jax.random.rademacher(k, x.shape, x.dtype)
                for k, (path, x) in zip(keys, chosen.items(), strict=True)
            }
        direction = {path: direction[path].astype(x.dtype) for path, x in chosen.items()}
        h = widened(jax.jvp(gradient, (chosen,), (direction,))[1])
        return {path: of_product[rule](w[path], h[path], direction[path]) for path in w}

    found: Iterable[Any] = taken(batches, steps, "saliency_scores")
    direction = None
    if rule == "grasp":
        found = list(found)
        direction = mean_gradients(loss_fn, params, sites, found)
    total, count = None, 0
    start = jax.random.key(0) if key is None else key
    for number, batch in enumerate(found):
        new = scored(chosen, arrays, batch, jax.random.fold_in(start, number), direction)
        check_finite_statistics(new, number, "the scores of", "saliency_scores")
        total = new if total is None else jax.tree.map(jnp.add, total, new)
        count = number + 1
    mean = jax.tree.map(lambda x: x / count, total)
    if rule == "snip":
        return {path: jnp.abs(w * mean[path]) for path, w in chosen.items()}
    return mean


@takes_sites
def obs_scores(
    params: Any, sites: Sites, moments: Mapping[str, Moments], *, damping: float = 0.01
) -> dict[str, jax.Array]:
    """What removing an entry costs its output, were the others of its column then made to help.

    For y = x @ w with inputs x, the error of column j grows by w_ij^2 / [H^-1]_ii, H = X^T X: the
    optimal brain surgeon, layer by layer. `sparsegpt_update` makes them help.

    Args:
      params: Parameters; the selected ones are plain arrays.
      sites: The weights.
      moments: From `input_moments`, of at least these sites.
      damping: Share of the mean of H's diagonal that is added to it, so that it can be inverted.

    Raises:
      ValueError: A damping that is not positive, or too small for moments to be inverted (names
        the weight); no moments of a site or those of another model, a selected weight is no plain
        array.

    References:
      Hassibi and Stork, Second order derivatives for network pruning: Optimal Brain Surgeon, 1993.
      Frantar and Alistarh, SparseGPT, 2023, section 3.1. https://arxiv.org/abs/2301.00774
    """
    if damping <= 0:
        raise ValueError(f"`obs_scores(damping={damping})`: a positive share is needed.")
    chosen, _ = chosen_arrays(params, sites, "obs_scores")
    scores = {}
    for path, site in sites.items():
        h = check_moments(moments, site, "obs_scores").second
        size = jnp.trace(h, axis1=-2, axis2=-1)[..., None, None] / h.shape[-1]
        inverse = jnp.linalg.inv(h + damping * size * jnp.eye(h.shape[-1], dtype=h.dtype))
        cost = jnp.diagonal(inverse, axis1=-2, axis2=-1)[..., :, None]
        if not jnp.all(cost > 0):
            raise ValueError(
                f"`obs_scores(damping={damping})`: the moments of '{path}' cannot be inverted in "
                f"{h.dtype}. Where its inputs are all zero, leave the weight out; else give a "
                "larger damping."
            )
        scores[path] = site.array(site.matrices(chosen[path]) ** 2 / cost)
    return scores
