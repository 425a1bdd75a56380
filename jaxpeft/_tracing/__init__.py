"""What a program does with each parameter, found by walking its jaxpr; start reading at `walk`.

values       what is known of a value, and one use of a parameter
flow         where a value comes from: the caller's data, the last weight, experts
ancestry     the parameters that a value is computed from, where it is not an activation
primitives   what each primitive does with what is known
walk         the walk, and what sums and products of parameters mean
roles        what only the whole of a program tells: heads, statistics, experts
"""

from jaxpeft._tracing.values import Use
from jaxpeft._tracing.walk import trace

__all__ = ["Use", "trace"]
