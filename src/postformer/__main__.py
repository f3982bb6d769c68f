"""python -m postformer"""

from postformer.cli.main import main

if __name__ == "__main__":
    main()
