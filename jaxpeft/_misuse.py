"""What a tree holds in the place of an array says what was forgotten when it is used as one."""

from typing import Any

import jax

#: What is done, by the name of the method that Python, JAX or NumPy then calls.
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
    """Stands in a tree at the place of an array, and is none.

    Every operation of an array on it raises a TypeError, and every attribute of an array that it
    has not an AttributeError, with what `misuse` says.
    """

    __array_ufunc__ = None  # NumPy leaves operators to those below

    def misuse(self, what: str) -> str:
        """What was forgotten, given what was done: "`@`", "`.T`" or "an operation of JAX"."""
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
