"""By what exits are measured, compared and chosen, for each kind of target: the one table.

A new kind of target is one more class of `nf_pipeline.core.results.Results`. Entry: `results_kind`.
"""

from nf_pipeline.core.hits import Hits
from nf_pipeline.core.results import Results
from nf_pipeline.core.sample_errors import SampleErrors
from nf_pipeline.samples import TargetKind, TargetSpec

RESULTS: dict[TargetKind, type[Results]] = {"class": Hits, "values": SampleErrors}


def results_kind(target: TargetSpec) -> type[Results]:
    """Returns the class of what exits that predict this make of samples."""
    return RESULTS[target.kind]
