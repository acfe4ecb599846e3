"""Bring public dataset formats into the raw layout of `crane_core.schema`."""

from crane_core.importers.amazon import import_amazon
from crane_core.importers.mapped import import_mapped
from crane_core.importers.mmrec import import_mmrec
from crane_core.importers.movielens import import_movielens
from crane_core.importers.target import Imported

__all__ = ["Imported", "import_amazon", "import_mapped", "import_mmrec", "import_movielens"]
