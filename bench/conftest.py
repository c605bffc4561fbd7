"""Options of ``pytest bench/``."""


def pytest_addoption(parser):
    group = parser.getgroup("fastft benchmarks")
    group.addoption("--bench-shape", action="append", help="named shape or model (bench/shapes.py), repeatable")
    group.addoption("--bench-dtype", action="append", help="dtype of the cases, repeatable")
    group.addoption("--bench-rounds", type=int, default=10, help="timed calls of each implementation (10)")
