"""Types of the flows' parameters: Prefect makes a form of them, and refuses a run whose values do not fit.

Descriptions and defaults stand with each flow, where Prefect reads them: in its docstring and its signature.
"""

from typing import Annotated

from pydantic import Field

from pipeline.analysis import ANALYSES

Texts = tuple[str, ...]
Count = Annotated[int, Field(gt=0)]
Seeds = Annotated[int, Field(ge=2)]
AnalysisNames = tuple[Annotated[str, Field(json_schema_extra={"enum": list(ANALYSES)})], ...]
"""In the form a choice of what the registry has; a misspelt one is refused there, or else by the chain."""
