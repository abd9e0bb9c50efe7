"""`python -m ep_runtime`, also under torchrun."""

from ep_runtime.cli import main

if __name__ == "__main__":
    main()
