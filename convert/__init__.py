"""Maps between checkpoint layouts: numpy in, numpy out, no framework.

The folder is `convert/`, the package `vit_convert`: one that is installed as `convert` would be
everybody's. `vit_convert.convert(source, target)` is what the command `vit convert` calls.
"""

if __name__ == "vit_convert":
    from vit_convert.convert import convert
    from vit_convert.report import Report, Verification

    __all__ = ["Report", "Verification", "convert"]
else:  # `import convert` in a clone, where the folder itself is found
    import importlib
    import importlib.abc
    import importlib.util
    import sys
    import warnings

    class _OldName(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        """Finds `convert.x` as the module `vit_convert.x` itself, so that each is loaded once."""

        def find_spec(self, name, path=None, target=None):
            if name.startswith("convert."):
                return importlib.util.spec_from_loader(name, self)
            return None

        def create_module(self, spec):
            return importlib.import_module(f"vit_{spec.name}")

        def exec_module(self, module):
            pass

    warnings.warn(
        "the package `convert` is called `vit_convert`; `import convert` works in a clone alone, "
        "and will go.",
        DeprecationWarning,
        stacklevel=2,
    )
    sys.meta_path.insert(0, _OldName())
    sys.modules[__name__] = importlib.import_module("vit_convert")
