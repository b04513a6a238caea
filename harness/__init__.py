"""Run folders, the command line, the machine and files, for every folder but kernels/ and modeling/."""
