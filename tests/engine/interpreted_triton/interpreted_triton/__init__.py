"""A Triton backend that compiles nothing: under TRITON_INTERPRET=1 kernels run as Python.

vLLM's V2 model runner needs Triton, and Triton needs a backend to believe in. Test code only.
"""
