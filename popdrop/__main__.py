"""The `popdrop` command, also as `python -m popdrop`."""

from __future__ import annotations


def main() -> None:
    """Run the command line and exit, as docs/reference/exit-codes.rst says."""
    from popdrop.cli.main import popdrop

    popdrop(prog_name="popdrop")


if __name__ == "__main__":
    main()
