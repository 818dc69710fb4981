"""`python -m aft_ray`: the same as `aft-ray`."""

from aft_ray.cli import main

if __name__ == "__main__":
    main()
