"""`python -m kdlora` is the command line."""

from kdlora.cli import main

main()
