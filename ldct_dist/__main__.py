"""The command `ldct-dist`, which is also `python -m ldct_dist`.

Its imports wait for its start: an ingest's workers import the main module of the process that started them.
"""


def main() -> None:
    from ldct_dist import cli

    cli.main()


if __name__ == "__main__":
    main()
