"""`python -m batchgen`, for srun and torchrun."""

from batchgen.commands import main

if __name__ == "__main__":
    main(prog_name="batchgen")
