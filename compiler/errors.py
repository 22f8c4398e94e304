"""Every error that jisu raises on purpose: each says what was wrong and what to do."""

from __future__ import annotations


class JisuError(Exception):
    """Base of all errors that jisu raises on purpose."""


class UnsupportedError(JisuError, NotImplementedError):
    """The model uses something that jisu does not compile; the message lists *all* such places with source lines."""


class InputError(JisuError, ValueError):
    """An argument of a program's call does not fit its declared name, dtype, shape or range."""


class InputTypeError(InputError, TypeError):
    """An argument is not the kind of thing that was expected (not a module, not a tensor, another dtype)."""


class IndexOutOfRangeError(InputError, IndexError):
    """An index (a token id, a position) lies outside the table that it looks up."""


class RecipeError(JisuError, ValueError):
    """A recipe has an unknown key or a value outside its range; the message names the nearest known key."""


class TargetError(JisuError, ValueError):
    """The target is unknown, or this machine or build can't serve it."""


class ArtifactError(JisuError, ValueError):
    """A saved program is damaged, foreign, or made for another format version or another processor."""


class VerifyError(JisuError, ValueError):
    """The graph breaks a rule of the IR; the message names node, op and reason."""


class CompileError(JisuError, RuntimeError):
    """TVM failed or crashed on a kernel; the message names the kernel and the folder with the saved IR."""


class TensorMemoryError(JisuError, MemoryError):
    """A tensor of the program doesn't fit into memory; the message names it and its size."""
