"""Importers of public dataset formats into the raw layout of `crane_core.schema`."""

from crane_core.raw.importers.amazon import import_amazon
from crane_core.raw.importers.check import check_mapping
from crane_core.raw.importers.mapped import import_mapped
from crane_core.raw.importers.mmrec import import_mmrec
from crane_core.raw.importers.movielens import import_movielens
from crane_core.raw.importers.target import Imported

__all__ = ["Imported", "check_mapping", "import_amazon", "import_mapped", "import_mmrec", "import_movielens"]
