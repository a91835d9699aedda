"""Triton's interpreter without what it does over and over: it looks through all names of the
language before each call of a function, and makes a table of types for each type it looks up.

And without what it leaves: behind a launch the language is as it was, so that kernels compile."""

import inspect
from functools import cache
from types import SimpleNamespace


def quicken() -> None:
    """For this process.  What the interpreter computes stays the same."""
    from triton import language
    from triton.runtime import interpreter

    @cache
    def builtins_of(package):  # asked for the first time before any of them is replaced
        return [name for name, value in inspect.getmembers(package) if is_builtin(value)]

    def members(package):
        return [(name, getattr(package, name)) for name in builtins_of(package)]

    def type_of(kind):
        kind = kind.element_ty if isinstance(kind, language.block_type) else kind
        return pointer if isinstance(kind, language.pointer_type) else scalar(kind)

    def patch(function):
        """What a function that a kernel calls replaces in the language ends with the launch."""
        scope = patch_language(function)
        if launches and launches[0]._changes:
            launches[0]._changes += scope._changes
        else:
            launches[:] = [scope]
        return scope

    patch_language, launches = interpreter._patch_lang, []
    is_builtin, plain = language.core.is_builtin, interpreter._get_np_dtype
    scalar, pointer = cache(plain), plain(language.pointer_type(language.int8))
    interpreter.inspect = SimpleNamespace(**{**vars(inspect), "getmembers": members})
    interpreter._get_np_dtype = type_of
    if hasattr(interpreter, "_LangPatchScope"):  # not before Triton 3.6
        interpreter._patch_lang = patch
