"""Downloads, locks, atomic writes, error messages and standard streams, shared by several subpackages."""
