"""Downloads, atomic writes, locks, error lines and standard streams: what several subpackages need."""
