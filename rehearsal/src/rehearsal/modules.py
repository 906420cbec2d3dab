"""All modules that take over operations, in the order in which their hooks look at a request."""

from rehearsal import faults, rules, iam, gaps, ecr  # noqa: F401, I001  hooks
from rehearsal import jobs, tuning, transform, pipelines, packages, hosting, endpoints, clock  # noqa: F401
