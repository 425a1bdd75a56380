"""Importance scores of the entries of weights: {path: array of the weight's shape}.

The larger a score, the more an entry is worth keeping or training; `topk_mask` turns scores into
masks. For an entry w with the gradient g of the loss and the Hessian H:

    magnitude   |w|                                          Han et al. 2015
    snip        |w E[g]|                                     Lee et al. 2019
    taylor      E[(w g)^2], over batches                     Molchanov et al. 2019
    fisher      E[g^2], over batches                         Sung et al. 2021, for training
    obd         w^2 diag(H) / 2                              LeCun et al. 1990
    grasp       w (H E[g]), the gradient flow it preserves   Wang et al. 2020
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
    first_batches,
    mean_gradients,
    selected_arrays,
    to_float32,
)

Criterion = Literal["snip", "taylor", "fisher", "obd", "grasp"]


@takes_sites
def magnitude_scores(params: Any, sites: Sites) -> dict[str, jax.Array]:
    """The magnitude of each entry, |w|.

    Args:
      params: Parameters; the selected ones must be plain arrays.
      sites: The weights.

    Returns:
      {path: array of the weight's shape}.

    Raises:
      ValueError: A selected weight is not a plain array, or not in the tree.

    Example:
      >>> import jax.numpy as jnp, jaxpeft as jp
      >>> f, params = lambda p, x: x @ p["w"], {"w": jnp.array([[1.0, -4.0]])}
      >>> magnitude_scores(params, jp.sites(f, params, jnp.ones((1, 1))))["w"].tolist()
      [[1.0, 4.0]]

    References:
      Han et al., Learning both Weights and Connections for Efficient Neural Networks, 2015,
      section 3. https://arxiv.org/abs/1506.02626
    """
    selected, _ = selected_arrays(params, sites, "magnitude_scores")
    return {path: jnp.abs(w) for path, w in selected.items()}


@takes_sites
def saliency_scores(
    criterion: Criterion,
    loss_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    sites: Sites,
    batches: Iterable[Any],
    *,
    steps: int | None = None,
    key: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Scores from the gradients of a loss on a few batches.

    For an entry w with gradient g and Hessian H of the loss, and E the mean over batches:

        "snip"      |w E[g]|
        "taylor"    E[(w g)^2]
        "fisher"    E[g^2]
        "obd"       w^2 E[diag(H)] / 2
        "grasp"     w E[H E[g]]

    The mean is computed in float32 or wider, whatever the dtype of the weights.

    Args:
      criterion: "snip", "taylor" or "fisher" take one gradient per batch; "obd" takes one
        Hessian-vector product per batch; "grasp" takes the mean gradient first and then one
        Hessian-vector product per batch, so it holds all batches until the end.
      loss_fn: `loss_fn(params, batch)`, a scalar.
      params: Parameters; the selected ones must be plain arrays.
      sites: The weights.
      batches: An iterable of batches, all of one shape.
      steps: Number of batches to use. `None` uses all.
      key: For "obd": PRNG key of the random signs that estimate the diagonal (Hutchinson's
        estimator), drawn for each batch.

    Returns:
      {path: array of the weight's shape}.

    Raises:
      ValueError: An unknown criterion, or "obd" without a key; there is no batch, or fewer than
        `steps`; scores are not finite (names the weight and the batch); a selected weight is no
        plain array.

    Example:
      >>> import jax.numpy as jnp, jaxpeft as jp
      >>> loss, params = lambda p, x: jnp.sum(x @ p["w"]), {"w": jnp.array([[2.0], [-1.0]])}
      >>> x = jnp.array([[1.0, 3.0]])
      >>> sites = jp.sites(loss, params, x)
      >>> saliency_scores("snip", loss, params, sites, [x])["w"].tolist()
      [[2.0], [3.0]]

    References:
      Lee et al., SNIP: Single-shot Network Pruning based on Connection Sensitivity, 2019,
      section 4.1. https://arxiv.org/abs/1810.02340
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
    # h = H d for a direction d. With random signs d, the mean of d * h is the diagonal of H.
    of_product: dict[str, Callable[[Any, Any, Any], Any]] = {
        "obd": lambda w, h, d: w**2 * (d * h) / 2,
        "grasp": lambda w, h, d: w * h,
    }
    if criterion not in of_gradient | of_product:
        known = ", ".join(of_gradient | of_product)
        raise ValueError(f"`saliency_scores('{criterion}')`: the criterion must be one of {known}.")
    if criterion == "obd" and key is None:
        raise ValueError(
            "`saliency_scores('obd')` draws random signs and needs `key=jax.random.key(...)`."
        )
    selected, with_selected = selected_arrays(params, sites, "saliency_scores")
    arrays, rebuilt = arrays_of(params)
    lifted = lift(loss_fn)

    @jax.jit
    def scores(selected: Any, arrays: Any, batch: Any, key: Any, direction: Any) -> Any:
        rest = rebuilt(arrays)

        def gradient(selected: Any) -> Any:
            return jax.grad(lambda selected: lifted(with_selected(selected, rest), batch))(selected)

        w = to_float32(selected)
        if criterion in of_gradient:
            g = to_float32(gradient(selected))
            return {path: of_gradient[criterion](w[path], g[path]) for path in w}
        if criterion == "obd":
            keys = jax.random.split(key, len(selected))
            direction = {
                path: jax.random.rademacher(k, x.shape, x.dtype)
                for k, (path, x) in zip(keys, selected.items(), strict=True)
            }
        direction = {path: direction[path].astype(x.dtype) for path, x in selected.items()}
        h = to_float32(jax.jvp(gradient, (selected,), (direction,))[1])
        return {path: of_product[criterion](w[path], h[path], direction[path]) for path in w}

    chosen: Iterable[Any] = first_batches(batches, steps, "saliency_scores")
    direction = None
    if criterion == "grasp":
        chosen = list(chosen)
        direction = mean_gradients(loss_fn, params, sites, chosen)
    total, count = None, 0
    start = jax.random.key(0) if key is None else key
    for number, batch in enumerate(chosen):
        new = scores(selected, arrays, batch, jax.random.fold_in(start, number), direction)
        check_finite_statistics(new, number, "the scores of", "saliency_scores")
        total = new if total is None else jax.tree.map(jnp.add, total, new)
        count = number + 1
    mean = jax.tree.map(lambda x: x / count, total)
    if criterion == "snip":
        return {path: jnp.abs(w * mean[path]) for path, w in selected.items()}
    return mean


@takes_sites
def obs_scores(
    params: Any, sites: Sites, moments: Mapping[str, Moments], *, damping: float = 0.01
) -> dict[str, jax.Array]:
    """The error from pruning an entry if the rest of its column is updated optimally (OBS).

    For y = x @ w with inputs x and H = X^T X, pruning entry w_ij and updating the other entries of
    column j increases the squared error of output j by w_ij^2 / [H^-1]_ii: the optimal brain
    surgeon, layer by layer. `sparsegpt_update` makes these updates.

    Args:
      params: Parameters; the selected ones must be plain arrays.
      sites: The weights.
      moments: From `calibration.input_moments`, of at least these sites.
      damping: Fraction of the mean of H's diagonal that is added to it, so that it can be
        inverted.

    Returns:
      {path: array of the weight's shape}.

    Raises:
      ValueError: A damping that is not positive, or too small for moments to be inverted (names
        the weight); moments of a site are missing or of another shape; a selected weight is no
        plain array.

    Example:
      >>> import jax.numpy as jnp, jaxpeft as jp
      >>> f, params = lambda p, x: x @ p["w"], {"w": jnp.array([[1.0], [2.0]])}
      >>> x = jnp.array([[3.0, 0.0], [0.0, 1.0]])  # H = diag(9, 1): w^2 H_ii
      >>> sites = jp.sites(f, params, x)
      >>> moments = jp.calibration.input_moments(f, params, sites, [x])
      >>> jnp.round(obs_scores(params, sites, moments)["w"], 0).tolist()
      [[9.0], [4.0]]

    References:
      Hassibi and Stork, Second order derivatives for network pruning: Optimal Brain Surgeon, 1993.
      Frantar and Alistarh, SparseGPT, 2023, section 3.1. https://arxiv.org/abs/2301.00774
    """
    if damping <= 0:
        raise ValueError(
            f"`obs_scores(damping={damping})`: `damping` must be positive, such as 0.01."
        )
    selected, _ = selected_arrays(params, sites, "obs_scores")
    scores = {}
    for path, site in sites.items():
        h = check_moments(moments, site, "obs_scores").second
        size = jnp.trace(h, axis1=-2, axis2=-1)[..., None, None] / h.shape[-1]
        inverse = jnp.linalg.inv(h + damping * size * jnp.eye(h.shape[-1], dtype=h.dtype))
        cost = jnp.diagonal(inverse, axis1=-2, axis2=-1)[..., :, None]
        if not jnp.all(cost > 0):
            raise ValueError(
                f"`obs_scores(damping={damping})`: the moments of '{path}' cannot be inverted in "
                f"{h.dtype}. Leave the weight out if its inputs are all zero; otherwise give a "
                "larger damping."
            )
        scores[path] = site.array(site.matrices(selected[path]) ** 2 / cost)
    return scores
