#!/bin/sh
# Starts Prometheus in the compose stack. Its configuration cannot read the environment, so the
# server's API key goes to the file that prometheus.yml names; empty where the server has none.
set -eu
umask 077
printf %s "${VLLM_API_KEY:-}" >/tmp/vllm-api-key
exec prometheus "$@"
