"""Load tests: users that behave like applications, and a mock engine to load the front end with.

`python -m loadtests` runs them; `locustfile.py` is what locust's own command loads.
"""
