from triton.backends.compiler import BaseBackend


def _refuse(*_args, **_kwargs):
    raise AssertionError("the interpreter compiles nothing")


InterpretedBackend = type(
    "InterpretedBackend",
    (BaseBackend,),
    dict.fromkeys(BaseBackend.__abstractmethods__, _refuse)
    | {"supports_target": staticmethod(lambda target: False)},
)
