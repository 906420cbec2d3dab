#!/bin/sh
# Install packages while an image is built: install.sh "<torch's build, by uv's names; or nothing>" <packages>
# Whatever fails with uv is tried again with pip, which takes torch's build from PyPI, as it does without a build.
set -e
build=$1
shift
[ $# != 0 ] || exit 0  # of a stage that is not wanted
if [ -f /opt/build/ca.crt ]; then export PIP_CERT=/opt/build/ca.crt SSL_CERT_FILE=/opt/build/ca.crt; fi
pip="python3 -m pip --no-cache-dir"
# What uv.lock says, but for torch and what only one build of it needs; so without what these packages depend on.
if [ -f /opt/build/locked.txt ]; then $pip install --no-deps --require-hashes --requirement /opt/build/locked.txt; fi
if python3 -c 'import torch; print("torch", torch.__version__, "of the base image is kept")' 2>/dev/null; then
    for word; do  # what goes with this torch is its image's, too
        shift
        case $word in torch | torchvision | torch[!a-z]* | torchvision[!a-z]*) ;; *) set -- "$@" "$word" ;; esac
    done
    build=
fi
if [ -n "$build" ]; then
    if $pip install uv && uv pip install --system --break-system-packages --no-cache --torch-backend "$build" "$@"; then
        $pip uninstall --yes uv
        exit 0
    fi
    $pip uninstall --yes uv
    echo "torch's build $build cannot be had here, so it is PyPI's"
fi
[ $# = 0 ] || $pip install "$@"
