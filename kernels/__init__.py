"""The kernels, installed as `kunbr_fast.kernels`. Never `import kernels`: that is Hugging Face's."""

if __name__ == "kernels":
    # This checkout is on sys.path (`python -m ...` run in it does that) and someone means Hugging Face's
    # package: transformers, most likely, whose import would fail on ours. Hand over to theirs, if installed.
    import importlib.util
    import sys
    from importlib.machinery import PathFinder
    from pathlib import Path

    _checkout = Path(__file__).resolve().parent.parent
    _spec = PathFinder.find_spec(__name__, [p for p in sys.path if Path(p).resolve() != _checkout])
    if _spec is not None and _spec.loader is not None:
        sys.modules[__name__] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[__name__])
