"""`python -m sculptor`: what launchers of several processes start."""

from importlib import import_module

if __name__ == "__main__":
    import_module("sculptor_cli.main").run()
