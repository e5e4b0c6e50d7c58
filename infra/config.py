"""`Config`: the base of every typed configuration in kinetok.

Frozen, strict about unknown keys, free of NaN. Counts are `StrictInt` (refuses `true` and `'17'`); floats stay lax because
YAML reads `1e-4` as text. Docstrings under fields become their help. Loading job files is in `job.py`.
"""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Frozen pydantic model: equality and hash by value, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=())
