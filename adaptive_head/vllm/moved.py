"""Names that vLLM moves between the supported minors.

Everything else imports them from here. It is imported late, because it loads vLLM's API server.
"""

from vllm import __version_tuple__

if __version_tuple__[:2] == (0, 32):
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
else:
    from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.common.startup import cli_env_setup

__all__ = ["cli_env_setup", "make_arg_parser", "validate_parsed_serve_args"]
