#!/bin/sh
# Puts the server into an image that has vLLM. The Dockerfile's stages run it as root, from a
# folder that holds the wheel, with HOME, ADAPTIVE_HEAD_CACHE and BAKE_MODEL set.
set -eu

# All that is temporary goes here, and away with it.
TMPDIR=$(dirname "$0")
export TMPDIR
chmod 1777 "$TMPDIR"

# Group 0, as OpenShift runs any user in it.
useradd --uid 10001 --gid 0 --home-dir "$HOME" --no-create-home adaptive
install --directory --owner=10001 --group=0 --mode=2770 "$HOME"
# Python looks for modules where it is started.
cd "$HOME"

# What the base brought stays as it is: the constraints name it all.
python3 -m pip list --format=freeze >"$TMPDIR/base.txt"
python3 -m pip install --no-cache-dir --constraint="$TMPDIR/base.txt" "$TMPDIR"/*.whl

if [ -n "${BAKE_MODEL:-}" ]; then
    python3 -m adaptive_head.embedded_model
    chmod -R a+rX "$ADAPTIVE_HEAD_CACHE"
fi

# Fails where the base keeps its Python from every user but root. It is env that looks for it, as
# setpriv loses root's rights only when it starts a program.
setpriv --reuid=10001 --regid=0 --clear-groups env python3 -c "
import vllm
from adaptive_head.vllm.compat import check_version

check_version(vllm.__version_tuple__)"

rm -r "$TMPDIR"
