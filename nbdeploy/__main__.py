"""`python -m nbdeploy`: the command line, where the command itself is not on PATH."""

from nbdeploy.cli import main

if __name__ == "__main__":
    main(prog_name="nbdeploy")
