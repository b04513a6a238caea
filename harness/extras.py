"""The command that installs an extra of this package, for errors about packages that are not installed."""


def install_command(extra: str) -> str:
    """Return the sentence with the command: the package is on no index and is installed from its checkout."""
    return f"In the checkout of ssm-zoo: pip install -e '.[{extra}]'"
