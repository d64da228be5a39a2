"""`python -m ipvrm` and `accelerate launch -m ipvrm` are the console command `ipvrm`."""

from ipvrm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
