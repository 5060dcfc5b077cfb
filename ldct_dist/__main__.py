"""`python -m ldct_dist`: the same as the command `ldct-dist`."""

from ldct_dist.cli import main

main()
