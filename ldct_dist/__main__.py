"""The command `ldct-dist`, which is also `python -m ldct_dist`.

Its imports wait for its start: an ingest's workers import the main module of the process that started them.
"""

import sys


def main() -> None:
    """`cli.main`; Ctrl-C while that is still being imported, for a minute on a slow disk, is one line and 130, too."""
    try:
        from ldct_dist import cli

        cli.main()
    except KeyboardInterrupt:
        print("interrupted; run the same command again", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
