"""A stand-in for an AWS account on this machine, in which SageMaker's requests are carried out in containers."""
