"""What Triton's interpreter needs before it runs with a newer numpy."""

import importlib.metadata

from packaging.version import Version


def repair():
    """Triton 3.6.0's interpreter takes a loop's run-time bound from an array of one element, dimension and all.
    numpy >= 2.4 refuses that: "only 0-dimensional arrays can be converted to Python scalars". Triton 3.7 drops the
    dimension first, and so does this. For the process that calls it: another one has to call it again."""
    try:
        version = Version(importlib.metadata.version("triton"))
    except importlib.metadata.PackageNotFoundError:
        return
    if version >= Version("3.7"):
        return
    from triton.runtime import interpreter

    theirs = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        theirs(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch
