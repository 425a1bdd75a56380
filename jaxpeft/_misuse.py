"""Nodes that stand in the place of an array say what was forgotten when they are used as one."""

from typing import Any

import jax

#: How messages call an operation, by the special method that Python, JAX or NumPy calls for it.
_BINARY = {
    "add": "`+`",
    "sub": "`-`",
    "mul": "`*`",
    "matmul": "`@`",
    "truediv": "`/`",
    "floordiv": "`//`",
    "mod": "`%`",
    "pow": "`**`",
    "and": "`&`",
    "or": "`|`",
    "xor": "`^`",
}
_OTHER = {
    "neg": "`-`",
    "pos": "`+`",
    "abs": "`abs`",
    "invert": "`~`",
    "lt": "`<`",
    "le": "`<=`",
    "gt": "`>`",
    "ge": "`>=`",
    "getitem": "`[...]`",
    "iter": "iteration",
    "float": "`float`",
    "int": "`int`",
    "complex": "`complex`",
    "jax_array": "an operation of JAX",
    "array": "an operation of NumPy",
}


class NotAnArray:
    """A node of a tree that stands in the place of an array and is not one.

    Operations of arrays raise a TypeError, and attributes of arrays that it lacks an
    AttributeError, each with the message of `misuse`.
    """

    __array_ufunc__ = None  # NumPy leaves operators to those below

    def misuse(self, what: str) -> str:
        """The message: what was forgotten, and what to write.

        Args:
          what: What was done: "`@`", "`.T`" or "an operation of JAX".
        """
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(jax.Array, name):
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        raise AttributeError(self.misuse(f"`.{name}`"))


def _refusing(what: str) -> Any:
    def refuse(self: NotAnArray, *args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        raise TypeError(self.misuse(what))

    return refuse


for _name, _what in {**_BINARY, **{f"r{k}": v for k, v in _BINARY.items()}, **_OTHER}.items():
    setattr(NotAnArray, f"__{_name}__", _refusing(_what))
