"""Native CPU ops: C++ source, build, and choice of variant at run time."""
