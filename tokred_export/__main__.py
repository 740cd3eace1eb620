"""python -m tokred_export"""

from tokred_export.cli import main

if __name__ == "__main__":
    main()
