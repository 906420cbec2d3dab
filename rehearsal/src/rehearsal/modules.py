"""All modules that take over operations, in the order in which their hooks look at a request."""

import importlib
import importlib.util

for _name in ("faults", "rules", "iam", "gaps", "ecr", "jobs", "tuning", "transform", "pipelines", "endpoints", "clock"):
    if importlib.util.find_spec(f"rehearsal.{_name}"):
        importlib.import_module(f"rehearsal.{_name}")
