"""What this program is called on a package index, where `sculptor` is another project."""

NAME = "sculptor-subspaces"


def extra(name: str) -> str:
    """The commands that install an extra, the end of a message."""
    return f"pip install '{NAME}[{name}]', or in a checkout pip install -e '.[{name}]'"
