"""The verbs: what runs on a laptop or in CI and drives SageMaker through its Python SDK V3. Never imports torch."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src"

if str(SOURCE) not in sys.path:  # for training.config, the one definition of the hyperparameters
    sys.path.append(str(SOURCE))
os.environ.setdefault("SAGEMAKER_USER_CONFIG_OVERRIDE", str(ROOT / "configs" / "sagemaker-sdk.yaml"))
os.environ.setdefault("SAGEMAKER_VALIDATE_ROLE", "false")  # the SDK would simulate policies, which few are allowed to
