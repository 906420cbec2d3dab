"""Validate every answer before a file exists. A refused answer: one sentence, exit code 1, nothing left behind."""

from __future__ import annotations

import json
import keyword
import re
import sys

ANSWERS = json.loads(r"""{{ cookiecutter | tojson }}""")
REGIONS = (
    "af-south-1 ap-east-1 ap-northeast-1 ap-northeast-2 ap-northeast-3 ap-south-1 ap-south-2 ap-southeast-1 "
    "ap-southeast-2 ap-southeast-3 ap-southeast-4 ap-southeast-5 ap-southeast-7 ca-central-1 ca-west-1 cn-north-1 "
    "cn-northwest-1 eu-central-1 eu-central-2 eu-north-1 eu-south-1 eu-south-2 eu-west-1 eu-west-2 eu-west-3 "
    "il-central-1 me-central-1 me-south-1 mx-central-1 sa-east-1 us-east-1 us-east-2 us-gov-east-1 us-gov-west-1 "
    "us-west-1 us-west-2"
).split()
# The project's folders, and all that its environment installs: `uv lock` fails for a project with a dependency's name.
TAKEN = (
    "absl absl_py aiobotocore aiohappyeyeballs aiohttp aioitertools aiosignal alembic annotated_doc annotated_types "
    "anyio artifacts ast_serialize attr attrs aws_xray_sdk bcrypt benchmarks blinker boto3 botocore bounds build "
    "cachebox cachetools certifi cffi cfgv cfn_lint cfnlint charset_normalizer click cloudpickle colorlog configs "
    "contourpy cookiecutter cryptography cuda cuda_bindings cuda_pathfinder cuda_toolkit cycler data databricks "
    "databricks_sdk dateutil deepdiff detect_secrets distlib docker docs dotenv fastapi fb303 filelock flask "
    "flask_cors fonttools frozenlist fsspec functorch git gitdb gitpython google google_auth graphene graphql "
    "graphql_core graphql_relay greenlet gunicorn h11 hf_xet hive_metastore huey huggingface_hub identify idna "
    "imaging importlib_metadata inference infrastructure iniconfig invoke isympy itsdangerous jinja2 jmespath joblib "
    "joserfc json5 jsonpatch jsonpointer jsonschema jsonschema_path jsonschema_specifications kiwisolver "
    "lazy_object_proxy librt mako markdown_it markdown_it_py markupsafe matplotlib mdurl mlflow mlflow_skinny "
    "mlflow_tracing mmh3 mock model moto mpl_toolkits mpmath multidict mypy mypy_extensions mypyc nacl narwhals "
    "nest_asyncio networkx nodeenv notebooks numpy nvidia nvidia_cublas nvidia_cuda_cccl nvidia_cuda_cupti "
    "nvidia_cuda_nvrtc nvidia_cuda_runtime nvidia_cudnn_cu13 nvidia_cufft nvidia_cufile nvidia_cusolver "
    "nvidia_cusparse nvidia_cusparselt_cu13 nvidia_nccl_cu13 nvidia_nvjitlink nvidia_nvshmem_cu13 nvidia_nvtx "
    "omegaconf openapi_schema_validator openapi_spec_validator opentelemetry opentelemetry_api opentelemetry_proto "
    "opentelemetry_sdk opentelemetry_semantic_conventions optuna orderly_set packaging pandas paramiko pathable "
    "pathspec payload pil pillow pipelines platformdirs pluggy pre_commit pre_commit_hooks prettytable processing "
    "progress propcache protobuf psutil py py_partiql_parser pyarrow pyasn1 pyasn1_modules pycparser pydantic "
    "pydantic_core pydantic_settings pygments pyiceberg pylab pynacl pyparsing pyroaring pytest python_dateutil "
    "python_discovery python_dotenv pytz pyyaml referencing regex requests responses rfc3339_validator rich rpds "
    "rpds_py ruamel ruamel_yaml ruff s3fs s3transfer safetensors sagemaker sagemaker_core sagemaker_mlflow "
    "sagemaker_mlops sagemaker_schema_inference_artifacts sagemaker_serve sagemaker_train schema scikit_learn scipy "
    "scores setuptools six sklearn skops smdebug_rulesconfig smmap spelling sqlalchemy sqlparse src starlette "
    "strictyaml sympy tblib tenacity tensorboard tensorboard_data_server tests threadpoolctl timm torch torchgen "
    "torchvision tqdm training triton types_pyyaml types_tqdm typing_extensions typing_inspection urllib3 uv uvicorn "
    "virtualenv wcwidth werkzeug wrapt xmltodict yaml yarl zipp zstandard"
).split()
SCOPES = ("local", "cloud", "full")
TEXTS = {"project_name": 60, "description": 200, "author": 100}


def problem() -> str | None:
    """Return what is wrong with the first bad answer, or None."""
    for name, longest in TEXTS.items():
        text = ANSWERS[name]
        if not text.strip() or len(text) > longest or not text.isprintable():
            return f"{name} is {text!r}; it must be one printable line of 1 to {longest} characters"
    slug = ANSWERS["project_slug"]
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", slug) or len(slug) > 30:
        return (
            f"project_slug is {slug!r}; it must be 1 to 30 lower-case letters, digits and single underscores, "
            "with a letter first and no underscore last"
        )
    if keyword.iskeyword(slug) or slug in sys.stdlib_module_names or slug in TAKEN:
        return f"project_slug is {slug!r}, a name that Python or a dependency uses; choose another one"
    if ANSWERS["aws_region"] not in REGIONS:
        return f"aws_region is {ANSWERS['aws_region']!r}; it must be one of {', '.join(REGIONS)}"
    if ANSWERS["scope"] not in SCOPES:  # cookiecutter refuses it before, but in a file for --replay it does not look
        return f"scope is {ANSWERS['scope']!r}; it must be one of {', '.join(SCOPES)}"
    return None


if __name__ == "__main__":
    found = problem()
    if found:
        sys.exit(f"error: {found}")
