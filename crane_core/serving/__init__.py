"""The model as it leaves the pipeline.

Every registered model names this package as its loader, so `_load_pyfunc` must stay importable from here.
"""

from crane_core.serving.model_folder import _load_pyfunc

__all__ = ["_load_pyfunc"]
